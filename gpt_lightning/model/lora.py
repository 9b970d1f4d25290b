"""Low-rank adapters (LoRA): fine-tuning that freezes a model's weights and trains small matrices beside them.

Names and scaling are those of `peft`, which loads the files of `gpt_lightning.export format=peft`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt_lightning.model.gpt import CausalLM

QKV = {"c_attn", "q_proj", "k_proj", "v_proj"}  # layers of queries, keys and values


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The layers with adapters, and the size of the adapters.

    Args:
        r: Rank: the inner width of an adapter.
        lora_alpha: An adapter's output is multiplied by lora_alpha / r.
        lora_dropout: Probability that an input of an adapter is dropped in training.
        target_modules: Names of linear layers: c_attn, c_fc, c_proj (of attention and feed-forward) of a
            GPT; q_proj, k_proj, v_proj, o_proj, and gate_proj, up_proj, down_proj of a Qwen3 or c_fc, c_proj
            of a StarCoder2. None is those of queries, keys and values.

    Raises:
        ValueError: If a value is out of its range.
    """

    r: int
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"lora.r={self.r!r} must be a whole number of at least 1, or 0 for no adapters")
        if type(self.lora_alpha) not in (int, float) or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora.lora_alpha={self.lora_alpha!r} must be a number above 0")
        if type(self.lora_dropout) not in (int, float) or not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora.lora_dropout={self.lora_dropout!r} must be a number in [0, 1)")
        known = {"c_attn", "c_proj", "c_fc"}
        known |= {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
        names = self.target_modules
        if names is not None and (isinstance(names, str) or not names or not set(names) <= known):
            raise ValueError(f"lora.target_modules={names!r} must be a list of {', '.join(sorted(known))}")


class LoRALinear(nn.Module):
    """y = W x + b + lora_alpha / r * B A dropout(x), with only A (r, in) and B (out, r) trained.

    B is initialized to zero, so that the initial output is that of the frozen layer.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1.
    """

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base_layer, self.scaling = base_layer, config.lora_alpha / config.r
        self.lora_dropout = nn.Dropout(config.lora_dropout)
        self.lora_A = nn.Linear(base_layer.in_features, config.r, bias=False)
        self.lora_B = nn.Linear(config.r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A single linear layer with the same output."""
        self.base_layer.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


def add_adapters(net: CausalLM, config: LoRAConfig) -> CausalLM:
    """Freeze a model and add adapters to it, in place.

    Raises:
        ValueError: If the model lacks one of the layers.
    """
    layers = [(p, name, c) for p in net.blocks.modules() for name, c in p.named_children()]
    linear = {name for _, name, child in layers if isinstance(child, nn.Linear)}
    names = set(config.target_modules or QKV & linear or QKV)
    if missing := names - linear:
        raise ValueError(
            f"lora.target_modules: the model has no {min(missing)}, but {', '.join(sorted(linear))}"
        )
    net.requires_grad_(False)
    for parent, name, child in layers:
        if isinstance(child, nn.Linear) and name in names:
            setattr(parent, name, LoRALinear(child, config))
    return net


def merge_adapters(net: CausalLM) -> CausalLM:
    """Merge adapters into the weights, in place, which gives a plain model with the same logits."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    return net.requires_grad_(True)
