"""Stories from the grammar of the bundled input.txt, as many as are wanted."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from gpt_lightning.data.corpus.base import Split, check_fraction, select
from gpt_lightning.data.tales import GRAMMAR, Tales


@dataclass(frozen=True)
class TalesCorpus(Tales):
    """The first `stories` stories of the seed's series, in two splits.

    Raises:
        ValueError: If an argument is out of range, and, when read, if a split has no story.
    """

    val_fraction: float = 0.1

    separated = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.val_fraction)

    def digest(self) -> str:
        return hashlib.sha256(repr((self, GRAMMAR)).encode()).hexdigest()

    def documents(self, split: Split) -> Iterator[str]:
        return select(self._bits, split, self.val_fraction, "the grammar")

    def floor_bits(self, document: str) -> float | None:
        return self.bits(document)
