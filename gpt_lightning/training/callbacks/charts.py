"""What TensorBoard shows beside the scalars of every logger: charts with several curves, bounds, samples."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.training.loggers import add_summary, true_reason
from gpt_lightning.training.module import LanguageModel

FLOOR, BEST = "val/floor_bits_per_byte", "val/best_loss"
LAYOUT = {
    "losses": {
        "training and validation loss, nats per token": ["Multiline", ["train/loss$", "val/loss$"]],
        "bits per byte, and the corpus entropy": ["Multiline", ["val/bits_per_byte$", f"{FLOOR}$"]],
    },
    "training": {
        "gradient norm": ["Multiline", ["train/grad_norm$"]],
        "learning rate": ["Multiline", ["train/lr$"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_second$"]],
    },
    "callbacks=diagnostics": {
        "size of an update, relative to the weights": ["Multiline", ["update_ratio/"]],
        "standard deviation of activations": ["Multiline", ["activation_std/"]],
    },
}


class Charts(Callback):
    """Arranges TensorBoard's page Custom Scalars, and adds the bounds of the validation losses.

    It stands before the callbacks that write checkpoints, so that a checkpoint has all of a step.

    Args:
        floor_bits_per_byte: The corpus entropy, None if it is not known.
    """

    def __init__(self, floor_bits_per_byte: float | None):
        self.floor = math.nan if floor_bits_per_byte is None else floor_bits_per_byte

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in tensorboards(trainer) if trainer.global_step == 0 else ():
            logger.experiment.add_custom_scalars(LAYOUT)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        bounds = {BEST: pl_module.best_val_loss, FLOOR: self.floor}
        known = {key: value for key, value in bounds.items() if math.isfinite(value)}
        for logger in tensorboards(trainer):
            with true_reason():
                logger.log_metrics(known, trainer.global_step)


def tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    """TensorBoard's loggers of the first rank."""
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def show_sample(trainer: pl.Trainer, prompt: str, text: str) -> None:
    """Show a text on TensorBoard's page Text, below its prompt, line by line as it is."""
    from tensorboard.plugins.text.summary_v2 import text_pb  # a run without TensorBoard does not wait for it

    asked = f"`{prompt}`" if prompt else "none, a new document"
    lines = text.replace("\n", "  \n")  # Markdown's line break
    for logger in tensorboards(trainer):
        text_of_tag = text_pb("sample", [f"prompt: {asked}\n\n---\n\n{lines}"])
        add_summary(logger, text_of_tag, trainer.global_step)
