"""Text generation: whole characters, stop strings, batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import BYTES, random_net, reciting

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import BATCH, TextGenerator

GREEDY = {"temperature": 0.0, "max_new_tokens": 100}
SAID = "naïve 你好 🦊!"


def test_stream_yields_characters_as_soon_as_they_are_complete() -> None:
    pieces = list(reciting(SAID).stream(**GREEDY))
    assert pieces == list(SAID)  # the tokens are bytes: each character comes with its last


def test_incomplete_last_character_is_replaced() -> None:
    cut = len(SAID.encode()) - 3  # two of the fox's four bytes
    model = reciting(SAID)
    assert model.generate(temperature=0.0, max_new_tokens=cut) == "naïve 你好 \N{REPLACEMENT CHARACTER}"
    assert "".join(model.stream(temperature=0.0, max_new_tokens=cut)) == model.generate(
        temperature=0.0, max_new_tokens=cut
    )


def test_invalid_utf8_is_replaced_as_in_python() -> None:
    data = b"a\xff\xc3(\xf0\x9f"
    assert reciting(data).generate(**GREEDY) == data.decode(errors="replace")


def until_a_stop(text: str, stops: list[str]) -> str:
    """The text as it stands when the first stop string is complete, without it."""
    for n in range(len(text) + 1):
        found = [text[:n].find(stop) for stop in stops if stop in text[:n]]
        if found:
            return text[: min(found)]
    return text


TEXTS = st.text(alphabet="ab\né", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stops=st.lists(st.text(alphabet="ab\né", min_size=1, max_size=4), max_size=3))
def test_stop_string_ends_the_text_however_it_is_tokenized(text: str, stops: list[str]) -> None:
    model = reciting(text)
    expected = until_a_stop(text, stops)
    assert model.generate(stop=stops, **GREEDY) == expected
    streamed = ""
    for piece in model.stream(stop=stops, **GREEDY):
        streamed += piece
        assert expected.startswith(streamed)  # nothing of a stop string is ever shown
    assert streamed == expected


@pytest.mark.parametrize(
    ("options", "text", "tokens", "finish"),
    [
        ({}, "hello", 5, "stop"),  # the end of the document
        ({"stop": "lo"}, "hel", 5, "stop"),
        ({"max_new_tokens": 3}, "hel", 3, "length"),
        ({"max_new_tokens": 4, "stop": "lo"}, "hell", 4, "length"),  # the l was held back until then
    ],
)
def test_last_piece_has_the_finish_reason_and_the_token_count(
    options: dict, text: str, tokens: int, finish: str
) -> None:
    pieces = [piece for (piece,) in reciting("hello").pieces([""], SamplingSettings(**{**GREEDY, **options}))]
    assert "".join(piece.text for piece in pieces) == text
    assert (pieces[-1].tokens, pieces[-1].finish) == (tokens, finish)
    assert not any(piece.finish for piece in pieces[:-1])


def test_batched_samples_equal_single_ones() -> None:
    model = TextGenerator(random_net(), BYTES)
    prompts = ["", "a longer prompt", "b"] * 7
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20}
    assert len(prompts) > BATCH
    together = model.generate(prompts, seed=5, num_samples=2, **options)
    each = [prompt for prompt in prompts for _ in range(2)]
    assert together == [model.generate(p, seed=5 + i, **options) for i, p in enumerate(each)]
    assert len(set(together[1::6])) > 1  # samples do differ


def test_answers_come_in_order_and_the_first_one_streams() -> None:
    model = TextGenerator(random_net(), BYTES)
    seen = list(model.in_order(["a", "b", "c"], SamplingSettings(max_new_tokens=5, stop="x")))
    numbers = [number for number, _ in seen]
    assert numbers == sorted(numbers)
    assert [number for number, piece in seen if piece.finish] == [0, 1, 2]
    assert next(iter(model.in_order(["a"] * 3, SamplingSettings(max_new_tokens=100_000))))[1].tokens == 1


def test_generate_returns_a_text_for_one_prompt_and_a_list_otherwise() -> None:
    model = reciting("hi")
    assert model.generate("", **GREEDY) == "hi"
    assert model.generate([""], **GREEDY) == ["hi"]
    assert model.generate("", num_samples=2, **GREEDY) == ["hi", "hi"]
    assert model.generate([], **GREEDY) == []


def test_end_of_text_in_a_prompt_is_the_special_token() -> None:
    model, end = reciting("hi"), BYTES.eot_token
    assert model.encode("") == [end]
    assert model.encode("ab") == [97, 98]
    assert model.encode("<|endoftext|>a<|endoftext|>") == [end, 97, end]


def test_ids_that_the_tokenizer_lacks_give_no_text() -> None:
    net = random_net(vocab_size=300)
    with torch.no_grad():
        net.transformer.ln_f.weight.zero_()
        net.transformer.ln_f.bias.fill_(1.0)
        net.lm_head.weight[299] = 9.0  # the only one that is ever said
    assert TextGenerator(net, BYTES).generate("a", **{**GREEDY, "max_new_tokens": 3}) == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "unknown setting 'temprature'"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number from"),
        ({"stop": ""}, "stop=''"),
        ({"stop": ["a", ""]}, "at least one character"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1 << 64}, "seed=18446744073709551616"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"prompt": "\ud800"}, "surrogate"),
    ],
)
def test_wrong_value_is_refused_before_anything_is_generated(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reciting("hi").generate(**options)
