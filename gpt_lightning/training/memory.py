"""What training needs of a device's memory, and what to do when that is not there."""

from __future__ import annotations

GIB = 2**30
# Bytes per token, layer and unit of width that the backward pass needs, with 32 and with 16 bits: of GPT-2
# after Korthikanti et al. (2022), section 4.1, without the attention matrix, which flash attention does not
# keep; of Qwen3 as autograd keeps them (tests/training/test_memory.py counts both)
KEPT = {"GPTConfig": (68, 34), "Qwen3Config": (99, 72)}
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
    network: str = "GPTConfig",
) -> dict[str, float]:
    """Bytes that training needs, by what needs them.

    Weights, gradients and AdamW's two averages are exact at 4 bytes each. Activations kept for the backward
    pass are those of KEPT; logits count twice. A loss in chunks has the logits of one chunk, and the gradient
    of the head a second time.

    Args:
        parameters: Numbers in the network, of which
        trained: have gradients.
        tokens: Of one forward on one device.
        n_embd, n_layer, vocab_size: Shape of the network; 0 where it has none.
        precision: As Lightning names it.
        shards: Devices that share weights, gradients and optimizer state.
        recomputed: Whether only the inputs of the blocks are kept, in 32 bits, and those of one block whole.
        chunked: Whether the loss is computed in chunks of `CHUNK` logits.
        network: Class of its configuration; others count as GPT-2's.
    """
    from gpt_lightning.model.gpt import CHUNK  # imports torch, for which --help does not wait

    size = 2 if "16" in precision else 4
    block = KEPT.get(network, KEPT["GPTConfig"])[size == 2]
    kept = block + 4 * n_layer if recomputed and n_layer else block * n_layer
    logits = (size + 4) * tokens * vocab_size
    if chunked and tokens * vocab_size > CHUNK:
        logits = 8 * CHUNK + 4 * vocab_size * n_embd
    return {
        "weights": 4 * parameters / shards,
        "gradients": 4 * trained / shards,
        "optimizer": 8 * trained / shards,
        "activations": kept * tokens * n_embd,
        "logits": logits,
    }


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
