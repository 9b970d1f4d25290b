"""Linear layers rearranged for generation on a CPU.

One token at a time, a linear layer does little but read its weights, and torch's matrix product for one
or a few rows reads them at less than half of the memory's speed. oneDNN, which torch brings along,
reaches it with weights in a blocked layout of its own. Smaller weights are read faster still: bfloat16,
or int8 with one scale per output, multiplied in integers with activations that have one scale per token
(https://arxiv.org/abs/2208.07339 calls that vector-wise). No row depends on its neighbours.
CPUs without VNNI add two products in 16 bits, which overflow: there, activations get 7 bits, and single
positions, for which integers are slow on them, are multiplied in bfloat16.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpt_lightning.model.gpt import GPT, Head

log = logging.getLogger(__name__)

ROWS = 32  # oneDNN chooses a layout for this many, which is as good for one and for a whole prompt
DTYPES = ("float32", "bfloat16", "int8")


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's layout, in the type of `linear`."""

    def __init__(self, linear: nn.Linear, bias: Tensor | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = bias
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1):  # oneDNN multiplies four rows in less time than one
            return self.linear(x.expand(4, *x.shape[1:]), self.weight, self.bias, "none", [], "")[:1]
        return self.linear(x, self.weight, self.bias, "none", [], "")


def _int8_product(x: Tensor, zero: int, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * ((x - zero) W^T) of unsigned x and a prepacked W, in float32."""
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # scale, zero, type, no function
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise.default(x, 1.0, zero, weight, scale, zeros, None, *output)


@functools.cache
def activation_levels() -> int:
    """The largest activation whose products this CPU adds up exactly: 127, or 63 where 16 bits overflow."""
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    largest = torch.full((1, 64), 255, dtype=torch.uint8)
    exact = bool((_int8_product(largest, 0, weight, torch.ones(16)) == 64 * 127 * 255).all())
    return 127 if exact else 63


class Int8Linear(nn.Module):
    """y = s_w (x W_int8^T) + b, with a scale per output s_w.

    Args:
        linear: The layer to replace.
        bias: b, None for none.
        weight_only: Whether one position per sequence meets the weights in bfloat16, unrounded, instead of
            in integers; None where integers are slow. Not for widths that are no multiple of 16.
    """

    def __init__(self, linear: nn.Linear, bias: Tensor | None, weight_only: bool | None = None):
        super().__init__()
        weight = linear.weight.detach()
        self.levels = activation_levels()
        self.scale = weight.abs().amax(1).clamp_min(1e-30) / 127
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.bias = torch.zeros(len(weight)) if bias is None else bias
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.packed_scale = self.scale / self.levels  # what remains when y is multiplied by the largest |x|
        self.zero = self.levels + 1  # of the unsigned activations
        self.middle = torch.tensor(self.zero + 0.5)  # a half to round with
        wanted = self.levels < 127 if weight_only is None else weight_only
        self.weight_only = wanted and linear.in_features % 16 == 0  # torch's kernel reads past other rows
        if self.weight_only:
            self.weight = rounded
            self.ones = torch.ones(len(weight), dtype=torch.bfloat16)  # scales of 8 bits would be too rough
            self.product = torch.ops.aten._weight_int8pack_mm.default

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_only and (x.dim() == 2 or x.size(1) == 1):
            rows = x.reshape(-1, x.size(-1)).bfloat16()
            y = self.product(rows, self.weight, self.ones).float()
            return torch.addcmul(self.bias, y, self.scale).view(*x.shape[:-1], -1)
        largest = x.abs().amax(-1, keepdim=True)  # (..., 1); where it is 0, so is its product below
        q = torch.addcdiv(self.middle, x, largest, value=self.levels).to(torch.uint8)
        return torch.addcmul(self.bias, _int8_product(q, self.zero, self.packed, self.packed_scale), largest)


@torch.no_grad()
def pack(net: GPT, dtype: str = "float32") -> GPT:
    """Make a model fast at generation on its CPU, in place; it can no longer be trained or saved.

    On other devices, and where torch was built without oneDNN, its layers stay as they are. The
    state_dict() of a packed model raises ValueError: its weights are not what was trained.

    Args:
        net: The model, in float32.
        dtype: "float32" changes nothing but rounding; "bfloat16" halves weights and cache; "int8"
            reads a quarter and computes everything between the layers in float32.

    Raises:
        ValueError: If dtype is none of these, or int8 is not available on this machine.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    if dtype == "bfloat16":
        net.to(torch.bfloat16)
    kind = Int8Linear if dtype == "int8" else PackedLinear
    layers = [(parent, name, child) for parent in net.modules() for name, child in parent.named_children()]
    try:
        if net.transformer.wte.weight.device.type != "cpu":
            raise RuntimeError("it is made for CPUs")
        for parent, name, child in layers:
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child, child.padding if isinstance(child, Head) else child.bias))
    except (AttributeError, RuntimeError) as error:  # torch.ops raises both for what a build lacks
        if dtype == "int8":
            raise ValueError(f"dtype=int8 is not available here ({error}); use dtype=bfloat16") from error
        log.info("linear layers stay as they are: %s", error)
        return net.eval()
    net.register_state_dict_pre_hook(_refuse_to_save)
    return net.eval()


def _refuse_to_save(*_: Any) -> None:
    raise ValueError("the model is packed for generation and has no weights to save; use read_model")
