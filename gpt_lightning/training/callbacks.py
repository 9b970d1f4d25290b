"""What a run shows and writes while it trains, and when it stops."""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import RunningStage
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.generator import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.model.gpt import GPT
from gpt_lightning.training.module import LanguageModel

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

SECTION = re.compile(r"## Step (\d+)\n")  # heading of a sample in samples.md


def memory_gib(device: torch.device) -> float:
    """Memory in GiB: the most so far on a CUDA device or of this process, what is taken now on MPS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


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


class StepMetrics(Callback):
    """Measures every optimizer step and logs every `every_steps`-th: loss, rate, norm, speed, memory.

    Speeds are over the steps since the last log, without validation, samples and checkpoints.

    Args:
        every_steps: Optimizer steps between two logs.

    Attributes:
        latest: What was logged last.
        seconds: Time in training steps of this process, as far as it is logged.
        steps: Their number.

    Raises:
        ValueError: If every_steps is below 1.
    """

    def __init__(self, every_steps: int):
        if every_steps < 1:
            raise ValueError(f"trainer.log_every_steps={every_steps} must be at least 1")
        self.every_steps = every_steps
        self.latest: dict[str, float] = {}
        self.seconds, self.steps = 0.0, 0
        self._seconds, self._steps = 0.0, 0  # since the last log
        self._started = 0.0

    @staticmethod
    def of(trainer: pl.Trainer) -> StepMetrics | None:
        """The one among a trainer's callbacks."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, StepMetrics)), None)  # type: ignore[attr-defined]

    def on_train_batch_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        stepped = not trainer.fit_loop._should_accumulate()
        step = trainer.global_step
        due = stepped and (step % self.every_steps == 0 or step == 1)
        if due:
            loss, norm = pl_module.mean_train_loss(), float(pl_module.grad_norm)  # waits for the device
        self._seconds += time.perf_counter() - self._started
        self._steps += stepped
        if not due:
            return
        tokens_per_step = trainer.datamodule.tokens_per_step  # type: ignore[attr-defined]
        self.latest = {
            "train/loss": loss,
            "train/grad_norm": norm,
            "train/lr": pl_module.lr,
            "train/tokens": float(step * tokens_per_step),
            "speed/tokens_per_second": self._steps * tokens_per_step / self._seconds,
            "speed/ms_per_step": 1000 * self._seconds / self._steps,
            "speed/memory_gib": memory_gib(pl_module.device),
        }
        self.seconds, self.steps = self.seconds + self._seconds, self.steps + self._steps
        self._seconds, self._steps = 0.0, 0
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)


class Stop(Callback):
    """Ends a run at its last step, or when the training loss reaches a target, with a validation.

    Args:
        target_loss: Mean training loss of an optimizer step, in nats, at or below which to stop.
    """

    def __init__(self, target_loss: float | None = None):
        self.target_loss = target_loss

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if trainer.fit_loop._should_accumulate():
            return
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates once more before it leaves
        if self.target_loss is None:
            return
        loss, step = pl_module.mean_train_loss(), trainer.global_step
        if loss <= self.target_loss:
            log.info("training loss %.4f reached the target %g at step %d", loss, self.target_loss, step)
            trainer.should_stop = True


class Samples(Callback):
    """Generates text after each validation, into samples.md and TensorBoard.

    Args:
        path: The file; sections are appended.
        prompt: Beginning of the text; empty begins a new document.
        max_new_tokens: Length.
        temperature, top_k: As in `SamplingSettings`.
        seed: Of a generator of its own, so that sampling does not change the training.
        show: Whether to print each sample, too.

    Raises:
        ValueError: If a setting is out of its range, and, before training, if the prompt has a character
            that the vocabulary lacks.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt: str = "",
        max_new_tokens: int = 150,
        temperature: float = 0.8,
        top_k: int | None = 50,
        seed: int = 1337,
        show: bool = False,
    ):
        self.path, self.prompt, self.seed, self.show = Path(path), prompt, seed, show
        try:
            self.settings = SamplingSettings(
                max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k
            )
        except ValueError as error:
            raise ValueError(f"callbacks.samples.{error}") from error
        self.latest = ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        """Look at the prompt, and drop the samples that a resumed run is going to write again."""
        tokenizers.encode_array(pl_module.tokenizer, self.prompt)  # better now than at the first validation
        if trainer.is_global_zero and self.path.exists():
            sections = re.split(r"(?m)^(?=## Step \d+$)", self.path.read_text(encoding="utf-8"))
            kept = [
                part
                for part in sections
                if (found := SECTION.match(part)) and int(found[1]) <= trainer.global_step
            ]
            self.path.write_text("".join(kept), encoding="utf-8")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        if not trainer.is_global_zero or not isinstance(pl_module.net, GPT):  # another model may not generate
            return
        encoding = pl_module.tokenizer
        end = tokenizers.end_of_text(encoding)
        ids = tokenizers.encode_array(encoding, self.prompt).tolist() if self.prompt else []
        new = generate(pl_module.net, [[end, *ids]], self.settings, seed=self.seed, stop_ids=(end,))[0]
        self.latest = encoding.decode([*ids, *(token for token in new if token != end)])
        if self.show:
            with tqdm.external_write_mode():
                log.info("%s\n", self.latest)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"## Step {trainer.global_step}\n\n```text\n{self.latest}\n```\n\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("sample", self.latest, trainer.global_step)


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


class Throughput(ThroughputMonitor):
    """Lightning's throughput monitor for batches of tokens, logged by optimizer step, training only.

    Args:
        window_size: Batches to average over.
    """

    def __init__(self, window_size: int = 20):
        super().__init__(
            batch_size_fn=lambda batch: batch[0].size(0),
            length_fn=lambda batch: batch[0].numel(),
            window_size=window_size,
        )

    def _compute(self, trainer: pl.Trainer, iter_num: int | None = None) -> None:
        stage = trainer.state.stage
        metrics = StepMetrics.of(trainer)
        every = metrics.every_steps if metrics else trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stage != RunningStage.TRAINING or trainer.global_step % every:
            return
        for logger in trainer.loggers:
            values = self._throughputs[stage].compute()
            logger.log_metrics(
                {f"throughput/{key}": value for key, value in values.items()}, trainer.global_step
            )


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
