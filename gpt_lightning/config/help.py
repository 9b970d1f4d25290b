"""--help: the groups with their choices, and every key with its comment from the YAML files."""

from __future__ import annotations

import re
from typing import Any

import yaml
from omegaconf import OmegaConf

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
    """The names of a group's choices; none if there is no such group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem[0] != "_")


def _defaults(name: str) -> list[object]:
    return list(
        (yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")) or {}).get("defaults", [])
    )


def _groups(config_name: str) -> dict[str, str | None]:
    """The groups of a command with the choices of its defaults list, in their order."""
    found: dict[str, str | None] = {}
    for entry in _defaults(config_name):
        if entry == "train":
            found |= _groups("train")
        elif isinstance(entry, dict):
            found |= {str(group): choice for group, choice in entry.items() if "override" not in str(group)}
    return found


def _body(name: str, indent: str) -> list[str]:
    """The keys of a file and of those that it extends, with their comments."""
    path = CONF / f"{name}.yaml"
    if not path.exists():  # a choice of the user's own
        return []
    lines: list[str] = []
    for entry in _defaults(name):
        if "/" in name and isinstance(entry, str) and entry != "_self_":
            lines += _body(f"{name.rpartition('/')[0]}/{entry}", indent)
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^hydra:\n(?:[ \t]+.*\n|\n)*", "", text, flags=re.M)
    for line in text.splitlines():
        if line.strip() and not INTERNAL.match(line.lstrip()) and not line.startswith("#"):
            lines.append(indent + line)
    return lines
