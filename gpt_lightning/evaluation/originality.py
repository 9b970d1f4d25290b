"""Whether a model recites: what its texts have in common with the training text, and how varied they are."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt_lightning.data.corpus.base import Corpus, Split

log = logging.getLogger(__name__)

SEPARATOR = "\0"  # between documents, so that no match goes over their boundary
SEARCHED = 1 << 24  # characters; the hashes of as many take half a gigabyte
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


def originality(samples: Sequence[str], training: str) -> dict[str, float | None]:
    """Figures that tell learning from recital; next to those of unseen text they mean something.

    Returns:
        `longest_match_mean` and `longest_match_max` in characters, `seen_4grams` and `seen_8grams` as shares,
        and distinct-n for n = 1, 2, 3; n-grams are of words.
    """
    longest = longest_matches(samples, training)
    return {
        "longest_match_mean": sum(longest) / len(longest) if longest else None,
        "longest_match_max": max(longest, default=None),
        **{f"seen_{n}grams": seen_share(samples, training, n) for n in (4, 8)},
        **{f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)},
    }


def excerpt(corpus: Corpus, split: Split) -> str:
    """The first 16 million characters of a split, its documents divided by a character that no text has."""
    parts, size = [], 0
    for document in corpus.documents(split):
        parts.append(document)
        size += len(document)
        if size > SEARCHED:
            log.info("samples are compared with the first %d characters of the %s split", size, split)
            break
    return (SEPARATOR if corpus.separated else "").join(parts)


def alike(text: str, samples: Sequence[str]) -> list[str]:
    """Pieces of a text, as many and as long as the samples; of documents, their beginnings."""
    if SEPARATOR in text:
        return [piece[: len(sample)] for piece, sample in zip(text.split(SEPARATOR), samples, strict=False)]
    ends = list(itertools.accumulate(map(len, samples), initial=0))
    return [text[start:end] for start, end in itertools.pairwise(ends) if text[start:end]]


def longest_matches(samples: Sequence[str], training: str) -> list[int]:
    """Characters of the longest passage of each sample that stands word for word in the training text.

    Passages of a length are compared by rolling hashes of 64 bits, and the length is found by bisection,
    because every part of a passage that occurs occurs as well.
    """
    text = _Hashes(training)
    hashed = [_Hashes(sample) for sample in samples]
    known: dict[int, list[bool]] = {}  # for a length, whether each sample has a passage of it

    def occurs(length: int, number: int) -> bool:
        if length not in known:
            known[length] = text.contains(hashed, length)
        return known[length][number]

    longest = []
    for number, sample in enumerate(samples):
        low, high = 0, min(len(sample), len(training))
        while low < high:
            middle = (low + high + 1) // 2 if high <= 2 * low + 8 else 2 * low + 4  # most matches are short
            low, high = (middle, high) if occurs(middle, number) else (low, middle - 1)
        longest.append(low)
    return longest


class _Hashes:
    """Hashes of all passages of a text: sums of character times BASE to the power of its place, mod 2^64."""

    def __init__(self, text: str):
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
        powers = _powers(BASE, len(codes))
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers, dtype=np.uint64)])
        self.back = _powers(pow(BASE, -1, 1 << 64), len(codes) + 1)  # moves a passage to the beginning

    def of_length(self, length: int) -> np.ndarray:
        places = max(0, len(self.sums) - length)
        return (self.sums[length:] - self.sums[:places]) * self.back[:places]

    def contains(self, samples: Sequence[_Hashes], length: int) -> list[bool]:
        """Whether a passage of this length of each sample occurs here."""
        wanted = [sample.of_length(length) for sample in samples]
        sought = np.unique(np.concatenate(wanted))
        possible = np.zeros(1 << 20, dtype=bool)
        possible[sought >> np.uint64(44)] = True
        mine = self.of_length(length)
        mine = mine[possible[mine >> np.uint64(44)]]  # most are sorted out by their first bits
        place = np.searchsorted(sought, mine).clip(max=max(0, len(sought) - 1))
        found = np.unique(mine[sought[place] == mine])
        return [bool(np.isin(hashes, found).any()) for hashes in wanted]


def _powers(base: int, n: int) -> np.ndarray:
    factors = np.full(n, base, dtype=np.uint64)
    factors[:1] = 1
    return np.cumprod(factors, dtype=np.uint64)


def seen_share(samples: Sequence[str], training: str, n: int) -> float | None:
    """Share of the samples' different n-grams of words that occur in the training text."""
    wanted = {gram for sample in samples for gram in ngrams(sample, n)}
    seen = {gram for gram in ngrams(training, n) if gram in wanted}
    return len(seen) / len(wanted) if wanted else None


def distinct(samples: Sequence[str], n: int) -> float | None:
    """Different n-grams of words among all n-grams, distinct-n of https://arxiv.org/abs/1510.03055."""
    grams = [gram for sample in samples for gram in ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else None


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Runs of n words; a punctuation mark is a word, and so is what separates documents."""
    words = re.findall(r"\w+|[^\w\s]", text)
    return zip(*(itertools.islice(words, i, None) for i in range(n)), strict=False)
