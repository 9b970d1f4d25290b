"""How well a model predicts a text.

N tokens of the text, B windows in a forward, T positions of the longest of them, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.gpt import GPT

LOGITS = 1 << 24  # computed at once, 64 MB
FORWARD = 8192  # tokens in a forward, by default

Segment = tuple[int, int]  # first token and end of a part that is read without the rest


@torch.inference_mode()
def token_losses(
    net: GPT,
    tokens: np.ndarray,
    *,
    stride: int,
    batch_size: int | None = None,
    segments: Sequence[Segment] | None = None,
) -> np.ndarray:
    """The loss of every token but the first, given what stands before it.

    A window of block_size tokens moves on by `stride`, and each token is scored once, in the first window
    that reaches it: it sees at least block_size - stride tokens, or all that there are. The smaller the
    stride, the more context, and the longer it takes: block_size / stride times as long.

    Args:
        net: The model.
        tokens: Ids, (N,).
        stride: Tokens that a window adds, at most block_size.
        batch_size: Windows in a forward; None is as many as have about 8,000 tokens.
        segments: Parts that are read each for itself, with their last windows moved back until they are
            full, as lm-evaluation-harness reads documents; None is the whole, as validation reads it.

    Returns:
        Nats, (N,) float32; NaN where a token is not scored.

    Raises:
        ValueError: If the stride does not fit, or there are fewer than two tokens.
    """
    T = net.config.block_size
    if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride <= T:
        raise ValueError(f"stride={stride!r} must be a whole number from 1 to the model's block_size={T}")
    windows = _windows(segments or [(0, len(tokens))], T, stride, fill=segments is not None)
    if not len(windows):
        raise ValueError(f"the text has {len(tokens)} tokens; two are the least to measure a loss")
    windows = windows[np.argsort(-windows[:, 1], kind="stable")]  # those of a length together
    batch_size = batch_size or max(1, FORWARD // T)
    device = net.transformer.wte.weight.device
    losses = np.full(len(tokens), np.nan, dtype=np.float32)
    was_training = net.training
    net.eval()
    try:
        for first in tqdm(range(0, len(windows), batch_size), unit="batch", leave=False, disable=None):
            starts, lengths, seen = windows[first : first + batch_size].T[:, :, None]  # each (B, 1)
            offsets = np.arange(lengths.max())
            inputs = starts + np.minimum(offsets, lengths - 1)  # (B, T), filled up at the end
            scored = (offsets >= seen) & (offsets < lengths)
            targets = (starts + offsets)[scored] + 1
            x = net.transformer(torch.from_numpy(tokens[inputs].astype(np.int64)).to(device))
            x = x[torch.from_numpy(scored).to(device)]  # (scored, C)
            y = torch.from_numpy(tokens[targets].astype(np.int64)).to(device)
            rows = max(1, LOGITS // net.config.padded_vocab_size)
            nats = [
                F.cross_entropy(net.lm_head(part).float(), ids, reduction="none")
                for part, ids in zip(x.split(rows), y.split(rows), strict=True)
            ]
            losses[targets] = torch.cat(nats).cpu().numpy()
    finally:
        net.train(was_training)
    return losses


def _windows(segments: Sequence[Segment], block_size: int, stride: int, *, fill: bool) -> np.ndarray:
    """First token, length, and positions that an earlier window has scored, of every window, (n, 3)."""
    windows = []
    for start, end in segments:
        done, last = start, end - 1  # tokens up to `done` are scored, and the last has none after it
        while done < last:
            reach = min(last, start + block_size if done == start else done + stride)
            begin = max(start, (reach if fill else done + stride) - block_size)
            windows.append((begin, reach - begin, done - begin))
            done = reach
    return np.array(windows, dtype=np.int64).reshape(-1, 3)


def evaluate(
    model: TextGenerator,
    tokens: np.ndarray,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    per_document: bool = False,
    words: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a text.

    Args:
        model: The model.
        tokens: The text, (N,), as from `lay_out` or a token store.
        stride, batch_size: As in `token_losses`; no stride is half of the block.
        per_document: Each document by itself, from the <|endoftext|> before it on, without the one after it.
        words: Words of the text, where they are counted.

    Returns:
        `stride`, `block_size`, and what `summarize` returns.

    Raises:
        ValueError: As `token_losses`.
    """
    block_size = model.net.config.block_size
    stride = -(-block_size // 2) if stride is None else stride
    parts = documents_in(tokens, tokenizers.end_of_text(model.tokenizer)) if per_document else None
    losses = token_losses(model.net, tokens, stride=stride, batch_size=batch_size, segments=parts)
    sizes = tokenizers.token_bytes(model.tokenizer)
    found = summarize(losses, tokens, sizes, block=block_size, words=words)
    return {"stride": stride, "block_size": block_size, **found}


def summarize(
    losses: np.ndarray, tokens: np.ndarray, token_bytes: np.ndarray, *, block: int, words: int | None = None
) -> dict[str, Any]:
    """Means over the tokens that were scored.

    Args:
        losses: As from `token_losses`, (N,).
        tokens: The ids, (N,).
        token_bytes: UTF-8 bytes of each id, (V,).
        block: Neighbouring tokens are not independent, so the standard error comes from the spread between
            blocks of this many, or fewer where there would not be 16 blocks.
        words: Of the text, where they are counted.

    Returns:
        `tokens` and `bytes` scored, `loss` and `standard_error` in nats per token, `perplexity`,
        `word_perplexity` and `bits_per_byte`; None where it cannot be said.
    """
    scored = ~np.isnan(losses)
    nats, ids = losses[scored].astype(np.float64), np.asarray(tokens)[scored]
    n, size, total = len(nats), int(token_bytes[ids].sum()), float(nats.sum())
    block = max(1, min(block, n // 16))
    means = nats[: n // block * block].reshape(-1, block).mean(1)
    return {
        "tokens": n,
        "bytes": size,
        "loss": total / n,
        "standard_error": float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None,
        "perplexity": _exp(total / n),
        "word_perplexity": _exp(total / words) if words else None,
        "bits_per_byte": total / math.log(2) / size if size else None,
    }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond it a float overflows


def lay_out(documents: Iterable[str], encoding: tiktoken.Encoding, *, separated: bool) -> np.ndarray:
    """Token ids of a text, (N,); documents that are separated stand between <|endoftext|>, as in training.

    Raises:
        ValueError: If the vocabulary lacks a character.
    """
    end = [np.array([tokenizers.end_of_text(encoding)], dtype=np.uint32)] if separated else []
    arrays = [*end]
    for document in documents:
        arrays += [tokenizers.encode_array(encoding, document), *end]
    return np.concatenate(arrays)


def documents_in(tokens: np.ndarray, end: int) -> list[Segment]:
    """Each document with the <|endoftext|> before it; the whole if there is none."""
    ends = np.flatnonzero(tokens == end).tolist()
    return [pair for pair in itertools.pairwise([*ends, len(tokens)]) if pair[1] - pair[0] > 1] or [
        (0, len(tokens))
    ]


def count_words(text: str) -> int:
    """Words between white space, counted as lm-evaluation-harness does."""
    return len(re.split(r"\s+", text))
