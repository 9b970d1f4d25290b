"""How a run starts: anew, resumed in its directory (`resume=`), or repeated in a new one (`repeat=`).

A resumed or repeated run has the overrides and, value by value, the configuration that the first run left in
.hydra/; what is given now comes on top, and a key that is newer than the run takes its default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gpt_lightning.config.command_line import (
    OURS,
    as_given,
    begins_a_run,
    flags_of,
    go_to,
    key_of,
    readable,
    split_arguments,
    value_of,
    verbatim,
)
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.ranks import (
    OTHER_RANK,
    arguments_of_other_rank,
    is_first_rank,
    refuse_several_sweeps,
)
from gpt_lightning.config.recorded import read_recorded, read_yaml, recorded_choices, recorded_overrides
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.resume import recorded_values
from gpt_lightning.rundir.directory import HYDRA, find_run, refuse_links, runs_below
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training.slurm import slurm_job

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of SLURM's jobs, and of torchrun's
SWEEP = "multirun.yaml"  # that Hydra leaves in the directory of a sweep


def start_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra: with the overrides of the run to resume or to repeat, if there is one.

    A job that SLURM or torchrun started again resumes without being told: the run in its `hydra.run.dir=`, or
    the one that the same command of this SLURM job began below `paths.outputs`.

    Raises:
        ConfigError: If there is no such run.
    """
    found, flags, given = split_arguments(arguments)
    given = readable(given) if not found.multirun else readable([*flags, *given])[len(flags) :]
    arguments = [*flags, *given]
    if found.multirun or "hydra.mode=MULTIRUN" in given:
        refuse_several_sweeps()
    if not is_first_rank() and begins_a_run(arguments):
        return arguments_of_other_rank(arguments)
    directory = value_of(given, "hydra.run.dir")
    restarted = any(os.environ.get(count, "0") != "0" for count in RESTARTS)
    if value_of(given, "resume") is None and restarted and begins_a_run(arguments):
        begun = directory is not None and (Path(directory) / HYDRA / "overrides.yaml").is_file()
        if own := directory if begun else _begun_by_this_job(arguments):
            given = [text for text in given if key_of(text) != "init_from"]  # it is this command's run
            given += [*verbatim("resume")([f"resume={own}"]), "trust=true"]
    resume, repeat = run_of(given, "resume"), run_of(given, "repeat")
    if repeat is not None:
        if resume is not None:
            raise ConfigError("resume= and repeat= exclude each other; give one of them")
        return _repeat_arguments(flags, _with_weights(given), repeat)
    if resume is None:
        return [*flags, *_with_weights(given), *_for_weights(given)]
    if found.multirun:
        raise ConfigError("resume= continues one run; it cannot be combined with -m")
    if (resume / SWEEP).is_file():
        refuse_several_sweeps()
        return [*flags, "--multirun", *_sweep_arguments(given, resume, found.config_dir)]
    if directory and Path(directory).resolve() != resume:
        raise ConfigError(f"resume= goes on in {resume}; leave out hydra.run.dir={directory}")
    recorded = recorded_overrides(resume)
    given = [text for text in given if key_of(text) != "hydra.run.dir" and text not in recorded]
    if (other := value_of(given, "init_from")) is not None:
        raise ConfigError(
            f"resume={resume} and init_from={other} exclude each other; resume continues a run exactly, "
            "init_from begins a new one from weights"
        )
    place = verbatim("hydra.run.dir")([f"hydra.run.dir={resume}"])
    return [*_with_recorded(flags, given, "resume", resume), *place, OTHER_RANK]


def plan_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra of a plan: with the overrides of the run to resume or to repeat.

    Raises:
        ConfigError: If there is no such run.
    """
    _, flags, given = split_arguments(arguments)
    given = _with_weights(readable(given))
    for key in ("resume", "repeat"):
        if (folder := run_of(given, key)) is not None:
            recorded = recorded_overrides(folder)
            given = [text for text in given if text not in recorded]
            return _with_recorded(["--config-name=plan", *flags], given, key, folder)
    return [*flags, *given, *_for_weights(given)]


def _for_weights(given: list[str]) -> list[str]:
    """The optimizer that goes on with the weights of init_from=, unless one is chosen; not Muon."""
    if value_of(given, "init_from") in (None, "null"):
        return []
    chosen = {key_of(text) for text in given}
    return [] if chosen & {"optimizer", "experiment"} else ["optimizer=adamw"]


def _sweep_arguments(given: list[str], folder: Path, config_dir: str | None) -> list[str]:
    """The overrides of a sweep that goes on; it may have more values, and other numbers of jobs at once.

    Raises:
        ConfigError: If one of Hydra's own launchers ran it, which begin each job anew.
    """
    hydra = read_yaml(folder / SWEEP).hydra
    if not str(hydra.launcher._target_).startswith(OURS):
        raise ConfigError(f"{folder} was started with a launcher that cannot go on; resume its runs")
    given = [text for text in given if key_of(text) not in ("resume", "hydra.sweep.dir")]
    now, place = {key_of(text) for text in given}, verbatim("hydra.sweep.dir")([f"hydra.sweep.dir={folder}"])
    now |= {"hydra.sweep.dir", "hydra.mode"} | ({"--config-dir"} if config_dir else set())
    before = [*flags_of(hydra, hydra.job.name, of_sweep=True), *as_given(hydra.overrides.task)]
    go_to(hydra.runtime.cwd)
    return [*(text for text in before if key_of(text) not in now), *given, *place]


def run_of(given: list[str], key: str) -> Path | None:
    """The run that resume= or repeat= names; None if there is none.

    Raises:
        ValueError: If it is empty, there is no latest run, or it has links to other places.
    """
    value = value_of(given, key)
    if value is None or value == "null":
        return None
    if not value.strip():
        raise ConfigError(f"{key}= is empty, as an unset variable is; give a run directory, or {key}=null")
    folder = _found(given, key, value, prefer_unfinished=key == "resume").resolve()
    refuse_links(folder)
    return folder


def _found(given: list[str], key: str, value: str, **which: bool) -> Path:
    """What the value of a key stands for, which may be `latest`."""
    try:
        return find_run(value, value_of(given, "paths.outputs") or "outputs", **which)
    except FileNotFoundError as error:
        raise ConfigError(f"{key}={value}: {error}; give {key}=RUN_DIR") from None


def _with_weights(given: list[str]) -> list[str]:
    """The overrides with the run in the place of init_from=latest: it stays the same one."""
    value = value_of(given, "init_from") or ""
    if Path(value).name != "latest" or "," in value or value.startswith("hf:"):  # a job finds one of several
        return given
    run = _found(given, "init_from", value, with_checkpoint=True)
    others = [text for text in given if key_of(text) != "init_from"]
    return [*others, *verbatim("init_from")([f"init_from={run}"])]


def _repeat_arguments(flags: list[str], given: list[str], folder: Path) -> list[str]:
    """A new run below the current directory; relative paths mean what they meant to the first one."""
    here = Path.cwd()
    places = {
        "paths.outputs": value_of(given, "paths.outputs")
        or read_recorded(folder, "config.yaml").paths.outputs
    }
    if directory := value_of(given, "hydra.run.dir"):
        places["hydra.run.dir"] = directory
    given = [text for text in given if key_of(text) not in places]
    values = [f"{key}={value if '${' in value else here / value}" for key, value in places.items()]
    quoted = [text if "${" in text else verbatim(key_of(text))([text])[0] for text in values]
    return [*_with_recorded(flags, given, "repeat", folder), *quoted]


def _with_recorded(flags: list[str], given: list[str], key: str, folder: Path) -> list[str]:
    """The command line of a run that is there, with what is given now; works where that run was started.

    Files that the run directory names, and not the user, are read if the user trusts it: they can run code.
    """
    hydra, trust = read_recorded(folder, "hydra.yaml").hydra, str(value_of(given, "trust")).lower() == "true"
    now = {key_of(text) for text in given}
    choices = [] if "experiment" in now else recorded_choices(folder)  # one that is given now chooses again
    recorded = [text for text in [*choices, *recorded_overrides(folder)] if key_of(text) not in now]
    found, _, _ = split_arguments(flags)
    dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    if trust and found.config_dir is None:
        flags = [*flags, *(f"--config-dir={path}" for path in dirs if Path(path).is_dir())]
    if found.config_name is None and (
        trust or hydra.job.config_name in [file.stem for file in CONF.glob("*.yaml")]
    ):
        flags = [*flags, f"--config-name={hydra.job.config_name}"]
    settings: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    search = [text for text in settings if key_of(text) == "hydra.searchpath" and key_of(text) not in now]
    search = search if trust else []
    if not search:  # otherwise a choice may be anywhere
        places = [CONF, *map(Path, [found.config_dir] if found.config_dir else dirs if trust else [])]
        recorded = [text for text in recorded if _choice_exists(text, places)]
    if found.config_dir and Path(found.config_dir).is_dir():  # the user's own, and not one that is there
        flags = [*flags, f"--config-dir={Path(found.config_dir).absolute()}"]
    go_to(hydra.runtime.cwd)
    given = [text for text in given if key_of(text) != key]
    arguments = [*flags, *search, *recorded, *given, *verbatim(key)([f"{key}={folder}"])]
    return [*arguments, *recorded_values(arguments, given, folder, resumes=key == "resume")]


def _choice_exists(override: str, places: list[Path]) -> bool:
    """Whether a choice of a group is still there, and in it; if not, the recorded values stand for it."""
    group, choice = key_of(override), override.partition("=")[2]
    if choice == "null" or not any((place / group).is_dir() for place in places):
        return True
    inside = not choice.startswith("/") and ".." not in Path(choice).parts
    return inside and any((place / group / f"{choice}.yaml").is_file() for place in places)


def _begun_by_this_job(arguments: list[str]) -> str | None:
    """The run that this command began before SLURM started the job again; a job may hold several commands."""
    found, _, overrides = split_arguments(arguments)
    job = slurm_job()
    given = [text for text in overrides if not key_of(text).startswith(("hydra.", "hydra/"))]
    given += _for_weights(given)
    latest = Path(value_of(given, "init_from") or "").name == "latest"

    def same(run: Path) -> bool:
        name = read_recorded(run, "hydra.yaml").hydra.job.config_name
        now, before = (  # the run has the path that latest stood for
            [text for text in texts if not latest or key_of(text) != "init_from"]
            for texts in (given, recorded_overrides(run))
        )
        return (now, found.config_name or "train") == (before, name)

    runs = runs_below(value_of(given, "paths.outputs") or "outputs")
    for run in sorted(runs, key=lambda run: (run / "summary.json").stat().st_mtime, reverse=True):
        if job and read_summary(run).get("slurm_job") == job and same(run):
            return str(run)
    return None
