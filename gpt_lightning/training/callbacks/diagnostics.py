"""Sizes of updates and of activations, layer by layer, to find out what goes wrong in a training."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from gpt_lightning.training.intervals import is_due, log_interval
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.strategies import whole


class Diagnostics(Callback):
    """Logs, every `every_steps`-th step, two sizes of each layer: a block, or a module beside the blocks.

    `update_ratio/LAYER` is the norm of the step's update divided by that of the weights before it; 1e-3 is
    usual. `activation_std/LAYER` is the standard deviation of the layer's output in the step's last
    micro-batch, on the first rank. The weights are copied in these steps; the training is the same.

    Args:
        every_steps: Optimizer steps between two logs; None is the interval of the other metrics.

    Raises:
        ValueError: If every_steps is below 1.
    """

    def __init__(self, every_steps: int | None = None):
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"callbacks.diagnostics.every_steps={every_steps} must be at least 1")
        self.every_steps = every_steps
        self._before: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: LanguageModel) -> None:  # type: ignore[override]
        self.interval = self.every_steps or log_interval(trainer.max_steps)
        for layer in dict.fromkeys(layer_of(name) for name, _ in pl_module.net.named_parameters()):
            pl_module.net.get_submodule(layer).register_forward_hook(self._keep(trainer, layer))

    def _due(self, trainer: pl.Trainer) -> bool:
        """Whether the step that is being computed is logged."""
        return is_due(trainer.global_step + 1, self.interval)

    def _keep(self, trainer: pl.Trainer, layer: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if module.training and self._due(trainer) and isinstance(output, Tensor):
                self._outputs[layer] = output.detach().float().std()

        return hook

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if self._due(trainer):
            self._before = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: LanguageModel, *_: Any) -> None:  # type: ignore[override]
        if not self._before or not pl_module.step_ended:
            return
        squares: dict[str, list[Tensor]] = defaultdict(lambda: [torch.zeros(()), torch.zeros(())])
        for name, after in pl_module.net.named_parameters():
            before = self._before[name]
            sums = squares[layer_of(name)]
            for place, part in enumerate((after.detach() - before, before)):
                sums[place] = sums[place].to(part.device) + whole(torch.linalg.vector_norm(part.float())) ** 2
        ratios = {f"update_ratio/{layer}": float((a / b).sqrt()) for layer, (a, b) in squares.items()}
        spreads = {f"activation_std/{layer}": float(std) for layer, std in self._outputs.items()}
        self._before, self._outputs = {}, {}
        log_metrics(trainer, {**ratios, **spreads}, trainer.global_step)


def layer_of(name: str) -> str:
    """The block that a parameter belongs to, or its module beside the blocks."""
    block = re.match(r"(.*?\.\d+)\.", name)
    return block[1] if block else name.rpartition(".")[0]
