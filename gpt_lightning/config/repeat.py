"""`--config-dir RUN/.hydra --config-name config`: the run of that configuration again, in a new directory."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gpt_lightning.config.command import CONF, PLACES, unquoted, verbatim
from gpt_lightning.config.resume import HYDRA, go_to, left_by_hydra, overrides_of


def repeat_arguments(arguments: list[str]) -> list[str]:
    """The command line that repeats a run, for one that asks for a run's config.yaml.

    Hydra leaves out of that file where runs go and how they log. Relative paths in it mean what they meant
    to the first run; the new one goes below the current directory, as every run does.

    Args:
        arguments: As in sys.argv[1:]. Others come back as they are.

    Raises:
        ConfigError: If what the run left is damaged.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", default=".")
    parser.add_argument("--config-name", "-cn")
    flags, given = parser.parse_known_args(arguments)
    folder, here = Path(flags.config_dir).resolve(), Path.cwd()
    if (
        (folder.name, flags.config_name) != (HYDRA, "config")
        or not (folder / "config.yaml").is_file()
        or "hydra.output_subdir=null" in arguments  # it is resumed, or this is a process that another started
    ):
        return arguments
    run = folder.parent
    config: Any = OmegaConf.to_container(left_by_hydra(run, "config.yaml"), resolve=False)
    ours = [*_hydra_settings(), f"paths.outputs={config['paths']['outputs']}"]
    if config["init_from"] is not None:
        # what was asked of the model by name, as the rest of it comes with the weights
        before = [override.lstrip("+") for override in overrides_of(run)]
        ours += [override for override in before if override.startswith("model.")]
    go_to(left_by_hydra(run, "hydra.yaml").hydra.runtime.cwd)
    changes = [argument for argument in given if re.match(r"~|[^-].*=", argument)]
    others = [argument for argument in given if argument not in changes]  # flags come first
    placed = [_from_here(override, here) for override in (*ours, *changes)]
    return [f"--config-dir={folder}", "--config-name=config", *others, *placed]


def _hydra_settings() -> list[str]:
    """As conf/train.yaml has them, and the choices in its defaults."""
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"), resolve=False)
    hydra = config["hydra"]
    values = {f"{key}.{name}": hydra[key][name] for key in ("run", "sweep") for name in hydra[key]}
    choices = ["hydra/job_logging=run", "hydra/help=gpt_lightning"]
    return [*choices, *(f"hydra.{key}='{value}'" for key, value in values.items())]


def _from_here(argument: str, here: Path) -> str:
    """An override that says where the run goes, for whatever working directory."""
    key, _, value = argument.partition("=")
    if key not in PLACES or "${" in value:
        return argument
    return verbatim(key)([f"{key}={here / unquoted(value)}"])[0]
