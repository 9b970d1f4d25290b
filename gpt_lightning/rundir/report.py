"""Compares runs: a ranked table, means over seeds, and a page with pictures."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from gpt_lightning.rundir.directory import HYDRA, is_locked, runs_below
from gpt_lightning.rundir.metrics import Row, read_metrics
from gpt_lightning.rundir.summary import LEDGER, RunSummary, read_ledger, read_summary

Table = tuple[list[str], list[list[str]]]  # names of the columns, and the rows
COLUMNS = ("best_val_loss", "val_loss", "bits_per_byte", "tokens", "seconds", "tokens_per_second")
FORMATS: dict[str, Callable[[float], str]] = {
    "tokens": "{:,.0f}".format,
    "seconds": "{:,.0f}".format,
    "tokens_per_second": "{:,.0f}".format,
}


class Validation(NamedTuple):
    """A validation of a run."""

    step: int
    tokens: int
    seconds: float  # in training steps, without validation, samples and checkpoints; 0 if unknown
    loss: float  # nats per token
    bits: float  # per byte; NaN if unknown


@dataclass(frozen=True)
class Result:
    """A run in a report.

    Attributes:
        folder: The run directory, which a job of a sweep may not have yet.
        summary: Its summary.json, with the latest values of metrics.csv while it is not finished.
        overrides: Their values by key; equal values are the same text in all runs of a report.
        validations: In the order of their steps.
        status: finished, pruned, failed, running, interrupted, or, in a sweep, waiting.
        error: Why a job of a sweep failed.
    """

    folder: Path
    summary: RunSummary
    overrides: dict[str, str]
    validations: list[Validation]
    status: str
    error: str | None = None

    @property
    def loss(self) -> float | None:
        """The lowest validation loss."""
        return self.summary.get("best_val_loss")

    @property
    def bits(self) -> float | None:
        """The lowest validation loss in bits per byte."""
        finite = [point.bits for point in self.validations if math.isfinite(point.bits)]
        return min(finite, default=self.summary.get("bits_per_byte"))

    def loss_at(self, tokens: int) -> float | None:
        """The last validation loss after at most so many tokens; None if the run has not seen as many."""
        before = [point.loss for point in self.validations if point.tokens <= tokens]
        return before[-1] if before and self.validations[-1].tokens >= tokens else None


def read_results(places: Sequence[str | Path]) -> list[Result]:
    """The runs in folders, at any depth, those with the lowest validation loss (as in `measure`) first.

    Jobs of a sweep that have not begun, or failed before they trained, are included.

    Raises:
        FileNotFoundError: If a folder has neither a run nor a sweep.
    """
    results: dict[Path, Result] = {}
    for place in places:
        jobs: dict[Path, dict[str, Any]] = {}
        for ledger in Path(place).expanduser().glob(f"**/{LEDGER}"):
            sweep = ledger.parent.resolve()
            runs = [job for job in read_ledger(sweep) if job.get("command", "train") == "train"]
            jobs |= {sweep / str(job.get("name")): job for job in runs}
        found = dict.fromkeys([*runs_below(place), *jobs])
        if not found:
            raise FileNotFoundError(f"there is no run in {Path(place).expanduser().resolve()}")
        results |= {folder: _read(folder, jobs.get(folder, {})) for folder in found}

    best = attrgetter(measure(list(results.values())))

    def rank(result: Result) -> tuple[float, str]:
        return math.inf if best(result) is None else best(result), str(result.folder)

    ranked = sorted(results.values(), key=rank)
    texts: dict[tuple[str, object], str] = {}  # of equal values, that of the best run
    for result in ranked:
        for key, text in result.overrides.items():
            result.overrides[key] = texts.setdefault((key, _value(text)), text)
    return ranked


def _read(folder: Path, job: Mapping[str, Any]) -> Result:
    summary = read_summary(folder)
    texts = summary.get("overrides", job.get("overrides"))
    pairs = [text.lstrip("+").partition("=") for text in (_recorded(folder) if texts is None else texts)]
    try:
        rows = read_metrics(folder / "metrics.csv")
    except OSError:
        rows = []
    validations, status = _validations(rows, summary), _status(folder, summary, job)
    if status != "finished" and validations:  # its summary is as old as its last checkpoint
        last = validations[-1]
        summary |= {"steps": last.step, "tokens": last.tokens, "val_loss": last.loss}
        summary |= {"bits_per_byte": last.bits if math.isfinite(last.bits) else None}
        finite = [point.loss for point in validations if math.isfinite(point.loss)]
        summary |= {"best_val_loss": min(finite, default=None)}
    error = job.get("error") if status == "failed" else None
    return Result(folder, summary, {key: value for key, _, value in pairs}, validations, status, error)


def _recorded(folder: Path) -> list[str]:
    """The overrides of a run as Hydra left them, without those of its start; empty if they are damaged."""
    try:
        texts = yaml.safe_load((folder / HYDRA / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    texts = map(str, texts if isinstance(texts, list) else [])
    return [text for text in texts if not text.lstrip("+").startswith(("resume=", "repeat=", "trust="))]


def _value(text: str) -> object:
    """What is equal for texts that Hydra reads as equal values, such as 1e-3 and 0.001."""
    for read in (int, float, lambda text: repr(yaml.safe_load(text))):  # YAML reads 1e-3 as a text
        with suppress(ValueError, yaml.YAMLError):
            return read(text)
    return text


def _status(folder: Path, summary: RunSummary, job: Mapping[str, Any]) -> str:
    """How a run stands, by its summary, its lock, and the file of its sweep."""
    if (over := summary.get("status")) in ("finished", "pruned"):
        return over
    if is_locked(folder):
        return "running"
    told = str(job.get("status", "?"))
    if told == "running":  # still importing, unless the sweep was killed; SLURM's jobs name no process
        return "interrupted" if job.get("pid") and not is_locked(folder.parent) else "running"
    return told if told == "failed" else str(summary.get("status", told))


def _validations(rows: Sequence[Row], summary: RunSummary) -> list[Validation]:
    """The validations of a metrics.csv; training times are added up from those of the steps."""
    per_step = next((row["train/tokens"] / row["step"] for row in rows if row.get("train/tokens")), 0.0)
    per_step = per_step or (summary.get("tokens") or 0) / (summary.get("steps") or 1)
    found, seconds, timed, per_second = [], 0.0, 0.0, 0.0
    for row in rows:
        step = row["step"]
        if "speed/ms_per_step" in row:  # a mean over the steps since the row before
            per_second = row["speed/ms_per_step"] / 1000
            seconds, timed = seconds + (step - timed) * per_second, step
        if "val/loss" in row:
            elapsed = seconds + (step - timed) * per_second
            bits = row.get("val/bits_per_byte", math.nan)
            found.append(Validation(int(step), round(step * per_step), elapsed, row["val/loss"], bits))
    return found


def measure(results: Sequence[Result]) -> Literal["loss", "bits"]:
    """The attribute by which runs are compared: bits per byte if their tokenizers differ."""
    return "bits" if len(_facts(results, "tokenizer_digest")) > 1 else "loss"


def _facts(results: Sequence[Result], key: Literal["tokenizer_digest", "corpus_digest"]) -> set[str]:
    return {fact for result in results if (fact := result.summary.get(key))}


def differing(results: Sequence[Result]) -> list[str]:
    """The keys of overrides that are not the same in all runs."""
    keys = dict.fromkeys(key for result in results for key in result.overrides)
    return [key for key in keys if len({result.overrides.get(key) for result in results}) > 1]


def table(results: Sequence[Result]) -> Table:
    """Names of the columns and, for each run, its texts."""
    keys = differing(results)
    more: dict[str, Callable[[Result], float | None]] = {}
    if measure(results) == "bits":
        more["best_bits_per_byte"] = attrgetter("bits")
    elif common := _common_tokens(results):
        more[f"loss_at_{common}_tokens"] = lambda result: result.loss_at(common)
    rows = []
    for number, result in enumerate(results, 1):
        values: Mapping[str, Any] = result.summary
        cells = [str(number), result.folder.name, result.status]
        cells += [result.overrides.get(key, "") for key in keys]
        cells += [_text(column, values.get(column)) for column in COLUMNS]
        rows.append(cells + [_text(name, value(result)) for name, value in more.items()])
    return ["rank", "run", "status", *keys, *COLUMNS, *more], rows


def by_seed(results: Sequence[Result]) -> tuple[list[str], dict[tuple[str, ...], list[float]]]:
    """The other keys that differ, and by their values the best losses of the finished runs of all seeds.

    Of several runs with the same values and the same seed, the best one counts. Values with runs of different
    tokenizers are left out.
    """
    keys, best = [key for key in differing(results) if key != "seed"], attrgetter(measure(results))
    groups: dict[tuple[str, ...], dict[tuple[str, str | None], Result]] = {}
    for result in results:  # best first
        if result.status == "finished" and best(result) is not None:
            group = tuple(result.overrides.get(key, "") for key in keys)
            seed = str(result.summary.get("seed", result.overrides.get("seed")))
            run = seed, result.summary.get("tokenizer_digest")
            groups.setdefault(group, {}).setdefault(run, result)
    return keys, {
        group: [best(run) for run in runs.values()]
        for group, runs in groups.items()
        if measure(list(runs.values())) == "loss"
    }


def over_seeds(results: Sequence[Result]) -> Table:
    """A table of the mean and the standard deviation over seeds, lowest mean first."""
    keys, groups = by_seed(results)
    rows = [
        [*group, str(len(losses)), _text("", statistics.mean(losses)), _text("", deviation(losses))]
        for group, losses in sorted(groups.items(), key=lambda pair: statistics.mean(pair[1]))
    ]
    mean = {"loss": "mean_best_val_loss", "bits": "mean_best_bits_per_byte"}[measure(results)]
    return [*keys, "n", mean, "std"], rows


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _common_tokens(results: Sequence[Result]) -> int:
    """The tokens of the shortest finished run if their lengths differ, else 0; of any if none is finished."""
    begun = [result for result in results if result.validations]
    finished = [result for result in begun if result.status == "finished"]
    lengths = {result.validations[-1].tokens for result in finished or begun}
    return min(lengths) if len(lengths) > 1 else 0


def _text(column: str, value: float | None) -> str:
    return "-" if value is None else FORMATS.get(column, "{:.4f}".format)(value)


def notes(results: Sequence[Result]) -> list[str]:
    """What must be known before the losses are compared."""
    found = []
    if measure(results) == "bits":
        found.append("the runs have different tokenizers: bits per byte rank them, not losses per token")
    elif tokens := _common_tokens(results):
        found.append(
            f"the runs saw different numbers of tokens: the last column compares them at {tokens:,}, "
            "the ranking and the means do not"
        )
    if len(_facts(results, "corpus_digest")) > 1:
        found.append("the runs have different corpora: their losses are not comparable")
    counts = Counter(result.status for result in results if result.status != "finished")
    if pruned := counts.pop("pruned", 0):
        found.append(f"{pruned} of {len(results)} runs were pruned by a search")
    if counts:
        listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        found.append(f"{counts.total()} of {len(results)} runs are not finished: {listed}")
    return found + [f"{result.folder.name} failed: {result.error}" for result in results if result.error]


def as_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def overview(results: Sequence[Result]) -> str:
    """For a terminal: the ranked table, the means over seeds, and what must be known to compare."""
    parts = [as_text(*table(results))]
    columns, rows = over_seeds(results)
    if rows and any("seed" in result.overrides for result in results):
        parts.append(as_text(columns, rows))
    if said := notes(results):
        parts.append("\n".join(f"note: {note}" for note in said))
    return "\n\n".join(parts)


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


def as_markdown(results: Sequence[Result], law: Table | None = None) -> str:
    """All tables and the notes."""

    def lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        texts = [[cell.replace("|", r"\|") for cell in row] for row in (columns, *rows)]
        texts.insert(1, ["---"] * len(columns))
        return [f"| {' | '.join(row)} |" for row in texts]

    tables = [table(results), over_seeds(results), *([law] if law else [])]
    parts = [line for one in tables for line in [*lines(*one), ""]]
    return "\n".join(parts + [f"- {note}" for note in notes(results)]) + "\n"
