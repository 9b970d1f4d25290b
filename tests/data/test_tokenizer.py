"""Tokenizers: their ids, round trips of text, and saved states."""

import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken requires it
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.tokenizer import BPE, GPT2, Byte, Char, FixedTokenizer

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ROOT / "../shared/tiktoken_cache"))
SHAKESPEARE = ROOT / "../shared/data/tinyshakespeare/input.txt"
needs_gpt2 = pytest.mark.skipif(not CACHE.is_dir(), reason=f"no vocabulary of GPT-2 in {CACHE}")
needs_shakespeare = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"{SHAKESPEARE} is not here")

STORY = (
    "Once upon a time there was a cat. The cat's hat was 12 feet high!\n\n  It'll rain, said the cat; "
    "we'll see — naïve café 漢字 😀.\tThen the other cats came and sat on the mat, and that was that.\n"
)


def documents(train: str, val: str = "") -> Callable[[str], Iterator[str]]:
    return lambda split: iter([{"train": train, "val": val}[split]])


@pytest.fixture(scope="module")
def gpt2() -> tiktoken.Encoding:
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(CACHE))
    return GPT2().build(documents(""))


@pytest.fixture(scope="module")
def learned() -> tiktoken.Encoding:
    return BPE(330).build(documents(STORY * 3))


@pytest.fixture(params=["bpe", "byte", pytest.param("gpt2", marks=needs_gpt2)])
def encoding(request) -> tiktoken.Encoding:
    if request.param == "byte":
        return Byte().build(documents(""))
    return request.getfixturevalue({"bpe": "learned", "gpt2": "gpt2"}[request.param])


def ids_of(encoding: tiktoken.Encoding, text: str) -> list[int]:
    return tokenizers.encode_array(encoding, text).tolist()


# -- each tokenizer ----------------------------------------------------------------------------------


@needs_gpt2
def test_gpt2_gives_the_published_ids(gpt2):
    assert ids_of(gpt2, "hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)


@needs_gpt2
@settings(deadline=None)
@given(text=st.text(st.sampled_from("aZé7 \n\t'srv.!漢<|>"), max_size=60))
def test_gpt2_ids_equal_tiktokens_own(text, gpt2):
    assert ids_of(gpt2, text) == tiktoken.get_encoding("gpt2").encode_ordinary(text)


@needs_shakespeare
def test_char_ids_equal_nanogpt():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    encoding = Char().build(documents(text[:500_000], text[500_000:]))
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    assert (len(stoi), encoding.n_vocab, encoding.eot_token) == (65, 66, 65)
    assert ids_of(encoding, text) == [stoi[character] for character in text]


def test_char_has_the_characters_of_both_splits_and_reports_an_unknown_one():
    encoding = Char().build(documents("ab\n-]^\\", "c漢"))
    assert ids_of(encoding, "c漢\nab") == [7, 8, 0, 5, 6]  # in \n - \ ] ^ a b c 漢
    for unknown, shown in [("ü", "'ü' (U+00FC)"), ("\r", r"'\r' (U+000D)"), ("[", "'[' (U+005B)")]:
        with pytest.raises(ValueError, match="tokenizer=char has no token for") as caught:
            ids_of(encoding, f"a{unknown}b")
        assert shown in str(caught.value)
        assert "\n" not in str(caught.value)


def test_byte_ids_are_the_bytes():
    encoding = Byte().build(documents(""))
    text = STORY * 3
    assert ids_of(encoding, text) == list(text.encode())
    assert (encoding.n_vocab, encoding.eot_token) == (257, 256)


def test_bpe_merges_the_most_frequent_pair_each_time():
    encoding = BPE(300).build(documents(STORY * 3))
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(tokenizers.GPT2_PATTERN, STORY)]
    for rank in range(256, 299):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        most = max(pairs.values())
        learned = encoding.decode_single_token_bytes(rank)
        (pair,) = [pair for pair, count in pairs.items() if count == most and b"".join(pair) == learned]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [learned]
                i += 1


PIECES = st.sampled_from(["a", "Z", " ", "\n", "漢", "<", "|", ">", "<|endoftext", "<|endoftext|>"])


@settings(deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=6))
def test_documents_have_the_ids_that_each_has_alone(texts, learned):
    ids, counts = tokenizers.encode_documents(learned, texts)
    alone = [[*ids_of(learned, text), learned.eot_token] for text in texts]
    assert ids.tolist() == [token for document in alone for token in document]
    assert counts.tolist() == [len(document) for document in alone]


def test_documents_with_a_character_that_has_no_token_are_refused(learned):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        tokenizers.encode_documents(learned, ["a", "b\ud800"])
    with pytest.raises(ValueError, match="has no token for 'c'"):
        tokenizers.encode_documents(Char().build(documents("ab")), ["a", "c"])


def test_bpe_learns_only_from_the_training_split():
    def train_only(split: str) -> Iterator[str]:
        assert split == "train"
        yield STORY

    assert BPE(300).build(train_only).n_vocab == 300


def test_bpe_vocabulary_counts_bytes_and_end_of_text(learned):
    assert (learned.n_vocab, learned.eot_token) == (330, 329)
    smallest = BPE(257).build(documents(STORY))
    assert ids_of(smallest, STORY) == list(STORY.encode())
    assert smallest.eot_token == 256


def test_bpe_of_a_small_corpus_warns_of_a_smaller_vocabulary(caplog):
    encoding = BPE(1024).build(documents("ab ab abc"))
    assert encoding.n_vocab == 260  # "ab", " ab", " abc" and the special token
    assert "tokenizer.vocab_size=1024, but the corpus gives only 260 tokens" in caplog.text


@pytest.mark.parametrize("size", [256, 0, -1, 1 << 40, 300.5, "many", None, True])
def test_bpe_refuses_an_invalid_vocabulary_size(size):
    with pytest.raises(ValueError, match=r"tokenizer.vocab_size=.* must be a whole number from 257"):
        BPE(size)


def test_gpt2_without_network_or_cache_gives_one_clear_line(tmp_path):
    code = "from gpt_lightning.data.tokenizer import GPT2\nGPT2().build(None)"
    env = {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "OSError: the GPT-2 vocabulary is not in tiktoken's cache and cannot be downloaded"
    )
    assert "TIKTOKEN_CACHE_DIR" in last
    assert "tokenizer=bpe" in last


# -- all tokenizers ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab <|endoftext|>\n", max_size=80))
def test_text_round_trips_and_token_bytes_sum_to_its_size(text, learned, gpt2_if_there):
    encodings = [learned, Byte().build(documents("")), *gpt2_if_there]
    if text:
        encodings.append(Char().build(documents(text)))
    for encoding in encodings:
        ids = ids_of(encoding, text)
        assert encoding.decode(ids, errors="strict") == text
        assert encoding.eot_token not in ids
        assert int(tokenizers.token_bytes(encoding)[ids].sum()) == len(text.encode())


@pytest.fixture(scope="module")
def gpt2_if_there(request) -> list[tiktoken.Encoding]:
    return [request.getfixturevalue("gpt2")] if CACHE.is_dir() else []


def test_separator_in_a_text_is_ordinary_text(encoding):
    text = "before<|endoftext|>after"
    ids = ids_of(encoding, text)
    assert encoding.eot_token not in ids
    assert encoding.decode(ids) == text
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [encoding.n_vocab - 1]


def test_a_million_white_space_characters_are_learned_from_and_encoded():
    text = "start" + " \n" * 600_000 + "end"
    encoding = BPE(300).build(documents(text))
    assert encoding.decode(ids_of(encoding, text)) == text


def test_lone_surrogate_is_refused_in_one_line(encoding):
    with pytest.raises(ValueError, match=r"character 1 of the text is half a surrogate pair; remove it"):
        ids_of(encoding, "a\ud800")


def test_special_tokens_have_no_bytes(encoding):
    lengths = tokenizers.token_bytes(encoding)
    assert (lengths.dtype, lengths.shape) == (np.int64, (encoding.n_vocab,))
    assert np.flatnonzero(lengths == 0).tolist() == [encoding.eot_token]
    assert lengths[:-1].tolist() == [
        len(encoding.decode_single_token_bytes(i)) for i in range(len(lengths) - 1)
    ]


@needs_gpt2
@pytest.mark.parametrize("registered", [False, True])
def test_definition_makes_the_same_encoding(registered, gpt2):
    encoding = tiktoken.get_encoding("gpt2") if registered else gpt2
    pattern, ranks, special = tokenizers.definition(encoding)
    again = tiktoken.Encoding("again", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    assert again.encode(STORY + "<|endoftext|>", allowed_special="all") == encoding.encode(
        STORY + "<|endoftext|>", allowed_special="all"
    )
    assert [again.decode_single_token_bytes(i) for i in range(again.n_vocab)] == [
        encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)
    ]


def test_keys_differ():
    fixed = FixedTokenizer(Byte().build(documents("")))
    keys = [BPE(1024).key(), BPE(1025).key(), GPT2().key(), Byte().key(), Char().key(), fixed.key()]
    assert len(set(keys)) == len(keys)
    assert fixed.build(documents("")) is fixed.encoding


# -- state -------------------------------------------------------------------------------------------


def test_state_round_trips_through_json_and_torch(encoding, tmp_path):
    state = tokenizers.to_state(encoding)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    tokenizers.save(encoding, tmp_path / "a.json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    copies = [
        tokenizers.from_state(json.loads(json.dumps(state))),
        tokenizers.from_state(torch.load(file, weights_only=True)),
        tokenizers.load(tmp_path / "a.json"),
    ]
    for copy in copies:
        assert copy.encode_ordinary(STORY) == encoding.encode_ordinary(STORY)
        assert copy.n_vocab == encoding.n_vocab
        assert tokenizers.digest(copy) == tokenizers.digest(encoding)
        assert tokenizers.to_state(copy) == state


def test_digests_of_different_tokenizers_differ(learned):
    others = [
        Byte().build(documents("")),
        BPE(331).build(documents(STORY * 3)),
        BPE(330).build(documents("b" + STORY)),
    ]
    digests = {tokenizers.digest(encoding) for encoding in [learned, *others]}
    assert len(digests) == 4
    assert tokenizers.digest(BPE(330).build(documents(STORY * 3))) in digests


def _char_state(**changes: object) -> dict[str, object]:
    return tokenizers.to_state(Char().build(documents("ab"))) | changes


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        "state",
        _char_state(version=2),
        _char_state(name=3),
        _char_state(pattern=None),
        _char_state(pattern="("),
        _char_state(tokens=""),
        _char_state(tokens=None),
        _char_state(tokens="YQ== 0\nYg=="),
        _char_state(tokens="YQ== 0\nYQ== 1"),
        _char_state(tokens="YQ== 0\nYg== 0"),
        _char_state(tokens="YQ== 0\nYg== 2"),  # the id of the special token
        _char_state(tokens="YQ== 0\n 1"),
        _char_state(tokens="YQ== 0\nYg== -1"),
        _char_state(tokens=f"YQ== 0\nYg== {1 << 40}"),
        _char_state(tokens="YQ== 0\n?! 1"),
        _char_state(special_tokens={}),
        _char_state(special_tokens={"<|endoftext|>": "2"}),
        _char_state(special_tokens=None),
    ],
)
def test_invalid_state_is_refused(state):
    with pytest.raises(ValueError, match="the tokenizer is no tokenizer state of version 1"):
        tokenizers.from_state(state)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}", b"[" * 100_000])
def test_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json is not a saved tokenizer \(") as caught:
        tokenizers.load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


def test_flipped_bit_in_a_saved_tokenizer_is_refused_or_changes_nothing(learned, tmp_path):
    path, draw, refused = tmp_path / "a.json", random.Random(0), 0
    tokenizers.save(learned, path)
    whole = path.read_bytes()
    for position in draw.sample(range(len(whole)), 400):
        flipped = bytes([whole[position] ^ (1 << draw.randrange(8))])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        try:
            assert tokenizers.digest(tokenizers.load(path)) == tokenizers.digest(learned), position
        except ValueError:
            refused += 1
    assert refused > 380
    path.write_text(json.dumps(tokenizers.to_state(learned)))  # as an earlier release wrote it
    assert tokenizers.digest(tokenizers.load(path)) == tokenizers.digest(learned)
