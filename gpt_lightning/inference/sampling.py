"""From logits to the next token: pure functions on batches.

B sequences, V vocabulary; an id with logit -inf is never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

NUCLEUS_GUESS = 1024  # ids among which the nucleus is searched before all are sorted
# Type, bounds and remedy of each setting. Within these bounds, float32 neither overflows nor becomes 0.
RANGES: dict[str, tuple[type, float, float, str]] = {
    "max_new_tokens": (int, 1, math.inf, ""),
    "temperature": (float, 1e-20, 1e20, ", or 0 to take the most likely token"),
    "top_k": (int, 1, math.inf, ", or null to keep all tokens"),
    "top_p": (float, 1e-20, 1, ", where 1 keeps all tokens"),
    "min_p": (float, 0, 1, ", where 0 keeps all tokens"),
    "repetition_penalty": (float, 0.01, 100, ", where 1 is no penalty"),
    "num_samples": (int, 1, 1 << 20, ""),
    "seed": (int, 0, (1 << 62) - 1, ""),  # torch takes 64 bits, and every text adds one
}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How texts are generated.

    Args:
        max_new_tokens: Tokens after the prompt, at most.
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Keeps the k most likely tokens; None keeps all.
        top_p: Keeps the fewest most likely tokens that together have this probability.
        min_p: Keeps tokens at least this fraction as likely as the most likely one.
        repetition_penalty: Divides positive logits of tokens already in the text, prompt included, and
            multiplies negative ones.
        num_samples: Continuations of each prompt.
        seed: The same seed gives the same text; sample i of prompt j draws from its own generator,
            seeded with seed + j * num_samples + i.
        stop: A text ends before this one, or before any of several; None for none.

    Raises:
        ValueError: If a value is out of its range; names the key, the value and the remedy.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_samples: int = 1
    seed: int = 0
    stop: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for key, (kind, least, most, also) in RANGES.items():
            value = getattr(self, key)
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            special = value is None if key == "top_k" else key == "temperature" and number and value == 0
            if not special and not (number and least <= value <= most):
                span = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
                name = "a whole number" if kind is int else "a number"
                raise ValueError(f"{key}={value!r} must be {name} {span}{also}")
        listed = isinstance(self.stop, Sequence)
        if self.stop is not None and not (listed and all(isinstance(t, str) and t for t in self.stops)):
            raise ValueError(f"stop={self.stop!r} must be a text of at least one character, a list, or null")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts of `stop`."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingSettings:
        """Settings from keyword arguments of a user; an unknown one is a ValueError that lists all."""
        known = [field.name for field in fields(cls)]
        if unknown := values.keys() - set(known):
            raise ValueError(f"unknown setting {min(unknown)!r}; use {', '.join(known)}")
        return cls(**values)


def choose(
    logits: Tensor, uniform: Tensor, settings: SamplingSettings, *, seen: Tensor | None = None
) -> Tensor:
    """The next token of each sequence, (B,) int64.

    The order is that of `transformers`: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        logits: (B, V).
        uniform: A random number in [0, 1) per sequence, (B,); decides which token is drawn.
        settings: The filters; those that would keep everything are skipped.
        seen: The ids in each sequence's text, (B, V) bool, for the repetition penalty.
    """
    if settings.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits.argmax(-1)
    ids = None
    if settings.top_k is not None and settings.top_k < logits.size(-1):
        logits, ids = torch.topk(logits, settings.top_k)  # what follows sees k candidates, not V
    logits = logits / settings.temperature
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = min_p(logits, settings.min_p)
    drawn = draw(logits, uniform)
    return drawn if ids is None else ids.gather(1, drawn[:, None])[:, 0]


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the ids in `seen` (B, V) less likely, https://arxiv.org/abs/1909.05858 section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_p(logits: Tensor, p: float) -> Tensor:
    """-inf outside the fewest most likely ids that together have probability p; ties all stay.

    Source: nucleus sampling, https://arxiv.org/abs/1904.09751.
    """
    probability = logits.softmax(-1)
    for n in (NUCLEUS_GUESS, logits.size(-1)):  # the nucleus is small nearly always
        largest = probability.topk(min(n, logits.size(-1))).values
        nucleus = largest.cumsum(-1) - largest < p  # the more likely ids do not reach p
        if not nucleus[:, -1].any():
            break
    smallest = largest.masked_fill(~nucleus, math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(probability < smallest, -math.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """-inf at ids less than p times as likely as the likeliest, https://arxiv.org/abs/2407.01082."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The index (B,) at which the cumulative probability passes `uniform` (B,)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = torch.searchsorted(cumulative, total)  # where rounding would pass the last possible id
    return torch.minimum(index, last)[:, 0]
