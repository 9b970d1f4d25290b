"""How a run starts: anew, resumed in its directory (`resume=`), or repeated in a new one (`repeat=`).

A resumed or repeated run has the overrides and, value by value, the configuration that the first run left in
.hydra/; what is given now comes on top, and a key that is newer than the run takes its default.
"""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from gpt_lightning.config.build import build, device_count, is_defined_in, targets, with_length
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
from gpt_lightning.rundir.directory import HYDRA, newest_run, refuse_links, runs_below
from gpt_lightning.rundir.provenance import versions
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training.slurm import slurm_job

if TYPE_CHECKING:
    from gpt_lightning.data.corpus.base import Corpus

log = logging.getLogger(__name__)

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
ELASTIC = (  # what may differ, too: it changes the weights by rounding alone
    "device.devices",
    "device.micro_batch_size",
    "trainer.num_nodes",
    "trainer.strategy",
)
VALIDATION = ("trainer.val_every_steps", "trainer.val_batches")  # determine when early stopping ends a run
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of SLURM's jobs, and of torchrun's
OLDER_VALUES: dict[tuple[str, Any], Any] = {  # of earlier releases, with what they stood for
    ("device.micro_batch_size", "auto"): 32,
}
OWN_KEYS = ("resume", "repeat", "trust")  # of a start, not of the run
# Packages whose classes a run directory of somebody else may name: they run no code that comes with it.
SAFE = (
    r"gpt_lightning\.(model|training|data\.(corpus|tales|tokenizer))|torch\.optim|"
    r"lightning\.pytorch\.(callbacks|loggers|strategies|plugins|profilers)"
)
SWEEP = "multirun.yaml"  # that Hydra leaves in the directory of a sweep
OTHER_RANK = "hydra.output_subdir=null"  # in the command line of a process that the first rank started
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # not 0 in all processes of a run but one


def is_first_rank() -> bool:
    """Whether this process is the first of those that train a run, as the environment has it."""
    return all(os.environ.get(rank, "0") == "0" for rank in RANKS)


def start_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra: with the overrides of the run to resume or to repeat, if there is one.

    A job that SLURM or torchrun started again resumes without being told: the run in its `hydra.run.dir=`, or
    the one that the same command of this SLURM job began below `paths.outputs`.

    Args:
        arguments: As in sys.argv[1:].

    Raises:
        ConfigError: If there is no such run.
    """
    found, flags, given = split_arguments(arguments)
    given = readable(given) if not found.multirun else readable([*flags, *given])[len(flags) :]
    arguments = [*flags, *given]
    if not is_first_rank() and begins_a_run(arguments):
        return _arguments_of_other_rank(arguments)
    directory = value_of(given, "hydra.run.dir")
    restarted = any(os.environ.get(count, "0") != "0" for count in RESTARTS)
    if value_of(given, "resume") is None and restarted and begins_a_run(arguments):
        begun = directory is not None and (Path(directory) / HYDRA / "overrides.yaml").is_file()
        if own := directory if begun else _begun_by_this_job(arguments):
            given = [*given, *verbatim("resume")([f"resume={own}"]), "trust=true"]  # it is this command's run
    resume, repeat = run_of(given, "resume"), run_of(given, "repeat")
    if repeat is not None:
        return _repeat_arguments(flags, given, repeat)
    if resume is None:
        return arguments
    if found.multirun:
        raise ConfigError("resume= continues one run; it cannot be combined with -m")
    if (resume / SWEEP).is_file():
        return [*flags, "--multirun", *_sweep_arguments(given, resume)]
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


def _arguments_of_other_rank(arguments: list[str]) -> list[str]:
    """The command line of a process that is not the first one of its run: it joins the run of the first one.

    Lightning starts such a process with the command line of the first one. One that torchrun or srun started
    waits for it, so that all agree on the run directory and on what is resumed.

    Raises:
        SystemExit: If there is nothing to do.
    """
    if OTHER_RANK not in arguments:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported; see `QUIET`
        from gpt_lightning.training.processes import TIMEOUT, await_start, starter

        _check_srun()
        if (place := starter()) is None:
            return arguments
        limit = value_of(arguments, "trainer.timeout_seconds") or ""
        start = await_start(place, float(limit) if limit.isdecimal() else TIMEOUT)
        if start is None:
            raise SystemExit(0)
        go_to(start["cwd"])
        arguments = start["arguments"]
    return [*arguments, "hydra/job_logging=rank"]


def tell_other_ranks(folder: Path | None, timeout: float) -> None:
    """Let the processes that torchrun or srun started join the run in a folder; None ends them."""
    if is_first_rank() and os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"}:
        from gpt_lightning.training.processes import tell_start

        place = verbatim("hydra.run.dir")([f"hydra.run.dir={folder}"])
        arguments = [*sys.argv[1:], *place, OTHER_RANK]
        start = {"arguments": arguments, "cwd": str(Path.cwd())}
        tell_start(None if folder is None else start, timeout)


def check_processes(cfg: DictConfig) -> None:
    """Refuse a number of started processes that is not the one that the configuration asks for.

    Raises:
        ConfigError: With the values that fit.
    """
    _check_srun()
    asked, environment = device_count(cfg), os.environ
    what = f"device.devices={cfg.device.devices} trainer.num_nodes={cfg.trainer.num_nodes}"
    variable = "WORLD_SIZE" if "WORLD_SIZE" in environment or not _srun_used() else "SLURM_NTASKS"
    size = environment.get(variable)
    if size is None or not size.isdecimal():
        if cfg.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={cfg.trainer.num_nodes}: nothing has started processes on other "
                "machines; start the command with torchrun or srun on each of them"
            )
    elif int(size) != asked:
        local = environment.get("LOCAL_WORLD_SIZE", "")
        nodes = environment.get("SLURM_NNODES", "1") if variable == "SLURM_NTASKS" else ""
        each = int(local) if local.isdecimal() else int(size) // int(nodes or 1)
        raise ConfigError(
            f"{what} is {asked} process{'es' * (asked > 1)}, but {variable}={size} in the environment: "
            f"set device.devices={each} trainer.num_nodes={int(size) // each}, or start as many"
        )


def _srun_used() -> bool:
    """Whether srun started this process, as Lightning has it."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _check_srun() -> None:
    """Refuse tasks that SLURM may spread over the machines as it likes, which Lightning does not support."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if _srun_used() and tasks != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(f"SLURM_NTASKS={tasks}: give srun --ntasks-per-node= instead of --ntasks=")


def plan_arguments(arguments: list[str]) -> list[str]:
    """The command line for Hydra of a plan: with the overrides of the run to resume or to repeat.

    Raises:
        ConfigError: If there is no such run.
    """
    _, flags, given = split_arguments(arguments)
    given = readable(given)
    for key in ("resume", "repeat"):
        if (folder := run_of(given, key)) is not None:
            recorded = recorded_overrides(folder)
            given = [text for text in given if text not in recorded]
            return _with_recorded(["--config-name=plan", *flags], given, key, folder)
    return [*flags, *given]


def _sweep_arguments(given: list[str], folder: Path) -> list[str]:
    """The overrides of a sweep that goes on; it may have more values, and other numbers of jobs at once."""
    hydra = read_yaml(folder / SWEEP).hydra
    given = [text for text in given if key_of(text) != "resume"]
    now, place = {key_of(text) for text in given}, verbatim("hydra.sweep.dir")([f"hydra.sweep.dir={folder}"])
    go_to(hydra.runtime.cwd)
    return [*(text for text in hydra.overrides.task if key_of(text) not in now), *given, *place]


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
    if value == "latest":
        try:
            outputs = value_of(given, "paths.outputs") or "outputs"
            value = str(newest_run(outputs, prefer_unfinished=key == "resume"))
        except FileNotFoundError as error:
            raise ConfigError(f"{key}=latest: {error}; give {key}=RUN_DIR") from None
    folder = Path(value).expanduser().resolve()
    refuse_links(folder)
    return folder


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
    recorded = [text for text in recorded_overrides(folder) if key_of(text) not in now]
    found, _, _ = split_arguments(flags)
    dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    if trust and found.config_dir is None:
        flags = [*flags, *(f"--config-dir={path}" for path in dirs if Path(path).is_dir())]
    if found.config_name is None and (trust or (CONF / f"{hydra.job.config_name}.yaml").is_file()):
        flags = [*flags, f"--config-name={hydra.job.config_name}"]
    settings: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    search = [text for text in settings if key_of(text) == "hydra.searchpath" and key_of(text) not in now]
    search = search if trust else []
    if not search:  # otherwise a choice may be anywhere
        places = [CONF, *map(Path, dirs if trust else [found.config_dir] if found.config_dir else [])]
        recorded = [text for text in recorded if _choice_exists(text, places)]
    go_to(hydra.runtime.cwd)
    given = [text for text in given if key_of(text) != key]
    return [*flags, *search, *recorded, *given, *verbatim(key)([f"{key}={folder}"])]


def _choice_exists(override: str, places: list[Path]) -> bool:
    """Whether a choice of a group is still there; if not, the recorded values stand for it."""
    group, choice = key_of(override), override.partition("=")[2]
    is_group = any((place / group).is_dir() for place in places)
    return not is_group or choice == "null" or any((p / group / f"{choice}.yaml").is_file() for p in places)


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


def read_recorded(folder: Path, name: str) -> Any:
    """A file that Hydra left in the run directory.

    Raises:
        ConfigError: If it is not there or damaged.
    """
    try:
        return read_yaml(folder / HYDRA / name)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a run directory (it has no {HYDRA}/{name})") from None


def read_yaml(path: Path) -> Any:
    """A file that Hydra left.

    Raises:
        FileNotFoundError, NotADirectoryError: If it is not there.
        ConfigError: If it is damaged.
    """
    try:
        return OmegaConf.load(path)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"{path} is damaged; begin a new run") from error


def recorded_overrides(folder: Path) -> list[str]:
    """The overrides of a run as they were given, with their interpolations; none of them is Hydra's own."""
    texts: Any = OmegaConf.to_container(read_recorded(folder, "overrides.yaml"), resolve=False)
    texts = [str(text) for text in texts]
    return [t for t in texts if key_of(t) not in OWN_KEYS and not re.match(r"hydra\b", key_of(t))]


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
        ConfigError: If a resumed run would not be the same run; lists the keys with both values. If the run
            names classes that may run code of its author, unless trust=true was given.
    """
    source = cfg.resume or cfg.repeat
    if source is None:
        return cfg
    folder = Path(source)
    recorded = set(recorded_overrides(folder))
    given = [text for text in HydraConfig.get().overrides.task if text not in recorded]
    keys = [key_of(text) for text in given if key_of(text) not in OWN_KEYS]
    before, now = flat(read_recorded(folder, "config.yaml")), flat(cfg)
    if cfg.resume:
        _check_unchanged(cfg, keys, before, now)
    for key, value in before.items():  # a class that is no longer chosen takes no argument of another one
        other = key.endswith("._target_") and now.get(key) != value and not _covered(key, keys)
        if other and not str(value).startswith("gpt_lightning."):
            OmegaConf.update(cfg, key.removesuffix("._target_"), {}, merge=False)
    for key, value in before.items():
        value = OLDER_VALUES.get((key, value), value) if isinstance(value, str) else value
        own_class = key.endswith("_target_") and key in now and str(value).startswith("gpt_lightning.")
        if not own_class and key not in OWN_KEYS and not _covered(key, [*keys, "paths.run"]):
            OmegaConf.update(cfg, key, value, force_add=True)
    if cfg.repeat:
        OmegaConf.update(cfg, "paths.outputs", now["paths.outputs"])
        job = HydraConfig.get()
        if job.output_subdir is not None:  # what Hydra wrote lacks the recorded values
            write_yaml(Path(job.runtime.output_dir) / HYDRA / "config.yaml", cfg)
    if (foreign := foreign_classes(cfg, given)) and cfg.trust is not True:
        raise ConfigError(
            f"the run names classes that are not of gpt_lightning, and building them runs their code: "
            f"{', '.join(foreign)}; name their --config-dir, or add trust=true if you trust the run"
        )
    return cfg


def foreign_classes(cfg: DictConfig, given: list[str]) -> list[str]:
    """Classes that may run code of a run's author, without those that the user names.

    Args:
        cfg: The configuration of the run, with what is given now on top.
        given: The overrides that are given now; in those that name the run, its author chose the text.
    """
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) for source in sources if source.provider == "command-line"]
    files = [file.read_text("utf-8", "ignore") for folder in folders for file in folder.rglob("*.yaml")]
    chosen = [text for text in given if key_of(text) not in OWN_KEYS]
    known = set(re.findall(r"_target_\W+([\w.]+)", "\n".join([*files, *chosen])))
    return sorted(t for t in targets(cfg) if not is_defined_in(t, SAFE) and t not in known)


def write_yaml(path: Path, content: Any) -> None:
    """Replace a file that Hydra left."""
    with atomic_write(path, text=True) as file:
        file.write(OmegaConf.to_yaml(content))


def _covered(key: str, overridden: list[str]) -> bool:
    """Whether a key, or a group that it belongs to, is set by an override."""
    return any(key == one or key.startswith(one.replace("/", ".") + ".") for one in overridden)


def _check_unchanged(cfg: DictConfig, keys: list[str], before: dict[str, Any], now: dict[str, Any]) -> None:
    stops_early = _stops_early(cfg)
    allowed = [rule for rule in HARMLESS + ELASTIC if not (stops_early and rule in VALIDATION)]
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


def check_corpus(corpus: Corpus, folder: Path, recorded: str | None) -> None:
    """Refuse to go on with another text than the run began with.

    Raises:
        ConfigError: If the digest of the corpus is not the recorded one; None if nothing was recorded.
    """
    if recorded is not None and (now := corpus.digest()) != recorded:
        raise ConfigError(
            f"the corpus is not the one that the run in {folder} is trained on (its digest was "
            f"{recorded[:16]} and is {now[:16]}); bring that text back, or train on this one in a new run "
            f"with init_from={folder}"
        )


def flat(cfg: Any) -> dict[str, Any]:
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
