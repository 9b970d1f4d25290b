"""Optimizers. Any class of torch.optim, or of a package, does as well: it receives parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

ParamGroups = list[dict[str, Any]]
SHARDED = "_fsdp_wrapped_module."  # what FSDP puts into names
OptimizerFactory = Callable[[ParamGroups], Optimizer]


def matrix_names(module: nn.Module) -> set[str]:
    """Names of the parameters with two dimensions or more."""
    return {name for name, parameter in module.named_parameters() if parameter.dim() >= 2}


def decay_groups(module: nn.Module, matrices: Collection[str] | None = None) -> ParamGroups:
    """Two parameter groups: matrices, which decay as the optimizer says, and the rest, which never does.

    Parameters with requires_grad=False are left out.

    Args:
        module: The network.
        matrices: Names of its matrices from before it was sharded, which makes parameters flat; None looks.
    """
    matrices = matrix_names(module) if matrices is None else matrices
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []  # biases and LayerNorm gains
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decay if name.replace(SHARDED, "") in matrices else rest).append(parameter)
    groups: ParamGroups = [{"params": decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    params: ParamGroups | Iterable[torch.Tensor],
    *,
    lr: float,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = True,
) -> Optimizer:
    """AdamW with one kernel for all parameters where the device has one.

    Args:
        params: Groups, or parameters.
        lr: Peak learning rate; the schedule multiplies it.
        betas: Decay of the mean and of the squared mean of the gradient.
        eps: Added to the denominator.
        weight_decay: Share of the learning rate by which matrices shrink in a step.
        fused: Whether to use the fused kernel, None to leave it to torch; Lightning does not clip with it in
            16-bit-mixed precision.

    Raises:
        ValueError: If a value is out of its range.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019).
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"optimizer.lr={lr} must be a finite number above 0; 1e-3 suits a small model")
    for key, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{key}={value} must be a finite number of at least 0")
    numbers = all(isinstance(beta, (int, float)) for beta in betas)
    if len(betas) != 2 or not numbers or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"optimizer.betas={list(betas)} must be two numbers in [0, 1), such as [0.9,0.95]")
    return torch.optim.AdamW(
        params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused
    )
