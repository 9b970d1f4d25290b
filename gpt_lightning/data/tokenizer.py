"""Tokenizers: every one is a `tiktoken.Encoding`; the dataclasses here are its configuration and build it."""

import base64
import contextlib
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import tiktoken
import tiktoken.registry
from tiktoken_ext import openai_public

from gpt_lightning.data.corpus.base import END_OF_TEXT, Split
from gpt_lightning.data.files import json_object, reading, sealed, unsealed, write_json

log = logging.getLogger(__name__)

Documents: TypeAlias = Callable[[Split], Iterable[str]]

# GPT-2's split into words, https://github.com/openai/gpt-2/blob/master/src/encoder.py. Every BPE here uses
# it, so that the export to Hugging Face's GPT-2 tokenizer is exact.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

MAX_VOCAB = 1 << 24  # a larger vocabulary is a mistake that would fill the memory

# The regular expressions of tiktoken and rustbpe overflow on a million consecutive white space characters.
_LONG = 500_000  # characters
_LONG_SPACE = re.compile(rf"\s{{{_LONG}}}")
_PART = 400_000  # characters


class Tokenizer(Protocol):
    """What the `tokenizer` group of the configuration builds."""

    @property
    def trained(self) -> bool:
        """True if the encoding depends on the corpus, and is therefore saved for later runs."""

    def key(self) -> str:
        """Identity for file names."""

    def build(self, documents: Documents) -> tiktoken.Encoding:
        """The encoding; `documents` reads a split of the corpus."""


@dataclass(frozen=True)
class BPE:
    """Byte-pair encoding learned from the training split.

    Args:
        vocab_size: Size of the whole vocabulary: 256 bytes, merges, and <|endoftext|> as the last id.
    Raises:
        ValueError: If vocab_size is below 257.
    """

    vocab_size: int = 1024

    trained = True

    def __post_init__(self) -> None:
        if not isinstance(self.vocab_size, int) or not 257 <= self.vocab_size <= MAX_VOCAB:
            raise ValueError(
                f"tokenizer.vocab_size={self.vocab_size!r} must be a whole number from 257 (256 bytes and "
                f"{END_OF_TEXT}) to {MAX_VOCAB}; 1024 suits a small corpus"
            )

    def key(self) -> str:
        return f"bpe-{self.vocab_size}"

    def build(self, documents: Documents) -> tiktoken.Encoding:
        import rustbpe

        logging.getLogger("rustbpe").setLevel(logging.WARNING)  # it reports every percent
        log.info("learning a vocabulary of %d tokens", self.vocab_size)
        trainer = rustbpe.Tokenizer()
        texts = (part for document in documents("train") for part in _parts(document))
        size = self.vocab_size - 1  # all but the special token
        # the buffer counts texts, and the pieces of a text without documents have 1 MB
        trainer.train_from_iterator(texts, vocab_size=size, buffer_size=64, pattern=GPT2_PATTERN)
        ranks: dict[bytes, int] = {}
        for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1]):
            ranks.setdefault(bytes(token), len(ranks))  # two merges may give the same bytes
        if len(ranks) + 1 < self.vocab_size:
            found = len(ranks) + 1
            log.warning(
                "tokenizer.vocab_size=%d, but the corpus gives only %d tokens", self.vocab_size, found
            )
        return _encoding(self.key(), GPT2_PATTERN, ranks)


@dataclass(frozen=True)
class GPT2:
    """GPT-2's vocabulary of 50,257 tokens, downloaded by tiktoken on first use.

    Raises:
        OSError: When built, if it is not in tiktoken's cache and cannot be downloaded.
    """

    trained = False

    def key(self) -> str:
        return "gpt2"

    def build(self, documents: Documents) -> tiktoken.Encoding:
        try:
            ranks = openai_public.gpt2()["mergeable_ranks"]
        except (OSError, ValueError) as error:
            raise OSError(
                "the GPT-2 vocabulary is not in tiktoken's cache and cannot be downloaded "
                f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that has it, "
                "or choose tokenizer=bpe"
            ) from error
        return _encoding("gpt2", GPT2_PATTERN, ranks)  # tiktoken's pattern differs between its versions


@dataclass(frozen=True)
class Byte:
    """One token per UTF-8 byte."""

    trained = False

    def key(self) -> str:
        return "byte"

    def build(self, documents: Documents) -> tiktoken.Encoding:
        return _encoding("byte", r"(?s:.{1,64})", {bytes([i]): i for i in range(256)})  # 64 is fastest


@dataclass(frozen=True)
class Char:
    """One token per character; the vocabulary is the sorted characters of both splits, as in nanoGPT."""

    trained = True

    def key(self) -> str:
        return "char"

    def build(self, documents: Documents) -> tiktoken.Encoding:
        characters: set[str] = set()
        for split in ("train", "val"):
            for document in documents(split):
                characters.update(document)
        return _encoding("char", r"(?s:.)", {c.encode(): i for i, c in enumerate(sorted(characters))})


@dataclass(frozen=True)
class FixedTokenizer:
    """An existing encoding, such as a checkpoint's."""

    encoding: tiktoken.Encoding

    trained = False

    def key(self) -> str:
        return f"fixed-{digest(self.encoding)[:16]}"

    def build(self, documents: Documents) -> tiktoken.Encoding:
        return self.encoding


def _encoding(name: str, pattern: str, ranks: dict[bytes, int]) -> tiktoken.Encoding:
    special = {END_OF_TEXT: len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


class Definition(NamedTuple):
    """What an encoding is made of."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]


@functools.lru_cache(maxsize=16)
def definition(encoding: tiktoken.Encoding) -> Definition:
    """The pattern, ranks and special tokens of an encoding.

    tiktoken keeps them in private attributes. This uses its pickle format instead, in which registered
    encodings are only a name.
    """
    state: Any = encoding.__getstate__()
    if isinstance(state, str):
        state = (tiktoken.registry.ENCODING_CONSTRUCTORS or {})[state]()
    return Definition(state["pat_str"], state["mergeable_ranks"], state["special_tokens"])


# -- use ---------------------------------------------------------------------------------------------


def encode_array(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of a text, shape (T,), uint32; <|endoftext|> in it is ordinary text.

    Raises:
        ValueError: If the text has a character that the vocabulary lacks, or half of a surrogate pair.
    """
    unknown = _unknown(encoding)
    if unknown and (found := unknown.search(text)):  # tiktoken would panic
        character = found.group()
        raise ValueError(
            f"tokenizer={encoding.name} has no token for {character!r} (U+{ord(character):04X}), not in "
            "the corpus that it was made from; leave it out, or choose tokenizer=byte or bpe"
        )
    try:
        arrays = [encoding.encode_to_numpy(part, disallowed_special=()) for part in _parts(text)]
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is half a surrogate pair; remove it"
        ) from error
    except BaseException as error:
        if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":  # Rust's
            raise
        raise ValueError(f"tokenizer={encoding.name} cannot encode the text: {error}") from error
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def encode_documents(encoding: tiktoken.Encoding, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of documents, each followed by <|endoftext|>, shape (T,), and how many each has with it.

    Short documents are encoded in one call, which is faster; the ids are those of `encode_array`.

    Raises:
        ValueError: As `encode_array`.
    """
    joined = "".join(f"{text}{END_OF_TEXT}" for text in texts)
    plain = joined.count(END_OF_TEXT) == len(texts) and _unknown(encoding) is None
    if plain and max(map(len, texts)) < _LONG:
        with contextlib.suppress(UnicodeEncodeError):
            ids = encoding.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
            return ids, np.diff(np.flatnonzero(ids == encoding.eot_token), prepend=-1)
    end = np.array([encoding.eot_token], dtype=np.uint32)
    arrays = [np.concatenate([encode_array(encoding, text), end]) for text in texts]
    return np.concatenate(arrays), np.array([len(ids) for ids in arrays])


@functools.lru_cache(maxsize=16)
def _unknown(encoding: tiktoken.Encoding) -> re.Pattern[str] | None:
    """Matches a character without a token; None if the vocabulary has every byte."""
    ranks = definition(encoding).ranks
    if all(bytes([i]) in ranks for i in range(256)):
        return None
    return re.compile("[^" + re.escape(b"".join(ranks).decode(errors="replace")) + "]")


def _parts(text: str) -> list[str]:
    """The text, in parts if it has more consecutive white space than the regular expressions can take."""
    if len(text) < _LONG or not _LONG_SPACE.search(text):
        return [text]
    return [text[i : i + _PART] for i in range(0, len(text), _PART)]


def token_bytes(encoding: tiktoken.Encoding) -> np.ndarray:
    """UTF-8 bytes of each token, shape (n_vocab,), int64; 0 for special and unused ids."""
    lengths = np.zeros(encoding.n_vocab, dtype=np.int64)
    for token, rank in definition(encoding).ranks.items():
        lengths[rank] = len(token)
    return lengths


# -- state -------------------------------------------------------------------------------------------


def to_state(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The definition of an encoding as str and int, for JSON and `torch.load(weights_only=True)`.

    `tokens` has a line per token with its bytes in base64 and its id, as tiktoken's own files do.
    """
    pattern, unsorted, special_tokens = definition(encoding)
    ranks = sorted(unsorted.items(), key=lambda item: item[1])
    return {
        "version": 1,
        "name": encoding.name,
        "pattern": pattern,
        "tokens": "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks),
        "special_tokens": dict(special_tokens),
    }


def from_state(state: Any) -> tiktoken.Encoding:
    """The encoding of a state from `to_state`.

    Raises:
        ValueError: If the state is not from `to_state`.
    """
    with reading("the tokenizer", "is no tokenizer state of version 1"):
        if state["version"] != 1:
            raise ValueError(f"it has version {state['version']!r}")
        lines = [line.split(" ") for line in state["tokens"].split("\n")]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if len(lines) != len(ranks):
            raise ValueError("a token is repeated")
        return verified(state["name"], state["pattern"], ranks, dict(state["special_tokens"]))


def verified(name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    """An encoding of parts that come from a file, and that encodes the text of its own tokens.

    Raises:
        TypeError, ValueError: If a part is wrong.
    """
    ids = [*ranks.values(), *special.values()]
    if END_OF_TEXT not in special:
        raise ValueError(f"it has no {END_OF_TEXT}")
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError("its name is no printable text")
    if b"" in ranks or "" in special or len(set(ids)) != len(ids):
        raise ValueError("a token is empty, or an id is repeated")
    if not all(type(i) is int and 0 <= i < MAX_VOCAB for i in ids):
        raise ValueError("an id is out of range")
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    text = b"".join(ranks)[:4000].decode(errors="ignore")
    with _quiet():
        if encoding.decode(encode_array(encoding, text).tolist()) != text:
            raise ValueError("its pattern leaves text out")
    return encoding


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences file descriptor 2, where Rust reports an error before Python can handle it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it may be closed
            shown = os.dup(2)
            stack.callback(os.close, shown)
            stack.callback(os.dup2, shown, 2)
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (a name, not a path)
                os.dup2(nowhere.fileno(), 2)
        yield


def digest(encoding: tiktoken.Encoding) -> str:
    """SHA-256 of the state, hexadecimal."""
    return str(sealed(to_state(encoding))["sha256"])


def save(encoding: tiktoken.Encoding, path: Path) -> None:
    """Write the state as JSON, with a checksum."""
    write_json(path, sealed(to_state(encoding)))


def load(path: Path) -> tiktoken.Encoding:
    """Reads what `save` wrote.

    Raises:
        ValueError: If the file is damaged.
    """
    with reading(path, "is not a saved tokenizer"):
        return from_state(unsealed(json_object(path)))
