"""Text files: a file, a folder, a glob or a list of these."""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from pathlib import Path

from gpt_lightning.data.corpus.base import (
    BLOCK,
    END_OF_TEXT,
    KINDS,
    DocumentParts,
    Floor,
    Split,
    check_fraction,
    digest_files,
    files_below,
    kind_of,
    select,
    stable,
)
from gpt_lightning.data.corpus.readers import count_characters, pieces, read_documents, text_blocks

PART = 4 << 20  # bytes that a part of a source has at least, where that is possible


@dataclass(frozen=True)
class TextFiles:
    """Documents from .txt, .jsonl and .parquet files, the first two also as .gz.

    In .txt files the separator ends a document wherever it stands, also within a line; line breaks around
    a document are dropped. A line of .jsonl, a row of .parquet, and each of several .txt files without
    separators is a document. Documents without text are skipped, and of the others number i is for
    validation if floor((i + 1) * val_fraction) > floor(i * val_fraction), which spreads them evenly.
    One single .txt without separators is one text: its first int(characters * (1 - val_fraction))
    characters are for training, as in nanoGPT.

    Args:
        path: File, glob pattern, folder (searched recursively, in sorted order), or a list of these.
        val_path: The same for validation; what else is in `path` is then for training.
        val_fraction: Share of validation, between 0 and 1.
        field: Name of the text in .jsonl objects and of the column in .parquet.
        separator: Text between documents in .txt files; None for files that are to be taken whole.
        floor: Source that knows how probable each document is.

    Raises:
        ValueError: If an argument is out of range, and, when read, if a file is empty, damaged, not UTF-8
            or without the field, or if a split has no document.
        FileNotFoundError: When read, if there is no such file.
    """

    path: str | Sequence[str]
    _: KW_ONLY
    val_path: str | Sequence[str] | None = None
    val_fraction: float = 0.1
    field: str = "text"
    separator: str | None = END_OF_TEXT
    floor: Floor | None = None

    def __post_init__(self) -> None:
        check_fraction(self.val_fraction)

    @cached_property
    def _files(self) -> dict[Split, list[Path]]:
        """Without val_path both splits come from the same files."""
        train = self._find()
        if self.val_path is None:
            return {"train": train, "val": train}
        val = _find_files("data.val_path", self.val_path)
        train = [file for file in train if not any(file.samefile(other) for other in val)]
        if not train:
            raise ValueError(f"data.val_path={self.val_path} takes all files of data.path={self.path}")
        return {"train": train, "val": val}

    def files(self, split: Split) -> list[Path]:
        """The files that a split is read from."""
        return self._files[split]

    def _find(self) -> list[Path]:
        return _find_files("data.path", self.path)

    @cached_property
    def _characters(self) -> int | None:
        """Length of the text if each split is in one text without documents, else None."""
        lengths = []
        for files in self._files.values() if self.val_path else [self._files["train"]]:
            if len(files) > 1 or kind_of(files[0]) != "text":
                return None
            lengths.append(count_characters(files[0], self.separator))
        return None if None in lengths else lengths[0]

    @property
    def separated(self) -> bool:
        return self._characters is None

    def digest(self) -> str:
        settings: list[object] = ["TextFiles", 1, self.field, self.separator]
        settings += [
            None if self.val_path else self.val_fraction,
            stable(repr(self.floor), "the floor of data.corpus"),
        ]
        return digest_files(settings, self._files["train"], self._files["val"] if self.val_path else [])

    def documents(self, split: Split) -> Iterable[str]:
        """In parts, unless the text has no documents."""
        name = f"data.path={self.path or self._files[split][0]}"
        if self.val_path and split == "val":
            name = f"data.val_path={self.val_path}"
        if self._characters is None:
            fraction = None if self.val_path else self.val_fraction
            return DocumentParts(self._parts(split), split, fraction, name)
        blocks = text_blocks(self._files[split][0])
        if self.val_path is None:
            boundary = int(self._characters * (1 - self.val_fraction))
            span = (0, boundary) if split == "train" else (boundary, self._characters)
            blocks = _characters_between(blocks, *span)
        return select(_pieces(blocks), split, None, name)

    def _parts(self, split: Split) -> list[partial[Iterator[str]]]:
        """Files and row groups of Parquet files, small ones together."""
        parts: list[list[tuple[Path, int | None]]] = []
        size = PART
        for more, file, group in pieces(self._files[split]):
            if size >= PART:
                parts.append([])
                size = 0
            parts[-1].append((file, group))
            size += more
        return [partial(self._read, part) for part in parts]

    def _read(self, part: Iterable[tuple[Path, int | None]]) -> Iterator[str]:
        for file, group in part:
            groups = None if group is None else [group]
            yield from filter(str.strip, read_documents(file, self.field, self.separator, groups))

    def floor_bits(self, document: str) -> float | None:
        return None if self.floor is None else self.floor.bits(document)


def _characters_between(blocks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    position = 0
    for block in blocks:
        if position >= stop:
            return
        yield block[max(start - position, 0) : stop - position]
        position += len(block)


def _pieces(blocks: Iterable[str], size: int = BLOCK) -> Iterator[str]:
    """A text in pieces of about `size` characters that are tokenized as the whole would be.

    A cut lies where a space follows a character that is not white space. No match of GPT-2's pattern, or of
    the later ones, goes on over such a place, and what follows it does not change the matches before. A text
    without such a place is cut before a line break, where the same holds for GPT-2's pattern, and one
    without line breaks, because it must be somewhere, anywhere after 8 sizes.
    """
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) < size:
            continue
        backwards = rest[::-1]
        last = re.search(r" \S", backwards) or re.search(r"\n\S", backwards)
        if last is None and len(rest) < 8 * size:
            continue
        cut = len(rest) - 1 - last.start() if last else len(rest)
        yield rest[:cut]
        rest = rest[cut:]
    if rest:
        yield rest


def _find_files(key: str, path: object) -> list[Path]:
    """The files that a path, glob or folder means, or each of a list of these; no file twice."""
    if not isinstance(path, (str, os.PathLike)):
        if not isinstance(path, Sequence) or not path:
            raise ValueError(f"{key}={path!r} must be a file, a glob, a folder or a list of these")
        return list(dict.fromkeys(file for part in path for file in _find_files(key, part)))
    if not str(path).strip():
        raise ValueError(f"{key}= is empty, as an unset variable is; name a file, a folder or a glob")
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [file for file in files_below(place) if kind_of(file, None)]
        problem = f"holds no file that ends in {', '.join(KINDS)}; name other files by a glob"
    else:
        matches = (Path(match) for match in glob.glob(str(place), recursive=True))  # noqa: PTH207 (absolute too)
        files = sorted(match for match in matches if match.is_file())
        problem = "is neither a file nor a folder" if place.exists() else "does not exist"
        problem = "matches no file" if glob.has_magic(str(place)) else problem
    if not files:
        raise FileNotFoundError(f"{key}={path} {problem} (the working directory is {Path.cwd()})")
    return files
