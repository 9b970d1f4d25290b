"""One run from its first step to its summary, however it ends."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.files import read_json, write_json
from gpt_lightning.data.windows import split_batch
from gpt_lightning.rundir.curves import plot_curves
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.training.callbacks.checkpoints import LastCheckpoint
from gpt_lightning.training.callbacks.incidents import Incidents
from gpt_lightning.training.callbacks.interruption import Interrupted, Interruption
from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.callbacks.progress import duration
from gpt_lightning.training.callbacks.samples import Samples
from gpt_lightning.training.intervals import save_interval
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


def fit(
    module: LanguageModel,
    data: TextDataModule,
    trainer: pl.Trainer,
    *,
    folder: Path,
    facts: Mapping[str, Any],
    val_every_steps: int | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Train, and leave summary.json, curves.png and checkpoints behind.

    Args:
        module, data, trainer: What trains on what.
        folder: The run directory.
        facts: What the summary repeats: seed, device, versions, digests.
        val_every_steps: Optimizer steps between validations; None follows the length of the run.
        checkpoint: A last.ckpt to go on from.
        deadline: When everything has to be written, in the seconds of time.monotonic(); None for never.

    Returns:
        The summary.

    Raises:
        Interrupted: After a signal or at the deadline, when everything is written.
    """
    _, accumulation = split_batch(data.batch_size, data.micro_batch_size, trainer.world_size)
    trainer.accumulate_grad_batches = accumulation
    # Lightning counts micro-batches here
    trainer.val_check_interval = (val_every_steps or save_interval(trainer.max_steps)) * accumulation
    path = folder / "summary.json"
    earlier = read_json(path) if checkpoint else {}
    started = time.monotonic()

    def record(status: str, **results: Any) -> dict[str, Any]:
        seconds = round(earlier.get("seconds", 0.0) + time.monotonic() - started, 1)
        reached = _results(module, data, trainer)
        summary = {"status": status, **reached, "seconds": seconds, **results, **facts}
        if trainer.is_global_zero:
            write_json(path, summary)
        return summary

    # a process that is killed cannot say so: until it says otherwise, the run is interrupted
    record("interrupted", **{key: value for key, value in earlier.items() if key != "status"})
    last = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
    if last is not None and threading.current_thread() is threading.main_thread():
        last.interruption = Interruption(deadline)
    if last is not None:
        last.after_save = lambda: record("interrupted")
    status = "failed"
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        status = "finished"
    except Interrupted:
        status = "interrupted"
        raise
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        status = "interrupted"  # Lightning's answer to Ctrl-C before the first step
        raise Interrupted(128 + signal.SIGINT) from None
    finally:
        try:
            summary = record(status)
            if trainer.is_global_zero:
                _draw(folder, data)
                _log_hyperparameters(module, trainer, summary)
        except OSError as error:
            if status == "finished":
                raise
            log.debug("nothing more could be written: %s", error)  # what ended the run is the error to tell
    return summary


def _results(module: LanguageModel, data: TextDataModule, trainer: pl.Trainer) -> dict[str, Any]:
    """What the run has reached, in the units of the summary: nats per token, bits per byte."""
    best = next((c for c in trainer.callbacks if type(c) is ModelCheckpoint), None)  # type: ignore[attr-defined]
    incidents = next((c for c in trainer.callbacks if isinstance(c, Incidents)), None)  # type: ignore[attr-defined]
    metrics = StepMetrics.of(trainer)
    best_loss = module.best_val_loss
    return {
        "parameters": module.n_parameters,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * data.tokens_per_step,
        "train_loss": float(module.train_loss),
        "val_loss": module.metrics.get("val/loss"),
        "best_val_loss": best_loss if math.isfinite(best_loss) else None,
        "perplexity": module.metrics.get("val/perplexity"),
        "bits_per_byte": module.metrics.get("val/bits_per_byte"),
        "floor_bits_per_byte": data.store.floor_bits_per_byte("val"),
        "tokens_per_second": metrics.steps * data.tokens_per_step / metrics.seconds
        if metrics and metrics.seconds
        else None,
        "skipped_steps": incidents.skipped if incidents else 0,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),  # of each process; Lightning changes it when several train
        "best_checkpoint": (best.best_model_path or None) if best else None,
    }


def _draw(folder: Path, data: TextDataModule) -> None:
    """curves.png; a run that logged no loss has none, and no picture is worth failing a run."""
    meta, floor = data.store.meta.splits["val"], None
    if meta.floor_bits is not None:
        floor = meta.floor_bits * math.log(2) / meta.tokens
    try:
        plot_curves(read_metrics(folder / "metrics.csv"), folder / "curves.png", floor=floor)
    except (OSError, ValueError) as error:
        log.debug("no curves: %s", error)


def _log_hyperparameters(module: LanguageModel, trainer: pl.Trainer, summary: Mapping[str, Any]) -> None:
    """TensorBoard's HParams page, with the results that the run really had."""
    keys = ("val_loss", "best_val_loss", "bits_per_byte")
    results = {f"hparams/{key}": summary[key] for key in keys if summary.get(key) is not None}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and results:
            logger.log_hyperparams(dict(module.hparams), results, step=trainer.global_step)
            logger.save()


def describe(summary: Mapping[str, Any], trainer: pl.Trainer, folder: Path) -> str:
    """The last lines that a user sees of a run."""
    sample = next((c.latest for c in trainer.callbacks if isinstance(c, Samples)), "")  # type: ignore[attr-defined]
    lines = [f"\n{sample}\n"] if sample else []
    if summary["val_loss"] is not None:
        floor = summary["floor_bits_per_byte"]
        beside = ""
        if floor:
            beside = f", {summary['bits_per_byte'] / floor - 1:.1%} above the corpus's floor of {floor:.4f}"
        lines.append(
            f"validation loss {summary['val_loss']:.4f} | perplexity {summary['perplexity']:.2f} | "
            f"{summary['bits_per_byte']:.4f} bits per byte{beside}"
        )
    speed = summary["tokens_per_second"]
    lines.append(
        f"{summary['steps']} steps, {summary['tokens']:,} tokens in {duration(summary['seconds'])}"
        + (f" ({speed:,.0f} tokens/s)" if speed else "")
    )
    lines.append(f"run: {folder}")
    return "\n".join(lines)


def end_with_parent() -> None:
    """A rank that Lightning started must not outlive the first one, or it would hold its GPU for ever."""
    if (
        "PL_GLOBAL_SEED" in os.environ
        and int(os.environ.get("LOCAL_RANK", 0)) > 0
        and sys.platform == "linux"
    ):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)


def quiet_lightning() -> None:
    """Leave to Lightning's log what a user needs, its warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()  # else every line comes twice
    # a thread of TensorBoard prints what goes wrong, and then hands it on to us
    others = threading.excepthook
    threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else others(args)
    # Lightning 2.6 uses a function that torch 2.12 deprecates; nothing a user can do about it
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
    # so it is where a run goes on
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
