"""`resume=RUN_DIR|latest`: the same command again, in the same run directory, from its last checkpoint."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from gpt_lightning.config.command import ConfigError, unquoted, verbatim, versions
from gpt_lightning.data.files import read_json
from gpt_lightning.training.slurm import slurm_job

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# what may differ when a run goes on: it changes what is written or shown, never the weights
HARMLESS = (
    "resume",
    "name",
    "paths.*",
    "logger.*",
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
VALIDATION = ("trainer.val_every_steps", "trainer.val_batches")  # decide when early stopping ends a run
HYDRA = ".hydra"  # folder of a run directory
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # of SLURM's jobs, and of torchrun's
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # not 0 in all processes of a run but one


def resume_arguments(arguments: list[str]) -> list[str]:
    """The command line of the run to resume, followed by what was given now.

    A job that SLURM or torchrun started again goes on without being told: with the run in its
    `hydra.run.dir=`, or with the one that the same command of this SLURM job began below `paths.outputs`.

    Args:
        arguments: As in sys.argv[1:]. Without a run to resume they come back as they are.

    Raises:
        ConfigError: If there is no such run, or if a new one would overwrite what is there.
    """
    wanted, directory = _value(arguments, "resume"), _value(arguments, "hydra.run.dir")
    if "hydra.output_subdir=null" in arguments:  # in a process that another rank started
        return arguments
    restarted = any(os.environ.get(count, "0") != "0" for count in RESTARTS)
    if wanted is None and restarted and _begins(arguments):
        wanted = directory or _begun_by_this_job(arguments)
        wanted = wanted if wanted and (Path(wanted) / HYDRA / "overrides.yaml").is_file() else None
    if wanted in (None, "null", ""):
        _check_free(arguments, directory)
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        raise ConfigError("resume= continues one run; it cannot be combined with -m")
    folder = (_latest(arguments) if wanted == "latest" else Path(str(wanted)).expanduser()).resolve()
    if directory and Path(directory).resolve() != folder:
        raise ConfigError(f"resume={wanted} goes on in {folder}; leave out hydra.run.dir={directory}")
    hydra, before = left_by_hydra(folder, "hydra.yaml").hydra, overrides_of(folder)
    dirs = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    # a run that repeats another has the same configuration itself, and the other may be gone
    dirs = [folder / HYDRA if Path(path).name == HYDRA else path for path in dirs]
    flags = [*(f"--config-dir={path}" for path in dirs), f"--config-name={hydra.job.config_name}"]
    flags = [flag for flag in flags if flag.split("=")[0] not in " ".join(arguments)]
    ours = ("resume=", "hydra.run.dir=")
    # the whole command line may have been given again
    given = [argument for argument in arguments if not argument.startswith(ours) and argument not in before]
    if (other := _value(given, "init_from")) is not None:
        raise ConfigError(
            f"resume={wanted} and init_from={other} exclude each other; resume continues a run exactly, "
            "init_from begins a new one from weights"
        )
    if _value(given, "hydra.searchpath") is None:
        settings: Any = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
        flags += [setting for setting in settings if setting.startswith("hydra.searchpath=")]
    go_to(hydra.runtime.cwd)
    quoted = verbatim("resume", "hydra.run.dir")([f"{key}{folder}" for key in ours])
    return [*flags, *before, *given, *quoted, "hydra.output_subdir=null"]


def _begins(arguments: list[str]) -> bool:
    """Whether the command line begins one run, neither shows something nor sweeps."""
    flags, _ = get_args_parser().parse_known_args(arguments)
    shows = flags.cfg or flags.help or flags.hydra_help or flags.info or flags.shell_completion
    return not (shows or flags.multirun or "hydra.mode=MULTIRUN" in arguments)


def _check_free(arguments: list[str], directory: str | None) -> None:
    """Refuse a run directory that holds a run, here, because Hydra writes into it before all of our code.

    What ended before it trained, as with a wrong value, has nothing to lose. Of many ranks only the first one
    judges: for the others, it may have begun already.
    """
    if directory is None or not _begins(arguments) or any(os.environ.get(rank, "0") != "0" for rank in RANKS):
        return
    folder = Path(directory)
    trained = (folder / "summary.json").exists() or (folder / "checkpoints").exists()
    if trained and (folder / HYDRA / "overrides.yaml").is_file():
        raise ConfigError(
            f"hydra.run.dir={directory} holds a run; go on with resume={directory} or name another directory"
        )


def _value(arguments: list[str], key: str) -> str | None:
    """What the command line says of a key, without Hydra's quotes; the last time counts."""
    values = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{key}=")]
    return unquoted(values[-1]) if values else None


def go_to(folder: str) -> None:
    """Work where the run was started, if that is still there: relative paths mean what they meant."""
    if Path(folder).is_dir():
        os.chdir(folder)
        sys.path.insert(0, folder)  # so do the names of the user's own classes, after `python -m`


def left_by_hydra(folder: Path, name: str) -> Any:
    """A file that Hydra left in the run directory.

    Raises:
        ConfigError: If it is not there or damaged.
    """
    try:
        return OmegaConf.load(folder / HYDRA / name)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"resume=: {folder} is not a run directory (it has no {HYDRA}/{name})") from None
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"resume=: {folder / HYDRA / name} is damaged; begin a new run") from error


def overrides_of(folder: Path) -> list[str]:
    """The overrides of a run as they were given, with their interpolations."""
    texts: Any = OmegaConf.to_container(left_by_hydra(folder, "overrides.yaml"), resolve=False)
    return [str(text) for text in texts]


def _runs(arguments: list[str]) -> tuple[list[Path], Path]:
    """The runs that have begun to train below paths.outputs, and that folder."""
    root = Path(_value(arguments, "paths.outputs") or "outputs")
    runs = [path.parent.parent for path in root.glob(f"**/{HYDRA}/overrides.yaml")]
    return [run for run in runs if (run / "summary.json").is_file()], root.resolve()


def _newest(runs: list[Path]) -> Path:
    """The newest run that is not finished; if all are, the newest of these."""

    def rank(run: Path) -> tuple[bool, float]:
        return status(run).get("status") != "finished", (run / "summary.json").stat().st_mtime

    return max(runs, key=rank)


def _latest(arguments: list[str]) -> Path:
    runs, root = _runs(arguments)
    if not runs:
        raise ConfigError(f"resume=latest: there is no run below {root}; give resume=RUN_DIR")
    return _newest(runs)


def _begun_by_this_job(arguments: list[str]) -> str | None:
    """The run that this command began before SLURM started the job again; a job may hold several commands."""
    job = slurm_job()
    flags, others = get_args_parser().parse_known_args(arguments)
    given = [argument for argument in (*flags.overrides, *others) if not re.match("[+~]*hydra[./]", argument)]

    def same(run: Path) -> bool:
        name = left_by_hydra(run, "hydra.yaml").hydra.job.config_name
        return (given, flags.config_name or "train") == (overrides_of(run), name)

    runs = [run for run in _runs(arguments)[0] if job and status(run).get("slurm_job") == job and same(run)]
    return str(_newest(runs)) if runs else None


def check_unchanged(cfg: DictConfig, folder: Path) -> None:
    """Refuse overrides under which the run would not be the same run.

    Raises:
        ConfigError: With a list of the keys that differ and both values.
    """
    before, now = _flat(left_by_hydra(folder, "config.yaml")), _flat(cfg)
    harmless = [rule for rule in HARMLESS if rule not in VALIDATION or not _stops_early(cfg)]
    differing = [
        f"{key} (was {before.get(key)}, now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(fnmatch.fnmatch(key, rule) for rule in harmless)
    ]
    if differing:
        raise ConfigError(
            f"resume= goes on with the same run, but these would change it: {'; '.join(differing)}; "
            "begin a new run with init_from= instead"
        )


def _stops_early(cfg: DictConfig) -> bool:
    """Whether a callback ends the run by what validations find."""
    nodes = [node for node in cfg.callbacks.values() if OmegaConf.is_dict(node)]
    return any("patience" in node or "EarlyStopping" in str(node.get("_target_")) for node in nodes)


def _flat(cfg: Any) -> dict[str, Any]:
    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        pairs = (walk(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
        return {key: value for part in pairs for key, value in part.items()}

    return walk(OmegaConf.to_container(cfg, resolve=False), "")


def status(folder: Path) -> dict[str, Any]:
    """The summary that the run left so far; empty if it has none."""
    return read_json(folder / "summary.json")


def warn_of_versions(folder: Path) -> None:
    """Say so if a run goes on under other packages than it began with: the bits may then differ."""
    before, now = status(folder).get("versions") or {}, versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in before.items() if was != now.get(name)]
    if changed:
        log.warning("the run began under other versions (%s) and may now differ slightly", ", ".join(changed))


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a run directory, so that two processes never train the same run.

    Raises:
        ConfigError: If another process holds it.
    """
    path = folder / HYDRA / "hydra.yaml"
    if fcntl is None or not path.is_file():
        yield
        return
    with path.open("r+") as file:  # a record lock: workers do not inherit it, and it ends with the process
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process trains the run in {folder}; wait for it or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
