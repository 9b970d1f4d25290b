"""metrics.csv: one row per logged optimizer step, valid after a crash and after resuming."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_lightning.data.files import atomic_write

Row = dict[str, float]


def read_metrics(path: str | Path) -> list[Row]:
    """Read a metrics.csv; a row has `step` and its metrics. An incomplete last line is ignored."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    whole = (line for line in lines if line.endswith("\n"))
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole)]


def _ints(row: Row) -> dict[str, float | int]:
    """Convert whole numbers, such as steps, to int, which is written without a decimal point."""
    return {key: int(value) if value.is_integer() else value for key, value in row.items()}


class MetricsFile:
    """Writes one row per step and one column per metric.

    A row is appended when the next step begins or on `save`. A new metric, which adds a column, and more
    metrics of a step that was saved rewrite the file atomically.

    Args:
        path: The file.
        resume_step: Last step whose rows are kept from an existing file; None keeps none.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        self.path, self._resume_step = Path(path), resume_step
        self._columns: list[str] = []
        self._row: Row = {}
        self._saved_step = -1.0  # of the last row in the file

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._row and self._row["step"] != step:
            self.save()
        self._row |= {"step": float(step)} | {
            key: float(value) for key, value in metrics.items() if key != "step"
        }

    def save(self) -> None:
        """Write the row that is being collected."""
        if not self._columns:
            self._begin()
        if not self._row:
            return
        new = [key for key in self._row if key not in self._columns]
        more = self._row["step"] == self._saved_step
        if new or more:
            rows = read_metrics(self.path) if self.path.exists() else []
            row = (rows.pop() if more else {}) | self._row
            self._columns += new
            self._write([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(_ints(self._row))
        self._saved_step, self._row = self._row["step"], {}

    def _begin(self) -> None:
        keep = self._resume_step if self._resume_step is not None else -1
        rows = read_metrics(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["step"] <= keep]
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        self._saved_step = rows[-1]["step"] if rows else -1.0
        self._write(rows)

    def _write(self, rows: Sequence[Row]) -> None:
        with atomic_write(self.path, text=True) as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(map(_ints, rows))
