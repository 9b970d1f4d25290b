"""Muon for the hidden matrices of a network, with AdamW for its other parameters.

n matrices of the same shape, R rows, K columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gpt_lightning.training.optimizers import ParamGroups, adamw
from gpt_lightning.training.precision import has_amx
from gpt_lightning.training.strategies import sharded_like, whole

STEPS = 4  # of the iteration; Jordan's Muon needs five, as it divides by the larger Frobenius norm
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero; singular values end between about 0.7 and 1.2
WIDE = 128  # shorter side of a matrix from which bfloat16 is faster on a CPU with AMX
MATRICES = {"hidden": 1, "qkv": 3}  # roles that Muon trains, and how many matrices a parameter has


def muon(
    params: ParamGroups,
    *,
    lr: float,
    muon_lr: float = 0.02,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    fused: bool | None = True,
) -> Optimizer:
    """Muon for hidden matrices, AdamW for embeddings, head, biases and gains.

    Args:
        params: A group for each role, as `parameter_groups(net, by_role=True)` makes them.
        lr: Peak learning rate of AdamW.
        muon_lr: Peak learning rate of Muon: the spectral norm of a square matrix's step.
        momentum: Decay of Muon's mean of the gradient.
        betas, eps, fused: Of AdamW.
        weight_decay: Of both: share of the learning rate by which matrices shrink in a step.

    Raises:
        ValueError: If a value is out of its range, or the network does not declare its hidden matrices.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024).
    """
    if not 0 < muon_lr < math.inf:
        raise ValueError(f"optimizer.muon_lr={muon_lr} must be a finite number above 0, such as 0.02")
    if not 0 <= momentum < 1:
        raise ValueError(f"optimizer.momentum={momentum} must lie in [0, 1), such as 0.95")
    found = {group.get("role") for group in params}
    if not found & set(MATRICES) or "matrix" in found:
        raise ValueError(
            "optimizer.muon trains networks that declare their hidden matrices in parameter_roles(), and no "
            "adapters of lora; use optimizer=adamw"
        )
    for group in params:
        if matrices := MATRICES.get(group.pop("role")):
            group |= {"lr": muon_lr, "momentum": momentum, "matrices": matrices}
    return Muon(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


muon.by_role = True  # type: ignore[attr-defined]  # its groups are roles


class Muon(Optimizer):
    """One optimizer of two kinds: Muon for groups with a momentum, AdamW for the others.

    Args:
        params: Parameter groups; those with `momentum` have parameters of so many `matrices`.
        options: Of `adamw`; lr and weight_decay are defaults for all groups.
    """

    def __init__(self, params: ParamGroups, **options: Any):
        super().__init__(params, {key: options[key] for key in ("lr", "weight_decay")})
        self._adamw = adamw([group for group in self.param_groups if "momentum" not in group], **options)
        self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """An optimizer step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._adamw.param_groups:
            self._adamw.step()
        hidden = [
            (parameter, group)
            for group in self.param_groups
            if "momentum" in group
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for (parameter, group), update in zip(hidden, self._updates(hidden), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(sharded_like(parameter, update), alpha=-group["lr"])
        return loss

    def _updates(self, hidden: list[tuple[Tensor, dict[str, Any]]]) -> list[Tensor]:
        """The step of each parameter at a learning rate of 1; matrices of one shape are computed together."""
        updates = []
        for parameter, group in hidden:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["mean"] = torch.zeros_like(parameter)
            mean = state["mean"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(whole(parameter.grad.lerp(mean, group["momentum"])))  # Nesterov's
        groups = (group for _, group in hidden)
        views = [v for u, group in zip(updates, groups, strict=True) for v in u.chunk(group["matrices"])]
        for shape in dict.fromkeys(view.shape for view in views):
            same, scale = [v for v in views if v.shape == shape], math.sqrt(max(1.0, shape[0] / shape[1]))
            for view, result in zip(same, orthogonal(torch.stack(same)) * scale, strict=True):
                view.copy_(result)
        return updates


def orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each, roughly: singular values become about 1.

    An odd polynomial of degree five is iterated, from the matrix divided by the square root of its Gram
    matrix's Frobenius norm, so that no singular value is above 1. It runs in bfloat16 on a GPU, and for wide
    matrices on a CPU with AMX, else in the type of the matrices.

    Args:
        matrices: (n, R, K).

    Returns:
        (n, R, K), in the type of the matrices.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    use_bf16 = x.is_cuda or (x.size(-2) >= WIDE and x.device.type == "cpu" and has_amx())
    if use_bf16:
        x = x.to(torch.bfloat16)
    gram = x @ x.mT  # (n, R, R)
    size = gram.norm(dim=(-2, -1), keepdim=True).sqrt().clamp(min=1e-7)
    x, gram = x / size, gram / size**2
    odd = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the polynomial of x is (a + odd) x
    if use_bf16 or x.size(-1) < 2 * x.size(-2):
        x = torch.baddbmm(x, odd, x, beta=a)
        for _ in range(STEPS - 1):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:  # the factors of x first, which are squares of its shorter side; bfloat16 is too coarse for that
        diagonal = a * torch.eye(x.size(-2), dtype=x.dtype, device=x.device)
        product = factor = diagonal + odd
        for _ in range(STEPS - 1):
            gram = factor @ gram @ factor
            factor = diagonal + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = factor @ product
        x = product @ x
    return (x.mT if tall else x).to(matrices.dtype)
