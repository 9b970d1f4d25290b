"""How a run starts: anew, resumed in its directory (`resume=`), or repeated in a new one (`repeat=`).

A resumed or repeated run has the overrides and, value by value, the configuration that the first run left in
.hydra/; what is given now comes on top, and a key that is newer than the run takes its default.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from gpt_lightning.config.build import build, with_length
from gpt_lightning.config.command_line import (
    begins_a_run,
    key_of,
    readable,
    split_arguments,
    value_of,
    verbatim,
)
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.data.files import atomic_write
from gpt_lightning.rundir.directory import HYDRA, newest_run, runs_below
from gpt_lightning.rundir.provenance import versions
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training.slurm import slurm_job

log = logging.getLogger(__name__)

# What may differ when a run is resumed: it changes what is written or shown, never the weights.
HARMLESS = (
    "resume",
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
    "time_limit",
)
VALIDATION = ("trainer.val_every_steps", "trainer.val_batches")  # determine when early stopping ends a run
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of SLURM's jobs, and of torchrun's
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # not 0 in all processes of a run but one
OLDER_VALUES: dict[tuple[str, Any], Any] = {  # of earlier releases, with what they stood for
    ("device.micro_batch_size", "auto"): 32,
}
OTHER_RANK = "hydra.output_subdir=null"  # in the command line of a process that the first rank started


def start_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra: with the overrides of the run to resume or to repeat, if there is one.

    A job that SLURM or torchrun started again resumes without being told: the run in its `hydra.run.dir=`, or
    the one that the same command of this SLURM job began below `paths.outputs`.

    Args:
        arguments: As in sys.argv[1:].

    Raises:
        ConfigError: If there is no such run, or if a new one would overwrite what is there.
    """
    found, flags, given = split_arguments(arguments)
    given = readable(given) if not found.multirun else readable([*flags, *given])[len(flags) :]
    arguments = [*flags, *given]
    resume, repeat = value_of(given, "resume"), value_of(given, "repeat")
    directory = value_of(given, "hydra.run.dir")
    if OTHER_RANK in given:
        return arguments
    restarted = any(os.environ.get(count, "0") != "0" for count in RESTARTS)
    if resume is None and restarted and begins_a_run(arguments):
        resume = directory or _begun_by_this_job(arguments)
        resume = resume if resume and (Path(resume) / HYDRA / "overrides.yaml").is_file() else None
    if repeat not in (None, "null", ""):
        _refuse_to_overwrite(arguments, directory)
        return _repeat_arguments(flags, given, Path(str(repeat)).expanduser().resolve())
    if resume in (None, "null", ""):
        _refuse_to_overwrite(arguments, directory)
        return arguments
    if found.multirun:
        raise ConfigError("resume= continues one run; it cannot be combined with -m")
    folder = _latest(given) if resume == "latest" else Path(str(resume)).expanduser().resolve()
    if directory and Path(directory).resolve() != folder:
        raise ConfigError(f"resume={resume} goes on in {folder}; leave out hydra.run.dir={directory}")
    recorded = recorded_overrides(folder)
    given = [
        text for text in given if key_of(text) not in ("resume", "hydra.run.dir") and text not in recorded
    ]
    if (other := value_of(given, "init_from")) is not None:
        raise ConfigError(
            f"resume={resume} and init_from={other} exclude each other; resume continues a run exactly, "
            "init_from begins a new one from weights"
        )
    quoted = verbatim("resume", "hydra.run.dir")([f"resume={folder}", f"hydra.run.dir={folder}"])
    return [*_with_recorded(flags, given, folder), *quoted, OTHER_RANK]


def _repeat_arguments(flags: list[str], given: list[str], folder: Path) -> list[str]:
    """A new run below the current directory; relative paths mean what they meant to the first one."""
    here = Path.cwd()
    outputs = read_recorded(folder, "config.yaml").paths.outputs
    given = [text for text in given if key_of(text) != "repeat"]
    places = {"paths.outputs": value_of(given, "paths.outputs") or outputs}
    if directory := value_of(given, "hydra.run.dir"):
        places["hydra.run.dir"] = directory
    given = [text for text in given if key_of(text) not in places]
    values = [f"{key}={value if '${' in value else here / value}" for key, value in places.items()]
    quoted = [text if "${" in text else verbatim(key_of(text))([text])[0] for text in values]
    arguments = _with_recorded(flags, given, folder)
    return [*arguments, *quoted, *verbatim("repeat")([f"repeat={folder}"])]


def _with_recorded(flags: list[str], given: list[str], folder: Path) -> list[str]:
    """The command line of a run that is there, with what is given now; works where that run was started."""
    hydra, recorded = read_recorded(folder, "hydra.yaml").hydra, recorded_overrides(folder)
    dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    now = {key_of(text) for text in given}
    recorded = [text for text in recorded if key_of(text) not in now and key_of(text) != "repeat"]
    found, _, _ = split_arguments(flags)
    if found.config_dir is None:
        flags = [*flags, *(f"--config-dir={path}" for path in dirs if Path(path).is_dir())]
    if found.config_name is None:
        flags = [*flags, f"--config-name={hydra.job.config_name}"]
    settings: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    search = [text for text in settings if key_of(text) == "hydra.searchpath" and key_of(text) not in now]
    if not search:  # otherwise a choice may be anywhere
        places = [CONF, *map(Path, dirs)]
        recorded = [text for text in recorded if _choice_exists(text, places)]
    go_to(hydra.runtime.cwd)
    return [*flags, *search, *recorded, *given]


def _choice_exists(override: str, places: list[Path]) -> bool:
    """Whether a choice of a group is still there; if not, the recorded values stand for it."""
    group, choice = key_of(override), override.partition("=")[2]
    is_group = any((place / group).is_dir() for place in places)
    return not is_group or choice == "null" or any((p / group / f"{choice}.yaml").is_file() for p in places)


def _refuse_to_overwrite(arguments: list[str], directory: str | None) -> None:
    """Refuse a run directory that holds a run, here, because Hydra writes into it before our code runs.

    A directory whose run ended before it trained has nothing to lose. Of many ranks only the first one
    judges: for the others, it may have begun already.
    """
    first = all(os.environ.get(rank, "0") == "0" for rank in RANKS)
    if directory is None or not begins_a_run(arguments) or not first:
        return
    folder = Path(directory)
    trained = (folder / "summary.json").exists() or (folder / "checkpoints").exists()
    if trained and (folder / HYDRA / "overrides.yaml").is_file():
        raise ConfigError(
            f"hydra.run.dir={directory} holds a run; go on with resume={directory} or name another directory"
        )


def go_to(folder: str) -> None:
    """Work where the run was started, if that is still there, so that relative paths mean the same."""
    if Path(folder).is_dir():
        os.chdir(folder)
        sys.path.insert(0, folder)  # as `python -m` does there, for the user's own classes


def read_recorded(folder: Path, name: str) -> Any:
    """A file that Hydra left in the run directory.

    Raises:
        ConfigError: If it is not there or damaged.
    """
    try:
        return OmegaConf.load(folder / HYDRA / name)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a run directory (it has no {HYDRA}/{name})") from None
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{folder / HYDRA / name} is damaged; begin a new run") from error


def recorded_overrides(folder: Path) -> list[str]:
    """The overrides of a run as they were given, with their interpolations."""
    texts: Any = OmegaConf.to_container(read_recorded(folder, "overrides.yaml"), resolve=False)
    return [str(text) for text in texts]


def _latest(given: list[str]) -> Path:
    try:
        return newest_run(value_of(given, "paths.outputs") or "outputs", prefer_unfinished=True)
    except FileNotFoundError as error:
        raise ConfigError(f"resume=latest: {error}; give resume=RUN_DIR") from None


def _begun_by_this_job(arguments: list[str]) -> str | None:
    """The run that this command began before SLURM started the job again; a job may hold several commands."""
    found, _, overrides = split_arguments(arguments)
    job, given = (
        slurm_job(),
        [text for text in overrides if not key_of(text).startswith(("hydra.", "hydra/"))],
    )

    def same(run: Path) -> bool:
        name = read_recorded(run, "hydra.yaml").hydra.job.config_name
        return (given, found.config_name or "train") == (recorded_overrides(run), name)

    for run in sorted(runs_below(value_of(given, "paths.outputs") or "outputs"), key=_last_change)[::-1]:
        if job and read_summary(run).get("slurm_job") == job and same(run):
            return str(run)
    return None


def _last_change(run: Path) -> float:
    return (run / "summary.json").stat().st_mtime


# -- values -------------------------------------------------------------------------------------------


def with_recorded_values(cfg: DictConfig) -> DictConfig:
    """The configuration of the run to resume or repeat, with what is given now on top.

    Raises:
        ConfigError: If a resumed run would not be the same run; lists the keys with both values.
    """
    source = cfg.resume or cfg.repeat
    if source is None:
        return cfg
    folder = Path(source)
    recorded = set(recorded_overrides(folder))
    given = [text for text in HydraConfig.get().overrides.task if text not in recorded]
    keys = [key_of(text) for text in given if key_of(text) not in ("resume", "repeat")]
    before, now = _flat(read_recorded(folder, "config.yaml")), _flat(cfg)
    if cfg.resume:
        _check_unchanged(cfg, keys, before, now)
    for key, value in before.items():  # a class that is no longer chosen takes no argument of another one
        other = key.endswith("._target_") and now.get(key) != value and not _covered(key, keys)
        if other and not str(value).startswith("gpt_lightning."):
            OmegaConf.update(cfg, key.removesuffix("._target_"), {}, merge=False)
    for key, value in before.items():
        value = OLDER_VALUES.get((key, value), value) if isinstance(value, str) else value
        own_class = key.endswith("_target_") and key in now and str(value).startswith("gpt_lightning.")
        if not own_class and key not in ("resume", "repeat") and not _covered(key, [*keys, "paths.run"]):
            OmegaConf.update(cfg, key, value, force_add=True)
    if cfg.repeat:
        OmegaConf.update(cfg, "paths.outputs", now["paths.outputs"])
        job = HydraConfig.get()
        if job.output_subdir is not None:  # what Hydra wrote lacks the recorded values
            write_yaml(Path(job.runtime.output_dir) / HYDRA / "config.yaml", cfg)
    return cfg


def write_yaml(path: Path, content: Any) -> None:
    """Replace a file that Hydra left."""
    with atomic_write(path, text=True) as file:
        file.write(OmegaConf.to_yaml(content))


def _covered(key: str, overridden: list[str]) -> bool:
    """Whether a key, or a group that it belongs to, is set by an override."""
    return any(key == one or key.startswith(one.replace("/", ".") + ".") for one in overridden)


def _check_unchanged(cfg: DictConfig, keys: list[str], before: dict[str, Any], now: dict[str, Any]) -> None:
    stops_early = _stops_early(cfg)
    allowed = [rule for rule in HARMLESS if not (stops_early and rule in VALIDATION)]
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if _covered(key, keys)
        and before.get(key) != now.get(key)
        and not any(fnmatch.fnmatch(key, rule) for rule in allowed)
    ]
    if differing and differing != ["trainer.max_steps"]:  # `extends` judges that alone
        earlier = read_recorded(Path(cfg.resume), "config.yaml")
        values = ((key, OmegaConf.select(earlier, key), OmegaConf.select(cfg, key)) for key in differing)
        listed = "; ".join(f"{key} (was {was}, now {now})" for key, was, now in values)
        raise ConfigError(
            f"resume= goes on with the same run, but these would change it: {listed}; "
            "begin a new run with init_from= instead"
        )


def _stops_early(cfg: DictConfig) -> bool:
    """Whether a callback ends the run by what validations find."""
    nodes = [node for node in cfg.callbacks.values() if OmegaConf.is_dict(node)]
    return any("patience" in node or "EarlyStopping" in str(node.get("_target_")) for node in nodes)


def check_extension(cfg: DictConfig, step: int) -> bool:
    """Whether a resumed run has more steps than before, which its schedule must allow.

    That is so if the learning rate of every step that is done stays what it was: under a constant rate, or
    under `wsd` before its decay.

    Args:
        cfg: The configuration.
        step: Optimizer steps done.

    Raises:
        ConfigError: If the schedule would have been another one.
    """
    before, now = read_recorded(Path(cfg.resume), "config.yaml").trainer.max_steps, cfg.trainer.max_steps
    if before == now:
        return False
    change = f"trainer.max_steps (was {before}, now {now})"
    if before is None or now is None or now < before:
        raise ConfigError(f"resume= cannot change {change}, only raise it; begin a new run with init_from=")
    earlier = cast(DictConfig, OmegaConf.merge(cfg, {"trainer": {"max_steps": before}}))
    old, new = (with_length(build(c, "scheduler"), c.trainer.max_steps) for c in (earlier, cfg))
    if any(old(i) != new(i) for i in range(step)):
        raise ConfigError(
            f"these would change the run: {change}: its learning rates up to step {step} depend on the "
            "number of steps (not so under scheduler=constant, or wsd before its decay); "
            "begin a new run with init_from="
        )
    return True


def record_extension(cfg: DictConfig) -> None:
    """Let later starts know the new number of steps."""
    folder = Path(cfg.resume)
    config, texts = read_recorded(folder, "config.yaml"), recorded_overrides(folder)
    config.trainer.max_steps = cfg.trainer.max_steps
    texts = [text for text in texts if key_of(text) != "trainer.max_steps"]
    texts.append(f"trainer.max_steps={cfg.trainer.max_steps}")
    write_yaml(folder / HYDRA / "config.yaml", config)
    write_yaml(folder / HYDRA / "overrides.yaml", OmegaConf.create(texts))


def _flat(cfg: Any) -> dict[str, Any]:
    """Unresolved values by their dotted keys."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict) or not node:
            yield prefix, node
            return
        for key, value in node.items():
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))

    return dict(walk(OmegaConf.to_container(cfg, resolve=False), ""))


def warn_of_versions(folder: Path) -> None:
    """Say so if a run goes on under other packages than it began with: the bits may then differ."""
    before, now = read_summary(folder).get("versions") or {}, versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in before.items() if was != now.get(name)]
    if changed:
        log.warning("the run began under other versions (%s) and may now differ slightly", ", ".join(changed))
