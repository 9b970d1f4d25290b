"""What Hydra left in .hydra/ of a run: its configuration, its overrides, and where it was started."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gpt_lightning.config.command_line import OWN_KEYS, as_given, as_of_job, key_of, varies
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.data.files import atomic_write
from gpt_lightning.rundir.directory import HYDRA

# What may differ when a run is resumed: it changes what is written or shown, never the weights.
HARMLESS = (
    "resume",
    "trust",
    "name",
    "paths.*",
    "logger*",
    "callbacks.layers*",
    "callbacks.progress*",
    "callbacks.samples*",
    "callbacks.metrics*",
    "callbacks.last*",
    "callbacks.nonfinite",
    "callbacks.incidents*",
    "data.num_workers",
    "device.pin_memory",
    "trainer.val_every_steps",
    "trainer.val_batches",
    "trainer.log_every_steps",
    "trainer.save_every_steps",
    "trainer.keep_last",
    "trainer.snapshot_every_steps",
    "trainer.timeout_seconds",
    "time_limit",
)
VALIDATION = ("trainer.val_every_steps", "trainer.val_batches")  # determine when early stopping ends a run
GROUPS = ("data", "tokenizer", "model", "optimizer", "scheduler")


def is_harmless(key: str) -> bool:
    """Whether the jobs of a sweep may differ in a key from those that are done."""
    return key not in VALIDATION and any(fnmatch.fnmatch(key, rule) for rule in HARMLESS)


def read_recorded(folder: Path, name: str) -> Any:
    """A file that Hydra left in the run directory.

    Raises:
        ConfigError: If it is not there or damaged.
    """
    if not (folder / HYDRA / name).is_file():
        raise ConfigError(f"{folder} is not a run directory (it has no {HYDRA}/{name})")
    return read_yaml(folder / HYDRA / name)


def read_yaml(path: Path) -> Any:
    """A file that Hydra left; a ConfigError if it is damaged."""
    try:
        return OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{path} is damaged; begin a new run") from error


def recorded_overrides(folder: Path) -> list[str]:
    """The overrides of a run as they were given, with their interpolations.

    Those of somebody else may be anything: left out are flags, several values for a key, and what is Hydra's
    own, as `group@hydra.callbacks.x=choice` is.
    """
    texts = as_given(read_recorded(folder, "overrides.yaml"))
    others = re.compile(r"-|[+~]*hydra\b|[^=]*@[^=]*\bhydra\b")
    own = [text for text in texts if key_of(text) not in OWN_KEYS and not others.match(text)]
    return [text for text in own if not (re.search("[,(]", text) and varies(text))]


def without_fixed(overrides: list[str], folder: Path) -> list[str]:
    """The overrides that vary in the sweep that a run belongs to; all of them without a sweep."""
    multirun = folder.parent / "multirun.yaml"
    try:
        fixed = {as_of_job(text) for text in as_given(read_yaml(multirun).hydra.overrides.task)}
        return [text for text in overrides if as_of_job(text) not in fixed]
    except (ConfigError, HydraException, OmegaConfBaseException):  # not there, or damaged
        return overrides


def recorded_choices(folder: Path) -> list[str]:
    """What the run took by default from the groups that decide its classes; releases may differ in it."""
    choices, given = group_choices(folder), {key_of(text) for text in recorded_overrides(folder)}
    if read_recorded(folder, "config.yaml").get("init_from") is not None:
        given.add("model")  # which is that of the weights
    groups = [group for group in GROUPS if group not in given and choices.get(group) is not None]
    return [f"{group}={choices[group]}" for group in groups]


def group_choices(folder: Path) -> dict[str, Any]:
    """The choices of a run, those of defaults too, by group."""
    return read_recorded(folder, "hydra.yaml").hydra.runtime.get("choices") or {}


def write_yaml(path: Path, content: Any) -> None:
    """Replace a file that Hydra left."""
    with atomic_write(path, text=True) as file:
        file.write(OmegaConf.to_yaml(content))


def flat(cfg: Any) -> dict[str, Any]:
    """Unresolved values by their dotted keys."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict) or not node:
            yield prefix, node
            return
        for key, value in node.items():
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))

    return dict(walk(OmegaConf.to_container(cfg, resolve=False), ""))
