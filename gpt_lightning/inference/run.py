"""A finished or interrupted run, as `gpt_lightning.train` returns it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt_lightning.inference.loading import load
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import RunSummary, read_summary


@dataclass(frozen=True)
class Run:
    """A run on disk.

    Args:
        folder: The run directory.
    """

    folder: Path

    @property
    def summary(self) -> RunSummary:
        """What summary.json says: status, losses in nats per token, speed, versions, digests."""
        return read_summary(self.folder)

    @property
    def objective(self) -> float | None:
        """What a sweeper minimizes: the best validation loss."""
        return self.summary.get("best_val_loss")

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns of metrics.csv by name, (rows,) float64; NaN where a row lacks the metric."""
        rows = read_metrics(self.folder / "metrics.csv")
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}

    def load(self, **options: Any) -> TextGenerator:
        """The best model of the run; options and errors as `gpt_lightning.load`."""
        return load(self.folder, **options)
