"""Linear layers rearranged for generation on a CPU.

For one token at a time, a linear layer mostly reads its weights, and torch's matrix product for one or a
few rows reads them at less than half of the memory's bandwidth. oneDNN, which comes with torch, reaches it
with weights in its own blocked layout. bfloat16 weights halve the bytes; int8 weights with one scale per
output quarter them, and are multiplied in integers by activations with one scale per token ("vector-wise",
https://arxiv.org/abs/2208.07339). No row depends on its neighbours.
CPUs without VNNI add pairs of products in 16 bits, which overflow: on these, activations get 7 bits, and
single positions, for which integers are slow there, are multiplied in bfloat16.

The operators are not part of torch's stable interface. int8 is used only if asked for; the default layout
only after `PackedLinear` has been compared with nn.Linear.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from gpt_lightning.model.gpt import CausalLM, Head

log = logging.getLogger(__name__)

ROWS = 32  # number of rows that oneDNN optimizes the layout for; as fast for one row and for a prompt
DTYPES = ("float32", "bfloat16", "int8")


def cpu_features() -> dict[str, bool]:
    """What this CPU's instructions can do, by torch's names; empty with versions of torch that do not say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def repeats_single_rows() -> bool:
    """Whether oneDNN is faster with four rows than with one: measured with AVX2 and AVX-512, not with AMX."""
    return not cpu_features().get("amx_tile")


class PackedLinear(nn.Module):
    """y = x W^T + b with W in oneDNN's layout, in the type of `linear`."""

    def __init__(self, linear: nn.Linear, bias: Tensor | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias, self.repeats = bias, repeats_single_rows()
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        if self.repeats and x.numel() == x.size(-1):
            return self.linear(x.expand(4, *x.shape[1:]), self.weight, self.bias, "none", [], "")[:1]
        return self.linear(x, self.weight, self.bias, "none", [], "")


def _int8_product(x: Tensor, zero: int, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * ((x - zero) W^T) of unsigned x and a prepacked W, in float32."""
    output: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")  # scale, zero point, type, activation
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise.default(x, 1.0, zero, weight, scale, zeros, None, *output)


@functools.cache
def activation_levels() -> int:
    """The largest activation whose products this CPU adds exactly: 127, or 63 if 16 bits overflow."""
    weight = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), 127, dtype=torch.int8), None)
    largest = torch.full((1, 64), 255, dtype=torch.uint8)
    exact = bool((_int8_product(largest, 0, weight, torch.ones(16)) == 64 * 127 * 255).all())
    return 127 if exact else 63


class Int8Linear(nn.Module):
    """y = s_w (x W_int8^T) + b, with a scale per output s_w.

    Args:
        linear: The layer to replace.
        bias: b, None for none.
        weight_only: Whether single positions are multiplied in bfloat16 instead of integers; None chooses
            the faster one. Ignored for widths that are not a multiple of 16.
    """

    def __init__(self, linear: nn.Linear, bias: Tensor | None, weight_only: bool | None = None):
        super().__init__()
        weight = linear.weight.detach()
        self.levels = activation_levels()
        self.scale = weight.abs().amax(1).clamp_min(1e-30) / 127
        rounded = (weight / self.scale[:, None]).round().to(torch.int8)
        self.bias = torch.zeros(len(weight)) if bias is None else bias
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.packed_scale = self.scale / self.levels  # y is multiplied by the largest |x| in addition
        self.zero = self.levels + 1  # zero point of the unsigned activations
        self.middle = torch.tensor(self.zero + 0.5)  # a half for rounding
        wanted = self.levels < 127 if weight_only is None else weight_only
        self.weight_only = wanted and linear.in_features % 16 == 0  # as torch's kernel needs
        if self.weight_only:
            self.weight = rounded
            self.ones = torch.ones(len(weight), dtype=torch.bfloat16)  # scaled in float32 instead
            self.product = torch.ops.aten._weight_int8pack_mm.default

    def forward(self, x: Tensor) -> Tensor:
        if self.weight_only and (x.dim() == 2 or x.size(1) == 1):
            rows = x.reshape(-1, x.size(-1)).bfloat16()
            y = self.product(rows, self.weight, self.ones).float()
            return torch.addcmul(self.bias, y, self.scale).view(*x.shape[:-1], -1)
        largest = x.abs().amax(-1, keepdim=True)  # (..., 1); if it is 0, so is the result
        q = torch.addcdiv(self.middle, x, largest, value=self.levels).to(torch.uint8)
        return torch.addcmul(self.bias, _int8_product(q, self.zero, self.packed, self.packed_scale), largest)


def check_packed_linear(dtype: torch.dtype) -> None:
    """Compare PackedLinear with nn.Linear on a small example, for one row and for several.

    Raises:
        RuntimeError: If the results differ.
    """
    random = torch.Generator().manual_seed(0)
    linear = nn.Linear(48, 20).to(dtype)
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random))
    packed = PackedLinear(linear, linear.bias)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for rows in (1, 5):
        x = torch.randn(rows, 1, 48, generator=random).to(dtype)
        if not torch.allclose(packed(x).float(), linear(x).float(), rtol=tolerance, atol=tolerance):
            raise RuntimeError("the packed layer gives other results than nn.Linear")


@torch.no_grad()
def pack(net: CausalLM, dtype: str = "float32") -> CausalLM:
    """Make a model fast at generation on a CPU, in place; it can no longer be trained or saved.

    The layers are unchanged on other devices, and where oneDNN is missing or gives wrong results. The
    state_dict() of a packed model raises ValueError.

    Args:
        net: The model, in float32.
        dtype: "float32" changes only rounding; "bfloat16" halves weights and cache; "int8" quarters the
            weights and computes in float32 between the layers.

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
        if net.embedding.weight.device.type != "cpu":
            raise RuntimeError("only CPUs have them")
        if dtype != "int8":
            check_packed_linear(net.embedding.weight.dtype)
        for parent, name, child in layers:
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child, child.padding if isinstance(child, Head) else child.bias))
    except (AttributeError, RuntimeError) as error:  # torch.ops raises both if a build lacks an operator
        if dtype == "int8":
            raise ValueError(f"dtype=int8 is not available here ({error}); use dtype=bfloat16") from error
        log.info("packed linear layers are not used: %s", error)
        return net.eval()
    net.register_state_dict_pre_hook(_refuse_to_save)
    return net.eval()


def _refuse_to_save(*_: Any) -> None:
    raise ValueError("the model is packed for generation and has no weights to save; use read_model")
