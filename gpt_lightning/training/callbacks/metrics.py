"""Measures a run while it trains: loss, speed, memory."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.trainer.states import RunningStage

from gpt_lightning.training.intervals import log_interval
from gpt_lightning.training.module import LanguageModel

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def memory_gib(device: torch.device) -> float:
    """Memory in GiB: the most so far on a CUDA device or of this process, what is taken now on MPS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class StepMetrics(Callback):
    """Measures every optimizer step and logs every `every_steps`-th: loss, rate, norm, speed, memory.

    Speeds are over the steps since the last log, without validation, samples and checkpoints.

    Args:
        every_steps: Optimizer steps between two logs; None follows the length of the run.

    Attributes:
        latest: What was logged last.
        seconds: Time in training steps of this process, as far as it is logged.
        steps: Their number.

    Raises:
        ValueError: If every_steps is below 1.
    """

    def __init__(self, every_steps: int | None = None):
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"trainer.log_every_steps={every_steps} must be at least 1")
        self.every_steps = every_steps
        self.latest: dict[str, float] = {}
        self.seconds, self.steps = 0.0, 0
        self._seconds, self._steps = 0.0, 0  # since the last log
        self._started = 0.0

    @staticmethod
    def of(trainer: pl.Trainer) -> StepMetrics | None:
        """The one among a trainer's callbacks."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, StepMetrics)), None)  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.interval = self.every_steps or log_interval(trainer.max_steps)

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        stepped = not trainer.fit_loop._should_accumulate()
        step = trainer.global_step
        due = stepped and (step % self.interval == 0 or step == 1)
        if due:
            loss, norm = pl_module.mean_train_loss(), float(pl_module.grad_norm)  # waits for the device
        self._seconds += time.perf_counter() - self._started
        self._steps += stepped
        if not due:
            return
        tokens_per_step = trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]
        self.latest = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": pl_module.lr,
            "train/tokens": float(step * tokens_per_step),
            "speed/tokens_per_second": self._steps * tokens_per_step / self._seconds,
            "speed/ms_per_step": 1000 * self._seconds / self._steps,
            "speed/memory_gib": memory_gib(pl_module.device),
        }
        self.seconds, self.steps = self.seconds + self._seconds, self.steps + self._steps
        self._seconds, self._steps = 0.0, 0
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)


class Throughput(ThroughputMonitor):
    """Lightning's throughput monitor for batches of tokens, logged by optimizer step, training only.

    Args:
        window_size: Batches to average over.
    """

    def __init__(self, window_size: int = 20):
        super().__init__(
            batch_size_fn=lambda batch: batch[0].size(0),
            length_fn=lambda batch: batch[0].numel(),
            window_size=window_size,
        )

    def _compute(self, trainer: pl.Trainer, iter_num: int | None = None) -> None:
        stage = trainer.state.stage
        metrics = StepMetrics.of(trainer)
        every = metrics.interval if metrics else trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stage != RunningStage.TRAINING or trainer.global_step % every:
            return
        for logger in trainer.loggers:
            values = self._throughputs[stage].compute()
            logger.log_metrics(
                {f"throughput/{key}": value for key, value in values.items()}, trainer.global_step
            )
