"""Short stories for children from a seeded probabilistic grammar: a corpus whose entropy is known exactly.

`Tales().text()` is the bundled `input.txt`.

The grammar is in tales.txt. `rule = text | text` lists the texts of a rule from common to rare: the text of
rank r = 0, 1, ... has a weight of 1 / (r + 4), a flat form of Zipf's law. In a text
  [rule]         draws one of the rule's texts; the rule's name may be told by the story: `[{kind}.home]`
  [rule>memory]  draws and remembers; what is remembered is not drawn again in the same story
  {memory}       says what is remembered; {memory.property} says the property of it (a rule of a single text)
  {she}          is a property of the hero, as {him} and {his} are: the names decide
A slot whose name has a capital letter says its text with one.
Draws are made where their words stand and no two series of draws tell the same story, so that the bits of the
draws are the bits of the text, its end included.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

SEPARATOR = "<|endoftext|>"  # alone on the line between two stories
SEED, STORIES = 1337, 1550  # the bundled input.txt


def _parse(grammar: str) -> dict[str, tuple[str, ...]]:
    """The rules of a grammar text, with the pronouns of every name and the skill of every kind and place."""
    rules = {}
    for line in re.sub(r"\n +", " ", grammar.strip()).splitlines():
        if line:
            name, texts = line.split(" = ", 1)
            rules[name] = tuple(text.strip() for text in texts.split("|"))
    she, he = "she her her", "he him his"
    for names, pronouns in {"girl": she, "boy": he, "woman": she, "man": he}.items():
        for name in rules[names]:
            for key, pronoun in zip(("she", "him", "his"), pronouns.split(), strict=True):
                rules[f"{name}.{key}"] = (pronoun,)
    for rule in [rule for rule in rules if rule.endswith((".kind", ".place"))]:
        for text in rules[rule]:
            rules[f"{text}.skill"] = (rule.split(".")[0],)
    return rules


GRAMMAR = _parse(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
SLOT = re.compile(r"\[(?P<rule>[^\]>]+)(?:>(?P<memory>\w+))?\]|\{(?P<recall>[\w.]+)\}")


def options(rule: str, memory: dict[str, str]) -> dict[str, float]:
    """Texts that a rule can draw and their probabilities, which sum to 1; what is remembered is left out."""
    known = set(memory.values())
    weights = {text: 1 / (rank + 4) for rank, text in enumerate(GRAMMAR[rule]) if text not in known}
    total = sum(weights.values())
    return {text: weight / total for text, weight in weights.items()}


def tell(choose: Callable[[str, Mapping[str, float]], str], rule: str = "story") -> str:
    """Tells a story; `choose(rule, options)` picks one of the options, which maps texts to probabilities."""
    memory: dict[str, str] = {}

    def say(slot: re.Match[str]) -> str:
        name = slot["rule"] or slot["recall"]
        capital, name = name[0].isupper(), SLOT.sub(say, name[0].lower() + name[1:])
        if slot["rule"]:
            text = SLOT.sub(say, choose(name, options(name, memory)))
        else:
            remembered, _, key = (name if name.split(".")[0] in memory else f"hero.{name}").partition(".")
            text = memory[remembered]
            if key:
                text = SLOT.sub(say, GRAMMAR[f"{text}.{key}"][0])
        if slot["memory"]:
            memory[slot["memory"]] = text
        return text[0].upper() + text[1:] if capital else text

    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", SLOT.sub(say, f"[{rule}]"))


@dataclass(frozen=True)
class Tales:
    """The first `stories` stories of the seed's endless series."""

    seed: int = SEED
    stories: int = STORIES

    def __post_init__(self) -> None:
        if self.stories < 1:
            raise ValueError(f"stories={self.stories}; ask for at least 1 story")

    def stories_with_bits(self) -> Iterator[tuple[str, float]]:
        """Every story with its -log2 probability."""
        uniform = random.Random(self.seed).random  # the one method that is the same in every Python version
        bits = 0.0

        def choose(_: str, chances: Mapping[str, float]) -> str:
            nonlocal bits
            rest = uniform()
            for text, chance in chances.items():  # noqa: B007 (used after the loop)
                rest -= chance
                if rest < 0:
                    break
            bits -= math.log2(chance)
            return text

        for _ in range(self.stories):
            bits = 0.0
            yield tell(choose), bits

    def text(self) -> str:
        """The corpus: a story on each line, a line with the separator between two; it ends with a newline."""
        return f"\n{SEPARATOR}\n".join(self._bits) + "\n"

    def bits(self, document: str) -> float | None:
        """-log2 probability of one of the stories, None for a text that is none of them."""
        return self._bits.get(document)

    @cached_property
    def _bits(self) -> dict[str, float]:
        return dict(self.stories_with_bits())
