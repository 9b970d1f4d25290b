"""What a model expected at each position of a text, and where a head of its attention looked.

T tokens of the text, V vocabulary, H heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt_lightning.inference.text import TextGenerator

LONGEST = 1024  # tokens of a text that are inspected; the attention of a head has as many squared
ALTERNATIVES = 5
ROWS = 64  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Inspection:
    """A text as the model read it in one forward.

    Args:
        tokens: Text of each token; bytes that are no whole character as \\xNN.
        nats: Loss of each token, in nats; None of the first, which nothing precedes.
        expected: The most probable tokens at each position with their probabilities, most probable first.
        n_vocab: Size of the vocabulary.
    """

    tokens: list[str]
    nats: list[float | None]
    expected: list[list[tuple[str, float]]]
    n_vocab: int


@torch.inference_mode()
def inspect(model: TextGenerator, ids: list[int]) -> Inspection:
    """The losses of the first tokens of a text, as many as the model reads at once, at most LONGEST.

    Raises:
        ValueError: If there are fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; two are the least to see a loss")
    ids = ids[: min(model.net.config.block_size, LONGEST)]
    idx = torch.tensor([ids], device=model.net.device)
    x = model.net.hidden(idx)[0, :-1]  # (T - 1, C)
    nats: list[float | None] = [None]
    expected: list[list[tuple[str, float]]] = [[]]
    for part, targets in zip(x.split(ROWS), idx[0, 1:].split(ROWS), strict=True):
        log_p = model.net.lm_head(part).float().log_softmax(-1)  # (rows, V)
        nats += (-log_p.gather(1, targets[:, None])[:, 0]).tolist()
        values, found = log_p.exp().topk(min(ALTERNATIVES, model.tokenizer.n_vocab))
        for row, probabilities in zip(found.tolist(), values.tolist(), strict=True):
            names = [token_text(model, token) for token in row]
            expected.append(list(zip(names, probabilities, strict=True)))
    return Inspection([token_text(model, token) for token in ids], nats, expected, model.tokenizer.n_vocab)


@torch.inference_mode()
def attention(model: TextGenerator, ids: list[int], *, layer: int, head: int) -> Tensor | None:
    """The weights with which a head reads earlier tokens, of the tokens that `inspect` shows.

    Returns:
        (T, T) float32 on the CPU; row t has the weights of token t and sums to 1. None if the network does
        not use torch's attention.

    Raises:
        ValueError: If there is no such layer or head.
    """
    ids = ids[: min(model.net.config.block_size, LONGEST)]
    with _Attentions() as seen:
        model.net.hidden(torch.tensor([ids], device=model.net.device))
    if not seen.inputs:
        return None
    for key, value, most in (("layer", layer, len(seen.inputs)), ("head", head, seen.inputs[0][0].size(1))):
        if not 0 <= value < most:
            raise ValueError(f"{key}={value} must be a whole number from 0 to {most - 1}")
    q, k = (tensor[0].float().cpu() for tensor in seen.inputs[layer])  # (H, T, D) each
    scores = q[head] @ k[head * len(k) // len(q)].T / math.sqrt(q.size(-1))  # (T, T)
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)


class _Attentions(TorchFunctionMode):
    """Keeps the queries and keys of each call of torch's attention while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            self.inputs.append(args[:2])
        return function(*args, **(kwargs or {}))


def token_text(model: TextGenerator, token: int) -> str:
    """The text of a token; bytes that are no whole character as \\xNN."""
    try:
        return model.tokenizer.decode_single_token_bytes(token).decode("utf-8", errors="backslashreplace")
    except KeyError:  # the model may have ids that no token has
        return f"<{token}>"
