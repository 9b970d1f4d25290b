"""The command line before Hydra reads it: flags first, plain text quoted."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from gpt_lightning.config.errors import ConfigError

TEXTS = ("prompt", "stop", "separator", "default_prompts", "api_key")  # last parts of keys that are no paths
OWN_KEYS = ("resume", "repeat", "trust")  # of a start, not of the run
OURS = "hydra_plugins.gpt_lightning_sweeps."  # launchers that go on with a sweep
OF_THE_SWEEP = ("hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra.mode", "hydra.run")
PLACES = ("paths.outputs", "hydra.run.dir", "hydra.sweep.dir")  # keys of folders that Hydra makes


def parsed_flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What Hydra's flags say, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in ("--config-dir -cd", "--config-name -cn", "--config-path -cp", "--cfg -c", "--package -p"):
        parser.add_argument(*names.split())
    parser.add_argument("--experimental-rerun")
    parser.add_argument("--info", "-i", nargs="?", const="all")
    for names in ("--help -h", "--hydra-help", "--multirun -m", "--shell-completion -sc", "--run -r"):
        parser.add_argument(*names.split(), action="store_true")
    for name in ("--version", "--resolve"):
        parser.add_argument(name, action="store_true")
    return parser.parse_known_args(arguments)


def check_flags(arguments: list[str]) -> None:
    """Refuse a setting that is written as a flag, as in `--max_steps 10`.

    Raises:
        ConfigError: Names it.
    """
    for text in parsed_flags(arguments)[1]:
        if text.startswith("-"):
            raise ConfigError(f"there is no flag {text}; settings have no dashes, as in trainer.max_steps=10")


def split_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """What the flags say, the flags, and the overrides, which may stand between the flags.

    The parser of Hydra takes overrides in one run only; here, any order is accepted.
    """
    found, rest = parsed_flags(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-")]
    flags, remaining = [], list(overrides)
    for argument in arguments:
        if argument in remaining:
            remaining.remove(argument)
        else:
            flags.append(argument)
    return found, flags, overrides


def check_users(overrides: list[str]) -> None:
    """Refuse a path in the home of a user that this machine does not have.

    Raises:
        ConfigError: Names the key and the value.
    """
    for text in overrides:
        key, _, value = text.partition("=")
        for home in re.findall(r"(?:^|[\[,])['\"]?(~[^/'\",\]]+)", value):
            if key.rpartition(".")[2] not in TEXTS and os.path.expanduser(home) == home:  # noqa: PTH111
                raise ConfigError(f"{text}: {home} is the home of no user here; write the whole path")


def begins_a_run(arguments: list[str]) -> bool:
    """Whether the command line starts one run: it neither shows something nor sweeps."""
    found, _, overrides = split_arguments(arguments)
    shows = found.cfg or found.help or found.hydra_help or found.info or found.shell_completion
    return not (shows or found.multirun or "hydra.mode=MULTIRUN" in overrides)


def value_of(overrides: list[str], key: str) -> str | None:
    """What the command line says of a key, without Hydra's quotes; the last time counts."""
    values = [text.partition("=")[2] for text in overrides if text.partition("=")[0].lstrip("+") == key]
    return unquoted(values[-1]) if values else None


def key_of(override: str) -> str:
    """The key, or the group, that an override sets."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def as_given(overrides: Any) -> list[str]:
    """The overrides that Hydra recorded, with their interpolations, which may be secrets."""
    found: Any = OmegaConf.to_container(overrides, resolve=False)
    return [str(text) for text in found]


def as_of_job(override: str) -> str:
    """An override as Hydra writes it for a job of a sweep, if it is the same in all: lr=1e-3 as lr=0.001."""
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={parsed.get_value_element_as_str()}"


def varies(override: str) -> bool:
    """Whether an override gives a key several values, one after the other."""
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException:  # Hydra will say so
        return False


def verbatim(*keys: str) -> Callable[[list[str]], list[str]]:
    """Rewrites a command line: the values of these keys are text as it stands, not in Hydra's grammar.

    Only null, and a value that is one text in single quotes already, is left to Hydra.
    """

    def quote(argument: str) -> str:
        key, _, value = argument.partition("=")
        if key not in keys or value == "null" or re.fullmatch(r"'(\\.|[^'\\])*'", value, re.DOTALL):
            return argument
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # not an interpolation
        return f"{key}={QuotedString(value, Quote.single).with_quotes()}"

    return lambda arguments: [quote(argument) for argument in arguments]


def readable(arguments: list[str]) -> list[str]:
    """Quotes plain text that Hydra's grammar cannot read, such as ~/é.txt.

    What begins as a list, a mapping or a quoted text, and in a sweep what may be several values, stays as it
    is.
    """
    parser = OverridesParser.create()
    sweeps = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))

    def reads(argument: str) -> bool:
        try:
            parser.parse_override(argument)
        except HydraException:
            return False
        return True

    def quote(argument: str) -> str:
        key, _, value = argument.partition("=")
        several = sweeps and "," in value
        if not value or key.startswith("-") or value[0] in "[{'\"" or several or reads(argument):
            return argument
        if key in PLACES and value.startswith("~/"):  # Hydra makes these folders
            value = str(Path(value).expanduser())
        quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
        return quoted if reads(quoted) else argument

    return [quote(argument) for argument in arguments]


def unquoted(value: str) -> str:
    """The text of a value as Hydra reads it, for code that needs it before Hydra."""
    try:
        text = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:  # Hydra will say so
        return value
    return text if isinstance(text, str) else value


def flags_of(cfg: Any, command: str, *, of_sweep: bool = False) -> list[str]:
    """The flags and the settings of Hydra's own that a command line had.

    Args:
        cfg: Hydra's configuration.
        command: Whose default configuration needs no flag.
        of_sweep: Whether to include what says how a sweep runs, or where a run is.
    """
    given = as_given(cfg.overrides.hydra)
    sources = [source for source in cfg.runtime.config_sources if source.provider == "command-line"]
    name = cfg.job.config_name
    return [
        *(f"--config-dir={source.path}" for source in sources),
        *([f"--config-name={name}"] if name != command else []),
        *(t for t in given if of_sweep or not key_of(t).replace("/", ".").startswith(OF_THE_SWEEP)),
    ]


def go_to(folder: str) -> None:
    """Work where the run was started, if that is still there, so that relative paths mean the same.

    Modules are imported from where this command was started, also by further ranks: those in a run directory
    of somebody else are not the user's.
    """
    here = str(Path.cwd())
    if not Path(folder).is_dir() or Path(folder).samefile(here):
        return
    sys.path[:] = [entry or here for entry in sys.path]
    os.environ["PYTHONSAFEPATH"] = "1"  # else `python -m` would look in the new directory
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), here]))
    os.chdir(folder)
