"""How long the steps of a run take on this CPU, measured on a small part of the work."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.weights import NETWORKS
from gpt_lightning.training.optimizers import OptimizerFactory, by_role, parameter_groups

BUDGET = 8e10  # FLOPs of a step that is measured
ENOUGH = 0.4  # seconds of measuring for each network
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
    with torch.random.fork_rng(devices=[]):
        speeds, deep = {}, min(DEEP, config.n_layer)
        for layers in {1, deep}:
            net = NETWORKS[type(config)](replace(config, n_layer=layers))
            speeds[layers] = astuple(
                _measure(net, optimizer, sequences, block_size, precision == "bf16-mixed")
            )
    times = (config.n_layer - 1) / max(deep - 1, 1)
    return Speed(*(a + times * max(b - a, 0.0) for a, b in zip(speeds[1], speeds[deep], strict=True)))


def _measure(
    net: CausalLM, optimizer: OptimizerFactory, sequences: int, block_size: int, bf16: bool
) -> Speed:
    """The speed of a whole network; of a large one with fewer or shorter sequences."""
    tokens = max(32, int(BUDGET / 6 / sum(p.numel() for p in net.parameters())))
    length = min(block_size, tokens)
    idx = torch.randint(net.config.vocab_size, (min(sequences, tokens // length), length))
    update = optimizer(parameter_groups(net, by_role=by_role(optimizer)))
    rows: list[list[float]] = []
    started = time.perf_counter()
    while len(rows) < 3 or time.perf_counter() - started < ENOUGH:
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
        rows.append([b - a for a, b in pairwise(times)])
    # the least, because other programs make single steps longer
    forward, training, step = (min(column) for column in zip(*rows[1:], strict=True))
    return Speed(forward / idx.numel(), training / idx.numel(), step)
