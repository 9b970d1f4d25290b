"""The bundled corpus: reproducible, unambiguous, and as varied as it says."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

import pytest
from support import ROOT

from gpt_lightning.data.tales import RULES, SEPARATOR, STORIES, Tales, options, tell

TOLD = list(Tales().stories_with_bits())
TEXTS = [text for text, _ in TOLD]


def test_command_reproduces_input_txt_byte_for_byte() -> None:
    result = subprocess.run([sys.executable, "-m", "gpt_lightning.data.tales"], capture_output=True, cwd=ROOT)
    assert result.stdout == (ROOT / "input.txt").read_bytes()
    floor = sum(bits for _, bits in TOLD) / sum(len(text.encode()) for text in TEXTS)
    assert f"{floor:.4f} bits per byte" in result.stderr.decode()


def test_documents_of_the_file_are_the_stories() -> None:
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    assert [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")] == TEXTS


class Open(Exception):
    """A draw that is not decided yet."""


def beginning(decided: list[str]) -> str:
    """What the first draws tell for certain: told with two different ends, as far as both agree."""
    told = []
    for mark in ("\0", "\1"):
        remaining = iter(decided)

        def choose(rule: str, chances: Mapping[str, float], mark: str = mark, draws=remaining) -> str:
            return next(draws, mark)

        try:
            told.append(tell(choose))
        except KeyError:  # a property of what is not decided yet
            return ""
    first, second = told
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    return re.sub(r"\b([Aa])n? ?$", r"\1", first[:same])  # a or an depends on what follows


def parses(text: str) -> list[float]:
    """Bits of every series of draws that tells `text`, found by following all that agree with it so far."""
    found: list[float] = []
    undecided: list[list[str]] = [[]]
    while undecided:
        decided = undecided.pop()
        draws, bits = iter(decided), 0.0
        fresh: Mapping[str, float] = {}

        def choose(rule: str, chances: Mapping[str, float], draws=draws) -> str:
            nonlocal bits, fresh
            drawn = next(draws, None)
            if drawn is None:
                fresh = chances
                raise Open
            bits -= math.log2(chances[drawn])
            return drawn

        try:
            if tell(choose) == text:
                found.append(bits)
        except Open:
            undecided += [[*decided, o] for o in fresh if text.startswith(beginning([*decided, o]))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_a_story_has_one_parse_and_its_probability(number: int) -> None:
    text, bits = TOLD[number]
    assert parses(text) == [pytest.approx(bits)]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_text_of_a_rule_begins_another(rule: str) -> None:
    assert len(set(RULES[rule])) == len(RULES[rule])
    texts = [text for text in RULES[rule] if "[" not in text and "{" not in text]
    for text in texts:
        for other in texts:
            assert text is other or not (other + " ").startswith(text + " "), (text, other)


def test_probabilities_of_every_draw_sum_to_one() -> None:
    draw = random.Random(0)

    def choose(rule: str, chances: Mapping[str, float]) -> str:
        assert sum(chances.values()) == pytest.approx(1)
        assert min(chances.values()) > 0
        return draw.choice(list(chances))

    for _ in range(50):
        tell(choose)


def test_weights_by_hand() -> None:
    # four texts weigh 1/4, 1/5, 1/6 and 1/7, in sum 319/420
    assert RULES["dearest"] == ("dearest", "greatest", "only", "secret")
    chances = {"dearest": 105 / 319, "greatest": 84 / 319, "only": 70 / 319, "secret": 60 / 319}
    assert options("dearest", {}) == pytest.approx(chances)
    # what is remembered is left out: 105 + 84 + 60 = 249
    assert options("dearest", {"x": "only"})["greatest"] == pytest.approx(84 / 249)


def test_frequencies_agree_with_the_weights() -> None:
    months = RULES["month"]
    pattern = re.compile(r"\bin (" + "|".join(months) + r")\b")
    counts = Counter(found[1] for text in TEXTS if (found := pattern.search(text)))
    n, total = sum(counts.values()), sum(1 / (rank + 4) for rank in range(len(months)))
    expected = {month: n / (rank + 4) / total for rank, month in enumerate(months)}
    chi2 = sum((counts[month] - expected[month]) ** 2 / expected[month] for month in months)
    assert chi2 < 31.3  # exceeded once in a thousand times, with 11 degrees of freedom


def test_stories_do_not_repeat() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == STORIES


def test_pronouns_agree_with_the_hero_and_the_treasure_returns() -> None:
    girls, boys = set(RULES["girl"]), set(RULES["boy"])
    for text in TEXTS:
        hero = next(word for word in re.findall(r"named (\w+)", text) if word in girls | boys)
        pronoun = re.search(r"\b(His|Her|For his|For her)\b", text)
        assert pronoun, text
        assert pronoun[1].lower().endswith("her" if hero in girls else "his")
        assert text.count(hero) >= 3
        treasure = re.search(r"(?:treasure was|got) an? \w+ (\w+),", text)
        assert treasure, text
        assert len(re.findall(rf"\b{treasure[1]}\b", text)) >= 3


def test_articles_fit_their_words() -> None:
    for text in TEXTS:
        assert not re.search(r"\b[Aa] [aeiou]", text)
        assert not re.search(r"\b[Aa]n [^aeiou]", text)


def test_foreign_text_has_no_bits() -> None:
    corpus = Tales(stories=3)
    assert corpus.bits(TEXTS[2]) == pytest.approx(TOLD[2][1])
    assert corpus.bits(TEXTS[3]) is None
    assert corpus.bits(TEXTS[0] + " ") is None


def test_no_stories_are_refused() -> None:
    with pytest.raises(ValueError, match="stories=0"):
        Tales(stories=0)
