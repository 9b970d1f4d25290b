"""What a user sees of a run: the layers, a progress bar, log lines."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)

LONGEST_SILENCE = 5.0  # seconds between two log lines
BAR = "{n}/{total} {percentage:3.0f}% |{bar}| {remaining} left{postfix}"  # fits into 80 columns


class Layers(Callback):
    """Logs a table of the layers with their parameters before training.

    A total counts shared parameters once; a layer that has those of an earlier one is marked.

    Args:
        max_depth: Depth of nested modules that are shown; 3 shows each block.
    """

    def __init__(self, max_depth: int = 3):
        self.max_depth = max_depth

    def on_fit_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        first_name = {id(p): name for name, p in pl_module.net.named_parameters()}
        rows = [("layer", "type", "parameters", "")]
        for name, layer in pl_module.net.named_modules():
            if len(name.split(".")) > self.max_depth or isinstance(layer, torch.nn.ModuleList):
                continue
            prefix = f"{name}." if name else ""
            owners = {first_name[id(p)].rpartition(".")[0] for p in layer.parameters()}
            others = sorted(owner for owner in owners if not f"{owner}.".startswith(prefix))
            note = f"  (shared with {', '.join(others)})" if others else ""
            count = f"{sum(p.numel() for p in layer.parameters()):,}"
            kind = type(layer).__name__.removeprefix("FSDP")  # which sharding adds
            rows.append((name or "model", kind, count, note))
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for name, kind, count, note in rows:
            columns = name.ljust(widths[0]), kind.ljust(widths[1]), count.rjust(widths[2])
            log.info("%s%s", "  ".join(columns), note)


class Progress(Callback):
    """A progress bar over the whole run in optimizer steps; log lines if standard error cannot show one.

    There is a line for each row of metrics.csv, and more if no row was due for LONGEST_SILENCE; these show
    the loss of the first rank alone.
    """

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self._shown: dict[str, float] = {}
        self._losses: dict[str, float] = {}  # in the bar
        self._shown_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (metrics := StepMetrics.of(trainer)) is not None:
            self._shown = metrics.latest
        self._shown_at = time.monotonic()
        if trainer.is_global_zero and can_show_bar():
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                bar_format=BAR,
                dynamic_ncols=True,
                leave=False,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not pl_module.step_ended:
            return
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
        metrics = StepMetrics.of(trainer)
        if metrics is None:
            return
        if metrics.latest is not self._shown:
            self._shown = metrics.latest
            self._show(trainer, metrics.latest)
        elif time.monotonic() - self._shown_at >= LONGEST_SILENCE:
            self._show(trainer, metrics.measure(trainer, pl_module, float(pl_module.train_loss)))

    def _show(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        self._shown_at = time.monotonic()
        speed = f"{row['speed/tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self._losses["loss"] = row["train/loss"]
            losses = "".join(f"{name} {loss:.3f}, " for name, loss in self._losses.items())
            self.bar.set_postfix_str(losses + speed)
        left = (trainer.max_steps - trainer.global_step) * row["speed/ms_per_step"] / 1000
        log.log(
            logging.DEBUG if self.bar is not None else logging.INFO,
            "step %d/%d | loss %.4f | %.1f ms/step | %s | grad norm %.2f | lr %.2e | %s left",
            trainer.global_step,
            trainer.max_steps,
            row["train/loss"],
            row["speed/ms_per_step"],
            speed,
            row["train/grad_norm"],
            row["train/lr"],
            format_duration(left),
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        m = pl_module.metrics
        self._losses["val"] = m["val/loss"]
        text = (
            f"step {trainer.global_step} | validation loss {m['val/loss']:.4f} | "
            f"perplexity {rounded(m['val/perplexity'])} | {m['val/bits_per_byte']:.4f} bits per byte"
        )
        with tqdm.external_write_mode():
            log.info(text)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


def can_show_bar() -> bool:
    """Whether standard error is a terminal or a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def rounded(perplexity: float | None) -> str:
    """Two decimals, unless the model has diverged."""
    perplexity = perplexity or math.inf
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"


def format_duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
