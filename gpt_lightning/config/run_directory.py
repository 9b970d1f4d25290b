"""Takes a run directory before Hydra writes into it, as one of Hydra's callbacks (conf/train.yaml)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command_line import OURS, as_given, key_of
from gpt_lightning.config.errors import ConfigError, Refusal
from gpt_lightning.config.parts import device_count
from gpt_lightning.config.ranks import check_processes, is_first_rank
from gpt_lightning.config.recorded import flat, is_harmless, read_yaml
from gpt_lightning.config.rules import check, number
from gpt_lightning.rundir.directory import holds_run, release_lock, take_lock
from gpt_lightning.training.slurm import refuse_queued

SWEEPS: list[Path] = []  # new directories, whose sweeps may still be refused
SWEEP = {"sweep.jobs": number(int, least=1, most=1000), "sweep.retries": number(int, least=0)}


class SweepDirectory(Callback):
    """Refuses the directory of another sweep, and wrong numbers of a sweep."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with refusing():
            sweep: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
            folder, subdir = Path(str(config.hydra.sweep.dir)), str(sweep["subdir"])
            if not str(config.hydra.launcher._target_).startswith(OURS):
                if (folder / "multirun.yaml").exists():
                    raise ConfigError(f"hydra.sweep.dir={folder} holds a sweep; name another directory")
                if "${" not in subdir:
                    raise ConfigError(
                        f"hydra.sweep.subdir={subdir} is the same for all jobs; use ${{hydra.job.num}}"
                    )
                if "device" in config and device_count(config) > 1:
                    raise ConfigError(
                        "several processes per run need a launcher that begins a process for each job; leave "
                        "hydra/launcher= out"
                    )
                return
            check(config, SWEEP)
            if subdir != "${hydra.job.num}":
                raise ConfigError(
                    f"hydra.sweep.subdir={subdir}: jobs are named by what they override; leave it out, or "
                    "choose hydra/launcher=basic"
                )
            if config.hydra.sweeper.get("max_batch_size") is not None:
                raise ConfigError("hydra.sweeper.max_batch_size= does not go with sweep.jobs=; leave it out")
            if (folder / "multirun.yaml").exists():
                check_same_sweep(folder, config)
                refuse_queued(folder)
                take_lock(folder.resolve())  # before Hydra writes its configuration again
            else:
                SWEEPS.append(folder.absolute())


class RunDirectory(SweepDirectory):
    """Locks the run directory, and refuses one that is in use or holds a run.

    The directory may come from the command line or from any file of the configuration.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if not is_first_rank():
            return  # the first rank judges; it may have begun already
        with refusing():
            check_processes(config)
            paths: Any = OmegaConf.to_container(config.paths, resolve=False)
            if paths["run"] != "${hydra:runtime.output_dir}":
                raise ConfigError(f"paths.run={paths['run']} would separate a run; set hydra.run.dir instead")
            folder = Path(str(config.hydra.run.dir)).resolve()
            if config.resume is None:
                refuse_to_overwrite(folder)
            take_lock(folder)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:
        release_lock(Path(str(config.hydra.run.dir)).resolve())


def check_same_sweep(folder: Path, config: DictConfig) -> None:
    """Refuse to go on with a sweep whose fixed values were others.

    Raises:
        ConfigError: Lists the keys with both values.
    """
    recorded = read_yaml(folder / "multirun.yaml")
    before, now = flat(recorded), flat(config)
    texts = [*as_given(recorded.hydra.overrides.task), *as_given(config.hydra.overrides.task)]
    given = {key_of(text) for text in texts}  # other keys that only one of them has are of another release
    differing = [
        f"{key} (was {before.get(key)}, now {now.get(key)})"
        for key in sorted((before.keys() & now.keys()) | (given & (before.keys() | now.keys())))
        if before.get(key) != now.get(key)
        and not key.startswith(("hydra.", "sweep."))
        and not is_harmless(key)
    ]
    if differing:
        raise ConfigError(
            f"{folder} holds another sweep: {'; '.join(differing)}; name another hydra.sweep.dir="
        )


@contextmanager
def refusing() -> Iterator[None]:
    """Errors in the block end the command, though Hydra turns those of callbacks into warnings."""
    try:
        yield
    except Exception as error:
        raise Refusal(error) from error


def refuse_to_overwrite(folder: Path) -> None:
    """Refuse a directory for a new run if it holds one.

    Raises:
        ConfigError: With what can be done instead.
    """
    if holds_run(folder):
        raise ConfigError(f"{folder} holds a run; go on with resume={folder} or name another directory")
