"""Parameter groups and AdamW against a step worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.training.optimizers import adamw, parameter_groups


def test_only_matrices_decay() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = adamw(parameter_groups(net), lr=1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in net.named_parameters()}
    assert found == {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}


def test_groups_hold_each_parameter_of_a_gpt_once() -> None:
    net = GPT(GPTConfig(vocab_size=10, block_size=8, n_layer=2, n_head=2, n_embd=8))
    names = {id(p): name for name, p in net.named_parameters()}
    matrices, rest = ([names[id(p)] for p in group["params"]] for group in parameter_groups(net))
    assert sorted(matrices + rest) == sorted(names.values())
    assert set(rest) == {name for name in names.values() if name.endswith("bias") or ".ln_" in name}


def test_frozen_parameters_are_left_out() -> None:
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(net)] == [1]


@pytest.mark.parametrize("fused", [True, False])
def test_first_step_of_adamw(fused: bool) -> None:
    # in the first step the corrected averages are g and g², so the update is lr * sign(g) after decay
    weight = nn.Parameter(torch.tensor([[2.0, -3.0]]))
    optimizer = adamw([{"params": [weight]}], lr=0.1, weight_decay=0.5, eps=0.0, fused=fused)
    weight.grad = torch.tensor([[4.0, -0.5]])
    optimizer.step()
    assert weight.tolist() == [pytest.approx([2.0 * (1 - 0.05) - 0.1, -3.0 * (1 - 0.05) + 0.1])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr=0.0 must be a finite number above 0"),
        ({"lr": math.nan}, "optimizer.lr=nan"),
        ({"lr": math.inf}, "optimizer.lr=inf"),
        ({"lr": 1.0, "eps": -1e-8}, "optimizer.eps=-1e-08 must be a finite number of at least 0"),
        ({"lr": 1.0, "weight_decay": -1}, "optimizer.weight_decay=-1"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "optimizer.betas"),
        ({"lr": 1.0, "betas": (0.9,)}, "optimizer.betas"),
        ({"lr": 1.0, "betas": ("a", "b")}, "optimizer.betas"),
    ],
)
def test_bad_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw([nn.Parameter(torch.ones(1))], **options)
