"""What training needs of a device's memory, and what to do when that is not there."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

GIB = 2**30
# Bytes per token, layer and unit of width that the backward pass needs, with 32 and with 16 bits: of GPT-2
# after Korthikanti et al. (2022), section 4.1, without the attention matrix, which flash attention does not
# keep; of others as autograd keeps them (tests/training/test_memory.py counts all)
KEPT = {"GPTConfig": (68, 34), "Qwen3Config": (84, 65), "StarCoder2Config": (64, 41)}
# What the C allocator holds of freed activations and logits, as a share of them: benchmarks/planning.py
CPU_SLACK = {"GPTConfig": 0.35, "Qwen3Config": 0.7, "StarCoder2Config": 0.35}
DEFAULT_MICRO_BATCH_SIZE = 32  # sequences per device per forward where the configuration has null


def memory_estimate(
    *,
    parameters: int,
    trained: int,
    tokens: int,
    n_embd: int,
    n_layer: int,
    vocab_size: int,
    precision: str,
    shards: int = 1,
    recomputed: bool = False,
    chunked: bool = False,
    cpu: bool = False,
    network: str = "GPTConfig",
) -> dict[str, float]:
    """Bytes that training needs, by what needs them.

    Weights, gradients and AdamW's two averages are exact: 4 bytes each, or those of a true precision; mixed
    precision has its weights in 16 bits as well. Activations kept for the backward pass are those of KEPT;
    logits count twice. A loss in chunks has the logits of one chunk, and the gradient of the head a second
    time.

    Args:
        parameters: Numbers in the network, of which
        trained: have gradients.
        tokens: Of one forward on one device.
        n_embd, n_layer, vocab_size: Shape of the network; 0 where it has none.
        precision: As Lightning names it.
        shards: Devices that share weights, gradients and optimizer state.
        recomputed: Whether only the inputs of the blocks are kept, in 32 bits, and those of one block whole.
        chunked: Whether the loss is computed in chunks of `CHUNK` logits.
        cpu: Whether the memory is that of the process, with what its allocator keeps.
        network: Class of its configuration; others count as GPT-2's.
    """
    from gpt_lightning.model.gpt import CHUNK  # imports torch, for which --help does not wait

    mixed = precision.endswith("-mixed")
    size = {"64-true": 8, "bf16-true": 2, "16-true": 2}.get(precision, 4)  # bytes of a weight
    network = network if network in KEPT else "GPTConfig"
    kept, slack = KEPT[network], CPU_SLACK[network]
    block = kept[1] if mixed else kept[0] * size / 4
    layers = block + size * n_layer if recomputed and n_layer else block * n_layer
    logits = (size + (2 if mixed else size)) * tokens * vocab_size
    if chunked and tokens * vocab_size > CHUNK:
        logits = 8 * CHUNK + 4 * vocab_size * n_embd
    activations = layers * tokens * n_embd
    needs = {
        "weights": (size + 2 * mixed) * parameters / shards,
        "gradients": size * trained / shards,
        "optimizer": 2 * size * trained / shards,
        "activations": activations,
        "logits": logits,
    }
    return needs | ({"allocator": slack * (activations + logits)} if cpu else {})


@contextmanager
def keep_freed_memory(device: str, *, large: bool) -> Iterator[None]:
    """Context in which this process keeps the memory that is freed, if the device is a CPU.

    Each step needs the same memory again, and the system takes longer to give it back, filled with zeros,
    than some of the operations that use it. Afterwards what is free is returned. Only glibc can do this.

    Args:
        device: Type of the device.
        large: Whether blocks above 32 MiB are kept as well; if these have many sizes, as logits and their
            gradients that are computed at once, they leave gaps, and the process needs more memory.

    Source: mallopt(3).
    """
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" and device == "cpu" else None
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # of malloc.h
    libc.mallopt(trim_threshold, -1)  # the heap never shrinks
    libc.mallopt(mmap_threshold, 32 << 20)  # smaller blocks are on it; glibc allows no more
    if large:
        libc.mallopt(mmap_max, 0)  # all are
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 64 << 20)  # the largest value that glibc takes by itself
        libc.mallopt(mmap_max, 1 << 16)  # its default
        libc.malloc_trim(0)


def out_of_memory(
    needs: dict[str, float], *, parameters: int, micro_batch_size: int, block_size: int
) -> ValueError:
    """The error to raise when a device's memory was not enough: what to lower, and what it was needed for."""
    total = sum(needs.values())
    if 16 * parameters > total / 2:  # weights, gradients, two averages: no batch makes them smaller
        remedy = "take a smaller model, such as model=gpt2_small, or shard it with trainer=fsdp"
    elif micro_batch_size > 1:
        remedy = f"use device.micro_batch_size={micro_batch_size // 2}; data.batch_size stays as it is"
    else:
        remedy = f"use model.block_size={block_size // 2} or a smaller model"
    largest = max(needs, key=lambda part: needs[part])
    return ValueError(
        f"out of memory with micro-batches of {micro_batch_size} sequences of {block_size} tokens and "
        f"{parameters:,} parameters (estimate: {total / GIB:.1f} GiB, most of it {largest}); {remedy}"
    )
