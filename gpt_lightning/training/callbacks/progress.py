"""What a person sees of a run: the layers, a progress bar, log lines."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.module import LanguageModel

log = logging.getLogger(__name__)


class Layers(Callback):
    """Prints the model by layers with their parameters, tied ones counted once, before training.

    Args:
        max_depth: How far to look into modules; 3 shows each block.
    """

    def __init__(self, max_depth: int = 3):
        self.max_depth = max_depth

    def on_fit_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        rows = [("layer", "type", "parameters")]
        for name, layer in pl_module.net.named_modules():
            if len(name.split(".")) <= self.max_depth and not isinstance(layer, torch.nn.ModuleList):
                rows.append(
                    (name or "model", type(layer).__name__, f"{sum(p.numel() for p in layer.parameters()):,}")
                )
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for name, kind, count in rows:
            log.info("%s  %s  %s", name.ljust(widths[0]), kind.ljust(widths[1]), count.rjust(widths[2]))


class Progress(Callback):
    """One bar for the whole run, in optimizer steps; log lines where nobody watches a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self._shown: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and sys.stderr.isatty():
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                unit="step",
                dynamic_ncols=True,
                leave=False,
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero or trainer.fit_loop._should_accumulate():
            return
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
        metrics = StepMetrics.of(trainer)
        if metrics is None or not metrics.latest or metrics.latest is self._shown:
            return
        self._shown = latest = metrics.latest
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {latest['train/loss']:.3f}, {latest['speed/tokens_per_second']:,.0f} tokens/s"
            )
        left = (trainer.max_steps - trainer.global_step) * latest["speed/ms_per_step"] / 1000
        log.log(
            logging.DEBUG if self.bar is not None else logging.INFO,
            "step %d/%d | loss %.4f | %.1f ms/step | %s tokens/s | grad norm %.2f | lr %.2e | %s left",
            trainer.global_step,
            trainer.max_steps,
            latest["train/loss"],
            latest["speed/ms_per_step"],
            f"{latest['speed/tokens_per_second']:,.0f}",
            latest["train/grad_norm"],
            latest["train/lr"],
            duration(left),
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        m = pl_module.metrics
        text = (
            f"step {trainer.global_step} | validation loss {m['val/loss']:.4f} | "
            f"perplexity {m['val/perplexity']:.2f} | {m['val/bits_per_byte']:.4f} bits per byte"
        )
        with tqdm.external_write_mode():
            log.info(text)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
