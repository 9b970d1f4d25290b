"""The loss in chunks against the logarithm of the probabilities of all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import random_net
from torch import Tensor

from gpt_lightning.model import gpt
from gpt_lightning.model.gpt import IGNORE
from gpt_lightning.model.lora import LoRAConfig, add_adapters
from gpt_lightning.model.qwen3 import Qwen3Config

KEPT = 37 - 4  # targets that count, in chunks of 8
IDS = torch.randint(257, (2, 1, 37), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "CHUNK", 8 * 320)


def batch() -> tuple[Tensor, Tensor]:
    idx, targets = IDS.clone()
    targets[0, 8:11] = targets[0, 36] = IGNORE
    return idx, targets


def build(**options: Any) -> Any:
    return random_net(block_size=37, **options).train()


def plain_loss(net: Any, idx: Tensor, targets: Tensor, reduction: str) -> Tensor:
    log_p = net(idx).float().log_softmax(-1)
    each = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets != IGNORE)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / KEPT}[reduction]


def gradients(net: Any, loss: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    (loss.sum() / 3).backward()  # as one of three accumulated micro-batches
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_weights": False}, {"vocab_multiple": 1}, {"kind": Qwen3Config}],
    ids=["tied", "untied", "no padding", "Qwen3"],
)
def test_loss_in_chunks_and_its_gradients_are_those_of_all_logits(
    options: dict[str, Any], reduction: str
) -> None:
    net = build(**options)
    chunked, plain = net(*batch(), reduction=reduction), plain_loss(net, *batch(), reduction)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6)
    found, expected = gradients(net, chunked), gradients(net, plain)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-6 * largest, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(net(*batch(), reduction=reduction), plain.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_of_the_inputs_are_those_by_hand_in_double_precision() -> None:
    net, (_, targets) = build().double(), batch()
    x, counts = net.hidden(IDS[0])[0], (targets[0] != IGNORE).unsqueeze(1)
    loss = gpt.ChunkedLoss.apply(x, net.lm_head.weight, net.lm_head.padding, targets[0])
    (dx,) = torch.autograd.grad(loss, x)
    by_hand = (net.lm_head(x).softmax(-1) - torch.eye(320)[targets[0].clamp(min=0)]) * counts
    torch.testing.assert_close(dx, by_hand @ net.lm_head.weight, rtol=1e-12, atol=1e-12)


def test_mixed_precision_gives_the_loss_in_32_bits_and_close_gradients() -> None:
    net = build(tie_weights=False)
    expected = gradients(net, plain_loss(net, *batch(), "mean"))
    with torch.autocast("cpu", torch.bfloat16):
        chunked, plain = net(*batch()), plain_loss(net, *batch(), "mean")
    assert chunked.dtype == torch.float32
    torch.testing.assert_close(chunked, plain, rtol=1e-3, atol=0)
    for name, gradient in gradients(net, chunked).items():
        assert (gradient - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_frozen_weights_get_no_gradient_and_adapters_the_right_one() -> None:
    net = add_adapters(build(), LoRAConfig(r=2)).train()
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found, expected = gradients(net, net(*batch())), gradients(net, plain_loss(net, *batch(), "mean"))
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["32 bits", "mixed"])
def test_no_more_logits_than_a_chunk_are_computed_at_once(mixed: bool) -> None:
    net = build()
    sizes: dict[int, list[int]] = {2: [], 4: []}  # by their bytes

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            is_new = isinstance(found, Tensor) and found.is_contiguous()  # unlike weight.T
            if is_new and found.size()[-1:] == (320,):
                sizes[found.element_size()].append(found.numel())
            return found

    with Recorder(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        net(*batch()).backward()
        if not mixed:
            with torch.no_grad():
                net(*batch(), reduction="none")
    if mixed:  # as many bytes of gradients, and an eighth of the logits
        assert (max(sizes[2]), max(sizes[4])) == (2 * gpt.CHUNK, gpt.CHUNK // 4)
    else:
        assert (max(sizes[4]), sizes[2]) == (gpt.CHUNK, [])
        assert sizes[4].count(gpt.CHUNK) >= 8


def test_a_batch_without_targets_has_no_mean() -> None:
    net, idx = build(), IDS[0]
    assert net(idx, torch.full_like(idx, IGNORE)).isnan()


def test_second_backward_pass_is_an_error() -> None:
    loss = build()(*batch())
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


def test_few_logits_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "CHUNK", 37 * 320)
    assert build()(*batch()).grad_fn.name() == "NllLossBackward0"
