"""Muon against torch's own, against the singular values of matrices, and against AdamW for the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.training import muon as muon_module
from gpt_lightning.training.muon import muon, orthogonal
from gpt_lightning.training.optimizers import adamw, parameter_groups


@pytest.fixture
def net() -> GPT:
    torch.manual_seed(1)
    return GPT(GPTConfig(vocab_size=40, block_size=8, n_layer=2, n_head=2, n_embd=16, tie_weights=False))


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def give_products(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Gradients that are multiples of one matrix of rank 1, which has one norm only."""
    for number, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(number)
        rows, columns = (torch.randn(size, generator=generator).sign() for size in parameter.shape)
        parameter.grad = seed * torch.outer(rows, columns)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        give_gradients(net, seed)
        optimizer.step()


def groups(net: nn.Module) -> list[dict[str, Any]]:
    return parameter_groups(net, by_role=True)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (3, 7), (8, 2)])
def test_orthogonal_applies_the_polynomial_to_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values /= values.pow(4).sum().pow(0.25)
        for _ in range(4):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        torch.testing.assert_close(found, left @ torch.diag(values) @ right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (12, 12), (8, 40)])
def test_wide_matrices_are_multiplied_in_bfloat16_where_the_processor_does(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(muon_module, "has_amx", lambda: False)
    exact = orthogonal(matrices)
    monkeypatch.setattr(muon_module, "has_amx", lambda: True)
    assert torch.equal(orthogonal(matrices), exact)  # too small for it
    monkeypatch.setattr(muon_module, "WIDE", 8)
    rounded = orthogonal(matrices)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.02 * exact.norm()  # bfloat16 has eight bits


def test_hidden_matrices_take_the_steps_of_torchs_muon(net: GPT) -> None:
    theirs = copy.deepcopy(net)
    names = [f"transformer.h.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("c_fc", "c_proj")]
    mine, other = ([one.get_parameter(name) for name in names] for one in (net, theirs))
    optimizers = (
        muon(groups(net), lr=1e-3, muon_lr=0.02, momentum=0.9, weight_decay=0.1),
        torch.optim.Muon(other, lr=0.02, momentum=0.9, weight_decay=0.1, ns_steps=4),
    )
    for seed in (1, 5, -2):
        for matrices, optimizer in zip((mine, other), optimizers, strict=True):
            give_products(matrices, seed)
            optimizer.step()
    for name in names:  # torch's has eight bits of precision; a step changes an entry by 0.00125 at most
        torch.testing.assert_close(net.get_parameter(name), theirs.get_parameter(name), rtol=0, atol=5e-5)


def test_query_key_and_value_are_matrices_of_their_own(net: GPT) -> None:
    weight = net.get_parameter("transformer.h.0.attn.c_attn.weight")
    parts = [nn.Parameter(part.clone()) for part in weight.detach().chunk(3)]
    give_products(parts, 1)
    weight.grad = torch.cat([part.grad for part in parts])  # type: ignore[misc]
    muon(groups(net), lr=1e-3).step()
    torch.optim.Muon(parts, lr=0.02, weight_decay=0.1, ns_steps=4).step()
    torch.testing.assert_close(weight, torch.cat(parts), rtol=0, atol=5e-5)


def test_other_parameters_take_the_steps_of_adamw(net: GPT) -> None:
    theirs = copy.deepcopy(net)
    train(net, muon(groups(net), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1), 1, 2)
    train(theirs, adamw(parameter_groups(theirs), lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1), 1, 2)
    by_muon = set()
    for name, parameter in net.named_parameters():
        if not torch.equal(parameter, theirs.get_parameter(name)):
            by_muon.add(name)
    assert by_muon == {name for name, p in net.named_parameters() if ".h." in name and p.dim() == 2}


def test_restored_optimizer_takes_the_same_steps(net: GPT) -> None:
    twin = copy.deepcopy(net)
    whole = muon(groups(twin), lr=1e-2)
    train(twin, whole, 1, 2, 3, 4)
    first = muon(groups(net), lr=1e-2)
    train(net, first, 1, 2)
    second = muon(groups(net), lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(net, second, 3, 4)
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_schedule_applies_to_both_rates(net: GPT) -> None:
    optimizer = muon(groups(net), lr=0.01, muon_lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    rates = [(group["lr"], "momentum" in group) for group in optimizer.param_groups]
    assert sorted(rates) == [(0.0025, False)] * 3 + [(0.125, True)] * 2
    before = net.get_parameter("transformer.h.0.mlp.c_fc.weight").detach().clone()
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    train(net, optimizer, 1)
    step = net.get_parameter("transformer.h.0.mlp.c_fc.weight").detach() - before
    assert torch.linalg.matrix_norm(step, 2) == pytest.approx(0.125 * math.sqrt(4), rel=0.3)  # 64 by 16


def test_parameters_without_a_gradient_stay(net: GPT) -> None:
    optimizer = muon(groups(net), lr=1e-2)
    give_gradients(net, 1)
    still = net.get_parameter("transformer.h.1.mlp.c_fc.weight")
    still.grad, before = None, still.detach().clone()
    optimizer.step()
    assert torch.equal(still, before)


def test_closure_is_called_with_gradients_and_its_loss_returned(net: GPT) -> None:
    optimizer, idx = muon(groups(net), lr=1e-2), torch.arange(8).view(1, 8)

    def closure() -> torch.Tensor:
        loss = net(idx, idx)
        loss.backward()
        return loss.detach()

    first = optimizer.step(closure)
    assert float(first) > float(optimizer.step(closure))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"muon_lr": 0.0}, "optimizer.muon_lr=0.0 must be a finite number above 0"),
        ({"muon_lr": math.inf}, "optimizer.muon_lr=inf"),
        ({"momentum": 1.0}, r"optimizer.momentum=1.0 must lie in \[0, 1\)"),
        ({"lr": -1.0}, "optimizer.lr=-1.0 must be a finite number above 0"),
    ],
)
def test_bad_values_are_refused(options: dict[str, float], message: str, net: GPT) -> None:
    with pytest.raises(ValueError, match=message):
        muon(groups(net), **{"lr": 1e-3, **options})


def test_network_without_declared_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="networks that declare their hidden matrices"):
        muon(groups(nn.Linear(2, 2)), lr=1e-3)
