"""What a run needs of a device's memory: estimated, tried out, and explained when it was too much."""

from __future__ import annotations

import logging
import os
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.build import windows
from gpt_lightning.config.command import ConfigError, build

log = logging.getLogger(__name__)

GIB = 2**30
ENOUGH = 32  # sequences in a micro-batch where memory is not what limits it
FOUND = "GPT_LIGHTNING_MICRO_BATCH_SIZE"  # tells further ranks what the first one found


def device_count(cfg: DictConfig) -> int:
    """How many devices share a batch, over all nodes."""
    import torch

    devices, accelerator = cfg.device.devices, cfg.device.accelerator
    if devices == "auto":
        on_cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
        devices = max(1, torch.cuda.device_count()) if on_cuda else 1
    elif OmegaConf.is_list(devices):
        devices = len(devices)
    return int(devices * cfg.trainer.num_nodes)


def memory_estimate(
    cfg: DictConfig, parameters: int, micro_batch_size: int, *, trained: int | None = None
) -> dict[str, float]:
    """Bytes that training needs, by what needs them; `trained` of the parameters, all if not given.

    Weights, gradients and AdamW's two averages are exact at 4 bytes each. Activations kept for the
    backward pass are 34 bytes per token, layer and unit of width at 16 bits, after Korthikanti et al. (2022),
    section 4.1, without the attention matrix, which flash attention does not keep; logits count twice.
    """
    model, half = cfg.model, 2 if "16" in str(cfg.device.precision) else 4
    tokens = micro_batch_size * windows(cfg)["block_size"]
    trained = parameters if trained is None else trained
    return {
        "weights": 4 * parameters,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": 17 * half * tokens * model.get("n_embd", 0) * model.get("n_layer", 0),
        "logits": (half + 4) * tokens * model.vocab_size,
    }


def out_of_memory(cfg: DictConfig, parameters: int, micro_batch_size: int) -> ConfigError:
    """The error to raise when a device's memory was not enough: what to lower, and what it was needed for."""
    needs = memory_estimate(cfg, parameters, micro_batch_size)
    block_size, total = windows(cfg)["block_size"], sum(needs.values())
    if 4 * 4 * parameters > total / 2:  # weights, gradients, two averages: no batch makes them smaller
        remedy = "take a smaller model, such as model=gpt2_small, or shard it with trainer=fsdp"
    elif micro_batch_size > 1:
        remedy = (
            f"use device.micro_batch_size={micro_batch_size // 2} or auto; data.batch_size stays as it is"
        )
    else:
        remedy = f"use model.block_size={block_size // 2} or a smaller model"
    largest = max(needs, key=lambda part: needs[part])
    return ConfigError(
        f"out of memory with micro-batches of {micro_batch_size} sequences of {block_size} tokens and "
        f"{parameters:,} parameters (estimate: {total / GIB:.1f} GiB, most of it {largest}); {remedy}"
    )


def find_micro_batch(cfg: DictConfig, devices: int) -> int:
    """What device.micro_batch_size=auto stands for: the largest that fits and divides the batch evenly.

    Raises:
        ConfigError: If not even one sequence fits, if ranks that know nothing of each other would search, or
            if the weights are sharded, which one device cannot try out.
    """
    from gpt_lightning.training.micro_batch import largest_that_fits, sizes_of

    if "fsdp" in str(cfg.trainer.strategy).lower():
        raise ConfigError("device.micro_batch_size=auto cannot try out trainer=fsdp; give a number")
    share = max(1, cfg.data.batch_size // devices)
    if cfg.device.accelerator != "cuda":
        return sizes_of(share, ENOUGH)[-1]
    if FOUND in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":  # the first one is in a new run
        return int(os.environ[FOUND])
    if devices > 1 and {"SLURM_PROCID", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        raise ConfigError(
            "device.micro_batch_size=auto needs one command that starts all ranks; give a number"
        )
    listed = OmegaConf.is_list(cfg.device.devices)
    device = f"cuda:{cfg.device.devices[0]}" if listed else "cuda"
    settings: dict[str, Any] = {"device": device, "precision": str(cfg.device.precision)}
    size = largest_that_fits(
        lambda: build(cfg.model),
        build(cfg.optimizer),
        sizes_of(share),
        block_size=windows(cfg)["block_size"],
        **settings,
    )
    if size is None:
        raise out_of_memory(cfg, sum(p.numel() for p in build(cfg.model).parameters()), 1)
    log.info("device.micro_batch_size=auto: %d sequences", size)
    os.environ[FOUND] = str(size)
    return size
