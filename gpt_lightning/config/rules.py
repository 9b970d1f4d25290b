"""What must hold within and between the parts of a configuration: the one place that validates it.

Names and types of a class's arguments are read from its signature, and ranges are checked by the class when
it is built; the tables are for keys that no class of this package reads, and for relations between keys.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError, suggestion

LARGEST = 10**12  # of a count, so that a product of counts has 64 bits
Rule = Callable[[str, Any], str | None]  # a key and its value -> what is wrong, or None

# -- keys ---------------------------------------------------------------------------------------------


def number(
    kind: type,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> Rule:
    """A whole number (int) or any (float) within bounds."""
    bound = f" of at least {least}" if least is not None else f" above {above}" if above is not None else ""
    bound = f" from {least} to {most}" if most is not None else bound
    expected = ("a whole number" if kind is int else "a number") + bound + " or null" * optional

    def rule(key: str, value: Any) -> str | None:
        if value is None and optional:
            return None
        good = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if good and not math.isfinite(value):
            return f"{key}={value!r} must be finite: {expected}"
        good = good and (least is None or value >= least) and (above is None or value > above)
        good = good and (most is None or value <= most)
        if good and kind is int and value > LARGEST:
            return f"{key}={value!r} must be {expected}, and at most {LARGEST}"
        return None if good else f"{key}={value!r} must be {expected}"

    return rule


def one_of(*choices: Any) -> Rule:
    """One of some values."""
    yaml = {True: "true", False: "false", None: "null"}
    words = [choice if isinstance(choice, str) else yaml[choice] for choice in choices]

    def rule(key: str, value: Any) -> str | None:
        good = any(type(value) is type(choice) and value == choice for choice in choices)
        return None if good else f"{key}={value!r} must be {', '.join(words[:-1])} or {words[-1]}"

    return rule


def text(key: str, value: Any) -> str | None:
    """Text of at least one character."""
    good = isinstance(value, str) and value
    return None if good else f"{key}={value!r} must be text; quote a number, as in {key}=\"'3'\""


def optional_text(key: str, value: Any) -> str | None:
    """Text, or null."""
    return None if value is None else text(key, value)


def texts(key: str, value: Any) -> str | None:
    """A list of texts."""
    good = OmegaConf.is_list(value) and all(isinstance(one, str) for one in value)
    return None if good else f"{key}={value!r} must be a list of texts, such as ['Once','a b']"


def readable_path(key: str, value: Any) -> str | None:
    """The path of a file or a folder, or null; from a pipe or a device, one could read for ever."""
    path = Path(str(value)).expanduser()
    if value is None or (value != "" and (path.is_file() or path.is_dir())):
        return None
    return (
        f"{key}={value} is neither a file nor a folder" if path.exists() else f"{key}={value} does not exist"
    )


def _devices(key: str, value: Any) -> str | None:
    good = value == "auto" or (type(value) is int and 1 <= value <= LARGEST)
    if OmegaConf.is_list(value):
        good = all(type(n) is int and n >= 0 for n in value) and len(value) == len(set(value)) > 0
    return None if good else f"{key}={value!r} must be how many, auto for all, or a list such as [0,2]"


def _strategy(key: str, value: Any) -> str | None:
    if isinstance(value, str) and "spawn" in value:
        return f"{key}={value} cannot hand a run to the processes that it starts; use ddp"
    other = value.startswith("fsdp_") if isinstance(value, str) else "FSDPStrategy" in str(value)
    return f"{key}={value} is another FSDP; use trainer=fsdp" if other else None


def _name(key: str, value: Any) -> str | None:
    good = re.fullmatch(r"[\w.,=+-]+(/[\w.,=+-]+)*", str(value)) and ".." not in str(value)
    good = good and not isinstance(value, (bool, types.NoneType))
    return None if good else f"{key}={value!r} names a folder; use letters, digits, and . _ - only"


def parse_duration(limit: str | int) -> float:
    """Seconds of a time limit: "HH:MM:SS", "D-HH:MM:SS" (SLURM's format), or seconds.

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
    "seed": number(int, least=0, most=2**32 - 1),  # numpy takes 32 bits
    "target_loss": number(float, above=0, optional=True),
    "paths.outputs": text,
    "paths.run": text,
    "lora.r": number(int, least=0),
    "data.batch_size": number(int, least=1),
    "data.stride": number(int, least=1, optional=True),
    "data.sequence_length": number(int, least=1, optional=True),
    "data.random_offset": one_of(True, False),
    "data.align_documents": one_of(True, False),
    "data.num_workers": number(int, least=0, most=1000),  # processes
    "data.shuffle": one_of(True, False),
    "data.drop_last": one_of(True, False),
    "data.shuffle_buffer": number(int, least=1, optional=True),  # windows
    "device.accelerator": one_of("auto", "cpu", "cuda", "mps"),
    "device.devices": _devices,
    "device.precision": one_of(
        "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"
    ),
    "device.micro_batch_size": number(int, least=1, optional=True),
    "device.compile": one_of(True, False),
    "device.pin_memory": one_of(True, False),
    "device.matmul_precision": one_of("highest", "high", "medium"),
    "trainer.max_steps": number(int, least=1, optional=True),
    "trainer.max_epochs": number(int, least=1, optional=True),
    "trainer.tokens_per_parameter": number(float, above=0, optional=True),
    "trainer.max_flops": number(float, above=0, optional=True),
    "trainer.val_every_steps": number(int, least=1, optional=True),
    "trainer.val_batches": number(int, least=1, optional=True),
    "trainer.log_every_steps": number(int, least=1, optional=True),
    "trainer.save_every_steps": number(int, least=1, optional=True),
    "trainer.keep_last": number(int, least=1, most=1000),  # files, each of which is renamed
    "trainer.strategy": _strategy,
    "model.n_layer": number(int, least=1, most=10_000, optional=True),  # each is an object
    "model.n_embd": number(int, least=1, optional=True),
    "model.n_inner": number(int, least=1, optional=True),
    "model.block_size": number(int, least=1, optional=True),
    "model.vocab_size": number(int, least=1, optional=True),
    "model.vocab_multiple": number(int, least=1, optional=True),
    "trainer.snapshot_every_steps": number(int, least=1, optional=True),
    "trainer.clip_norm": number(float, above=0, optional=True),
    "trainer.num_nodes": number(int, least=1),
    "trainer.activation_checkpointing": one_of(True, False),
    "trainer.timeout_seconds": number(int, least=1, most=86_400),
    "trainer.deterministic": one_of(True, False, "warn"),
}
# arguments of Lightning's Trainer that have a key of their own here
TRAINER_KEYS = {
    "accelerator": "device.accelerator",
    "devices": "device.devices",
    "precision": "device.precision",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "deterministic": "trainer.deterministic",
    "max_steps": "trainer.max_steps",
    "max_epochs": "trainer.max_epochs",
    "limit_val_batches": "trainer.val_batches",
    "val_check_interval": "trainer.val_every_steps",
    "check_val_every_n_epoch": "trainer.val_every_steps",
    "num_sanity_val_steps": "trainer.val_every_steps",
    "log_every_n_steps": "trainer.log_every_steps",
    "gradient_clip_val": "trainer.clip_norm",
    "gradient_clip_algorithm": "trainer.clip_norm",
    "accumulate_grad_batches": "data.batch_size and device.micro_batch_size",
    "logger": "logger",
    "max_time": "time_limit",
    "callbacks": "callbacks",
    "enable_checkpointing": "callbacks.last",
    "enable_progress_bar": "callbacks.progress",
    "enable_model_summary": "callbacks.layers",
    "default_root_dir": "paths.run",
    "plugins": "trainer.strategy",
    "use_distributed_sampler": "data.shuffle",
}
LENGTHS = ("max_steps", "max_epochs", "tokens_per_parameter", "max_flops")  # of a run; the shortest counts
METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte", "train/loss")  # what a callback can monitor


def check(cfg: DictConfig, rules: Mapping[str, Rule]) -> None:
    """Refuse the first value that breaks its rule.

    Raises:
        ConfigError: Names the key, the value and the remedy.
    """
    for key, rule in rules.items():
        if problem := rule(key, OmegaConf.select(cfg, key)):
            raise ConfigError(problem)


def validate(cfg: DictConfig) -> None:
    """Refuse what cannot work before anything expensive begins.

    Raises:
        ConfigError: The first thing that is wrong, with the remedy.
    """
    check(cfg, RULES)
    if cfg.resume is None and cfg.repeat is None:  # the run of an older release may have other keys
        _check_keys(cfg)
    if all(cfg.trainer[key] is None for key in LENGTHS):
        raise ConfigError(f"{', '.join(f'trainer.{key}' for key in LENGTHS)} are all null; set one of them")
    lightning = cfg.trainer.lightning
    if not OmegaConf.is_dict(lightning):
        raise ConfigError(
            f"trainer.lightning={lightning!r} must be keys with values, as in "
            "+trainer.lightning.detect_anomaly=true"
        )
    for name in TRAINER_KEYS.keys() & lightning.keys():
        raise ConfigError(
            f"trainer.lightning.{name}={lightning[name]} would be ignored; set {TRAINER_KEYS[name]} instead"
        )
    if cfg.time_limit is not None and parse_duration(cfg.time_limit) and cfg.callbacks.get("last") is None:
        raise ConfigError("time_limit= needs the checkpoints of callbacks.last; do not set that to null")
    if cfg.lora.r and cfg.init_from is None:
        raise ConfigError(f"lora.r={cfg.lora.r} trains beside frozen weights; give these with init_from=")
    if cfg.data.shuffle_buffer is not None and (
        cfg.trainer.val_batches is None or cfg.trainer.max_epochs is not None
    ):
        raise ConfigError(
            "data.shuffle_buffer trains before the whole text is read, so it needs a number of validation "
            "batches and no epochs; set trainer.val_batches=20 and trainer.max_epochs=null"
        )
    _check_monitors(cfg.callbacks)
    _check_device(cfg)
    if cfg.trainer.strategy == "fsdp":
        _check_sharding(cfg)


def _check_keys(cfg: DictConfig) -> None:
    """Refuse keys that were added (+trainer.maxsteps=9) and that nothing reads."""
    for group in ("trainer", "device"):
        for key in (f"{group}.{name}" for name in cfg[group]):
            if key not in RULES and key != "trainer.lightning":
                close = suggestion(key, RULES)
                remedy = f"did you mean {close}?" if close else "--cfg job shows all keys"
                raise ConfigError(f"there is no key {key}; {remedy}")


def _check_monitors(callbacks: DictConfig) -> None:
    nodes = {str(key): node for key, node in callbacks.items() if OmegaConf.is_dict(node)}
    targets = [str(node.get("_target_")) for node in nodes.values()]
    if not all(target.startswith(("gpt_lightning.", "lightning.")) for target in targets):
        return  # one of the user's own may measure more
    for key, node in nodes.items():
        monitor = node.get("monitor")
        if monitor is not None and monitor not in METRICS:
            raise ConfigError(f"callbacks.{key}.monitor={monitor!r} must be one of {', '.join(METRICS)}")


def _check_sharding(cfg: DictConfig) -> None:
    if cfg.lora.r:
        raise ConfigError("trainer.strategy=fsdp does not train adapters; use lora.r=0 or trainer=ddp")
    if cfg.device.precision == "16-mixed":
        raise ConfigError("trainer.strategy=fsdp needs another device.precision than 16-mixed: bf16-mixed")
    if cfg.device.accelerator == "mps":
        raise ConfigError("trainer.strategy=fsdp: mps is one device; use trainer=default")


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
    if device.compile and cfg.callbacks.get("diagnostics") is not None:
        raise ConfigError(
            "callbacks=diagnostics sees no layers of a compiled network; use device.compile=false"
        )
    if precision.startswith("16") and device.accelerator != "cuda":
        raise ConfigError(
            f"device.precision={precision} needs a CUDA GPU; use device.precision=32-true or bf16-mixed"
        )
    fused = OmegaConf.select(cfg, "optimizer.fused")
    if precision == "16-mixed" and fused and cfg.trainer.clip_norm is not None:
        raise ConfigError(
            "device.precision=16-mixed cannot clip under a fused optimizer; add optimizer.fused=false"
        )
