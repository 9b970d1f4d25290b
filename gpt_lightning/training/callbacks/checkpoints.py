"""When a run writes checkpoints, and what it restores from them to continue exactly."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from gpt_lightning.rundir.checkpoint import read_checkpoint, write_checkpoint
from gpt_lightning.training.callbacks.interruption import Interruption
from gpt_lightning.training.callbacks.stop import rule_reached
from gpt_lightning.training.intervals import is_due, save_interval
from gpt_lightning.training.module import LanguageModel

LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lets Lightning write and read the package's checkpoint format."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        return dict(read_checkpoint(path, verify=False))  # it was verified when it was chosen


def random_state() -> dict[str, Any]:
    """State of every global random generator of this process, as tensors and numbers only."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = tuple(np.random.get_state(legacy=True))
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())


def give_name(path: Path, name: Path) -> None:
    """Give a file another name beside its own, in the place of another file.

    Where the file system has no hard links, the file moves.
    """
    link = name.with_name(f"{name.name}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, name)
    else:
        os.replace(link, name)
        link.unlink(missing_ok=True)  # rename(2) leaves it if both are one file


def validation_is_due(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch that just ended."""
    if trainer.should_stop:
        return True
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.val_check_batch) and batches % int(trainer.val_check_batch or 1) == 0


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, for which a model that is worse than guessing is never the best.

    Attributes:
        best_step: Optimizer steps before it was saved; None if there is none.
    """

    best_step: int | None = None

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        if current is None or not current.isfinite() or not trainer.lightning_module.plausible:
            return False
        better = super().check_monitor_top_k(trainer, current)
        self.best_step = trainer.global_step if better else self.best_step
        return better

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]  # which Lightning forgets
        self.best_step = state_dict.get("best_step")  # which older runs lack


class LastCheckpoint(Checkpoint):
    """Saves last.ckpt after the first step, at regular steps, at the end and on an interruption.

    The first one shows early that there is room. A checkpoint is written between two optimizer steps. Where
    a validation is due, it is written after the validation, so that it has the results and a resumed run does
    not repeat it.

    Args:
        folder: Where checkpoints go.
        every_steps: Optimizer steps between two; None follows the length of the run.
        keep: How many to keep: last.ckpt, last-1.ckpt (the one before it), and so on.
        snapshot_every_steps: Optimizer steps between checkpoints that stay (step-1000.ckpt); None for none.

    Attributes:
        reached: Whether a stopping rule had ended the run before it was loaded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_steps: int | None = None,
        keep: int = 2,
        snapshot_every_steps: int | None = None,
    ):
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.snapshot_every_steps = snapshot_every_steps
        self.interruption: Interruption | None = None  # a request to stop, if there can be one
        self.after_save: Callable[[], object] = lambda: None
        self._restored: dict[str, Any] | None = None
        self._saved_step = -1
        self._validating = False  # whether a validation is under way
        self.reached = False
        self._stop = False  # at the end of this step
        self._validation_pending = False  # in the loaded checkpoint
        self._resumed: Path | None = None  # that checkpoint, until another one is written
        self._max_steps = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.interval = self.every_steps or save_interval(trainer.max_steps)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.interruption is not None:
            self.interruption.begin(trainer)
        if self._validation_pending:  # it was interrupted, so it is repeated from the beginning
            loop = trainer.fit_loop.epoch_loop
            loop.max_steps = self._max_steps
            loop.val_loop.restarting = False
            trainer.should_stop = self.reached
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
        trainer.should_stop = trainer.should_stop or self.reached

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if not pl_module.step_ended:  # where Lightning would stop and lose a part of the step
            self._stop, trainer.should_stop = self._stop or trainer.should_stop, False
            return
        trainer.should_stop |= self._stop
        if not validation_is_due(trainer):
            self._after_step(trainer)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.world_size == 1 or batch_idx % 10 == 0:  # ranks must synchronize to ask
            self._validating = True
            self._leave_if_asked(trainer)
            self._validating = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._after_step(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_last(trainer)

    def _after_step(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        ends = trainer.should_stop or step >= trainer.max_steps
        if self.snapshot_every_steps and step % self.snapshot_every_steps == 0:
            # before last.ckpt, from which a run that is killed in between would not come here again
            self._save(trainer, f"step-{step}.ckpt")
        if ends or is_due(step, self.interval):
            self.save_last(trainer)
        if not ends:
            self._leave_if_asked(trainer)

    def _leave_if_asked(self, trainer: pl.Trainer) -> None:
        if self.interruption is not None and (code := self.interruption.code(trainer)):
            self.save_last(trainer)
            self.interruption.leave(code, trainer)

    def save_last(self, trainer: pl.Trainer) -> None:
        """Rename the older checkpoints and write last.ckpt; there is a checkpoint at every moment."""
        if trainer.global_step == self._saved_step:
            return
        started = time.monotonic()
        self._save(trainer, LAST)
        self._saved_step = trainer.global_step
        self.after_save()
        if self.interruption is not None:
            self.interruption.saved(time.monotonic() - started)

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # the logs on the disk must not end before the checkpoint
        if name == LAST and trainer.is_global_zero:
            self._rotate()
        trainer.save_checkpoint(self.folder / name)

    def _rotate(self) -> None:
        """Give last.ckpt the additional name last-1.ckpt, and so on."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed.name.startswith("last-"):  # last.ckpt is damaged
            give_name(resumed, self.folder / LAST)
        names = [LAST, *(f"last-{age}.ckpt" for age in range(1, self.keep))]
        for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
            if (self.folder / newer).exists():
                give_name(self.folder / newer, self.folder / older)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = self._restored or random_state()  # a loaded state applies from the first batch on
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_states"] = states
        checkpoint["pending"] = {"stop": rule_reached(trainer), "validation": self._validating}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._relocate(trainer, checkpoint["callbacks"])
        self._resumed = Path(str(trainer.ckpt_path))
        self._count_as_here(trainer, checkpoint)
        states = checkpoint["random_states"]
        # with another number of devices, each rank keeps the state of its seed
        if trainer.world_size == len(states):
            self._restored = states[trainer.global_rank]
        self.reached = checkpoint["pending"]["stop"]
        self._validation_pending = checkpoint["pending"]["validation"]
        if "format_version" not in checkpoint:  # these have a stop at the last step as well
            length = checkpoint["hyper_parameters"].get("trainer", {}).get("max_steps")
            self.reached &= checkpoint["global_step"] != length
        self._saved_step = -1 if self._validation_pending else checkpoint["global_step"]
        self._max_steps = trainer.max_steps
        if self._validation_pending and checkpoint["global_step"] >= self._max_steps:
            trainer.fit_loop.epoch_loop.max_steps += 1  # else Lightning would not even begin

    @staticmethod
    def _count_as_here(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Lightning counts micro-batches, of which another number of processes has others in a step."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        shift = checkpoint["global_step"] * trainer.accumulate_grad_batches - progress["total"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts.update({key: count + shift for key, count in counts.items()})

    @staticmethod
    def _relocate(trainer: pl.Trainer, states: dict[str, Any]) -> None:
        """Change the absolute paths in the state of ModelCheckpoint if the run directory was moved."""
        for callback in trainer.checkpoint_callbacks:
            state = states.get(callback.state_key, {})
            old, new = state.get("dirpath"), str(getattr(callback, "dirpath", None))
            for key, value in state.items() if old else ():
                if isinstance(value, str):
                    state[key] = value.replace(old, new)
                elif isinstance(value, dict):
                    state[key] = {k.replace(old, new): v for k, v in value.items()}

    def on_train_batch_start(self, *_: Any) -> None:
        if self._restored is not None:  # this late because setting up a run may draw random numbers
            set_random_state(self._restored)
            self._restored = None
