"""summary.json: the state and the results of a run. sweep.jsonl: how each job of a sweep stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from gpt_lightning.data.files import read_json

Status = Literal["finished", "interrupted", "failed", "pruned"]  # pruned: by a sweep that searches
LEDGER = "sweep.jsonl"
PRUNED = "pruned.txt"  # says why a search stops the run; written before the run is asked to end


class RunSummary(TypedDict, total=False):
    """Keys of summary.json; losses in nats per token.

    `fit` writes all of them, NaN and infinities as null. A summary that was read may lack some: it is of an
    older release, or damaged.
    """

    status: Status
    parameters: int
    steps: int
    tokens: int
    train_loss: float
    val_loss: float | None
    best_val_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    floor_bits_per_byte: float | None  # the corpus entropy
    tokens_per_second: float | None
    seconds: float  # over all attempts
    skipped_steps: int
    processes: int
    threads: int  # of each process
    best_checkpoint: str | None
    # what identifies the run, given by the caller of `fit`
    name: str
    overrides: list[str]
    seed: int
    device: str
    precision: str  # as Lightning names it
    versions: dict[str, str]
    git_revision: str | None
    slurm_job: str | None
    corpus_digest: str
    tokenizer_digest: str


def read_summary(folder: Path) -> RunSummary:
    """Read summary.json; empty if it is missing or damaged."""
    return cast(RunSummary, read_json(folder / "summary.json"))


def pruned_by(folder: Path) -> str | None:
    """Why a search has asked the run to end; None if it has not."""
    try:
        return (folder / PRUNED).read_text(encoding="utf-8")
    except OSError:
        return None


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of a sweep.jsonl; empty if it is missing or damaged."""
    try:
        lines = (folder / LEDGER).read_text(encoding="utf-8").splitlines()
        return [dict(json.loads(line)) for line in lines]
    except (OSError, TypeError, ValueError):
        return []
