"""Token files: a corpus tokenized once, then memory-mapped by every run.

A store is a folder with train.bin and val.bin (little-endian token ids), tokenizer.json and meta.json.
A corpus of documents is stored as E d1 E d2 E … dN E, where E is the end-of-text token, so that every
document begins after an E and its end is a target too. A text without documents has no E.
"""

import contextlib
import itertools
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.cache_files import file_lock, output, replacing, writing
from gpt_lightning.data.corpus.base import Corpus, DocumentParts, Split, check_chosen, file_sha256, stable
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.files import sealed, unsealed, write_json
from gpt_lightning.data.remembered import remembered, verifying
from gpt_lightning.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SPLITS: tuple[Split, Split] = ("train", "val")
GROUP = 1 << 19  # characters per task of a thread
DOCUMENT = np.dtype([("tokens", "<i8"), ("bytes", "<i8"), ("floor", "<f8")])  # in bits; NaN if unknown
VERIFY_BELOW = 64 << 20  # bytes; of larger files, only `verifying` checks more than the size


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
) -> TokenStore:
    """Load the token store of a corpus from the cache, or build it if it is missing or damaged.

    Args:
        corpus: The text, or token files, which are used in place.
        tokenizer: A trained one is stored in cache/tokenizers.
        cache: Folder of stores; created if needed.
        threads: Encoding threads; None for one per core.

    Raises:
        ValueError: If the corpus or the tokenizer is not usable.
        OSError: If something cannot be read, downloaded, or written to the cache.
    """
    if isinstance(corpus, TokenBins):
        return _open_bins(corpus, tokenizer)
    builder = StoreBuilder(corpus, tokenizer, cache, threads or os.cpu_count() or 1)
    return builder.reopen(warn=False) or builder.build(builder.encoded)


class Group(NamedTuple):
    """Consecutive documents that a thread encodes in one task."""

    stream: int  # index of what they were read from, among `StoreBuilder.streams`
    place: int  # orders the groups of a stream
    ids: np.ndarray  # their tokens, each document with its end-of-text token, (tokens,)
    documents: np.ndarray  # a row for each, of the type DOCUMENT


def order(group: Group) -> tuple[int, int]:
    """In which groups are written: first those of a validation text of its own, which a run needs first."""
    return -group.stream, group.place


class _Split:
    """The token file of a split while it is written, and what is counted of it."""

    def __init__(self, write: Callable[[bytes], None]):
        self.write = write
        self.tokens = self.bytes = self.documents = 0
        self.floors: list[float] = []  # of groups, in bits; NaN if unknown

    def add(self, ids: np.ndarray, documents: np.ndarray) -> None:
        self.write(ids.tobytes())
        self.tokens += len(ids)
        self.bytes += int(documents["bytes"].sum())
        self.documents += len(documents)
        self.floors.append(math.fsum(documents["floor"]))


class StoreBuilder:
    """Builds the store of a corpus and a tokenizer."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, cache: str | Path, threads: int):
        if not isinstance(cache, (str, Path)) or not str(cache):
            raise ValueError(f"paths.cache={cache!r} must be the name of a folder")
        cache = Path(cache).expanduser()
        self.corpus, self.threads = corpus, threads
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
        with file_lock(path):
            if path.is_file():  # another process may have saved it meanwhile
                try:
                    return tokenizers.load(path)
                except ValueError as error:
                    log.warning("%s; training it again", error)
            encoding = tokenizer.build(self.corpus.documents)
            self.check_unchanged()
            with writing(path.parent):
                tokenizers.save(encoding, path)
        return encoding

    def build(self, groups: Callable[[], Iterable[Group]]) -> TokenStore:
        """Make the store of the groups, in their order; another process may have made it meanwhile."""
        with file_lock(self.folder):
            if (store := self.reopen(warn=True)) is None:
                with replacing(self.folder) as partial:
                    splits = self.write(partial, groups())
                    self.check_unchanged()
                    self.finish(partial, splits)
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

    @cached_property
    def streams(self) -> list[DocumentParts]:
        """What is read: the documents of both splits at once, or of one after the other."""
        found: list[DocumentParts] = []
        for split in SPLITS:
            read = self.corpus.documents(split)
            if not isinstance(read, DocumentParts):
                read = DocumentParts([partial(iter, read)], split, None, "the text of data.corpus")
            found.append(read)
            if read.fraction is not None:
                break
        return found

    def write(self, folder: Path, groups: Iterable[Group]) -> dict[Split, _Split]:
        """Write the token files of both splits.

        Raises:
            ValueError: If a split has no document.
        """
        seen, fraction = 0, self.streams[0].fraction
        with contextlib.ExitStack() as stack:
            splits = {s: _Split(stack.enter_context(output(folder / f"{s}.bin"))) for s in SPLITS}
            if self.corpus.separated:
                for file in splits.values():
                    file.add(self.end, np.zeros(0, dtype=DOCUMENT))
            for group in groups:
                if fraction is None:
                    splits[SPLITS[group.stream]].add(group.ids, group.documents)
                    continue
                numbers = np.arange(seen, seen + len(group.documents) + 1)
                of_val = np.diff(np.floor(numbers * fraction)) > 0  # by the rule of `select`
                seen += len(of_val)
                for split, chosen in zip(SPLITS, (~of_val, of_val), strict=True):
                    ids = group.ids[np.repeat(chosen, group.documents["tokens"])]
                    splits[split].add(ids, group.documents[chosen])
            for split, stream in zip(SPLITS, self.streams * 2, strict=False):
                chosen = splits[split].documents
                check_chosen(seen or chosen, chosen, split, fraction, stream.name)
        return splits

    def finish(self, folder: Path, written: dict[Split, _Split]) -> None:
        """Write tokenizer.json and, last, meta.json."""
        splits = {}
        for name, split in written.items():
            floor = math.fsum(split.floors)
            count = split.documents if self.corpus.separated else 1
            sha = file_sha256(folder / f"{name}.bin")
            known = None if math.isnan(floor) else floor
            splits[name] = SplitMeta(split.tokens, split.bytes, count, known, sha)
        with writing(folder):
            tokenizers.save(self.encoding, folder / "tokenizer.json")
            write_json(folder / "meta.json", sealed(asdict(self.meta(splits))))

    def encoded(self, shard: int = 0, shards: int = 1) -> Iterator[Group]:
        """The groups of a shard, encoded by several threads, in their order."""
        log.info("tokenizing into %s", self.folder)
        pending: deque[Future[Group]] = deque()
        bar = tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None)  # only on a terminal
        with ThreadPoolExecutor(self.threads) as pool, bar:

            def finished(most: int) -> Iterator[Group]:
                while len(pending) > most or (pending and pending[0].done()):
                    group = pending.popleft().result()
                    bar.update(int(group.documents["bytes"].sum()))
                    yield group

            for stream, documents in reversed(list(enumerate(self.streams))):
                for place, texts in _shard_of(documents, shard, shards):
                    pending.append(pool.submit(self._encode, stream, place, texts))
                    yield from finished(2 * self.threads)  # bounds the memory
            yield from finished(0)

    @property
    def end(self) -> np.ndarray:
        """The end-of-text token."""
        return np.array([self.encoding.eot_token], dtype=self.dtype)

    def _encode(self, stream: int, place: int, texts: list[str]) -> Group:
        if self.corpus.separated:
            ids, counts = tokenizers.encode_documents(self.encoding, texts)
        else:
            arrays = [tokenizers.encode_array(self.encoding, text) for text in texts]
            ids, counts = np.concatenate(arrays), np.array([len(ids) for ids in arrays])
        rows = []
        for text, count in zip(texts, counts, strict=True):
            floor = self.corpus.floor_bits(text)
            rows.append((count, len(text.encode()), math.nan if floor is None else floor))
        return Group(stream, place, ids.astype(self.dtype), np.array(rows, dtype=DOCUMENT))


def _times(corpus: Corpus) -> dict[Path, int]:
    """When each file of a text was written, in nanoseconds; empty for other kinds of corpora."""
    files = [corpus.files(split) for split in SPLITS] if isinstance(corpus, TextFiles) else []
    return {file: file.stat().st_mtime_ns for file in itertools.chain(*files)}


def _shard_of(documents: DocumentParts, shard: int, shards: int) -> Iterator[tuple[int, list[str]]]:
    """The groups of every `shards`-th part, or if there are too few parts, every `shards`-th group.

    Each group comes with its place among all of them.
    """
    own_parts = len(documents.parts) >= shards
    number = 0
    for place in range(shard if own_parts else 0, len(documents.parts), shards if own_parts else 1):
        for texts in _groups(documents.parts[place]()):
            if own_parts:
                yield place, texts
            elif number % shards == shard:
                yield number, texts
            number += 1


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


def _check_file(path: Path, meta: SplitMeta, itemsize: int) -> None:
    size = path.stat().st_size
    if size != meta.tokens * itemsize:
        raise ValueError(f"{path.name} has {size} bytes instead of {meta.tokens * itemsize}")
    if (size < VERIFY_BELOW or verifying()) and file_sha256(path) != meta.sha256:
        raise ValueError(f"the checksum of {path.name} differs")
