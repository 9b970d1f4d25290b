"""The loss of a model on a text.

N tokens of the text, B windows in a forward, T positions of the longest of them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypedDict

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.windows import scoring_windows
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.gpt import CausalLM

LOGITS = 1 << 24  # computed at once, 64 MB
FORWARD = 8192  # tokens in a forward, by default


class Result(TypedDict, total=False):
    """What was found: means over the scored tokens, None where undefined; some keys belong to the command."""

    checkpoint: str
    text: str  # its file, or its corpus and split
    tokens: int
    bytes: int
    loss: float  # nats per token
    standard_error: float | None
    perplexity: float
    bits_per_byte: float | None
    floor_bits_per_byte: float | None  # the corpus entropy, where it is known
    stride: int  # tokens, as block_size
    block_size: int
    bleu: float


@torch.inference_mode()
def token_losses(
    net: CausalLM,
    tokens: np.ndarray,
    *,
    stride: int,
    end: int | None = None,
    batch_size: int | None = None,
) -> np.ndarray:
    """The loss of every token but the first, given the tokens before it.

    Each token is scored once, in the first of `scoring_windows` that contains it: with at least
    block_size - stride tokens of context, or its document from the beginning, or all there are. A smaller
    stride gives more context and takes up to block_size / stride times as long.

    Args:
        net: The model, in evaluation mode.
        tokens: Ids, (N,).
        stride: Tokens by which the window advances, at most block_size.
        end: The end-of-text token before each document; None takes no notice of documents.
        batch_size: Windows in a forward; None is as many as have about 8,000 tokens.

    Returns:
        Nats, (N,) float32; NaN where a token is not scored.

    Raises:
        ValueError: If the stride does not fit, or there are fewer than two tokens.
    """
    T = net.config.block_size
    if type(stride) is not int or not 1 <= stride <= T:
        raise ValueError(f"stride={stride!r} must be a whole number from 1 to the model's block_size={T}")
    windows = scoring_windows(tokens, block_size=T, stride=stride, end=end)
    if not len(windows):
        raise ValueError(f"the text has {len(tokens)} tokens; two are the least to measure a loss")
    windows = windows[np.argsort(-windows[:, 1], kind="stable")]  # windows of equal length together
    batch_size = batch_size or max(1, FORWARD // T)
    device = net.device
    losses = np.full(len(tokens), np.nan, dtype=np.float32)
    for first in tqdm(range(0, len(windows), batch_size), unit="batch", leave=False, disable=None):
        starts, lengths, seen = windows[first : first + batch_size].T[:, :, None]  # each (B, 1)
        offsets = np.arange(lengths.max())
        inputs = starts + np.minimum(offsets, lengths - 1)  # (B, T), filled up at the end
        scored = (offsets >= seen) & (offsets < lengths)
        targets = (starts + offsets)[scored] + 1
        x = net.hidden(torch.from_numpy(tokens[inputs].astype(np.int64)).to(device))
        x = x[torch.from_numpy(scored).to(device)]  # (scored, C)
        y = torch.from_numpy(tokens[targets].astype(np.int64)).to(device)
        rows = max(1, LOGITS // net.config.padded_vocab_size)
        nats = [
            F.cross_entropy(net.lm_head(part).float(), ids, reduction="none")
            for part, ids in zip(x.split(rows), y.split(rows), strict=True)
        ]
        losses[targets] = torch.cat(nats).cpu().numpy()
    return losses


def evaluate(
    model: TextGenerator,
    tokens: np.ndarray,
    *,
    counted: np.ndarray | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
) -> Result:
    """Loss, perplexity and bits per byte of a text.

    Args:
        model: The model.
        tokens: The text, (N,), as from `lay_out` or a token store.
        counted: Tokens that the means are over, (N,) bool; None takes all.
        stride, batch_size: As in `token_losses`; the default stride is half of the block.

    Raises:
        ValueError: As `token_losses`.
    """
    block_size = model.net.config.block_size
    stride = -(-block_size // 2) if stride is None else stride
    end = model.tokenizer.eot_token
    losses = token_losses(model.net, tokens, stride=stride, end=end, batch_size=batch_size)
    if counted is not None:
        losses[~counted] = np.nan
    found = summarize(losses, tokens, tokenizers.token_bytes(model.tokenizer), block=block_size)
    return {**found, "stride": stride, "block_size": block_size}


def summarize(losses: np.ndarray, tokens: np.ndarray, token_bytes: np.ndarray, *, block: int) -> Result:
    """Means over the tokens that were scored.

    Args:
        losses: As from `token_losses`, (N,).
        tokens: The ids, (N,).
        token_bytes: UTF-8 bytes of each id, (V,).
        block: Tokens per block. The standard error is that of block means, because neighbouring tokens are
            not independent; blocks are smaller if there would be fewer than 16.
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
        "perplexity": math.exp(min(total / n, 700.0)),  # beyond it a float overflows
        "bits_per_byte": total / math.log(2) / size if size else None,
    }


def lay_out(documents: Iterable[str], encoding: tiktoken.Encoding, *, separated: bool) -> np.ndarray:
    """Token ids of a text, (N,); separated documents have <|endoftext|> around them, as in training.

    Raises:
        ValueError: If the vocabulary lacks a character.
    """
    end = [np.array([encoding.eot_token], dtype=np.uint32)] if separated else []
    arrays = [*end]
    for document in documents:
        arrays += [tokenizers.encode_array(encoding, document), *end]
    return np.concatenate(arrays)
