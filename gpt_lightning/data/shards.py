"""Shards of a corpus, each tokenized by a process of its own and merged into one token store."""

import hashlib
import heapq
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from gpt_lightning.data.cache_files import file_lock, output, replacing, writing
from gpt_lightning.data.corpus.base import Corpus, reason_of
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.files import sealed, unsealed, write_json
from gpt_lightning.data.token_store import DOCUMENT, Group, StoreBuilder, TokenStore, order
from gpt_lightning.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_SHARDS = 512  # each is an open file when they are merged
GROUPS = "groups.bin"  # the tokens and the documents of each group of a shard


def prepare_shard(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    shard: int,
    shards: int,
) -> TokenStore | None:
    """Tokenize one of several shards; the process that completes the last one merges them into the store.

    Run it once for each shard 0 … shards - 1, on one or several machines that share the cache folder. The
    store has the same bytes as that of `prepare`. Each process reads only its parts of the corpus if that has
    as many parts as shards or more: files, row groups of Parquet files, shards of a dataset. Otherwise, it
    reads the whole corpus but encodes its shard.

    Returns:
        The store, None if shards are still missing.

    Raises:
        ValueError: If shard is out of range, or as `prepare`.
        OSError: As `prepare`.
    """
    if type(shards) is not int or not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"shards={shards!r} must be a whole number from 1 to {MAX_SHARDS}")
    if type(shard) is not int or not 0 <= shard < shards:
        raise ValueError(f"shard={shard!r} must be a whole number from 0 to {shards - 1}, since {shards=}")
    if isinstance(corpus, TokenBins):
        raise ValueError(f"data.path={corpus.path} is tokenized already; use it without shards")
    builder = StoreBuilder(corpus, tokenizer, cache, os.cpu_count() or 1)
    if (store := builder.reopen(warn=False)) is not None:
        return store
    parts = [_Part(builder.folder, i, shards, builder.dtype) for i in range(shards)]
    with file_lock(parts[shard].folder):
        if not parts[shard].is_whole():
            with replacing(parts[shard].folder) as partial:
                groups = parts[shard].write(partial, builder.encoded(shard, shards))
                builder.check_unchanged()
                with writing(partial):
                    write_json(partial / "part.json", sealed({"groups": groups}))
    if not all(part.folder.is_dir() for part in parts):
        return builder.reopen(warn=False)  # another process may have merged them just now
    # within a stream, the groups of a part are in order
    store = builder.build(lambda: heapq.merge(*(part.groups() for part in parts), key=order))
    for part in parts:
        shutil.rmtree(part.folder, ignore_errors=True)  # also by a process that merges at the same time
    return store


class _Part:
    """The folder of a shard: its groups, and part.json with their sizes and checksum."""

    def __init__(self, store: Path, shard: int, shards: int, dtype: str):
        self.folder = store.with_name(f"{store.name}.part-{shard}-of-{shards}")
        self.remedy = f"prepare it again with shard={shard} shards={shards}"
        self.dtype = np.dtype(dtype)

    @staticmethod
    def write(folder: Path, groups: Iterable[Group]) -> list[tuple[int, int, int, int, str]]:
        """Write the groups; stream, place, the numbers of tokens and documents, and SHA-256 of each."""
        done = []
        with output(folder / GROUPS) as write:
            for group in groups:
                data = group.ids.tobytes() + group.documents.tobytes()
                write(data)
                sha = hashlib.sha256(data).hexdigest()
                done.append((group.stream, group.place, len(group.ids), len(group.documents), sha))
        return done

    def groups(self) -> Iterator[Group]:
        """The groups, each verified.

        Raises:
            ValueError: If the part is damaged.
        """
        try:
            content = unsealed(json.loads((self.folder / "part.json").read_bytes()))
            with (self.folder / GROUPS).open("rb") as file:
                for stream, place, tokens, documents, sha in content["groups"]:
                    size = tokens * self.dtype.itemsize
                    data = file.read(size + documents * DOCUMENT.itemsize)
                    if hashlib.sha256(data).hexdigest() != sha:
                        raise ValueError(f"the checksum of {GROUPS} differs")
                    ids = np.frombuffer(data, self.dtype, tokens)
                    yield Group(stream, place, ids, np.frombuffer(data, DOCUMENT, documents, size))
                if file.read(1):
                    raise ValueError(f"{GROUPS} is longer than it was")
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder} is damaged ({reason_of(error)}); {self.remedy}") from error

    def is_whole(self) -> bool:
        """Whether the part is there and undamaged; a damaged one is reported."""
        try:
            return self.folder.is_dir() and all(True for _ in self.groups())
        except ValueError as error:
            log.warning("%s", error)
            return False
