"""Runs a training from its first step to its summary, and records how it ended."""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.files import write_json
from gpt_lightning.data.windows import split_batch
from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.rundir.curves import plot_curves
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import PRUNED, RunSummary, Status, pruned_by, read_summary
from gpt_lightning.training.callbacks.charts import Charts
from gpt_lightning.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from gpt_lightning.training.callbacks.incidents import Incidents
from gpt_lightning.training.callbacks.interruption import Interrupted, Interruption
from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.callbacks.progress import format_duration, rounded
from gpt_lightning.training.callbacks.ranks import Ranks
from gpt_lightning.training.callbacks.samples import Samples
from gpt_lightning.training.callbacks.stop import rule_reached
from gpt_lightning.training.intervals import save_interval
from gpt_lightning.training.loggers import log_hyperparameters, silent_tensorboard_thread
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


@silent_tensorboard_thread()
def fit(
    module: LanguageModel,
    data: TextDataModule,
    trainer: pl.Trainer,
    *,
    folder: Path,
    facts: RunSummary,
    hyperparameters: Sequence[str] = (),
    val_every_steps: int | None = None,
    checkpoint: Path | None = None,
    deadline: float | None = None,
) -> RunSummary:
    """Train, and write summary.json, curves.png and checkpoints.

    Args:
        module, data, trainer: The parts of the run.
        folder: The run directory.
        facts: What identifies the run, copied to the summary: name, seed, device, versions, digests.
        hyperparameters: Overrides that become columns of TensorBoard's HParams page.
        val_every_steps: Optimizer steps between validations; None follows the length of the run.
        checkpoint: A last.ckpt to resume from.
        deadline: When everything must be written, in the seconds of time.monotonic(); None for never.

    Raises:
        Interrupted: After a signal or at the deadline, when everything is written.
    """
    _, accumulation = split_batch(data.batch_size, data.micro_batch_size, trainer.world_size)
    trainer.accumulate_grad_batches = accumulation
    # Lightning counts micro-batches here
    trainer.val_check_interval = (val_every_steps or save_interval(trainer.max_steps)) * accumulation
    earlier = read_summary(folder) if checkpoint else RunSummary()
    started = time.monotonic()

    def record(status: Status, results: RunSummary | None = None) -> RunSummary:
        seconds = round(earlier.get("seconds", 0.0) + time.monotonic() - started, 1)
        results = results or {**_results(module, data, trainer), "seconds": seconds}
        summary: RunSummary = {**results, **facts, "status": status}
        if trainer.is_global_zero:
            write_json(folder / "summary.json", summary)
        return summary

    _remove_leftovers(folder, trainer)
    record("interrupted", earlier)  # which stays if the process is killed
    last = next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]
    interruption, ranks = Interruption(deadline), Ranks(f"go on with resume={folder}")
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.append(ranks)
    callbacks.insert(0, Charts(data.store.floor_bits_per_byte("val")))
    if last is not None:
        last.after_save, last.interruption = lambda: record("interrupted"), interruption
        interruption.listen(trainer)
    status: Status = "failed"
    kept = keep_freed_memory(trainer.strategy.root_device.type, large=isinstance(module.net, CausalLM))
    try:
        with ranks, kept:
            status = _train(module, data, trainer, checkpoint)
    except Interrupted:
        status = "pruned" if pruned_by(folder) else "interrupted"
        raise
    finally:
        try:
            if trainer.is_global_zero:
                _draw(folder, data, trainer, f"{facts.get('name', 'run')}, {folder.name}")
                if status == "finished":
                    log_hyperparameters(trainer, _results(module, data, trainer), hyperparameters)
            summary = record(status)  # last, so that a finished run has everything
        except OSError as error:
            if status == "finished":
                raise
            log.debug("cannot write: %s", error)  # the user needs the error that ended the run
        finally:
            interruption.stop_listening()
    return summary


def _train(
    module: LanguageModel, data: TextDataModule, trainer: pl.Trainer, checkpoint: Path | None
) -> Status:
    """Train until Lightning stops; only the last step and stopping rules finish a run."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:  # into which Lightning turns Ctrl-C, if nothing else handles it
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise Interrupted(128 + signal.SIGINT) from None
    finished = trainer.global_step >= trainer.max_steps or rule_reached(trainer)
    return "finished" if finished else "interrupted"


def _remove_leftovers(folder: Path, trainer: pl.Trainer) -> None:
    """Remove what an earlier attempt left: files that were being written, and the request to end."""
    for name in ("*.tmp", "checkpoints/*.tmp", PRUNED) if trainer.is_global_zero else ():
        for path in folder.glob(name):
            path.unlink()


def _results(module: LanguageModel, data: TextDataModule, trainer: pl.Trainer) -> RunSummary:
    """Results of a run so far."""
    best = next((c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)), None)  # type: ignore[attr-defined]
    incidents = next((c for c in trainer.callbacks if isinstance(c, Incidents)), None)  # type: ignore[attr-defined]
    metrics = StepMetrics.of(trainer)
    speed = metrics.steps * data.tokens_per_step / metrics.seconds if metrics and metrics.seconds else None
    return {
        "parameters": module.n_parameters,
        "steps": trainer.global_step,
        "tokens": trainer.global_step * data.tokens_per_step,
        # other ranks may be gone, so it is the mean that was last logged or saved
        "train_loss": module.mean_loss if trainer.world_size > 1 else float(module.train_loss),
        "val_loss": module.metrics.get("val/loss"),
        "best_val_loss": module.best_val_loss if math.isfinite(module.best_val_loss) else None,
        "perplexity": module.metrics.get("val/perplexity"),
        "bits_per_byte": module.metrics.get("val/bits_per_byte"),
        "floor_bits_per_byte": data.store.floor_bits_per_byte("val"),
        "tokens_per_second": speed,
        "skipped_steps": incidents.skipped if incidents else 0,
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),  # Lightning changes it if several processes train
        "best_checkpoint": (best.best_model_path or None) if best else None,
    }


def _draw(folder: Path, data: TextDataModule, trainer: pl.Trainer, title: str) -> None:
    """Draw curves.png; no error in it fails the run."""
    best = next((c for c in trainer.callbacks if isinstance(c, BestCheckpoint)), None)  # type: ignore[attr-defined]
    meta, floor = data.store.meta.splits["val"], None
    if meta.floor_bits is not None:
        floor = meta.floor_bits * math.log(2) / meta.tokens
    try:
        rows = read_metrics(folder / "metrics.csv")
        marked = best.best_step if best else None
        plot_curves(rows, folder / "curves.png", floor=floor, title=title, best_step=marked)
    except OSError as error:
        log.warning("curves.png was not drawn: %s", error)
    except Exception as error:
        log.debug("no curves: %s", error)


def closing_lines(summary: RunSummary, trainer: pl.Trainer, folder: Path) -> str:
    """The last lines that a user sees of a run."""
    sample = next((c.latest for c in trainer.callbacks if isinstance(c, Samples)), "")  # type: ignore[attr-defined]
    bits, floor, speed = (summary[k] for k in ("bits_per_byte", "floor_bits_per_byte", "tokens_per_second"))
    rows = {"steps": f"{summary['steps']:,}", "tokens": f"{summary['tokens']:,}"}
    rows["time"] = format_duration(summary["seconds"]) + (f", {speed:,.0f} tokens/s" if speed else "")
    if bits is not None:
        above = f", {bits / floor - 1:.1%} above the corpus entropy of {floor:.4f}" if floor else ""
        rows |= {
            "validation loss": f"{summary['val_loss']:.4f} nats per token",
            "perplexity": rounded(summary["perplexity"]),
            "bits per byte": f"{bits:.4f}{above}",
        }
        if not getattr(trainer.datamodule, "align_documents", False):  # type: ignore[attr-defined]
            rows[""] = "over windows end to end; evaluate gives tokens more context"
    lines = [f"\n{sample}\n"] if sample else []
    lines += [f"{name:<15}  {value}" for name, value in rows.items()]
    if summary["status"] != "finished":
        lines.append(f"stopped before step {trainer.max_steps}; go on with resume={folder}")
    lines.append(f"run: {folder}")
    return "\n".join(lines)


def quiet_lightning() -> None:
    """Hide Lightning's messages except its warnings."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()  # else every line is printed twice
    # Lightning 2.6 calls a function that torch 2.12 deprecates
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
    # the module reduces what it measures itself
    warnings.filterwarnings("ignore", message=r"It is recommended to use .*sync_dist=True")
    # a run of one process, as of a sweep, needs no srun
    warnings.filterwarnings("ignore", message=r"The `srun` command is available")
    # which is expected when a run is resumed
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
