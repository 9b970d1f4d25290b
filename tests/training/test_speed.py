"""The speed from which a plan foretells how long a run takes."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt_lightning
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.qwen3 import Qwen3Config
from gpt_lightning.training import speed
from gpt_lightning.training.muon import muon
from gpt_lightning.training.optimizers import adamw
from gpt_lightning.training.speed import Speed, measure_speed

SHAPE = {"vocab_size": 50, "block_size": 16, "n_head": 2, "n_embd": 32}


@pytest.mark.parametrize(
    "config", [GPTConfig(**SHAPE, n_layer=1), Qwen3Config(**SHAPE, n_layer=1)], ids=["GPT", "Qwen3"]
)
@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_whole_network_of_one_layer_is_measured(
    config: GPTConfig | Qwen3Config, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MEASURE_SECONDS", 0.0)
    before = torch.get_rng_state()
    found = measure_speed(
        config, partial(optimizer, lr=1e-3), sequences=2, block_size=16, precision="bf16-mixed"
    )
    assert found is not None
    assert min(found.forward, found.training, found.update) > 0
    assert torch.equal(torch.get_rng_state(), before)  # a plan from Python changes no later run


@pytest.mark.parametrize(
    ("one", "three", "five"),
    [
        (Speed(1.0, 3.0, 0.5), Speed(2.0, 7.0, 1.0), Speed(3.0, 11.0, 1.5)),
        (Speed(1.0, 3.0, 0.5), Speed(0.9, 7.0, 0.5), Speed(1.0, 11.0, 0.5)),  # no layer takes less than none
    ],
)
def test_layers_add_what_the_second_and_third_add(
    one: Speed, three: Speed, five: Speed, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {1: one, 3: three}
    monkeypatch.setattr(speed, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_steps", lambda net, *_: itertools.repeat(astuple(speeds[len(net.blocks)])))
    config = GPTConfig(**SHAPE, n_layer=5)  # type: ignore[arg-type]
    assert (
        measure_speed(config, partial(adamw, lr=1e-3), sequences=2, block_size=16, precision="32-true")
        == five
    )
    speeds = {1: one, 2: three}  # a network of two layers is measured whole
    config = GPTConfig(**SHAPE, n_layer=2)  # type: ignore[arg-type]
    found = measure_speed(config, partial(adamw, lr=1e-3), sequences=2, block_size=16, precision="32-true")
    assert found == Speed(max(one.forward, three.forward), three.training, max(one.update, three.update))


def test_networks_take_turns_and_the_first_step_of_each_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns, speeds = [], {1: [0.1, 5.0, 3.0], 3: [0.1, 7.0, 9.0]}

    def steps(net: GPT, *_: Any) -> Any:
        for value in speeds[len(net.blocks)]:
            turns.append(len(net.blocks))
            yield value, value, value

    monkeypatch.setattr(speed, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(speed, "_steps", steps)
    config = GPTConfig(**SHAPE, n_layer=3)  # type: ignore[arg-type]
    found = measure_speed(config, partial(adamw, lr=1e-3), sequences=2, block_size=16, precision="32-true")
    assert found == Speed(7.0, 7.0, 7.0)
    assert turns == [1, 3, 1, 3, 1, 3]


@pytest.mark.parametrize(("sequences", "shape"), [(3, (3, 16)), (64, (4, 16))])
def test_the_micro_batch_of_the_run_is_measured_or_what_the_budget_allows(
    sequences: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shapes = GPTConfig(**SHAPE, n_layer=1), set()  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in GPT(config).parameters())
    monkeypatch.setattr(speed, "MEASURE_SECONDS", 0.0)
    monkeypatch.setattr(speed, "BUDGET", 6 * parameters * 4 * 16 + 1)
    forward = GPT.forward

    def recording(net: GPT, idx: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.add(tuple(idx.shape))
        return forward(net, idx, *rest)

    monkeypatch.setattr(GPT, "forward", recording)
    options = {"sequences": sequences, "block_size": 16, "precision": "32-true"}
    measure_speed(config, partial(adamw, lr=1e-3), **options)  # type: ignore[arg-type]
    assert shapes == {shape}


def test_plan_adds_up_steps_and_validations(monkeypatch: pytest.MonkeyPatch, small_text: Path) -> None:
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: Speed(0.001, 0.01, 0.5))
    options = [
        "device=cpu",
        f"data.path={small_text}",
        "tokenizer=byte",
        "model.block_size=8",
        "data.batch_size=6",
    ]
    options += ["device.micro_batch_size=3", "trainer.max_steps=10", "trainer.val_every_steps=4"]
    plan = gpt_lightning.plan(*options)
    whole_split = plan.val_tokens * 0.001
    assert plan.seconds == pytest.approx(10 * (48 * 0.01 + 0.5) + 3 * whole_split)  # after steps 4, 8 and 10
    two_batches = 2 * 48 * 0.001
    plan = gpt_lightning.plan(*options, "trainer.val_batches=2")
    assert plan.seconds == pytest.approx(10 * (48 * 0.01 + 0.5) + 3 * two_batches)
