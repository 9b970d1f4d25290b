"""What device.precision=auto stands for."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from gpt_lightning.inference.cpu_kernels import cpu_features

# Parameters from which bfloat16 makes a CPU's steps faster, without and with AMX, by benchmarks/RESULTS.md
WORTHWHILE = {False: 3_000_000, True: 400_000}


def choose_precision(accelerator: str, parameters: int, *, has_bfloat16: bool, amx: bool = False) -> str:
    """The precision for so many parameters on cpu, cuda or mps; GPUs gain at any size."""
    large = accelerator == "cuda" or (accelerator == "cpu" and parameters >= WORTHWHILE[amx])
    return "bf16-mixed" if has_bfloat16 and large else "32-true"


def multiplies_bfloat16(accelerator: str) -> bool:
    """Whether the device has instructions for it; others emulate them slowly."""
    if accelerator == "cuda":
        # a plan for a GPU of another machine assumes a recent one
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator == "cpu" and any(cpu_features().get(name) for name in ("avx512_bf16", "amx_bf16"))


def has_amx() -> bool:
    """Whether the CPU has matrix units for bfloat16."""
    return bool(cpu_features().get("amx_bf16"))


def use_precision(trainer: Trainer, precision: str) -> None:
    """Change a trainer of 32 bits, which was built before its network was known, to another precision."""
    if precision == "bf16-mixed":
        device = trainer.strategy.root_device.type
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", device)
