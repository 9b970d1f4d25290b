"""The largest micro-batch that a device's memory holds, found by trying.

B sequences of a micro-batch, T block_size.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gpt_lightning.training.optimizers import OptimizerFactory, decay_groups

log = logging.getLogger(__name__)

ROOM = 0.9  # share of the memory to use: what lies in between is lost to fragments


def sizes_of(share: int, limit: int | None = None) -> list[int]:
    """Micro-batch sizes that make up a device's share of a batch exactly, smallest first."""
    return [size for size in range(1, min(share, limit or share) + 1) if share % size == 0]


def largest_that_fits(
    build_net: Callable[[], nn.Module],
    optimizer: OptimizerFactory,
    sizes: Sequence[int],
    *,
    block_size: int,
    device: str | torch.device,
    precision: str = "32-true",
) -> int | None:
    """Try whole training steps on a network of its own, halving the sizes in question each time.

    Args:
        build_net: Makes the network.
        optimizer: As in `LanguageModel`; its state counts too.
        sizes: Candidates for B, smallest first.
        block_size: T.
        device: Where to try.
        precision: As Lightning names it.

    Returns:
        The largest size whose step needs at most ROOM of the memory, None if not even the smallest does.
    """
    device = torch.device(device)
    low, high = -1, len(sizes) - 1  # sizes[low] fits; above sizes[high] nothing does
    while low < high:
        middle = (low + high + 1) // 2
        fits = _fits(build_net, optimizer, sizes[middle], block_size, device, precision)
        log.debug("micro-batch of %d: %s", sizes[middle], "fits" if fits else "does not fit")
        low, high = (middle, high) if fits else (low, middle - 1)
    return sizes[low] if low >= 0 else None


def _fits(
    build_net: Callable[[], nn.Module],
    optimizer: OptimizerFactory,
    size: int,
    block_size: int,
    device: torch.device,
    precision: str,
) -> bool:
    kind = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    mixed: Any = torch.autocast(device.type, kind) if precision.endswith("-mixed") else nullcontext()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        net = build_net().to(device, kind if precision in ("bf16-true", "16-true") else torch.float32).train()
        step = optimizer(decay_groups(net))
        tokens = torch.zeros(size, block_size, dtype=torch.long, device=device)  # (B, T)
        with mixed:
            loss = net(tokens, tokens)
        loss.backward()
        step.step()
        if device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device) <= ROOM * total
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        net = step = tokens = loss = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
