"""Where text comes from: files, downloads, Hugging Face datasets, and folders that are tokenized already.

A corpus yields the documents of a split one by one: what it needs of memory is a document, not its size.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import http.client
import importlib.util
import json
import logging
import os
import re
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

log = logging.getLogger(__name__)

Split: TypeAlias = Literal["train", "val"]
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

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of a split, in a fixed order, none of them empty."""

    def floor_bits(self, document: str) -> float | None:
        """-log2 of the probability of a document under its true source; None where that is unknown."""


class Floor(Protocol):
    """A source of text that knows how probable each document is; its repr is part of the corpus digest."""

    def bits(self, document: str) -> float | None:
        """-log2 of the probability of a document; None for a text that is not from the source."""


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
        _check_fraction(self.val_fraction)

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

    def _find(self) -> list[Path]:
        return _find_files("data.path", self.path)

    @cached_property
    def _characters(self) -> int | None:
        """Length of the text if each split is in one text without documents, else None."""
        lengths = []
        for files in self._files.values() if self.val_path else [self._files["train"]]:
            if len(files) > 1 or _kind(files[0]) != "text":
                return None
            lengths.append(_count_characters(files[0], self.separator))
        return None if None in lengths else lengths[0]

    @property
    def separated(self) -> bool:
        return self._characters is None

    def digest(self) -> str:
        settings: list[object] = ["TextFiles", 1, self.field, self.separator]
        settings += [None if self.val_path else self.val_fraction, repr(self.floor)]
        return _digest(settings, self._files["train"], self._files["val"] if self.val_path else [])

    def documents(self, split: Split) -> Iterator[str]:
        files = self._files[split]
        fraction = None if self.val_path else self.val_fraction
        from_val_path = self.val_path and split == "val"
        source = f"data.val_path={self.val_path}" if from_val_path else f"data.path={self.path or files[0]}"
        if self._characters is None:
            texts = (text for file in files for text in _read(file, self.field, self.separator))
            return _select(filter(str.strip, texts), split, fraction, source)
        blocks = _text_blocks(files[0])
        if fraction is not None:
            boundary = int(self._characters * (1 - fraction))
            span = (0, boundary) if split == "train" else (boundary, self._characters)
            blocks = _characters_between(blocks, *span)
        return _select(_pieces(blocks), split, None, source)

    def floor_bits(self, document: str) -> float | None:
        return None if self.floor is None else self.floor.bits(document)


@dataclass(frozen=True)
class Shakespeare(TextFiles):
    """Tiny Shakespeare (1,115,394 characters), downloaded to `folder` on first use.

    Source: https://github.com/karpathy/char-rnn/tree/master/data/tinyshakespeare

    Args:
        path: A local copy instead; the other arguments of TextFiles hold as well.

    Raises:
        ValueError, OSError: When read, as TextFiles and `download`.
    """

    path: str | Sequence[str] | None = None  # type: ignore[assignment]
    _: KW_ONLY
    folder: str = "data"
    url: str = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    sha256: str = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

    def _find(self) -> list[Path]:
        if self.path is not None:
            return super()._find()
        return [download(self.url, Path(self.folder).expanduser() / "tinyshakespeare.txt", self.sha256)]


@dataclass(frozen=True)
class HuggingFace:
    """Documents from a dataset of the Hugging Face hub, or from a local folder in the hub's layout.

    Args:
        name: Name on the hub, such as "roneneldan/TinyStories", or a folder.
        config: Configuration of the dataset, where it has several.
        revision: Branch, tag or commit on the hub.
        field: Name of the text column.
        split: The dataset's split to train on.
        val_split: The dataset's split to validate on; None takes `val_fraction` of the documents of `split`.
        val_fraction: Share of validation, spread as in TextFiles.
        streaming: Read over the network as needed and store nothing.

    Raises:
        ValueError: If an argument is out of range, and, when read, for an unknown field, split or config.
        OSError: When read, if the dataset can neither be reached nor is stored here.
        ImportError: When read, if `datasets` is not installed.
    """

    name: str
    _: KW_ONLY
    config: str | None = None
    revision: str | None = None
    field: str = "text"
    split: str = "train"
    val_split: str | None = None
    val_fraction: float = 0.1
    streaming: bool = False

    separated = True

    def __post_init__(self) -> None:
        _check_fraction(self.val_fraction)

    @property
    def _folder(self) -> Path | None:
        folder = Path(self.name).expanduser()
        return folder if folder.is_dir() else None

    def digest(self) -> str:
        settings: list[object] = ["HuggingFace", 1, self.config, self.field, self.split, self.val_split]
        settings.append(None if self.val_split else self.val_fraction)
        if self._folder is not None:
            return _digest(settings, _files_below(self._folder))
        return _digest([*settings, self.name, self._load("load_dataset_builder").hash])  # of the commit

    def documents(self, split: Split) -> Iterator[str]:
        name = self.val_split if split == "val" and self.val_split else self.split
        fraction = None if self.val_split else self.val_fraction
        return _select(filter(str.strip, self._texts(name)), split, fraction, f"data.name={self.name}")

    def floor_bits(self, document: str) -> float | None:
        return None

    def _texts(self, split: str) -> Iterator[str]:
        where = f"data.name={self.name}"
        dataset = self._load("load_dataset", split=split, streaming=self.streaming)
        if self.field in (dataset.column_names or ()):
            dataset = dataset.select_columns([self.field])  # does not read the others
        for batch in dataset.iter(batch_size=256):
            for text in _field(batch, self.field, where):
                yield _text(text, f"{where}: data.field={self.field}")

    def _load(self, function: str, **options: object) -> Any:
        datasets = _require("datasets", f"data.name={self.name}")
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        place = str(self._folder or self.name)
        try:
            return getattr(datasets, function)(place, self.config, revision=self.revision, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(
                f"cannot read data.name={self.name}: {_one_line(error)}; give a name on the hub that can be "
                "reached, or a local folder in the hub's layout"
            ) from error


@dataclass(frozen=True)
class TokenBins:
    """A folder with train.bin and val.bin as nanoGPT writes them: raw uint16 token ids, used in place.

    meta.pkl is not opened, since a pickle can run code: the tokenizer is the one of the configuration.

    Raises:
        FileNotFoundError: When read, if one of the two files is missing.
        ValueError: When read, if one of them is empty or not a whole number of ids.
    """

    path: str

    separated = True

    def file(self, split: Split) -> Path:
        """The file of a split, which is there and has a plausible size."""
        file = Path(self.path).expanduser() / f"{split}.bin"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; data.path= must be a folder with both .bin files"
            )
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"{file} has {size} bytes, no whole number of uint16 token ids; write it again")
        return file

    def digest(self) -> str:
        return _digest(["TokenBins", 1], [self.file("train")], [self.file("val")])

    def documents(self, split: Split) -> Iterator[str]:
        raise ValueError(
            f"data.path={self.path} holds token ids, not text to learn a tokenizer from; "
            "choose the tokenizer that made it, such as tokenizer=gpt2"
        )

    def floor_bits(self, document: str) -> float | None:
        return None


def download(url: str, target: Path, sha256: str) -> Path:
    """Fetches a file once, checks it, and gives it its name only then.

    Raises:
        OSError: If it cannot be fetched or written.
        ValueError: If what came is not what was expected.
    """
    if target.is_file():
        if file_sha256(target) == sha256:
            return target
        log.warning("%s is damaged (its checksum differs); downloading it again", target)
    remedy = "download it in another way and set data.path= to the file"
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file, urllib.request.urlopen(url, timeout=30) as response:
            while block := response.read(BLOCK):
                file.write(block)
        if file_sha256(partial) != sha256:
            raise ValueError(f"{url} sent something else than expected (the checksum differs); {remedy}")
        partial.replace(target)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise OSError(f"cannot download {url} to {target} ({_one_line(error)}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target


# -- splits ------------------------------------------------------------------------------------------


def _check_fraction(fraction: object) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ValueError(f"data.val_fraction={fraction!r} must be above 0 and below 1; 0.1 is usual")


def _select(texts: Iterable[str], split: Split, fraction: float | None, source: str) -> Iterator[str]:
    """The documents that belong to the split, which are all when fraction is None."""
    seen = chosen = 0
    for text in texts:
        is_val = fraction is not None and int((seen + 1) * fraction) > int(seen * fraction)
        seen += 1
        if fraction is None or is_val == (split == "val"):
            chosen += 1
            yield text
    if not seen:
        raise ValueError(f"{source} holds no text for the {split} split; give more text")
    if not chosen:
        raise ValueError(
            f"data.val_fraction={fraction} leaves none of the {seen} documents of {source} to the {split} "
            "split; change data.val_fraction, set data.val_path or give more documents"
        )


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


# -- files -------------------------------------------------------------------------------------------


def _find_files(key: str, path: object) -> list[Path]:
    """The files that a path, glob or folder means, or each of a list of these; no file twice."""
    if not isinstance(path, (str, os.PathLike)):
        if not isinstance(path, Sequence) or not path:
            raise ValueError(f"{key}={path!r} must be a file, a glob, a folder or a list of these")
        return list(dict.fromkeys(file for part in path for file in _find_files(key, part)))
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [file for file in _files_below(place) if _kind(file, None)]
        problem = f"holds no file that ends in {', '.join(KINDS)}; name other files by a glob"
    else:
        matches = (Path(match) for match in glob.glob(str(place), recursive=True))  # noqa: PTH207 (absolute too)
        files = sorted(match for match in matches if match.is_file())
        problem = "matches no file" if glob.has_magic(str(place)) else "does not exist"
    if not files:
        raise FileNotFoundError(f"{key}={path} {problem} (the working directory is {Path.cwd()})")
    return files


def _files_below(folder: Path) -> list[Path]:
    """All files but hidden ones, sorted."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts))


def _kind(path: Path, unknown: str | None = "text") -> str | None:
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix, unknown)


def file_sha256(*paths: Path, start: bytes = b"") -> str:
    """SHA-256 of `start` and the bytes of the files, hexadecimal."""
    sha = hashlib.sha256(start)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                sha.update(block)
    return sha.hexdigest()


def _digest(settings: object, *groups: list[Path]) -> str:
    """SHA-256 of settings and of the kinds, sizes and bytes of files, wherever they lie."""
    facts = [[(_kind(file), file.suffix == ".gz", file.stat().st_size) for file in group] for group in groups]
    files = (file for group in groups for file in group)
    return file_sha256(*files, start=json.dumps([settings, facts]).encode())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _require(package: str, what: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{what} needs the package {package}; pip install 'gpt-lightning[hf]' brings it"
        )
    return importlib.import_module(package)


# -- readers -----------------------------------------------------------------------------------------


def _read(path: Path, field: str, separator: str | None) -> Iterator[str]:
    """The documents of one file."""
    if _kind(path) == "parquet":
        yield from _parquet(path, field)
    elif _kind(path) == "jsonl":
        for number, line in enumerate(_split_at(_text_blocks(path), "\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                yield _text(_field(_json(line, where), field, where), f"{where}: data.field={field}")
    else:
        for document in _split_at(_text_blocks(path), separator):
            yield document.strip("\r\n")


def _text_blocks(path: Path) -> Iterator[str]:
    """The text of a file in blocks, with its line ends as they are and without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            while True:
                block = file.read(BLOCK)
                begin = size - len(decoder.getstate()[0])  # an unfinished character waits for this block
                text = decoder.decode(block, final=not block)
                yield text.removeprefix("\ufeff") if begin == 0 else text
                if not block:
                    return
                size += len(block)
    except UnicodeDecodeError as error:
        where = f"{path}: byte {begin + error.start} is not UTF-8"
        raise ValueError(f"{where}; convert the file, for example with iconv -t UTF-8") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({_one_line(error)}); compress it again") from error


def _count_characters(path: Path, separator: str | None) -> int | None:
    """Length of a text, None if it holds a separator."""
    count, tail = 0, ""
    for block in _text_blocks(path):
        count += len(block)
        if separator:
            if separator in tail + block:
                return None
            tail = (tail + block)[-len(separator) :]
    return count


def _split_at(blocks: Iterable[str], separator: str | None) -> Iterator[str]:
    """Texts between separators, which may lie across blocks."""
    parts: list[str] = []
    tail = ""
    for block in blocks:
        *documents, last = (tail + block).split(separator) if separator else [block]
        for document in documents:
            yield "".join(parts) + document
            parts = []
        cut = max(0, len(last) - len(separator or ""))  # the tail may be the beginning of a separator
        parts.append(last[:cut])
        tail = last[cut:]
    yield "".join(parts) + tail


def _json(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({_one_line(error)}); give one object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; give one object per line")
    return row


def _parquet(path: Path, field: str) -> Iterator[str]:
    pyarrow = _require("pyarrow", f"reading {path}")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            _field(dict.fromkeys(file.schema_arrow.names), field, str(path))
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield _text(text, f"{path}: data.field={field}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable parquet file ({_one_line(error)})") from error


def _field(row: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise ValueError(f"{where} has no data.field={field}; it has {', '.join(row)[:200] or 'none at all'}")
    return row[field]


def _text(value: object, where: str) -> str:
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
