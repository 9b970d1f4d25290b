"""What must hold between the parts of a configuration, and of keys that no class of ours reads."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command import ConfigError

Rule = Callable[[str, Any], str | None]  # a key and its value -> what is wrong, or None


def _number(
    kind: type, *, least: float | None = None, above: float | None = None, optional: bool = False
) -> Rule:
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    expected = ("a whole number" if kind is int else "a number") + bound + " or null" * optional

    def rule(key: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if good and not math.isfinite(value):
            return f"{key}={value!r} must be finite: {expected}"
        good = good and (least is None or value >= least) and (above is None or value > above)
        return None if good else f"{key}={value!r} must be {expected}"

    return rule


def _one_of(*choices: Any) -> Rule:
    words = [str(choice).lower() if isinstance(choice, bool) else choice for choice in choices]

    def rule(key: str, value: Any) -> str | None:
        good = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if good else f"{key}={value!r} must be {', '.join(words[:-1])} or {words[-1]}"

    return rule


def _text(key: str, value: Any) -> str | None:
    good = isinstance(value, str) and value
    return None if good else f"{key}={value!r} must be text; quote a number, as in {key}=\"'3'\""


def _micro_batch_size(key: str, value: Any) -> str | None:
    problem = _number(int, least=1, optional=True)(key, value)
    return f"{problem}, or auto" if problem and value != "auto" else None


def _devices(key: str, value: Any) -> str | None:
    good = value == "auto" or (type(value) is int and value >= 1)
    if OmegaConf.is_list(value):
        good = all(type(n) is int and n >= 0 for n in value) and len(value) == len(set(value)) > 0
    return None if good else f"{key}={value!r} must be how many, auto for all, or a list such as [0,2]"


def _name(key: str, value: Any) -> str | None:
    good = re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", str(value)) and ".." not in str(value)
    good = good and not isinstance(value, (bool, types.NoneType))
    return None if good else f"{key}={value!r} names a folder; use letters, digits, and . _ - only"


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


# What no class of ours checks, and what would cost much before one does.
RULES: dict[str, Rule] = {
    "name": _name,
    "seed": _number(int, least=0),
    "target_loss": _number(float, above=0, optional=True),
    "paths.outputs": _text,
    "paths.run": _text,
    "lora.r": _number(int, least=0),
    "data.batch_size": _number(int, least=1),
    "data.stride": _number(int, least=1, optional=True),
    "data.sequence_length": _number(int, least=1, optional=True),
    "data.random_offset": _one_of(True, False),
    "data.num_workers": _number(int, least=0),
    "data.shuffle": _one_of(True, False),
    "data.drop_last": _one_of(True, False),
    "device.accelerator": _one_of("auto", "cpu", "cuda", "mps"),
    "device.devices": _devices,
    "device.precision": _one_of("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
    "device.micro_batch_size": _micro_batch_size,
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
    "trainer.deterministic": _one_of(True, False, "warn"),
}
METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss")  # what a callback can monitor


def check(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything expensive begins.

    Raises:
        ConfigError: The first thing that is wrong, with the remedy.
    """
    for key, rule in RULES.items():
        problem = rule(key, OmegaConf.select(cfg, key))
        if problem:
            raise ConfigError(problem)
    if cfg.trainer.max_steps is None and cfg.trainer.max_epochs is None:
        raise ConfigError("trainer.max_steps and trainer.max_epochs are both null; set one of them")
    if not OmegaConf.is_dict(cfg.trainer.lightning):
        raise ConfigError(
            f"trainer.lightning={cfg.trainer['lightning']!r} must be keys with values, as in "
            "+trainer.lightning.detect_anomaly=true"
        )
    if cfg.time_limit is not None and duration(cfg.time_limit) and cfg.callbacks.get("last") is None:
        raise ConfigError("time_limit= needs the checkpoints of callbacks.last; do not set that to null")
    if cfg.lora.r and cfg.init_from is None:
        raise ConfigError(f"lora.r={cfg.lora.r} trains beside frozen weights; give these with init_from=")
    _check_monitors(cfg.callbacks)
    _check_device(cfg)


def _check_monitors(callbacks: DictConfig) -> None:
    nodes = {str(key): node for key, node in callbacks.items() if OmegaConf.is_dict(node)}
    targets = [str(node.get("_target_")) for node in nodes.values()]
    if not all(target.startswith(("gpt_lightning.", "lightning.")) for target in targets):
        return  # one of the user's own may measure more
    for key, node in nodes.items():
        monitor = node.get("monitor")
        if monitor is not None and monitor not in METRICS:
            raise ConfigError(f"callbacks.{key}.monitor={monitor!r} must be one of {', '.join(METRICS)}")


def _check_device(cfg: DictConfig) -> None:
    device, precision = cfg.device, cfg.device.precision
    if device.accelerator == "cpu" and OmegaConf.is_list(device.devices):
        raise ConfigError(
            f"device.devices={device.devices!r} names GPUs; on a CPU it is a number of processes"
        )
    if device.accelerator == "mps":
        if device.devices not in (1, "auto"):
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
