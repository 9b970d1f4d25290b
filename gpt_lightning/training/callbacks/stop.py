"""Ends a run at its last step or at a target loss."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


class Stop(Callback):
    """Ends a run with a validation, at its last step or when the training loss reaches a target.

    Args:
        target_loss: Mean training loss of an optimizer step, in nats, at or below which to stop.
    """

    def __init__(self, target_loss: float | None = None):
        self.target_loss = target_loss
        self._at_last_step = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if not pl_module.step_ended:
            return
        step = trainer.global_step
        if self.target_loss is not None and (loss := pl_module.mean_train_loss()) <= self.target_loss:
            log.info("training loss %.4f reached the target %g at step %d", loss, self.target_loss, step)
            trainer.should_stop = True
        elif step >= trainer.max_steps and not trainer.should_stop:
            trainer.should_stop = self._at_last_step = True  # makes Lightning validate before it ends

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_last_step:  # the last step is no reason to stop if the run is extended later
            trainer.should_stop = self._at_last_step = False
