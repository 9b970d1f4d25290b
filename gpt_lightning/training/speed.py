"""How long the steps of a run take: measured on a small part of the work, or by the data sheet of a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.weights import NETWORKS
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.optimizers import OptimizerFactory, by_role, parameter_groups

BUDGET = 8e10  # FLOPs of a step that is measured
MEASURE_SECONDS = 0.4  # for each network
PEAKS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}  # TFLOP/s in dense bfloat16, NVIDIA's data sheets (SXM)
UTILIZATION = 0.4  # share of the peak that a run on a GPU is assumed to reach
DEEP = 3  # layers of the second network; noise in the difference counts for all layers of the run


@dataclass(frozen=True)
class Speed:
    """Seconds of what a run repeats."""

    forward: float  # per token, without gradients
    training: float  # per token, forward and backward
    update: float  # of the optimizer


def measure_speed(
    config: Any, optimizer: OptimizerFactory, *, sequences: int, block_size: int, precision: str
) -> Speed | None:
    """The speed of training on this CPU, from a network with one of the layers and one with DEEP.

    Args:
        config: Of the network.
        optimizer: Of the run.
        sequences: Of a micro-batch; fewer are measured where they take long.
        block_size: Tokens of a sequence.
        precision: As Lightning names it.

    Returns:
        None for a network of the user's own, whose layers are not known.
    """
    if type(config) not in NETWORKS:
        return None
    with torch.random.fork_rng(devices=[]), keep_freed_memory("cpu", large=True):  # as a run
        deep = min(DEEP, config.n_layer)
        nets = [NETWORKS[type(config)](replace(config, n_layer=layers)) for layers in sorted({1, deep})]
        found = _least(
            [_steps(net, optimizer, sequences, block_size, precision == "bf16-mixed") for net in nets]
        )
    one, several = found[0], found[-1]
    times = (config.n_layer - 1) / max(deep - 1, 1)
    return Speed(*(a + times * max(b - a, 0.0) for a, b in zip(one, several, strict=True)))


def _least(steps: list[Iterator[tuple[float, ...]]]) -> list[tuple[float, ...]]:
    """The least of each number of each network's steps, because other programs make single ones longer.

    The networks take turns, so that what slows one of them down for long slows the others as well.
    """
    for each in steps:
        next(each)  # the first step is slower
    rows: list[list[tuple[float, ...]]] = [[] for _ in steps]
    started = time.perf_counter()
    while len(rows[0]) < 2 or time.perf_counter() - started < MEASURE_SECONDS * len(steps):
        for found, each in zip(rows, steps, strict=True):
            found.append(next(each))
    return [tuple(min(column) for column in zip(*found, strict=True)) for found in rows]


def _steps(
    net: CausalLM, optimizer: OptimizerFactory, sequences: int, block_size: int, bf16: bool
) -> Iterator[tuple[float, float, float]]:
    """The numbers of `Speed` of each step; a large network gets fewer or shorter sequences."""
    tokens = max(32, int(BUDGET / 6 / sum(p.numel() for p in net.parameters())))
    length = min(block_size, tokens)
    idx = torch.randint(net.config.vocab_size, (min(sequences, tokens // length), length))
    update = optimizer(parameter_groups(net, by_role=by_role(optimizer)))
    while True:
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                net(idx, idx)
            times.append(time.perf_counter())
            loss = net(idx, idx)
        loss.backward()
        times.append(time.perf_counter())
        update.step()
        update.zero_grad()
        times.append(time.perf_counter())
        forward, training, step = (b - a for a, b in pairwise(times))
        yield forward / idx.numel(), training / idx.numel(), step
