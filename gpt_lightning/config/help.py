"""--help: the groups with their choices, and every key with its comment from the YAML files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from gpt_lightning.config.command_line import split_arguments
from gpt_lightning.config.resolvers import CONF

INTERNAL = re.compile(r"(defaults:|hydra:|model: \{block_size|_target_:|_partial_:|# @package|- |\s+- )")


def help_text(config_name: str, overrides: list[str]) -> str:
    """What a command can be told; `overrides` may name other choices, as in `--help model=gpt2_small`."""
    lines = [f"python -m gpt_lightning.{config_name} key=value …", ""]
    given = dict(text.split("=", 1) for text in overrides if "=" in text)
    groups = _groups(config_name)
    chosen: Any = OmegaConf.to_container(OmegaConf.create(groups | given), resolve=True)
    lines += ["== Groups and their choices: GROUP=CHOICE =="]
    for group in sorted(groups):
        lines.append(f"{group}: {', '.join(choices_of(group))}")
    lines += ["", "== Keys: KEY=VALUE ==", *_body(config_name, "")]
    lines += _body("train", "") if config_name == "plan" else []
    for group in groups:
        if group != "experiment" and chosen[group] not in (None, "null"):
            lines += [f"{group}: # {group}={chosen[group]}", *_body(f"{group}/{chosen[group]}", "  ")]
    lines += [
        "",
        "Several runs: -m seed=1,2 optimizer.lr=1e-3,3e-3. --cfg job prints the composed configuration,",
    ]
    lines += ["--config-dir DIR adds choices of your own, --hydra-help lists Hydra's flags."]
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


def _body(name: str, indent: str) -> list[str]:
    """The keys of a file and of those that it extends, with their comments."""
    if (path := _file(name)) is None:  # Hydra will say so
        return []
    lines: list[str] = []
    for entry in _defaults(path):
        if "/" in name and isinstance(entry, str) and entry != "_self_":
            lines += _body(f"{name.rpartition('/')[0]}/{entry}", indent)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^hydra:\n(?:[ \t]+.*\n|\n)*", "", text, flags=re.M)
    for line in text.splitlines():
        if line.strip() and not INTERNAL.match(line.lstrip()) and not line.startswith("#"):
            lines.append(indent + line)
    return lines
