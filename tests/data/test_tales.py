"""The bundled corpus: reproducible, unambiguous, and as varied as it says."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import pytest
from support.runs import ROOT

from gpt_lightning.data.corpus.base import Split
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.tales import TalesCorpus
from gpt_lightning.data.tales import GRAMMAR, SEPARATOR, STORIES, Tales, options, tell

TOLD = list(Tales().stories_with_bits())
TEXTS = [text for text, _ in TOLD]
SPLITS: tuple[Split, ...] = ("train", "val")


def test_text_is_input_txt_byte_for_byte() -> None:
    assert Tales().text().encode() == (ROOT / "input.txt").read_bytes()


def test_documents_of_the_file_are_the_stories() -> None:
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    assert [part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n")] == TEXTS


def test_corpus_of_tales_has_the_documents_and_floors_of_the_file() -> None:
    file = TextFiles(str(ROOT / "input.txt"), val_fraction=0.1, floor=Tales())
    corpus = TalesCorpus(val_fraction=0.1)
    for split in SPLITS:
        stories = list(corpus.documents(split))
        assert stories == list(file.documents(split))
        assert [corpus.floor_bits(s) for s in stories] == [file.floor_bits(s) for s in stories]
    longer = TalesCorpus(stories=STORIES + 1)
    assert corpus.digest() == TalesCorpus(val_fraction=0.1).digest() != longer.digest()
    with pytest.raises(ValueError, match=r"data\.val_fraction=2 must be above 0"):
        TalesCorpus(val_fraction=2)


SLOT = re.compile(r"\[[^\]]+\]|\{[^}]+\}")
Rules = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Reader:
    """How far a text is read: what was told up to there, and what has to follow."""

    told: str = ""  # as the grammar has it, without the capitals that slots ask for
    capital: bool = False  # whether the next letter is one
    memory: tuple[tuple[str, str], ...] = ()
    bits: float = 0.0
    rest: Any = None  # ("say", text), ("remember", name, where it began) or ("expand", slot), and the rest

    def then(self, *items: tuple[Any, ...], **changes: Any) -> Reader:
        """With these items before the rest."""
        rest = self.rest
        for item in reversed(items):
            rest = (item, rest)
        return replace(self, **{"rest": rest, **changes})

    def recall(self, name: str, rules: Rules) -> str:
        """The text of {name} or {name.property}."""
        memory = dict(self.memory)
        first, _, key = (name if name.split(".")[0] in memory else f"hero.{name}").partition(".")
        if not key:
            return memory[first]
        (text,) = rules[f"{memory[first]}.{key}"]
        return text


def items(text: str) -> list[tuple[Any, ...]]:
    """The words and slots of a text of a rule."""
    parts = [("say", part) for part in SLOT.split(text)]
    slots = [("expand", slot) for slot in SLOT.findall(text)]
    return [item for pair in zip_longest(parts, slots) for item in pair if item]


def expanded(reader: Reader, slot: str, rules: Rules) -> list[Reader]:
    """One reader for each text that can stand in the place of a slot."""
    name, _, memory = slot[1:-1].partition(">")
    reader = replace(reader, capital=reader.capital or name[0].isupper())
    name = re.sub(r"\{(.+?)\}", lambda m: reader.recall(m[1], rules), name[0].lower() + name[1:])
    if slot[0] == "{":
        return [reader.then(*items(reader.recall(name, rules)))]
    end = [("remember", memory, len(reader.told))] if memory else []
    known = {text for _, text in reader.memory}
    weights = {text: 1 / (rank + 4) for rank, text in enumerate(rules[name]) if text not in known}
    total = sum(weights.values())
    return [
        reader.then(*items(text), *end, bits=reader.bits - math.log2(weight / total))
        for text, weight in weights.items()
    ]


def parses(text: str, rules: Rules = GRAMMAR) -> list[float]:
    """Bits of every series of draws that tells `text`, reading it from left to right."""
    text = re.sub(r"\b([Aa])n (?=[aeiou])", r"\1 ", text)  # the grammar writes a everywhere
    found: list[float] = []
    readers = [Reader().then(("expand", "[story]"))]
    while readers:
        reader = readers.pop()
        if reader.rest is None:
            found += [reader.bits] * (len(reader.told) == len(text))
            continue
        (kind, *values), rest = reader.rest
        reader = replace(reader, rest=rest)
        if kind == "expand":
            readers += expanded(reader, values[0], rules)
        elif kind == "remember":
            name, start = values
            readers.append(replace(reader, memory=(*reader.memory, (name, reader.told[start:]))))
        elif not (said := values[0]):
            readers.append(reader)
        else:
            seen = said[0].upper() + said[1:] if reader.capital else said
            if text.startswith(seen, len(reader.told)):
                readers.append(replace(reader, told=reader.told + said, capital=False))
    return found


def test_a_story_has_one_parse_and_its_probability() -> None:
    for text, bits in TOLD[:50]:
        assert parses(text) == [pytest.approx(bits)], text


def test_text_has_as_many_stories_as_asked() -> None:
    text = Tales(stories=7).text()
    assert text.count(SEPARATOR) == 6
    assert (ROOT / "input.txt").read_text(encoding="utf-8").startswith(f"{text}{SEPARATOR}\n")


def test_other_seed_tells_other_stories_which_are_the_same_each_time() -> None:
    text = Tales(seed=5, stories=3).text()
    assert text == Tales(seed=5, stories=3).text()
    assert not set(text.split(f"\n{SEPARATOR}\n")) & set(TEXTS)


def test_parser_finds_every_parse_of_an_ambiguous_text() -> None:
    rules = {"story": ("[First>memory] [second], {memory}", "[second]"), "first": ("x", "x y")}
    rules |= {"second": ("y z", "z", "x")}
    # three times 1/4 against 1/5, since the second x is out once it is remembered
    assert parses("X y z, x", rules) == [pytest.approx(-math.log2((5 / 9) ** 3))]
    rules["story"] = ("[first] [second]",)
    both = [5 / 9 * 15 / 37, 4 / 9 * 12 / 37]
    assert sorted(parses("x y z", rules)) == pytest.approx([-math.log2(chance) for chance in both])
    assert parses("x y", rules) == parses("x y z z z", rules) == parses("X z", rules) == []
    assert parses("x y x", rules) != []


def test_grammar_has_no_article_that_the_reader_would_take_for_another() -> None:
    assert not any(re.search(r"\b[Aa]n\b", text) for texts in GRAMMAR.values() for text in texts)


@pytest.mark.parametrize("rule", sorted(GRAMMAR))
def test_no_text_of_a_rule_begins_another(rule: str) -> None:
    assert len(set(GRAMMAR[rule])) == len(GRAMMAR[rule])
    texts = [text for text in GRAMMAR[rule] if "[" not in text and "{" not in text]
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
    assert GRAMMAR["dearest"] == ("dearest", "greatest", "only", "secret")
    chances = {"dearest": 105 / 319, "greatest": 84 / 319, "only": 70 / 319, "secret": 60 / 319}
    assert options("dearest", {}) == pytest.approx(chances)
    # what is remembered is left out: 105 + 84 + 60 = 249
    assert options("dearest", {"x": "only"})["greatest"] == pytest.approx(84 / 249)


def test_frequencies_agree_with_the_weights() -> None:
    months = GRAMMAR["month"]
    pattern = re.compile(r"\bin (" + "|".join(months) + r")\b")
    counts = Counter(found[1] for text in TEXTS if (found := pattern.search(text)))
    n, total = sum(counts.values()), sum(1 / (rank + 4) for rank in range(len(months)))
    expected = {month: n / (rank + 4) / total for rank, month in enumerate(months)}
    chi2 = sum((counts[month] - expected[month]) ** 2 / expected[month] for month in months)
    assert chi2 < 31.3  # exceeded once in a thousand times, with 11 degrees of freedom


def test_stories_do_not_repeat() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == STORIES


def test_pronouns_agree_with_the_hero_and_the_treasure_returns() -> None:
    girls, boys = set(GRAMMAR["girl"]), set(GRAMMAR["boy"])
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
