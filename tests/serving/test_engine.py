"""One model with several clients."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning import load
from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.serving.engine import Engine

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "seed": 1, "temperature": 0.9}
LONG = SamplingSettings(**{**SETTINGS, "max_new_tokens": 100})


@pytest.fixture
def model() -> TextGenerator:
    encoding = tokenizers.Byte().build(lambda split: iter(()))
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=encoding.n_vocab, block_size=32, n_layer=1, n_head=2, n_embd=16))
    return TextGenerator(net.eval(), encoding)


def engine(model: TextGenerator, most: int = 100) -> Engine:
    return Engine(model, max_prompt_chars=100, max_new_tokens=most, queue=1)


async def read(engine: Engine, prompt: str) -> str:
    async with aclosing(engine.pieces([prompt], SamplingSettings(**SETTINGS))) as steps:
        return "".join([piece.text async for (piece,) in steps])


def test_client_that_stops_reading_does_not_block_the_next(model: TextGenerator) -> None:
    async def both() -> tuple[str, str]:
        waiter = engine(model)
        async with aclosing(waiter.pieces(["first"], SamplingSettings(**SETTINGS))) as slow:
            (piece,) = await anext(slow)
            other = await asyncio.wait_for(read(waiter, "second"), 60)
            return piece.text + "".join([piece.text async for (piece,) in slow]), other

    assert asyncio.run(both()) == tuple(model.generate(text, **SETTINGS) for text in ("first", "second"))


def test_closed_request_frees_the_engine(model: TextGenerator) -> None:
    async def closed() -> str:
        waiter = engine(model)
        async with aclosing(waiter.pieces(["first"], LONG)) as steps:
            await anext(steps)
        text = await asyncio.wait_for(read(waiter, "second"), 60)
        assert waiter.inside == 0
        return text

    assert asyncio.run(closed()) == model.generate("second", **SETTINGS)


def test_error_reaches_its_client_and_the_next_request_is_answered(model: TextGenerator) -> None:
    async def failing() -> str:
        waiter = engine(model)
        weight = model.net.transformer.wte.weight.data
        model.net.transformer.wte.weight.data = weight[:, :3]  # no layer fits it
        with pytest.raises(RuntimeError):
            await read(waiter, "first")
        model.net.transformer.wte.weight.data = weight
        return await read(waiter, "second")

    assert asyncio.run(failing()) == model.generate("second", **SETTINGS)


def test_fast_model_updates_the_page_as_often_as_a_browser_can(checkpoint: Path) -> None:
    chat, page = (pytest.importorskip(f"gpt_lightning.serving.{name}") for name in ("chat", "page"))

    async def lengths() -> list[int]:
        answers = chat.respond(engine(load(checkpoint, "cpu"), 1000), "x", [], 1000, 1.0)
        return [len(chat.without_html(history[-1]["content"])) async for history in answers]

    started = time.monotonic()
    seen = asyncio.run(lengths())
    assert len(seen) <= 2 + (time.monotonic() - started) / page.REFRESH  # there are 1,000 tokens
    assert seen[-1] == max(seen) == 1000
