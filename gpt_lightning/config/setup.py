"""What `plan check=true` finds: whether this machine has what runs need, and which presets fit its memory."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gpt_lightning.config.build import build_net, memory_needs, windows
from gpt_lightning.config.errors import EXTRAS
from gpt_lightning.config.help import choices_of
from gpt_lightning.rundir.provenance import versions
from gpt_lightning.training.memory import DEFAULT_MICRO_BATCH_SIZE, GIB

PURPOSES = {  # of the extras
    "hf": "data=huggingface, data=tinystories, .parquet files and init_from=hf:…",
    "demo": "the command demo",
    "optuna": "-m sweep=optuna",
    "eval": "BLEU in evaluate",
    "wandb": "logger=wandb",
    "mlflow": "logger=mlflow",
}
LITTLE_SPACE = 5 * GIB  # a checkpoint of GPT-2 small has 1.4 GiB, and three are kept
SHARE = 0.8  # of the memory; the rest is for other programs and for what the estimate leaves out
GPT2_FILES = ("vocab.bpe", "encoder.json")
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line of the check."""

    name: str  # what was looked at
    found: str
    remedy: str | None = None  # what to do, if something has to be done


def check_setup(cfg: DictConfig) -> list[Finding]:
    """Looks at packages, device, folders and tokenizer, and at the memory that each preset needs."""
    return [
        *_packages(),
        *_device(str(cfg.device.accelerator)),
        *(_folder(key, Path(str(cfg.paths[key])).expanduser()) for key in ("outputs", "cache", "data")),
        _gpt2_tokenizer(),
        *_presets(cfg),
    ]


def _packages() -> Iterator[Finding]:
    """The versions that determine what a run computes, and what is missing of each extra."""
    yield Finding(name="versions", found=", ".join(f"{name} {v}" for name, v in versions().items()))
    for extra, purpose in PURPOSES.items():
        missing = [name for name, of in EXTRAS.items() if of == extra and find_spec(name) is None]
        found = f"{', '.join(missing)} is missing" if missing else "installed"
        remedy = f"for {purpose}: pip install 'gpt-lightning[{extra}]'" if missing else None
        yield Finding(name=f"extra {extra}", found=found, remedy=remedy)


def _device(accelerator: str) -> Iterator[Finding]:
    """The chosen device, and the number formats that it has."""
    import torch

    from gpt_lightning.training.precision import multiplies_bfloat16

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(accelerator, True):
        build = "install a build of PyTorch for it (pytorch.org), or use device=cpu"
        yield Finding(name="device", found=f"{accelerator}, which PyTorch cannot use here", remedy=build)
        return
    kind = torch.cuda.get_device_name() if accelerator == "cuda" else platform.machine()
    count = torch.cuda.device_count() if accelerator == "cuda" else 1
    memory = memory_of(accelerator)
    size = f", {memory / GIB:.0f} GiB" if memory else ""
    lost = accelerator == "cpu" and shutil.which("nvidia-smi") is not None
    remedy = "there may be an NVIDIA GPU: see pytorch.org for a build that uses it" if lost else None
    yield Finding(name="device", found=f"{accelerator}: {count} × {kind}{size}", remedy=remedy)
    fast = multiplies_bfloat16(accelerator)
    yield Finding(
        name="precision", found="32-true, bf16-mixed" if fast else "32-true; bfloat16 would be slow"
    )


def memory_of(accelerator: str) -> float | None:
    """Bytes that the device has, or the part of them that a container may use; None if that is unknown."""
    import torch

    if accelerator == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
    if accelerator == "mps":
        return float(torch.mps.recommended_max_memory()) if torch.backends.mps.is_available() else None
    if not hasattr(os, "sysconf"):  # Windows
        return None
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, float(text)) if text.isdigit() else memory


def _folder(key: str, folder: Path) -> Finding:
    """Whether files can be written below a folder, which may not exist yet, and the room there."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    name = f"paths.{key}"
    try:
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        found = f"{folder} cannot be written ({error.strerror})"
        return Finding(name=name, found=found, remedy=f"use another folder, {name}=DIR")
    remedy = f"make room, or use another disk, {name}=DIR" if free < LITTLE_SPACE else None
    return Finding(name=name, found=f"{folder}, {free / GIB:.1f} GiB free", remedy=remedy)


def _gpt2_tokenizer() -> Finding:
    """Whether GPT-2's vocabulary is in tiktoken's cache, which names a file by the SHA-1 of its address."""
    variables = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = next((Path(os.environ[name]) for name in variables if os.environ.get(name)), default)
    names = [hashlib.sha1(f"{GPT2_URL}{file}".encode()).hexdigest() for file in GPT2_FILES]
    if all((folder / name).is_file() for name in names):
        return Finding(name="tokenizer=gpt2", found=f"in {folder}")
    remedy = "without a connection, set TIKTOKEN_CACHE_DIR to a copy of another machine's cache"
    return Finding(name="tokenizer=gpt2", found="will be downloaded on first use", remedy=remedy)


def _presets(cfg: DictConfig) -> Iterator[Finding]:
    """Which models and experiments the memory of the device is enough for, as they are."""
    memory = memory_of(str(cfg.device.accelerator))
    for group in ("model", "experiment"):
        fit: list[str] = []
        large: list[str] = []
        unknown: list[str] = []
        for name in choices_of(group):
            if (need := _need(group, name)) is None:
                unknown.append(name)
            else:
                room = memory is None or need <= SHARE * memory
                (fit if room else large).append(f"{name} {need / GIB:.1f}")
        yield Finding(name=f"{group}s that fit", found=f"GiB: {', '.join(fit) or 'none'}")
        if unknown:
            yield Finding(name="sized by weights", found=", ".join(unknown))
        if large:
            remedy = "lower device.micro_batch_size, set trainer.activation_checkpointing=true, or shard"
            yield Finding(name=f"{group}s too large", found=f"GiB: {', '.join(large)}", remedy=remedy)


def _need(group: str, name: str) -> float | None:
    """Bytes on the device that a preset needs; None where that depends on weights to start from."""
    import torch

    device = HydraConfig.get().runtime.choices.get("device", "auto")
    cfg = compose("plan", [f"{group}={name}", f"device={device}", "paths.run=run"])
    if cfg.init_from is not None:
        return None
    vocab_size = cfg.model.vocab_size or cfg.tokenizer.get("vocab_size") or 50257
    with torch.device("meta"):
        net = build_net(cfg, vocab_size)
    sequences = min(cfg.device.micro_batch_size or DEFAULT_MICRO_BATCH_SIZE, cfg.data.batch_size)
    tokens = sequences * windows(cfg)["block_size"]
    return sum(memory_needs(cfg, net, tokens=tokens, vocab_size=vocab_size).values())
