"""Exported tokenizers compared with tiktoken, on any text."""

import json
import os
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt_lightning.data.tokenizer import BPE, GPT2, Byte, Char, definition
from gpt_lightning.interop.tokenizer import (
    from_tokenizer_json,
    load_tokenizer,
    recover_merges,
    save_tokenizer,
)

transformers = pytest.importorskip("transformers")

TEXT = """Once upon a time there was a naïve fox — "Grüße!" 你好, said 123 hens; it's they'll we've I'd.
\tif x == 10:   return  [x]\n\n\nThe end. 🦊🦊 Ωmega ﬁn\u00a0\u2003x\r\nlet's LET'S """
CACHE = "../shared/tiktoken_cache"


def gpt2():
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", str(Path(__file__).parents[2] / CACHE))
    if not Path(folder).is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {CACHE} and TIKTOKEN_CACHE_DIR is not set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", folder)
        return GPT2().build(lambda split: iter(()))


BUILD = {
    "bpe": lambda: BPE(vocab_size=600).build(lambda split: iter([TEXT * 3, "the hen and the fox " * 9])),
    "gpt2": gpt2,
    "byte": lambda: Byte().build(lambda split: iter(())),
    "char": lambda: Char().build(lambda split: iter([TEXT])),
}


@pytest.fixture(scope="module", params=BUILD)
def pair(request, tmp_path_factory):
    """An encoding and what transformers made of its files."""
    encoding = BUILD[request.param]()
    folder = tmp_path_factory.mktemp("tokenizer") / "new"
    save_tokenizer(encoding, folder, block_size=77)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')  # as in an exported model
    return encoding, transformers.AutoTokenizer.from_pretrained(folder)


def check(pair, text):
    encoding, theirs = pair
    if encoding.name == "char":  # tiktoken panics at characters it does not know
        text = "".join(c for c in text if c in TEXT)
    ids = encoding.encode(text, allowed_special="all")
    assert theirs.encode(text, add_special_tokens=True) == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=TEXT, max_size=80), st.text(alphabet="aehnot \n'", max_size=80)))
@example(TEXT)
@example("")
@example(" <|endoftext|>a<|endoftext|>")
@example("aaaaaaaaaaaaaaaaaaaaaaa")
@example("x \n  \n\t ")
@example("a\u0085b\u200bc\u180ed\u2028e\ufefff")
def test_ids_and_text_equal_tiktoken(pair, text):
    check(pair, text)


def test_long_text_equals_tiktoken(pair):
    check(pair, TEXT * 50)


def test_special_token_and_maximum_length_are_exported(pair):
    encoding, theirs = pair
    assert theirs.eos_token_id == theirs.bos_token_id == encoding.eot_token
    assert theirs.model_max_length == 77
    assert len(theirs) == encoding.n_vocab


def test_merges_of_gpt2_equal_the_published_ones():
    merges = recover_merges(definition(gpt2()).ranks)
    assert len(merges) == 50_000
    assert merges[:4] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n")]  # as in its merges.txt
    assert merges[-1] == (b" g", b"azed")


def test_token_that_no_merge_produces_has_no_pair():
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"bc": 257, b"abcd": 258, b"bcd": 259}
    assert recover_merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"bc", b"d")]  # abcd: ab, c, d
    encoding = tiktoken.Encoding(
        "made-up", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260}
    )
    assert encoding.encode("abcd") == [258]  # whole pieces are found all the same


def test_own_files_round_trip(pair, tmp_path):
    encoding, theirs = pair
    theirs.save_pretrained(tmp_path)  # also after transformers has written them
    for folder in (theirs.name_or_path, tmp_path):
        again = load_tokenizer(folder)
        assert definition(again) == definition(encoding)


def trained(**options):
    """A tokenizer of the library `tokenizers`, of the kind that GPT-2 has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    return tokenizer


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=TEXT, max_size=80)))
@example(TEXT)
def test_tokenizer_trained_by_tokenizers_gives_the_same_ids(text):
    theirs = trained()
    ours = from_tokenizer_json(json.loads(theirs.to_str()))
    assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        (("normalizer",), {"type": "NFC"}, "normalizer"),
        (("model", "type"), "WordPiece", "another kind"),
        (("model", "byte_fallback"), True, "byte_fallback"),
        (("pre_tokenizer", "add_prefix_space"), True, "another kind"),
        (("pre_tokenizer", "use_regex"), False, "another way"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "another kind"),
        (("added_tokens",), [], "no <|endoftext|>"),
        (("model", "merges"), [], "merges"),
        (("model", "vocab", "…"), 999, "KeyError"),
        (("model",), None, "AttributeError"),
    ],
)
def test_tokenizer_that_tiktoken_cannot_express_is_refused(tmp_path, where, value, reason):
    content = json.loads(trained().to_str())
    part = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a byte-level BPE") as caught:
        load_tokenizer(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folder_without_a_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None
