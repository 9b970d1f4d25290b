"""Stopping rules: the last step, a target loss."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


def rule_reached(trainer: pl.Trainer) -> bool:
    """Whether a stopping rule ended the run, so that it is finished before its last step.

    Stopping rules are EarlyStopping and callbacks whose attribute `reached` is true. Everything else that
    stops Lightning early interrupts the run.
    """
    return any(
        callback.stopping_reason != EarlyStoppingReason.NOT_STOPPED
        if isinstance(callback, EarlyStopping)
        else getattr(callback, "reached", False)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


class Stop(Callback):
    """Ends a run with a validation, at its last step or when the training loss reaches a target.

    Args:
        target_loss: Mean training loss of an optimizer step, in nats, at or below which to stop.

    Attributes:
        reached: Whether the target was reached.
    """

    def __init__(self, target_loss: float | None = None):
        self.target_loss = target_loss
        self.reached = self._at_last_step = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if not pl_module.step_ended:
            return
        step = trainer.global_step
        if self.target_loss is not None and (loss := pl_module.mean_train_loss()) <= self.target_loss:
            log.info("training loss %.4f reached the target %g at step %d", loss, self.target_loss, step)
            trainer.should_stop = self.reached = True
        elif step >= trainer.max_steps and not trainer.should_stop:
            trainer.should_stop = self._at_last_step = True  # makes Lightning validate before it ends

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_last_step:  # the last step is no reason to stop if the run is extended later
            trainer.should_stop = self._at_last_step = False
