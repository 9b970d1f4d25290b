"""--help: the groups with their choices, and every key with its comment from the YAML files."""

from __future__ import annotations

import functools
import operator
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from gpt_lightning.config.command_line import split_arguments
from gpt_lightning.config.resolvers import CONF

SWEEPS = {"train": "seed=1,2 optimizer.lr=1e-3,3e-3", "prepare": "'shard=range(8)' shards=8"}


@dataclass
class Key:
    """A key with the value that wins, its first comment, and the keys below it."""

    value: str = ""
    comment: list[str] = field(default_factory=list)  # its lines
    column: int = 0  # of the comment, from the beginning of the key
    below: dict[str, Key] = field(default_factory=dict)


def help_text(config_name: str, overrides: list[str]) -> str:
    """What a command can be told; `overrides` may name other choices, as in `--help model=gpt2_small`."""
    lines = [f"python -m gpt_lightning.{config_name} key=value …", ""]
    given = dict(text.split("=", 1) for text in overrides if "=" in text)
    groups = _groups(config_name)
    brought: list[dict[str, Any]] = [_overridden(f"{g}/{choice}") for g, choice in (groups | given).items()]
    asked = functools.reduce(operator.or_, [groups, *brought, given])
    chosen: Any = OmegaConf.to_container(OmegaConf.create(asked), resolve=True)
    lines += ["== Groups and their choices: GROUP=CHOICE =="]
    for group in sorted(groups):
        lines.append(f"{group}: {', '.join(choices_of(group))}")
    keys: dict[str, Key] = {}
    for name in (config_name, *(["train"] if config_name == "plan" else [])):
        _add_file(keys, name)
    for group in groups:
        if chosen[group] not in (None, "null"):
            keys.setdefault(group, Key(comment=[f"# {group}={chosen[group]}"]))
            _add_file(keys, f"{group}/{chosen[group]}")
    lines += ["", "== Keys: KEY=VALUE ==", *_lines(keys), ""]
    lines += [f"Several runs: -m {SWEEPS[config_name]}"] if config_name in SWEEPS else []
    lines += ["--cfg job prints the composed configuration, --config-dir DIR adds choices of your own,"]
    lines += ["--hydra-help lists Hydra's flags."]
    return "\n".join(lines)


def choices_of(group: str) -> list[str]:
    """The names of a group's choices, those of a --config-dir too; none if there is no such group."""
    files = (path for place in config_dirs() for path in (place / group).glob("*.yaml"))
    return sorted({path.stem for path in files if path.stem[0] != "_"})


def config_dirs() -> list[Path]:
    """Where this command's choices are, as Hydra looks for them: ours come before those of --config-dir."""
    own = split_arguments(sys.argv[1:])[0].config_dir
    return [CONF, *([Path(own)] if own else [])]


def _file(name: str) -> Path | None:
    return next((path for place in config_dirs() if (path := place / f"{name}.yaml").is_file()), None)


def _defaults(path: Path) -> list[object]:
    with path.open(encoding="utf-8") as file:  # which an error names
        return list((yaml.safe_load(file) or {}).get("defaults", []))


def _groups(config_name: str) -> dict[str, str | None]:
    """The groups of a command with the choices of its defaults list, in their order."""
    found: dict[str, str | None] = {}
    for entry in _defaults(CONF / f"{config_name}.yaml"):
        if entry == "train":
            found |= _groups("train")
        elif isinstance(entry, dict):
            found |= {str(group): choice for group, choice in entry.items() if "override" not in str(group)}
    return found


def _overridden(name: str) -> dict[str, str]:
    """The choices of other groups that a choice brings with it, as GPT-2's sizes do its tokenizer."""
    path, found = _file(name), dict[str, str]()
    for entry in _defaults(path) if path else ():
        if isinstance(entry, dict):
            found |= {key.removeprefix("override /"): choice for key, choice in entry.items()}
        elif entry != "_self_":
            found |= _overridden(f"{name.rpartition('/')[0]}/{entry}")
    return found


def _add_file(keys: dict[str, Key], name: str) -> None:
    """Adds the keys of the files that a file extends, and its own, where Hydra puts them."""
    if (path := _file(name)) is None:  # Hydra will say so
        return
    group = name.rpartition("/")[0]
    for entry in _defaults(path):
        if group and isinstance(entry, str) and entry != "_self_":
            _add_file(keys, f"{group}/{entry.partition('@')[0]}")
    text = path.read_text(encoding="utf-8")
    if group and not re.search("^# *@package +_global_", text, re.M):
        for part in group.split("/"):
            keys = keys.setdefault(part, Key()).below
    _add(keys, yaml.compose(text), text)


def _add(keys: dict[str, Key], node: Any, text: str) -> None:
    """Adds the keys of a mapping in a YAML text; the last value and the first comment of a key stay."""
    for name, value in node.value if node else ():
        shown = text[value.start_mark.index : value.end_mark.index]
        if name.value in ("defaults", "hydra") or name.value.startswith("_") or shown == "{block_size: null}":
            continue
        key, end = keys.setdefault(name.value, Key()), value.end_mark.index
        if isinstance(value, yaml.CollectionNode) and not value.flow_style:  # a block, below its key
            items = value.value if isinstance(value, yaml.SequenceNode) else []
            shown = ", ".join(text[item.start_mark.index : item.end_mark.index] for item in items)
            shown, end = f"[{shown}]" if items else "", name.end_mark.index + 1
        key.value = re.sub(r"\s*\n\s*", " ", shown)
        comment = re.compile(r"[ \t]*(#.*(\n[ \t]+#.*)*)").match(text, end)
        if comment and not key.comment:
            key.comment = [line.strip() for line in comment[1].splitlines()]
            key.column = comment.start(1) - name.start_mark.index
        if isinstance(value, yaml.MappingNode):
            _add(key.below, value, text)
        else:
            key.below.clear()


def _lines(keys: dict[str, Key], indent: str = "") -> list[str]:
    lines: list[str] = []
    for name, key in keys.items():
        first, *more = key.comment or [""]
        text = f"{name}: {'' if key.below else key.value}".rstrip() + " "
        lines += [f"{indent}{text.ljust(key.column)}{first}".rstrip()]
        lines += [f"{indent}{' ' * key.column}{line}" for line in more]
        lines += _lines(key.below, indent + "  ")
    return lines
