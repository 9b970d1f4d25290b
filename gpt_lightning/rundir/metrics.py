"""metrics.csv: one row per logged optimizer step, valid after a crash and after resuming."""

from __future__ import annotations

import codecs
import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt_lightning.data.files import atomic_write

log = logging.getLogger(__name__)
Row = dict[str, float]


def read_metrics(path: str | Path) -> list[Row]:
    """Read a metrics.csv; a row has `step` and its metrics.

    An incomplete last line is ignored; damaged lines are left out with a warning.
    """
    rows, damaged = _parse(Path(path))
    if damaged:
        log.warning("%s: %d damaged line(s) left out", path, len(damaged))
    return rows


def _parse(path: Path) -> tuple[list[Row], list[bytes]]:
    """The rows of a file, and its lines that are none."""
    columns: list[str] = []
    rows: list[Row] = []
    damaged: list[bytes] = []
    for line in path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")[:-1]:
        try:
            values = next(csv.reader([line.decode()]), [])
            if columns:
                row = {key: float(value) for key, value in zip(columns, values, strict=True) if value}
                rows.append({"step": row.pop("step"), **row})
            elif "step" in values:
                columns = values
            else:
                damaged.append(line)
        except (csv.Error, KeyError, ValueError):
            damaged.append(line)
    return rows, damaged


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
            self._write([*self._columns, *new], [*rows, row])
        else:
            self._append(self._row)
        self._saved_step, self._row = self._row["step"], {}

    def _begin(self) -> None:
        keep = self._resume_step if self._resume_step is not None else -1
        rows, damaged = _parse(self.path) if self.path.exists() else ([], [])
        if damaged and keep >= 0:
            aside = self.path.with_name(self.path.name + ".damaged")
            with aside.open("ab") as file:
                file.writelines(line + b"\n" for line in damaged)
            log.warning("%s: %d damaged line(s) moved to %s", self.path, len(damaged), aside.name)
        rows = [row for row in rows if row["step"] <= keep]
        self._write(list(dict.fromkeys(["step", *(key for row in rows for key in row)])), rows)
        self._saved_step = rows[-1]["step"] if rows else -1.0

    def _append(self, row: Row) -> None:
        """Append the whole row or nothing."""
        values = _ints(row)
        rest = (",".join(str(values.get(key, "")) for key in self._columns) + "\r\n").encode()
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                while rest:  # a full disk takes a part, then raises
                    rest = rest[file.write(rest) :]
            except OSError as error:
                file.truncate(size)
                error.filename = str(self.path)
                raise

    def _write(self, columns: list[str], rows: Sequence[Row]) -> None:
        with atomic_write(self.path, text=True) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(map(_ints, rows))
        self._columns = columns  # not before, so that no row is appended below another header
