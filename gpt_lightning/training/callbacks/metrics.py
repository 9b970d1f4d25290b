"""Training metrics: loss, learning rate, gradient norm, speed, memory."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from gpt_lightning.training.intervals import is_due, log_interval
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import LanguageModel

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def memory_gib(device: torch.device) -> float:
    """Memory in GiB: the peak of a CUDA device, the present use of MPS, else the peak of this process."""
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

    Speeds are means over the steps since the last log, without validation, samples and checkpoints.

    Args:
        every_steps: Optimizer steps between two logs; None follows the length of the run.

    Attributes:
        latest: The metrics that were logged last.
        seconds: Time in training steps of this process, up to the last log.
        steps: Their number.
    """

    def __init__(self, every_steps: int | None = None):
        self.every_steps = every_steps
        self.latest: dict[str, float] = {}
        self.seconds, self.steps = 0.0, 0
        self._seconds, self._steps = 0.0, 0  # since the last log
        self._started = 0.0

    @staticmethod
    def of(trainer: pl.Trainer) -> StepMetrics | None:
        """The instance among a trainer's callbacks."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, StepMetrics)), None)  # type: ignore[attr-defined]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.interval = self.every_steps or log_interval(trainer.max_steps)

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        due = pl_module.step_ended and is_due(step, self.interval)
        loss = pl_module.mean_train_loss() if due else 0.0  # waits for the device
        self._seconds += time.perf_counter() - self._started
        self._steps += pl_module.step_ended
        if not due:
            return
        self.latest = self.measure(trainer, pl_module, loss)
        self.seconds, self.steps = self.seconds + self._seconds, self.steps + self._steps
        self._seconds, self._steps = 0.0, 0
        log_metrics(trainer, self.latest, step)

    def measure(self, trainer: pl.Trainer, pl_module: LanguageModel, loss: float) -> dict[str, float]:
        """Metrics of the step that just ended, whose training loss is given."""
        tokens_per_step = trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]
        return {
            "train/loss": loss,
            "train/grad_norm": float(pl_module.grad_norm),
            "train/lr": pl_module.lr,
            "train/tokens": float(trainer.global_step * tokens_per_step),
            "speed/tokens_per_second": self._steps * tokens_per_step / self._seconds,
            "speed/ms_per_step": 1000 * self._seconds / self._steps,
            "speed/memory_gib": memory_gib(pl_module.device),
        }
