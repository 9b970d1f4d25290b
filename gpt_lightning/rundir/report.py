"""Compares runs: a ranked table, means over seeds, and a page with pictures."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_lightning.rundir.directory import runs_below
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import RunSummary, read_summary

COLUMNS = ("best_val_loss", "val_loss", "bits_per_byte", "tokens", "seconds", "tokens_per_second")
FORMATS: dict[str, Callable[[float], str]] = {
    "tokens": "{:,.0f}".format,
    "seconds": "{:,.0f}".format,
    "tokens_per_second": "{:,.0f}".format,
}


@dataclass(frozen=True)
class Result:
    """A run in a report: its folder, its summary, its overrides by key, its validation losses by tokens."""

    folder: Path
    summary: RunSummary
    overrides: dict[str, str]
    losses: list[tuple[int, float]]  # tokens seen, nats per token

    def loss_at(self, tokens: int) -> float | None:
        """The last validation loss after at most so many tokens."""
        before = [loss for seen, loss in self.losses if seen <= tokens]
        return before[-1] if before else None


def read_results(places: Sequence[str | Path]) -> list[Result]:
    """The runs in folders, at any depth, those with the lowest validation loss first.

    Raises:
        FileNotFoundError: If a folder has no run.
    """
    results: dict[Path, Result] = {}
    for place in places:
        found = runs_below(place)
        if not found:
            raise FileNotFoundError(f"there is no run in {Path(place).expanduser().resolve()}")
        results |= {folder: _read(folder) for folder in found}

    def rank(result: Result) -> tuple[float, str]:
        loss = result.summary.get("best_val_loss")
        return math.inf if loss is None else loss, str(result.folder)

    return sorted(results.values(), key=rank)


def _read(folder: Path) -> Result:
    summary = read_summary(folder)
    pairs = [text.lstrip("+").partition("=") for text in summary.get("overrides", [])]
    try:
        rows = read_metrics(folder / "metrics.csv")
    except OSError:
        rows = []
    steps, tokens = summary.get("steps") or 0, summary.get("tokens") or 0
    per_step = tokens / steps if steps else 0.0
    losses = [(round(row["step"] * per_step), row["val/loss"]) for row in rows if "val/loss" in row]
    return Result(folder, summary, {key: value for key, _, value in pairs}, losses)


def differing(results: Sequence[Result]) -> list[str]:
    """The keys of overrides that are not the same in all runs."""
    keys = dict.fromkeys(key for result in results for key in result.overrides)
    return [key for key in keys if len({result.overrides.get(key) for result in results}) > 1]


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and, for each run, its texts."""
    keys, common = differing(results), _common_tokens(results)
    at = [f"loss_at_{common}_tokens"] if common else []
    rows = []
    for number, result in enumerate(results, 1):
        values: Mapping[str, Any] = result.summary
        cells = [str(number), result.folder.name, str(values.get("status", "?"))]
        cells += [result.overrides.get(key, "") for key in keys]
        cells += [_text(column, values.get(column)) for column in COLUMNS]
        rows.append(cells + [_text(name, result.loss_at(common)) for name in at])
    return ["rank", "run", "status", *keys, *COLUMNS, *at], rows


def over_seeds(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Finished runs that differ in their seed alone: mean and standard deviation of the best loss."""
    keys = [key for key in differing(results) if key != "seed"]
    groups: dict[tuple[str, ...], list[float]] = {}
    for result in results:
        loss = result.summary.get("best_val_loss")
        if result.summary.get("status") == "finished" and loss is not None:
            group = tuple(result.overrides.get(key, "") for key in keys)
            groups.setdefault(group, []).append(loss)
    rows = [
        [*group, str(len(losses)), _text("", statistics.mean(losses)), _text("", _deviation(losses))]
        for group, losses in sorted(groups.items(), key=lambda pair: statistics.mean(pair[1]))
    ]
    return [*keys, "n", "mean_best_val_loss", "std"], rows


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _common_tokens(results: Sequence[Result]) -> int:
    """The tokens of the shortest run if the runs have different lengths, else 0."""
    lengths = {result.summary.get("tokens") or 0 for result in results} - {0}
    return min(lengths) if len(lengths) > 1 else 0


def _text(column: str, value: float | None) -> str:
    return "-" if value is None else FORMATS.get(column, "{:.4f}".format)(value)


def notes(results: Sequence[Result]) -> list[str]:
    """What must be known before the losses are compared."""
    found = []
    summaries: list[Mapping[str, Any]] = [result.summary for result in results]
    if len({summary.get("tokenizer_digest") for summary in summaries}) > 1:
        found.append("the runs have different tokenizers: compare bits per byte, not losses per token")
    if len({summary.get("corpus_digest") for summary in summaries}) > 1:
        found.append("the runs have different corpora: their losses are not comparable")
    if tokens := _common_tokens(results):
        found.append(f"the runs saw different numbers of tokens: the last column compares them at {tokens:,}")
    if open_runs := [r for r in results if r.summary.get("status") != "finished"]:
        found.append(f"{len(open_runs)} of {len(results)} runs are not finished")
    return found


def as_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_csv(results: Sequence[Result]) -> str:
    """The table of runs, with numbers as they are and not rounded."""
    columns, rows = table(results)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for result, row in zip(results, rows, strict=True):
        values: Mapping[str, Any] = result.summary
        writer.writerow(
            [values.get(c, cell) if c in COLUMNS else cell for c, cell in zip(columns, row, strict=True)]
        )
    return out.getvalue()


def as_markdown(results: Sequence[Result]) -> str:
    """Both tables and the notes."""

    def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]

    parts = [*lines(*table(results)), "", *lines(*over_seeds(results)), ""]
    return "\n".join(parts + [f"- {note}" for note in notes(results)]) + "\n"
