"""Overlap of samples with the training text, compared with a slow reference."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.evaluation.originality import (
    distinct,
    excerpt,
    longest_matches,
    originality,
    pieces_like,
    seen_share,
)

TEXT = st.lists(st.sampled_from(["a", "b", "日", ".", "\0", "ab"]), max_size=25).map(" ".join)


def slow_match(sample: str, training: str) -> int:
    """The longest run of words of the sample in the training text, by comparing lists of words."""
    words, text = sample.split(), training.split()
    runs = [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    return max((len(r) for r in runs if any(text[k : k + len(r)] == r for k in range(len(text)))), default=0)


@settings(max_examples=300, deadline=None)
@given(samples=st.lists(TEXT, min_size=1, max_size=4), training=TEXT)
@example(samples=["a b " * 20], training="a b " * 20)
@example(samples=["", "a"], training="")
def test_longest_match_equals_a_slow_reference(samples: list[str], training: str) -> None:
    assert longest_matches(samples, training) == [slow_match(sample, training) for sample in samples]


def test_match_of_any_length_is_found_in_a_long_text() -> None:
    training = random.Random(0).choices(["the", "a", "cat", "dog", "sees", ".", ",", "old"], k=40_000)
    passages = [training[start : start + n] for start, n in ((5, 1000), (39_000, 777), (20_000, 130))]
    samples = [f"#{' '.join(passage)}#" for passage in passages]
    assert longest_matches(samples, " ".join(training)) == [1000, 777, 130]


def test_match_is_of_whole_words_and_ignores_white_space() -> None:
    assert longest_matches(["at sat on"], "the cat sat on it") == [2]
    assert longest_matches(["cat\nsat"], "the  cat sat on it") == [2]


def test_share_of_ngrams_by_hand() -> None:
    # pairs of the sample: the cat | cat sat | sat . ; the first two are in the training text
    assert seen_share(["The cat sat."], "The cat sat down. It sat there.", 2) == 2 / 3
    assert seen_share(["one"], "one", 2) is None


def test_distinct_by_hand() -> None:
    assert distinct(["a b a b"], 1) == 2 / 4
    assert distinct(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct(["a b", "a b"], 2) == 1 / 2  # over all samples together
    assert distinct([""], 1) is None


def test_recited_and_new_text_have_different_figures() -> None:
    training = "the old fox ran over the green hill and came home before the night fell"
    recital = "fox ran over the green hill and came home"
    recited, invented = originality([recital], training), originality(["a hen swam under blue ice"], training)
    assert recited["longest_match_words_max"] == recited["longest_match_words_mean"] == 9
    assert (recited["seen_4grams"], invented["seen_4grams"]) == (1.0, 0.0)
    assert invented["longest_match_words_max"] < 2


def test_comparison_pieces_have_the_lengths_of_the_samples(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"story number {i}" for i in range(30)))
    stories = excerpt(TextFiles(str(tmp_path / "stories.txt")), "val")
    assert pieces_like(stories, ["12345", "1"]) == ["story", "s"]
    (tmp_path / "text.txt").write_text("0123456789" * 10)
    text = excerpt(TextFiles(str(tmp_path / "text.txt")), "val")
    assert pieces_like(text, ["abc", "ab"]) == ["012", "34"]
    assert pieces_like(text, ["abc" * 10]) == [text]
