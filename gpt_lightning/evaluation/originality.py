"""Whether a model recites: the overlap of its texts with the training text, and their variety."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence

from gpt_lightning.data.corpus.base import Corpus, Split

log = logging.getLogger(__name__)

SEPARATOR = "\0"  # between documents, so that no match extends from one to the next
SEARCHED = 1 << 24  # characters; one comparison with as many takes about five milliseconds
Figures = dict[str, float | None]  # by name; None where there are no texts


def originality(samples: Sequence[str], training: str) -> Figures:
    """Overlap with a training text, to be compared with that of unseen text, and variety.

    Longest matches are in words, n-grams of words, shares from 0 to 1.
    """
    longest = longest_matches(samples, training)
    return {
        "longest_match_words_mean": sum(longest) / len(longest) if longest else None,
        "longest_match_words_max": max(longest, default=None),
        **{f"seen_{n}grams": seen_share(samples, training, n) for n in (4, 8)},
        **variety(samples),
    }


def variety(samples: Sequence[str]) -> Figures:
    """distinct-n of the samples for n = 1, 2 and 3."""
    return {f"distinct_{n}": distinct(samples, n) for n in (1, 2, 3)}


def excerpt(corpus: Corpus, split: Split) -> str:
    """The first 16 million characters of a split, with SEPARATOR between documents."""
    parts, size = [], 0
    for document in corpus.documents(split):
        parts.append(document)
        size += len(document)
        if size > SEARCHED:
            log.info("samples are compared with the first %d characters of the %s split", size, split)
            break
    return (SEPARATOR if corpus.separated else "").join(parts)


def pieces_like(text: str, samples: Sequence[str]) -> list[str]:
    """Pieces of a text, as many and as long as the samples; of documents, their beginnings."""
    if SEPARATOR in text:
        return [piece[: len(sample)] for piece, sample in zip(text.split(SEPARATOR), samples, strict=False)]
    ends = list(itertools.accumulate(map(len, samples), initial=0))
    return [text[start:end] for start, end in itertools.pairwise(ends) if text[start:end]]


def longest_matches(samples: Sequence[str], training: str) -> list[int]:
    """Length in words of the longest passage of each sample that occurs in the training text.

    White space does not count. `length` only grows while `start` moves on, so a sample of n words takes
    at most 2 n searches.
    """
    searched = f" {' '.join(words(training))} "
    longest = []
    for sample in map(words, samples):
        length = 0
        for start in range(len(sample)):
            while start + length < len(sample) and (
                f" {' '.join(sample[start : start + length + 1])} " in searched
            ):
                length += 1
        longest.append(length)
    return longest


def seen_share(samples: Sequence[str], training: str, n: int) -> float | None:
    """Share of the samples' different n-grams that occur in the training text."""
    wanted = {gram for sample in samples for gram in ngrams(sample, n)}
    seen = {gram for gram in ngrams(training, n) if gram in wanted}
    return len(seen) / len(wanted) if wanted else None


def distinct(samples: Sequence[str], n: int) -> float | None:
    """Different n-grams among all n-grams, distinct-n of https://arxiv.org/abs/1510.03055."""
    grams = [gram for sample in samples for gram in ngrams(sample, n)]
    return len(set(grams)) / len(grams) if grams else None


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Runs of n words."""
    found = words(text)
    return zip(*(itertools.islice(found, i, None) for i in range(n)), strict=False)


def words(text: str) -> list[str]:
    """The words of a text; each punctuation mark is one, and so is SEPARATOR."""
    return re.findall(r"\w+|[^\w\s]", text)
