"""Converts between tiktoken encodings and tokenizer.json of `transformers`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import tiktoken

from gpt_lightning.data.corpus.base import END_OF_TEXT
from gpt_lightning.data.files import json_object, reading, write_json
from gpt_lightning.data.tokenizer import GPT2_PATTERN, definition, verified

MAX_WORK = 1 << 27  # sum of the squared lengths of all tokens, the steps of `recover_merges`


def save_tokenizer(
    encoding: tiktoken.Encoding, folder: str | Path, *, block_size: int, chat_template: str | None = None
) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `AutoTokenizer` loads without this package.

    Ids equal `encoding.encode(text, allowed_special="all")`; a character that the vocabulary lacks,
    which tiktoken cannot encode, is left out.

    Raises:
        OSError: If the folder cannot be written.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        **({"chat_template": chat_template} if chat_template else {}),
    }
    write_json(Path(folder, "tokenizer.json"), to_tokenizer_json(encoding))
    write_json(Path(folder, "tokenizer_config.json"), settings)


def to_tokenizer_json(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """The contents of tokenizer.json: split by the pattern, then BPE on bytes written as characters."""
    pattern, ranks, special_tokens = definition(encoding)
    letters = _byte_letters()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # Rust's "s", with which a dot matches line breaks too, is "m" in the Oniguruma of `tokenizers`.
    pattern = pattern.replace("(?s:", "(?m:")
    pieces = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, as_letters]},
        "post_processor": None,
        "decoder": as_letters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token stays whole, as in tiktoken
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": [[written[a], written[b]] for a, b in recover_merges(ranks)],
        },
    }


def load_tokenizer(folder: str | Path) -> tiktoken.Encoding | None:
    """The encoding with the ids of a folder's tokenizer.json; None if there is no such file.

    Raises:
        ValueError: If tiktoken cannot express the tokenizer, or there is no <|endoftext|>.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    with reading(path, "is not a byte-level BPE that tiktoken can do"):
        return from_tokenizer_json(json_object(path))


def from_tokenizer_json(content: dict[str, Any]) -> tiktoken.Encoding:
    """The encoding of the contents of a tokenizer.json, from `to_tokenizer_json` or GPT-2's own.

    Raises:
        ValueError: If tiktoken cannot express the tokenizer.
    """
    model, before = content["model"], content["pre_tokenizer"]
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    pattern = GPT2_PATTERN  # ByteLevel's own unless use_regex is false
    if len(steps) == 2 and steps[0]["type"] == "Split" and steps[0]["behavior"] == "Isolated":
        pattern = steps[0]["pattern"]["Regex"].replace("(?m:", "(?s:")
    elif len(steps) != 1 or not steps[0].get("use_regex", True):
        raise ValueError("it splits text in another way than GPT-2")
    unknown = [key for key in ("normalizer", "truncation", "padding") if content.get(key)]
    unknown += [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    unknown += [key for key in ("dropout", "byte_fallback") if model.get(key)]
    if model["type"] != "BPE" or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"] or unknown:
        raise ValueError(f"it has {unknown[0]}" if unknown else "it is of another kind")
    special = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
    letters = {letter: byte for byte, letter in _byte_letters().items()}
    ranks = {
        bytes(letters[letter] for letter in token): int(rank)
        for token, rank in model["vocab"].items()
        if token not in special
    }
    encoding = verified(f"bpe-{len(ranks) + len(special)}", pattern, ranks, special)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = [(bytes(letters[c] for c in a), bytes(letters[c] for c in b)) for a, b in pairs]
    if sum(len(token) ** 2 for token in ranks) > MAX_WORK:
        raise ValueError("its tokens are too long")
    singles = sum(len(token) == 1 for token in ranks)
    whole = model.get("ignore_merges") or len(merges) + singles == len(ranks)
    if merges != recover_merges(ranks) or not whole:
        raise ValueError("its merges are not in the order of their ids")
    return encoding


def recover_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair of parts of each token longer than one byte, in the order of the tokens' ranks.

    tiktoken stores no pairs: it merges the neighbours whose concatenation has the lowest rank. Applied to
    a token's own bytes, the merges of lower rank therefore leave the two parts of the token. If they
    leave more, the token never results from a merge, only from a whole piece, and needs no pair.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            lowest = min(joined)
            if lowest >= rank:
                break
            i = joined.index(lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2 and all(part in ranks for part in parts):
            merges.append((parts[0], parts[1]))
    return merges


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable character for each byte: the byte's own if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
