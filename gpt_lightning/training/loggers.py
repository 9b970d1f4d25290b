"""Loggers: metrics.csv as one of Lightning's, TensorBoard's HParams page, and errors of its writer."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.rundir.metrics import MetricsFile
from gpt_lightning.rundir.summary import RunSummary


class MetricsCSV(Logger):
    """Writes metrics.csv; arguments as `MetricsFile`."""

    name = version = ""

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        super().__init__()
        self.file = MetricsFile(path, resume_step=resume_step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """They are in .hydra/ and in every checkpoint."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None, "every metric belongs to a step"
        self.file.log(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        """Write the row that is being collected."""
        self.file.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Give the metrics of an optimizer step to every logger.

    Raises:
        OSError: If a file cannot be written.
    """
    for logger in trainer.loggers:
        with true_reason():
            logger.log_metrics(dict(metrics), step=step)


def log_hyperparameters(trainer: pl.Trainer, results: RunSummary, overrides: Sequence[str]) -> None:
    """Fill TensorBoard's HParams page: a column for each override of the run and for each of its losses.

    The losses are those of the charts, so that no chart has a single point.
    """
    from torch.utils.tensorboard.summary import hparams  # a run without TensorBoard does not wait for it

    tags = {"val_loss": "val/loss", "best_val_loss": "val/best_loss", "bits_per_byte": "val/bits_per_byte"}
    metrics = {tags[key]: value for key, value in results.items() if key in tags and value is not None}
    pairs = (text.lstrip("+").partition("=") for text in overrides)
    columns = {key: _number_or_text(value) for key, _, value in pairs}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and metrics:
            for summary in hparams(columns, metrics):
                add_summary(logger, summary, trainer.global_step)
            with true_reason():
                logger.experiment.flush()


def add_summary(logger: TensorBoardLogger, summary: Any, step: int) -> None:
    """Write a summary into TensorBoard's file.

    There is no public way: add_hparams of the writer makes another run, its add_text adds to the tag.
    """
    logger.experiment._get_file_writer().add_summary(summary, step)


def _number_or_text(value: str) -> float | str:
    """Of a number, TensorBoard can sort the column and draw an axis."""
    try:
        return float(value)
    except ValueError:
        return value


@contextmanager
def true_reason() -> Iterator[None]:
    """Raise the OSError for which Lightning's TensorBoardLogger blames the value that is logged."""
    try:
        yield
    except ValueError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


@contextmanager
def silent_tensorboard_thread() -> Iterator[None]:
    """Keep TensorBoard's writer thread from printing an OSError that it raises in the main thread too."""
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        from_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (from_tensorboard and isinstance(args.exc_value, OSError)):
            report(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = report
