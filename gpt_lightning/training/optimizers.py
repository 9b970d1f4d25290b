"""Optimizers. Any class of torch.optim, or of a package, does as well: it receives parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

ParamGroups = list[dict[str, Any]]
OptimizerFactory = Callable[[ParamGroups], Optimizer]


def parameter_groups(module: nn.Module, *, by_role: bool = False) -> ParamGroups:
    """Parameter groups: matrices, which decay as the optimizer says, and vectors, which never do.

    A network says the role of each parameter in `parameter_roles()`: "hidden" for a matrix between hidden
    layers, "qkv" for three of them in one, "embedding", "head", "vector" for biases and gains. For other
    networks, a parameter of two dimensions or more is a "matrix", one of fewer a "vector". Parameters with
    requires_grad=False are left out.

    Args:
        module: The network.
        by_role: Whether each role is a group of its own, with the key `role`.
    """
    declare: Callable[[], dict[str, str]] = getattr(module, "parameter_roles", dict)
    roles = declare()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            role = roles.get(name) or ("matrix" if parameter.dim() >= 2 else "vector")
            kind = role if by_role or role == "vector" else "matrix"
            group = groups.setdefault(kind, {"params": []} | ({"role": kind} if by_role else {}))
            group["params"].append(parameter)
            if role == "vector":
                group["weight_decay"] = 0.0
    return [groups[kind] for kind in sorted(groups)]


def by_role(factory: OptimizerFactory) -> bool:
    """Whether an optimizer wants a parameter group for each role."""
    return getattr(getattr(factory, "func", factory), "by_role", False)  # of a partial, or itself


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
