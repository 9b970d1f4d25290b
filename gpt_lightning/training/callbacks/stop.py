"""Ends a run at its last step or at a target loss."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


class Stop(Callback):
    """Ends a run at its last step, or when the training loss reaches a target, with a validation.

    Args:
        target_loss: Mean training loss of an optimizer step, in nats, at or below which to stop.
    """

    def __init__(self, target_loss: float | None = None):
        self.target_loss = target_loss

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates once more before it leaves
        if self.target_loss is None:
            return
        loss, step = pl_module.mean_train_loss(), trainer.global_step
        if loss <= self.target_loss:
            log.info("training loss %.4f reached the target %g at step %d", loss, self.target_loss, step)
            trainer.should_stop = True
