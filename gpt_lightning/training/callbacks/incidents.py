"""Steps that went wrong: gradients that are not finite, losses that jump, and what the step had read."""

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
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)

IN_A_ROW = 10  # skipped steps after which a run stops all the same: it no longer learns
REPORTS = 20  # of loss spikes in a run; a run that spikes all the time needs no more of them
SETTLING = 20  # steps before a loss can be called a spike
MEMORY = 0.98  # weight of the past in the mean loss: about the last 50 steps


class NonFiniteError(ValueError):
    """A step whose gradient is infinite or not a number; the weights are still those before it."""


class Incidents(Callback):
    """Looks at every optimizer step before it is taken, and writes incident-<step>.json for a strange one.

    The look waits for the device once in a step. Each rank reports on its own part of the batch, the
    others in incident-<step>-rank<n>.json.

    Args:
        folder: Where reports go.
        nonfinite: "stop" the run before a step whose gradient is not finite, or "skip" the step.
        spike: Report a loss of more than this many times the mean of the last steps; None never does.

    Attributes:
        skipped: Steps that were not taken.
        spikes: Losses that jumped.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, folder: str | Path, *, nonfinite: Literal["stop", "skip"] = "stop", spike: float | None = 2.0
    ):
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"callbacks.nonfinite={nonfinite!r} must be stop or skip")
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
                path.unlink()  # a resumed run is going to write it again

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def _check_step(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Judge the step whose gradient is complete; a step without gradients changes nothing."""
        losses, self._losses = self._losses, []
        loss, norm = torch.stack([module.train_loss, module.grad_norm]).tolist()  # waits for the device
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            norm = 0.0  # 16-bit training overflows now and then; its scaler skips such steps by itself
        self._steps += 1
        if math.isfinite(norm) and math.isfinite(loss):
            self._in_a_row = 0
            high = bool(self.spike) and self._steps > SETTLING and loss > (self.spike or 0) * self._mean
            if high and not self._high:
                self._spike(trainer, module, losses, loss)
            self._high = high
            past = MEMORY if self._steps > 1 else 0.0
            self._mean = past * self._mean + (1 - past) * loss
            return
        path = self._report(trainer, module, losses, kind="nonfinite", action=self.nonfinite)
        self._in_a_row += 1
        step = trainer.global_step + 1
        what = f"step {step}: the gradient is not finite (loss {loss:g}, gradient norm {norm:g})"
        if self.nonfinite == "stop":
            raise NonFiniteError(
                f"{what}; see {path}; lower optimizer.lr in a new run, or leave the step out with "
                f"resume={self.folder} callbacks.nonfinite=skip"
            )
        if self._in_a_row == IN_A_ROW:
            raise NonFiniteError(
                f"{what}, as in the {IN_A_ROW - 1} steps before; see {path} and lower optimizer.lr"
            )
        self.skipped += 1
        log.warning("%s; it is skipped, see %s", what, path)
        for parameter in module.parameters():
            parameter.grad = None  # which optimizers take for: leave it as it is
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": float(self.skipped)}, step=step)

    def _spike(self, trainer: pl.Trainer, module: LanguageModel, losses: list[Tensor], loss: float) -> None:
        self.spikes += 1
        if self.spikes > REPORTS:
            return
        path = self._report(trainer, module, losses, kind="spike", action=None, mean_loss=self._mean)
        step, times = trainer.global_step + 1, loss / self._mean
        log.warning(
            "step %d: the loss of %.4f is %.1f times the mean before; see %s", step, loss, times, path
        )

    def _report(self, trainer: pl.Trainer, module: LanguageModel, losses: list[Tensor], **facts: Any) -> Path:
        step, rank = trainer.global_step + 1, trainer.global_rank
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = len(losses) / (scaler.get_scale() if scaler else 1.0)
        path = self.folder / (f"incident-{step}-rank{rank}.json" if rank else f"incident-{step}.json")
        report = {
            "step": step,
            **facts,
            "loss": _number(module.train_loss),
            "gradient_norm": _number(module.grad_norm),
            "learning_rate": module.lr,
            "micro_batch_losses": [_number(loss * scale) for loss in losses],
            "gradient_norms": gradient_norms(module.net),
            "batch": self._batch(trainer, module, len(losses)),
        }
        write_json(path, report)
        return path

    def _batch(self, trainer: pl.Trainer, module: LanguageModel, accumulation: int) -> list[dict[str, Any]]:
        """What the step read, window by window: place in the token file, and text."""
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if not isinstance(dataset, TrainBatches):  # data of the user's own
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
    """Gradient norm of each layer, by its name; of a sharded one, this rank's share."""
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            layer = name.rpartition(".")[0]
            squares[layer] = squares[layer] + parameter.grad.detach().float().square().sum().cpu()
    return {layer: _number(square.sqrt()) for layer, square in squares.items()}


def _number(value: Tensor) -> float | str:
    """JSON has no word for what is not finite."""
    number = float(value)
    return number if math.isfinite(number) else str(number)
