"""What must hold between the parts of a configuration, and of keys that no class reads alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config import ConfigError


def _number(
    kind: type, *, least: float | None = None, above: float | None = None, optional: bool = False
) -> Callable[[str, Any], str | None]:
    """A check that returns what is wrong with a value, or None."""
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    expected = ("a whole number" if kind is int else "a number") + bound + (" or null" if optional else "")

    def check(key: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        good = good and (least is None or value >= least) and (above is None or value > above)
        return None if good else f"{key}={value!r} must be {expected}"

    return check


def _one_of(*choices: Any) -> Callable[[str, Any], str | None]:
    def check(key: str, value: Any) -> str | None:
        return None if value in choices else f"{key}={value!r} must be one of {', '.join(map(str, choices))}"

    return check


def duration(limit: str | int) -> float:
    """Seconds of a time limit: "HH:MM:SS", "D-HH:MM:SS" as SLURM has it, or seconds.

    Raises:
        ConfigError: If it is none of these, or nothing.
    """
    # YAML reads an unquoted 1:30:00 as the number of seconds, 5400
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)|(\d+)", str(limit))
    days, hours, minutes, seconds, plain_seconds = map(int, found.groups("0")) if found else (0,) * 5
    total = 86400 * days + 3600 * hours + 60 * minutes + seconds + plain_seconds
    if total <= 0:
        raise ConfigError(f"time_limit={limit!r} must be HH:MM:SS, such as 23:50:00 or 1-12:00:00")
    return float(total)


_AT_LEAST_ONE = _number(int, least=1, optional=True)

# Keys that no single class reads alone. Everything else is checked by the class that takes it.
RULES: dict[str, Callable[[str, Any], str | None]] = {
    "seed": _number(int, least=0),
    "target_loss": _number(float, above=0, optional=True),
    "data.batch_size": _number(int, least=1),
    "data.stride": _number(int, least=1, optional=True),
    "data.sequence_length": _number(int, least=1, optional=True),
    "data.random_offset": _one_of(True, False),
    "data.num_workers": _number(int, least=0),
    "data.shuffle": _one_of(True, False),
    "data.drop_last": _one_of(True, False),
    "device.micro_batch_size": lambda key, value: (value != "auto" and _AT_LEAST_ONE(key, value)) or None,
    "device.compile": _one_of(True, False),
    "device.pin_memory": _one_of(True, False),
    "device.matmul_precision": _one_of("highest", "high", "medium"),
    "trainer.max_steps": _number(int, least=1, optional=True),
    "trainer.max_epochs": _number(int, least=1, optional=True),
    "trainer.val_every_steps": _number(int, least=1),
    "trainer.val_batches": _number(int, least=1, optional=True),
    "trainer.log_every_steps": _number(int, least=1),
    "trainer.save_every_steps": _number(int, least=1),
    "trainer.keep_last": _number(int, least=1),
    "trainer.snapshot_every_steps": _number(int, least=1, optional=True),
    "trainer.clip_norm": _number(float, above=0, optional=True),
    "trainer.num_nodes": _number(int, least=1),
}


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything expensive begins.

    Raises:
        ConfigError: The first thing that is wrong, with the remedy.
    """
    for key, rule in RULES.items():
        problem = rule(key, OmegaConf.select(cfg, key))
        if problem:
            raise ConfigError(problem)
    if not re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", str(cfg.name)) or ".." in str(cfg.name):
        raise ConfigError(f"name={cfg.name!r} names a folder; use letters, digits, and . _ - only")
    if cfg.trainer.max_steps is None and cfg.trainer.max_epochs is None:
        raise ConfigError("trainer.max_steps and trainer.max_epochs are both null; set one of them")
    if cfg.time_limit is not None and duration(cfg.time_limit) and cfg.callbacks.get("last") is None:
        raise ConfigError("time_limit= needs the checkpoints of callbacks.last; do not set that to null")
    if cfg.resume is not None and cfg.init_from is not None:
        raise ConfigError(
            f"resume={cfg.resume} and init_from={cfg.init_from} exclude each other; resume continues a run "
            "exactly, init_from begins a new one from weights"
        )
    device, precision = cfg.device, str(cfg.device.precision)
    if device.accelerator == "mps":
        if device.devices not in (1, "auto", "1"):
            raise ConfigError(
                f"device.devices={device.devices}: Apple's GPU is one device; use device.devices=1"
            )
        if device.compile:
            raise ConfigError("device.compile=true does not work on mps; use device.compile=false")
    if precision.startswith("16") and device.accelerator != "cuda":
        raise ConfigError(
            f"device.precision={precision} needs a CUDA GPU; use device.precision=32-true or bf16-mixed"
        )
    fused = OmegaConf.select(cfg, "optimizer.fused")
    if precision == "16-mixed" and fused and cfg.trainer.clip_norm is not None:
        raise ConfigError(
            "device.precision=16-mixed cannot clip under a fused optimizer; add optimizer.fused=false"
        )
