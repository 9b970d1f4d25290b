"""What a model expected and where it looked, against a forward pass that is taken apart by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import BYTES, random_net
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_lightning.inference.inspection import attention, inspect
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.gpt import GPTConfig
from gpt_lightning.model.own import as_causal_lm
from gpt_lightning.model.qwen3 import Qwen3Config

IDS = [BYTES.eot_token, *"<Ä cat>".encode()]


def test_losses_and_expected_tokens_are_those_of_the_logits() -> None:
    net = random_net()
    seen = inspect(TextGenerator(net, BYTES), IDS)
    assert seen.tokens == ["<|endoftext|>", "<", "\\xc3", "\\x84", " ", "c", "a", "t", ">"]
    with torch.no_grad():
        logits = net(torch.tensor([IDS]))[0, :-1]
    losses = F.cross_entropy(logits, torch.tensor(IDS[1:]), reduction="none")
    assert seen.nats[0] is None
    assert seen.nats[1:] == pytest.approx(losses.tolist(), rel=1e-5)
    assert seen.expected[0] == []
    for found, row in zip(seen.expected[1:], logits.softmax(-1).tolist(), strict=True):
        best = sorted(range(BYTES.n_vocab), key=lambda token: -row[token])[:5]
        assert [probability for _, probability in found] == pytest.approx([row[token] for token in best])
        assert found[0][0] == BYTES.decode_single_token_bytes(best[0]).decode(errors="backslashreplace")


def test_text_is_cut_to_what_the_model_reads_at_once() -> None:
    model = TextGenerator(random_net(block_size=4), BYTES)
    assert inspect(model, IDS).tokens == ["<|endoftext|>", "<", "\\xc3", "\\x84"]
    assert inspect(model, IDS).nats == inspect(model, IDS[:4]).nats
    with pytest.raises(ValueError, match="the text has 1 tokens"):
        inspect(model, IDS[:1])


@pytest.mark.parametrize("kind", [GPTConfig, Qwen3Config], ids=["gpt", "qwen3"])
def test_attention_weights_give_the_output_of_the_layer(kind: type) -> None:
    """The values of all heads, weighted by them and projected, are what the layer adds."""
    options: dict[str, Any] = {"n_head": 4} | ({"n_kv_head": 2} if kind is Qwen3Config else {})
    net, seen = random_net(kind=kind, **options), {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output[0]})

    layer = net.blocks[1].attn if kind is GPTConfig else net.blocks[1].self_attn
    layer.register_forward_hook(keep("output"))
    (layer.c_attn if kind is GPTConfig else layer.v_proj).register_forward_hook(keep("values"))
    model = TextGenerator(net, BYTES)
    weights: list[Tensor | None] = [attention(model, IDS, layer=1, head=head) for head in range(4)]
    values = seen["values"][:, -16 if kind is GPTConfig else 0 :].view(len(IDS), -1, 4)  # (T, heads, D)
    if kind is Qwen3Config:  # heads 0 and 1 share the first values
        values = values.repeat_interleave(2, dim=1)
    mixed = [w @ values[:, head] for head, w in enumerate(weights) if w is not None]
    project = layer.c_proj if kind is GPTConfig else layer.o_proj
    assert torch.allclose(project(torch.cat(mixed, -1)), seen["output"], atol=1e-5)


@pytest.mark.parametrize(("place", "line"), [((2, 0), "layer=2 must be .* 0 to 1"), ((0, 2), "head=2 must")])
def test_head_that_does_not_exist_is_refused(place: tuple[int, int], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        attention(TextGenerator(random_net(), BYTES), IDS, layer=place[0], head=place[1])


def test_network_without_torchs_attention_has_none() -> None:
    net = as_causal_lm(nn.Embedding(257, 257), vocab_size=257, block_size=8)
    model = TextGenerator(net, BYTES)
    assert attention(model, IDS, layer=0, head=0) is None
    assert len(inspect(model, IDS).tokens) == 8
