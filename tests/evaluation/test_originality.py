"""What samples share with the training text, beside a search by brute force."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.evaluation.originality import (
    alike,
    distinct,
    excerpt,
    longest_matches,
    originality,
    seen_share,
)

AB = st.text(alphabet="ab日", max_size=40)


def brute_force(sample: str, training: str) -> int:
    pieces = (sample[i:j] for i in range(len(sample)) for j in range(i, len(sample) + 1))
    return max((len(piece) for piece in pieces if piece in training), default=0)


@settings(max_examples=300, deadline=None)
@given(samples=st.lists(AB, min_size=1, max_size=4), training=AB)
@example(samples=["ab" * 20], training="ab" * 20)
@example(samples=["", "a"], training="")
def test_longest_match_equals_brute_force(samples: list[str], training: str) -> None:
    assert longest_matches(samples, training) == [brute_force(sample, training) for sample in samples]


def test_match_of_any_length_is_found_in_a_long_text() -> None:
    training = "".join(random.Random(0).choices("abcdefg ", k=200_000))
    passages = [training[start : start + n] for start, n in ((5, 1000), (199_000, 777), (100_000, 130))]
    assert longest_matches([f"#{passage}#" for passage in passages], training) == [1000, 777, 130]


def test_share_of_ngrams_by_hand() -> None:
    # pairs of the sample: the cat | cat sat | sat . ; the first two are in the training text
    assert seen_share(["The cat sat."], "The cat sat down. It sat there.", 2) == 2 / 3
    assert seen_share(["one"], "one", 2) is None


def test_distinct_by_hand() -> None:
    assert distinct(["a b a b"], 1) == 2 / 4
    assert distinct(["a b a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct(["a b", "a b"], 2) == 1 / 2  # over all samples together
    assert distinct([""], 1) is None


def test_recital_and_invention_are_told_apart() -> None:
    training = "the old fox ran over the green hill and came home before the night fell"
    recital = "fox ran over the green hill and came home"
    recited, invented = originality([recital], training), originality(["a hen swam under blue ice"], training)
    assert recited["longest_match_max"] == recited["longest_match_mean"] == len(recital)
    assert (recited["seen_4grams"], invented["seen_4grams"]) == (1.0, 0.0)
    assert invented["longest_match_max"] < 6


def test_pieces_to_compare_with_have_the_samples_lengths(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(f"story number {i}" for i in range(30)))
    stories = excerpt(TextFiles(str(tmp_path / "stories.txt")), "val")
    assert alike(stories, ["12345", "1"]) == ["story", "s"]
    (tmp_path / "text.txt").write_text("0123456789" * 10)
    text = excerpt(TextFiles(str(tmp_path / "text.txt")), "val")
    assert alike(text, ["abc", "ab"]) == ["012", "34"]
    assert alike(text, ["abc" * 10]) == [text]
