"""Losses compared with a slow reference that predicts one token at a time."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import BYTES, random_net
from torch.nn import functional as F

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import Byte, token_bytes
from gpt_lightning.data.windows import EvalBatches
from gpt_lightning.evaluation.losses import evaluate, lay_out, summarize, token_losses
from gpt_lightning.inference.cpu_kernels import pack
from gpt_lightning.inference.text import TextGenerator

T = 32  # block_size of the model


def tokens(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BYTES.n_vocab, n).astype(np.uint16)


@torch.no_grad()
def slow(net, ids: np.ndarray, stride: int) -> list[float]:
    """Loss of every token but the first, each from a forward of its own over what its window shows of it."""
    losses = []
    for target in range(1, len(ids)):
        k = 0  # the first window that reaches the target
        while k * stride + T < target:
            k += 1
        context = torch.from_numpy(ids[k * stride : target].astype(np.int64))
        logits = net(context[None])[0, -1]
        losses.append(float(F.cross_entropy(logits, torch.tensor(int(ids[target])))))
    return losses


@pytest.mark.parametrize("stride", [1, 7, 16, T])
@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 3 * T, 107])
def test_losses_equal_the_slow_reference(n: int, stride: int) -> None:
    net, ids = random_net(), tokens(n)
    losses = token_losses(net, ids, stride=stride, batch_size=3)
    assert np.isnan(losses[0])
    np.testing.assert_allclose(losses[1:], slow(net, ids, stride), atol=2e-5, rtol=2e-5)


def test_documents_of_a_block_are_scored_from_their_beginning() -> None:
    net, end = random_net(), BYTES.eot_token
    documents = [np.array([end, *tokens(T - 1, seed)], dtype=np.uint16) for seed in range(3)]
    expected = [loss for d in documents for loss in slow(net, np.array([*d, end]), T)]
    losses = token_losses(net, np.array([*np.concatenate(documents), end]), stride=T // 2, end=end)
    np.testing.assert_allclose(losses[1:], expected, atol=2e-5, rtol=2e-5)


def test_every_token_has_at_least_a_block_minus_a_stride_of_context() -> None:
    net, ids, stride = random_net(), tokens(100), 8
    losses = token_losses(net, ids, stride=stride)
    changed = ids.copy()
    changed[40] = (changed[40] + 1) % BYTES.n_vocab  # whoever sees it gets another loss
    differs = np.flatnonzero(token_losses(net, changed, stride=stride)[1:] != losses[1:]) + 1
    assert set(range(40, 40 + T - stride + 1)) <= set(differs.tolist())
    assert max(differs) <= 40 + T


@torch.no_grad()
def test_stride_of_a_block_gives_the_validation_loss_of_training(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(random.Random(1).choices("the cat sat\n", k=3000)))
    store = prepare(TextFiles(str(text)), Byte(), tmp_path / "cache")
    net, total, count = random_net(), 0.0, 0
    batches = EvalBatches(store, block_size=T, micro_batch_size=4)
    for b in range(len(batches)):
        x, y = batches[b]
        total += float(net(x, y, reduction="sum"))
        count += int((y >= 0).sum())
    found = evaluate(TextGenerator(net, BYTES), store.tokens("val"), stride=T)
    assert found["tokens"] == count == len(store.tokens("val")) - 1
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)


def test_untied_padded_and_packed_models_are_scored_alike() -> None:
    ids = tokens(90)
    for options in ({"tie_weights": False}, {"vocab_multiple": 1}, {"vocab_size": 300}):
        net = random_net(**options)
        expected = slow(net, ids, 16)
        np.testing.assert_allclose(
            token_losses(pack(net), ids, stride=16)[1:], expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(("n", "stride"), [(10, 0), (10, T + 1), (10, 2.5), (1, 4), (0, 4)])
def test_impossible_stride_or_text_is_refused(n: int, stride: float) -> None:
    with pytest.raises(ValueError, match=r"stride=|two are the least"):
        token_losses(random_net(), tokens(n), stride=stride)  # type: ignore[arg-type]


def test_summary_by_hand() -> None:
    ids = np.array([256, 97, 98, 256])  # the end of a text has a loss, but no bytes
    losses = np.array([np.nan, 1.0, 2.0, 6.0], dtype=np.float32)
    found = summarize(losses, ids, token_bytes(BYTES), block=8)
    assert (found["tokens"], found["bytes"], found["loss"]) == (3, 2, 3.0)
    assert found["perplexity"] == pytest.approx(math.exp(3))
    assert found["bits_per_byte"] == pytest.approx(9 / math.log(2) / 2)
    assert found["standard_error"] == pytest.approx(np.std([1, 2, 6], ddof=1) / math.sqrt(3))


def test_standard_error_equals_the_spread_over_many_texts() -> None:
    # neighbours have the same loss 50 times, so 5,000 tokens say no more than 100
    draw = np.random.default_rng(0)
    samples = [np.repeat(draw.normal(3, 1, 100), 50).astype(np.float32) for _ in range(300)]
    ids, sizes = np.zeros(5000, dtype=np.int64), np.ones(1, dtype=np.int64)
    found = [summarize(losses, ids, sizes, block=256) for losses in samples]
    spread = np.std([one["loss"] for one in found])
    assert spread == pytest.approx(0.1, rel=0.1)
    assert np.mean([one["standard_error"] for one in found]) == pytest.approx(spread, rel=0.15)


def test_layout_equals_that_of_a_token_store(tmp_path: Path) -> None:
    for separator in ("", "\n<|endoftext|>\n"):
        text = tmp_path / f"{len(separator)}.txt"
        text.write_text(separator.join(f"story {i} of many" for i in range(40)))
        corpus = TextFiles(str(text))
        expected = prepare(corpus, Byte(), tmp_path / "cache").tokens("train")
        laid_out = lay_out(corpus.documents("train"), BYTES, separated=corpus.separated)
        np.testing.assert_array_equal(laid_out, expected)
