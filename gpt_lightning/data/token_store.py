"""Token files: a corpus tokenized once, then memory-mapped by every run.

A store is a folder with train.bin and val.bin (little-endian token ids), tokenizer.json and meta.json.
A corpus of documents is stored as E d1 E d2 E … dN E, where E is the end-of-text token, so that every
document begins after an E and its end is a target too. A text without documents has no E.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import tiktoken
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.base import Corpus, Split, file_sha256, one_line, stable
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.files import atomic_write, sealed, unsealed, write_json
from gpt_lightning.data.remembered import remembered
from gpt_lightning.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SPLITS: tuple[Split, Split] = ("train", "val")
MAX_SHARDS = 512  # each is an open file when they are merged
GROUP = 1 << 19  # characters per task of a thread
VERIFY_BELOW = 64 << 20  # bytes; larger files are checked by their size alone when opened


@dataclass(frozen=True)
class SplitMeta:
    """Content of a .bin file; bytes count UTF-8 text without separators."""

    tokens: int
    bytes: int
    documents: int
    floor_bits: float | None
    sha256: str


@dataclass(frozen=True)
class StoreMeta:
    """Content of meta.json."""

    version: int
    dtype: str
    n_vocab: int
    corpus_digest: str
    tokenizer_digest: str
    splits: dict[Split, SplitMeta]


@dataclass(frozen=True)
class TokenStore:
    """Both splits of a tokenized corpus; pickled without the tokens, which each process maps itself.

    Args:
        folder: Of the files.
        tokenizer: That made them.
        meta: Content of meta.json.
        marker: Ids behind which the response of each document begins, which alone is learned; empty if
            all of a document is.
    """

    folder: Path
    tokenizer: tiktoken.Encoding
    meta: StoreMeta
    marker: tuple[int, ...] = ()

    @property
    def n_vocab(self) -> int:
        return self.meta.n_vocab

    def tokens(self, split: Split) -> np.ndarray:
        """Token ids of a split, shape (tokens,), uint16 or uint32, mapped read-only."""
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta.dtype, mode="r")

    def floor_bits_per_byte(self, split: Split) -> float | None:
        """Corpus entropy of a split, which no model can beat; None if the corpus does not know it."""
        meta = self.meta.splits[split]
        return None if meta.floor_bits is None else meta.floor_bits / meta.bytes


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> TokenStore:
    """Load the token store of a corpus from the cache, or build it if it is missing or damaged.

    Args:
        corpus: The text, or token files, which are used in place.
        tokenizer: A trained one is stored in cache/tokenizers.
        cache: Folder of stores; created if needed.
        threads: Encoding threads; None for one per core.
        progress: Whether to show a progress bar if standard error is a terminal.

    Raises:
        ValueError: If the corpus or the tokenizer is not usable.
        OSError: If something cannot be read, downloaded, or written to the cache.
    """
    if isinstance(corpus, TokenBins):
        return _open_bins(corpus, tokenizer)
    job = _Job(corpus, tokenizer, cache, threads or os.cpu_count() or 1, progress)
    return job.reopen(warn=False) or job.build(job.tokenize)


def prepare_shard(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache: str | Path,
    *,
    shard: int,
    shards: int,
    threads: int | None = None,
    progress: bool = True,
) -> TokenStore | None:
    """Tokenize one of several shards; the process that completes the last one merges them into the store.

    Run it once for each shard 0 … shards - 1, on one or several machines that share the cache folder. The
    store has the same bytes as that of `prepare`. Each process reads the whole corpus but encodes its shard.

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
    job = _Job(corpus, tokenizer, cache, threads or os.cpu_count() or 1, progress)
    if (store := job.reopen(warn=False)) is not None:
        return store
    parts = [_Part(job.folder, i, shards, job.dtype) for i in range(shards)]
    with _locked(parts[shard].folder):
        if not parts[shard].is_whole():
            with _replacing(parts[shard].folder) as partial:
                groups = {split: job.tokenize(split, partial, shard, shards) for split in SPLITS}
                sums = {split: file_sha256(partial / f"{split}.bin") for split in SPLITS}
                job.check_unchanged()
                with _writing(partial):
                    write_json(partial / "part.json", sealed({"groups": groups, "bins": sums}))
    if not all(part.folder.is_dir() for part in parts):
        return job.reopen(warn=False)  # another process may have merged them just now
    store = job.build(lambda split, folder: _merge(parts, split, folder))
    for part in parts:
        shutil.rmtree(part.folder, ignore_errors=True)  # also by a process that merges at the same time
    return store


class _Group(NamedTuple):
    """Consecutive documents that a thread encodes in one task; bytes count the text."""

    tokens: int
    bytes: int
    documents: int
    floor_bits: float | None


class _Job:
    """Builds the store of a corpus and a tokenizer."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, cache: str | Path, threads: int, progress: bool):
        if not isinstance(cache, (str, Path)) or not str(cache):
            raise ValueError(f"paths.cache={cache!r} must be the name of a folder")
        cache = Path(cache).expanduser()
        self.corpus, self.threads, self.progress = corpus, threads, progress
        self.corpus_digest = stable(corpus.digest(), "the digest of data.corpus")
        self.times = _times(corpus)
        self.encoding = self._build_tokenizer(tokenizer, cache)
        self.tokenizer_digest = tokenizers.digest(self.encoding)
        self.dtype = "<u2" if self.encoding.n_vocab <= 1 << 16 else "<u4"
        self.folder = cache / f"{self.corpus_digest[:16]}-{self.tokenizer_digest[:16]}"

    def check_unchanged(self) -> None:
        """Compares the text that was read with the one whose digest names what is stored.

        Raises:
            ValueError: If it was written meanwhile, even if it has the same bytes again.
        """
        times = _times(self.corpus)
        if self.corpus.digest() != self.corpus_digest or times != self.times:
            files = [str(file) for file, time in times.items() if time != self.times.get(file)]
            raise ValueError(
                f"{', '.join(files[:3]) or 'the text of data.corpus'} changed while it was read, so nothing "
                "of it is kept; start again when no other program writes to it"
            )

    def _build_tokenizer(self, tokenizer: Tokenizer, cache: Path) -> tiktoken.Encoding:
        """Build the encoding, or load a trained one from the cache."""
        if not tokenizer.trained:
            return tokenizer.build(self.corpus.documents)
        path = cache / "tokenizers" / f"{tokenizer.key()}-{self.corpus_digest[:16]}.json"
        if path.is_file():
            with contextlib.suppress(ValueError):
                return tokenizers.load(path)
        with _locked(path):
            if path.is_file():  # another process may have saved it meanwhile
                try:
                    return tokenizers.load(path)
                except ValueError as error:
                    log.warning("%s; training it again", error)
            encoding = tokenizer.build(self.corpus.documents)
            self.check_unchanged()
            with _writing(path.parent):
                tokenizers.save(encoding, path)
        return encoding

    def build(self, write: Callable[[Split, Path], list[_Group]]) -> TokenStore:
        """Make the store of token files that `write` writes; another process may have made it meanwhile."""
        with _locked(self.folder):
            if (store := self.reopen(warn=True)) is None:
                with _replacing(self.folder) as partial:
                    groups = {split: write(split, partial) for split in SPLITS}
                    self.check_unchanged()
                    self.finish(partial, groups)
                store = self.open()
        return store

    def reopen(self, warn: bool) -> TokenStore | None:
        """Open the store; None if it is missing or damaged."""
        if not self.folder.exists():
            return None
        try:
            return self.open()
        except ValueError as error:
            if warn:
                log.warning("%s; building it again", error)
            return None

    def open(self) -> TokenStore:
        """Open the store and verify it.

        Raises:
            ValueError: If it is damaged or belongs to another corpus or tokenizer.
        """
        try:
            content = unsealed(json.loads((self.folder / "meta.json").read_bytes()))
            found = content.pop("splits")
            splits = {split: SplitMeta(**found[split]) for split in SPLITS}
            meta = StoreMeta(**content, splits=splits)
            if meta != self.meta(splits):
                raise ValueError("it was made by another version, or from another corpus or tokenizer")
            for split in SPLITS:
                _check_file(self.folder / f"{split}.bin", splits[split], np.dtype(self.dtype).itemsize)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"the token cache {self.folder} cannot be used ({reason})") from error
        text: str = getattr(self.corpus, "response_marker", "")
        marker = tuple(tokenizers.encode_array(self.encoding, text).tolist()) if text else ()
        return TokenStore(self.folder, self.encoding, meta, marker)

    def meta(self, splits: dict[Split, SplitMeta]) -> StoreMeta:
        n_vocab = self.encoding.n_vocab
        return StoreMeta(1, self.dtype, n_vocab, self.corpus_digest, self.tokenizer_digest, splits)

    def finish(self, folder: Path, groups: dict[Split, list[_Group]]) -> None:
        """Write tokenizer.json and, last, meta.json."""
        splits = {}
        for split in SPLITS:
            tokens, size, documents, floors = zip(*groups[split], strict=True)
            floor = None if None in floors else math.fsum(floors)
            sha = file_sha256(folder / f"{split}.bin")
            count = sum(documents) if self.corpus.separated else 1
            splits[split] = SplitMeta(sum(tokens), sum(size), count, floor, sha)
        with _writing(folder):
            tokenizers.save(self.encoding, folder / "tokenizer.json")
            write_json(folder / "meta.json", sealed(asdict(self.meta(splits))))

    def tokenize(self, split: Split, folder: Path, shard: int = 0, shards: int = 1) -> list[_Group]:
        """Write the token file of a split, or every `shards`-th group of it."""
        log.info("tokenizing the %s split into %s", split, self.folder)
        done: list[_Group] = []
        pending: deque[Future[tuple[np.ndarray, _Group]]] = deque()
        hide = None if self.progress else True  # None: only on a terminal
        bar = tqdm(desc=f"tokenizing {split}", unit="B", unit_scale=True, disable=hide)
        with _output(folder / f"{split}.bin") as write, ThreadPoolExecutor(self.threads) as pool, bar:

            def write_next() -> None:
                ids, group = pending.popleft().result()
                write(ids.tobytes())
                bar.update(group.bytes)
                done.append(group)

            for index, texts in enumerate(_groups(self.corpus.documents(split))):
                if index % shards == shard:
                    pending.append(pool.submit(self._encode, texts, index == 0))
                if len(pending) > 2 * self.threads:  # bounds the memory
                    write_next()
            while pending:
                write_next()
        return done

    def _encode(self, texts: list[str], is_first: bool) -> tuple[np.ndarray, _Group]:
        separated = self.corpus.separated
        end = np.array([self.encoding.eot_token], dtype=self.dtype)
        arrays = [end] if separated and is_first else []
        for text in texts:
            arrays.append(tokenizers.encode_array(self.encoding, text).astype(self.dtype))
            if separated:
                arrays.append(end)
        ids = np.concatenate(arrays)
        floors = [self.corpus.floor_bits(text) for text in texts]
        floor = None if None in floors else math.fsum(f for f in floors if f is not None)
        return ids, _Group(len(ids), sum(len(text.encode()) for text in texts), len(texts), floor)


def _times(corpus: Corpus) -> dict[Path, int]:
    """When each file of a text was written, in nanoseconds; empty for other kinds of corpora."""
    files = [corpus.files(split) for split in SPLITS] if isinstance(corpus, TextFiles) else []
    return {file: file.stat().st_mtime_ns for file in itertools.chain(*files)}


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive documents of at least GROUP characters together; a function of the documents alone."""
    group: list[str] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


class _Part:
    """The folder of a shard: the token files of its groups, and part.json with their checksums."""

    def __init__(self, store: Path, shard: int, shards: int, dtype: str):
        self.folder = store.with_name(f"{store.name}.part-{shard}-of-{shards}")
        self.remedy = f"prepare it again with shard={shard} shards={shards}"
        self.itemsize = np.dtype(dtype).itemsize

    def groups(self, split: Split) -> Iterator[tuple[_Group, bytes]]:
        """The groups of a split with their token ids, verified when the last one has been read.

        Raises:
            ValueError: If the part is damaged.
        """
        sha = hashlib.sha256()
        try:
            content = unsealed(json.loads((self.folder / "part.json").read_bytes()))
            with (self.folder / f"{split}.bin").open("rb") as file:
                for group in map(_Group._make, content["groups"][split]):
                    data = file.read(group.tokens * self.itemsize)
                    sha.update(data)
                    yield group, data
                if file.read(1) or sha.hexdigest() != content["bins"][split]:
                    raise ValueError(f"the checksum of {split}.bin differs")
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{self.folder} is damaged ({one_line(error)}); {self.remedy}") from error

    def is_whole(self) -> bool:
        """Whether the part is there and undamaged; a damaged one is reported."""
        try:
            return self.folder.is_dir() and all(True for split in SPLITS for _ in self.groups(split))
        except ValueError as error:
            log.warning("%s", error)
            return False


def _merge(parts: list[_Part], split: Split, folder: Path) -> list[_Group]:
    """Join the token files of all shards in the order of the corpus."""
    merged: list[_Group] = []
    with _output(folder / f"{split}.bin") as write:
        for turn in itertools.zip_longest(*(part.groups(split) for part in parts)):  # shards take turns
            for group, data in filter(None, turn):
                write(data)
                merged.append(group)
    return merged


def _open_bins(corpus: TokenBins, tokenizer: Tokenizer) -> TokenStore:
    """Use a folder of token files as a store."""
    encoding = tokenizer.build(corpus.documents)
    lengths = tokenizers.token_bytes(encoding)
    splits = {}
    for split in SPLITS:
        file = corpus.file(split)
        counts = np.array(remembered([file], "counts of ids", partial(_count_ids, file)))
        largest = len(counts) - 1
        if largest >= encoding.n_vocab:
            raise ValueError(
                f"{file} has the token id {largest}, but tokenizer={encoding.name} has {encoding.n_vocab}; "
                "choose the tokenizer that made it"
            )
        size = int(counts @ lengths[: len(counts)])
        documents = int(counts[encoding.eot_token]) if encoding.eot_token <= largest else 0
        splits[split] = SplitMeta(int(counts.sum()), size, documents, None, "")
    meta = StoreMeta(1, "<u2", encoding.n_vocab, corpus.digest(), tokenizers.digest(encoding), splits)
    return TokenStore(Path(corpus.path).expanduser(), encoding, meta)


def _count_ids(file: Path) -> list[int]:
    """How often each id is in a file, up to the largest one."""
    ids, counts = np.memmap(file, dtype="<u2", mode="r"), np.zeros(1 << 16, dtype=np.int64)
    for start in range(0, len(ids), 1 << 22):
        counts += np.bincount(ids[start : start + (1 << 22)], minlength=1 << 16)
    return counts[: int(counts.nonzero()[0][-1]) + 1].tolist()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to the token cache {folder} ({error.strerror or error}); "
            "make room or give the right to write there, or set paths.cache= to another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file against other processes, also on other machines that share the folder."""
    lock = filelock.FileLock(f"{path}.lock")
    with _writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that prepares %s", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `folder` when the block ends; an error removes it.

    The caller holds the lock of `folder`, so an existing temporary folder was left by a killed process.
    """
    partial, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    with _writing(folder.parent):
        for left_over in (partial, old):
            if left_over.exists():
                shutil.rmtree(left_over)
        partial.mkdir()
    try:
        yield partial
        with _writing(folder.parent):
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _output(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Open a new file for writing; only errors of the file itself are reported as errors of the cache."""

    def write(data: bytes) -> None:
        with _writing(path.parent):
            file.write(data)

    with contextlib.ExitStack() as stack:
        with _writing(path.parent):
            file = stack.enter_context(atomic_write(path))
        yield write
        with _writing(path.parent):
            stack.close()


def _check_file(path: Path, meta: SplitMeta, itemsize: int) -> None:
    size = path.stat().st_size
    if size != meta.tokens * itemsize:
        raise ValueError(f"{path.name} has {size} bytes instead of {meta.tokens * itemsize}")
    if size < VERIFY_BELOW and file_sha256(path) != meta.sha256:
        raise ValueError(f"the checksum of {path.name} differs")
