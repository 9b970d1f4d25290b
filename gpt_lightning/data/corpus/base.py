"""What every corpus has: documents in two splits, and a digest of everything that decides them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from gpt_lightning.data.remembered import remembered

Split: TypeAlias = Literal["train", "val"]
T = TypeVar("T")
END_OF_TEXT = "<|endoftext|>"
BLOCK = 1 << 20  # bytes per read, and characters per piece of a text without documents
# What a folder is searched for; a file that is named expressly and ends otherwise is plain text.
KINDS = {".txt": "text", ".text": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}
KINDS |= {".json": "jsonl", ".parquet": "parquet"}


class Corpus(Protocol):
    """Text in two splits; a user's own corpus needs these four members and nothing else."""

    @property
    def separated(self) -> bool:
        """True if documents are bounded by end-of-text tokens, False for consecutive parts of one text."""

    def digest(self) -> str:
        """SHA-256 of the content and of everything that changes documents, splits or floors."""

    def documents(self, split: Split) -> Iterable[str]:
        """The documents of a split, in a fixed order, none empty; `DocumentParts` if there are parts."""

    def floor_bits(self, document: str) -> float | None:
        """-log2 of the probability of a document under its true source; None where that is unknown."""


@dataclass(frozen=True)
class DocumentParts:
    """The documents of a split, in parts that are read without each other.

    Attributes:
        parts: Functions that read consecutive documents, none of them empty.
        split: The one that iterating gives.
        fraction: Share of validation, by the numbers of the documents over all parts; None if all documents
            belong to the split. With a fraction, both splits have the same parts.
        name: Of the text, for errors.
    """

    parts: Sequence[Callable[[], Iterable[str]]]
    split: Split
    fraction: float | None
    name: str

    def __iter__(self) -> Iterator[str]:
        texts = chain.from_iterable(part() for part in self.parts)
        return select(texts, self.split, self.fraction, self.name)


class Floor(Protocol):
    """A source of text that knows how probable each document is; its repr is part of the corpus digest."""

    def bits(self, document: str) -> float | None:
        """-log2 of the probability of a document; None for a text that is not from the source."""


def check_fraction(fraction: object) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction={fraction!r} must be above 0 and below 1; 0.1 is usual")


def select(texts: Iterable[T], split: Split, fraction: float | None, source: str) -> Iterator[T]:
    """The documents that belong to the split, which are all when fraction is None."""
    seen = chosen = 0
    for text in texts:
        is_val = fraction is not None and int((seen + 1) * fraction) > int(seen * fraction)
        seen += 1
        if fraction is None or is_val == (split == "val"):
            chosen += 1
            yield text
    check_chosen(seen, chosen, split, fraction, source)


def check_chosen(seen: int, chosen: int, split: Split, fraction: float | None, source: str) -> None:
    """Refuse a split without documents."""
    if not seen:
        raise ValueError(f"{source} holds no text for the {split} split; give more text")
    if not chosen:
        raise ValueError(
            f"data.val_fraction={fraction} leaves none of the {seen} documents of {source} to the {split} "
            "split; change data.val_fraction, set data.val_path or give more documents"
        )


def stable(text: str, what: str) -> str:
    """A text that identifies something on disk, and must not change from one start to the next.

    Raises:
        ValueError: If it holds an address in memory, as the default repr of an object does.
    """
    if " object at 0x" in text:
        raise ValueError(
            f"{what} is {text}, which changes at each start, so that the text would be tokenized again every "
            "time; give the class a __repr__ with its settings, as a dataclass has"
        )
    return text


def files_below(folder: Path) -> list[Path]:
    """All files but hidden ones, sorted."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def kind_of(path: Path, unknown: str | None = "text") -> str | None:
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix, unknown)


def file_sha256(*paths: Path, start: bytes = b"") -> str:
    """SHA-256 of `start` and the bytes of the files, hexadecimal."""
    sha = hashlib.sha256(start)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                sha.update(block)
    return sha.hexdigest()


def digest_files(settings: object, *groups: list[Path]) -> str:
    """SHA-256 of settings and of the kinds, sizes and bytes of files, wherever they lie."""
    facts = [
        [(kind_of(file), file.suffix == ".gz", file.stat().st_size) for file in group] for group in groups
    ]
    files, start = [file for group in groups for file in group], json.dumps([settings, facts])
    digest: str = remembered(files, f"digest {start}", lambda: file_sha256(*files, start=start.encode()))
    return digest


def reason_of(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def field_of(row: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise ValueError(f"{where} has no data.field={field}; it has {', '.join(row)[:200] or 'none at all'}")
    return row[field]


def valid_text(value: object, where: str) -> str:
    """A document that can be written as UTF-8; a missing one counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where} is {type(value).__name__}, not text; choose another field")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{where} has half a surrogate pair at character {error.start}") from error
    return value
