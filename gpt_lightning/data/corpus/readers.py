"""Readers of .txt, .jsonl and .parquet files, document by document."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_lightning.data.corpus.base import BLOCK, field_of, kind_of, reason_of, valid_text


def read_documents(
    path: Path, field: str, separator: str | None, row_groups: list[int] | None = None
) -> Iterator[str]:
    """The documents of one file, or of some row groups of a Parquet file."""
    if kind_of(path) == "parquet":
        yield from _parquet(path, field, row_groups)
    elif kind_of(path) == "jsonl":
        for row, where in read_objects(path):
            yield valid_text(field_of(row, field, where), f"{where}: data.field={field}")
    else:
        for document in _split_at(text_blocks(path), separator):
            yield document.strip("\r\n")


def read_objects(path: Path) -> Iterator[tuple[dict[str, object], str]]:
    """The objects of a .jsonl file, each with where it stands."""
    for number, line in enumerate(_split_at(text_blocks(path), "\n"), 1):
        if line.strip():
            yield _json(line, f"{path}:{number}"), f"{path}:{number}"


def text_blocks(path: Path) -> Iterator[str]:
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
        raise ValueError(f"{path} is no whole gzip file ({reason_of(error)}); compress it again") from error


def count_characters(path: Path, separator: str | None) -> int | None:
    """Length of a text, None if it holds a separator."""
    count, tail = 0, ""
    for block in text_blocks(path):
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
        raise ValueError(f"{where} is not JSON ({reason_of(error)}); give one object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a JSON {type(row).__name__}; give one object per line")
    return row


def pieces(paths: Iterable[Path]) -> Iterator[tuple[int, Path, int | None]]:
    """What of files can be read without the rest, in their order: bytes, path, and row group in it."""
    for path in paths:
        if kind_of(path) != "parquet":
            yield path.stat().st_size, path, None
            continue
        with _parquet_file(path) as file:
            for group in range(file.num_row_groups):
                yield file.metadata.row_group(group).total_byte_size, path, group


def _parquet(path: Path, field: str, row_groups: list[int] | None) -> Iterator[str]:
    with _parquet_file(path) as file:
        field_of(dict.fromkeys(file.schema_arrow.names), field, str(path))
        for batch in file.iter_batches(batch_size=256, row_groups=row_groups, columns=[field]):
            for text in batch.column(0).to_pylist():
                yield valid_text(text, f"{path}: data.field={field}")


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable parquet file ({reason_of(error)})") from error
