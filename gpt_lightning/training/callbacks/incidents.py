"""Detects gradients that are not finite and loss spikes, and reports them with the batch."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from gpt_lightning.data.files import write_json
from gpt_lightning.data.windows import TrainBatches
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.strategies import local

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10  # then the run stops, since it no longer learns
MAX_SPIKE_REPORTS = 20  # in a run
FIRST_SPIKE_STEP = 20  # the mean of fewer losses says too little
DECAY = 0.98  # of the running mean of the loss: about the last 50 steps


class NonFiniteError(ValueError):
    """The gradient of a step is infinite or NaN; the weights are those before the step."""


class Incidents(Callback):
    """Checks every optimizer step before it is taken, and writes incident-<step>.json if something is wrong.

    The check synchronizes with the device once per step. Each rank reports on its own part of the batch,
    all but the first in incident-<step>-rank<n>.json.

    Args:
        folder: Where reports are written.
        nonfinite: "stop" the run before a step whose gradient is not finite, or "skip" the step.
        spike: Report a loss of more than this multiple of the running mean; None never does.

    Attributes:
        skipped: Number of skipped steps.
        spikes: Number of loss spikes.

    Raises:
        ValueError: If `spike` is out of range.
    """

    def __init__(
        self, folder: str | Path, *, nonfinite: Literal["stop", "skip"] = "stop", spike: float | None = 2.0
    ):
        if spike is not None and not 1 < spike < math.inf:
            raise ValueError(
                f"callbacks.incidents.spike={spike} is a multiple, so it must exceed 1; null reports none"
            )
        self.folder, self.nonfinite, self.spike = Path(folder), nonfinite, spike
        self.skipped, self.spikes = 0, 0
        self._in_a_row, self._steps, self._mean, self._high = 0, 0, 0.0, False
        self._losses: list[Tensor] = []  # of this step's micro-batches

    def state_dict(self) -> dict[str, Any]:
        keys = ("skipped", "spikes", "_in_a_row", "_steps", "_mean", "_high")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        pl_module.before_step = lambda: self._check_step(trainer, pl_module)
        for path in self.folder.glob("incident-*.json"):
            step = path.stem.split("-")[1]
            if trainer.is_global_zero and step.isdecimal() and int(step) > trainer.global_step:
                path.unlink()  # of steps that a resumed run repeats

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def _check_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        loss, norm = torch.stack([module.train_loss, module.grad_norm]).tolist()  # synchronizes
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            norm = 0.0  # the gradient scaler of 16-bit training skips steps that overflow itself
        self._steps += 1
        if math.isfinite(norm) and math.isfinite(loss):
            self._in_a_row = 0
            self._check_spike(trainer, module, loss)
        else:
            self._stop_or_skip(trainer, module, f"loss {loss:g}, gradient norm {norm:g}")
        self._losses.clear()

    def _stop_or_skip(self, trainer: pl.Trainer, module: LanguageModel, values: str) -> None:
        path = self._report(trainer, module, kind="nonfinite", action=self.nonfinite)
        self._in_a_row += 1
        step = trainer.global_step + 1
        what = f"step {step}: the gradient is not finite ({values})"
        if self.nonfinite == "stop":
            raise NonFiniteError(
                f"{what}; see {path}; lower optimizer.lr in a new run, or leave the step out with "
                f"resume={self.folder} callbacks.nonfinite=skip"
            )
        if self._in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"{what}, as in the {self._in_a_row - 1} steps before; see {path} and lower optimizer.lr"
            )
        self.skipped += 1
        log.warning("%s; it is skipped, see %s", what, path)
        for parameter in module.parameters():
            parameter.grad = None  # optimizers then leave the parameter as it is
        log_metrics(trainer, {"train/skipped_steps": float(self.skipped)}, step)

    def _check_spike(self, trainer: pl.Trainer, module: LanguageModel, loss: float) -> None:
        high = self.spike is not None and self._steps > FIRST_SPIKE_STEP and loss > self.spike * self._mean
        self.spikes += high and not self._high
        if high and not self._high and self.spikes <= MAX_SPIKE_REPORTS:
            path = self._report(trainer, module, kind="spike", action=None, mean_loss=self._mean)
            what = f"the loss of {loss:.4f} is {loss / self._mean:.1f} times the mean before"
            log.warning("step %d: %s; see %s", trainer.global_step + 1, what, path)
        self._high = high
        decay = DECAY if self._steps > 1 else 0.0
        self._mean = decay * self._mean + (1 - decay) * loss

    def _report(self, trainer: pl.Trainer, module: LanguageModel, **facts: Any) -> Path:
        step, rank = trainer.global_step + 1, trainer.global_rank
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = len(self._losses) / (scaler.get_scale() if scaler else 1.0)
        path = self.folder / (f"incident-{step}-rank{rank}.json" if rank else f"incident-{step}.json")
        report = {
            "step": step,
            **facts,
            "loss": _number(module.train_loss),
            "gradient_norm": _number(module.grad_norm),
            "learning_rate": module.lr,
            "micro_batch_losses": [_number(loss * scale) for loss in self._losses],
            "gradient_norms": gradient_norms(module.net),
            "batch": self._batch(trainer, module, len(self._losses)),
        }
        write_json(path, report)
        return path

    def _batch(self, trainer: pl.Trainer, module: LanguageModel, accumulation: int) -> list[dict[str, Any]]:
        """The windows of the step: position in the token file, and text."""
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(dataset, TrainBatches):  # a user's own data module
            return []
        first = trainer.global_step * accumulation
        return [
            {
                "micro_batch": part,
                "first_token": int(start),
                "text": module.tokenizer.decode(
                    dataset.tokens[start : start + dataset.block_size + 1].tolist()
                ),
            }
            for part in range(accumulation)
            for start in dataset.starts(first + part)
        ]


def gradient_norms(net: torch.nn.Module) -> dict[str, float | str]:
    """Gradient norm by name of the layer; for a sharded layer, that of this rank's shard."""
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            layer = name.rpartition(".")[0]
            squares[layer] = squares[layer] + local(parameter.grad).float().square().sum().cpu()
    return {layer: _number(square.sqrt()) for layer, square in squares.items()}


def _number(value: Tensor) -> float | str:
    """A number for JSON; as text if it is not finite, which JSON cannot express."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
