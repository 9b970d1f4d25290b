"""Takes a run directory before Hydra writes into it, as one of Hydra's callbacks (conf/train.yaml)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError, Refusal
from gpt_lightning.config.ranks import check_processes, is_first_rank
from gpt_lightning.config.recorded import flat, read_yaml
from gpt_lightning.config.rules import check, number
from gpt_lightning.rundir.directory import holds_run, release_lock, take_lock

OURS = "hydra_plugins.gpt_lightning_sweeps."  # launchers that go on with a sweep
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
                return
            check(config, SWEEP)
            if subdir != "${hydra.job.num}":
                raise ConfigError(
                    f"hydra.sweep.subdir={subdir}: jobs are named by what they override; leave it out, or "
                    "choose hydra/launcher=basic"
                )
            if (folder / "multirun.yaml").exists():
                check_same_sweep(folder, config)
            else:
                SWEEPS.append(folder.absolute())


class RunDirectory(SweepDirectory):
    """Locks the run directory, and refuses one that is in use or holds a run.

    Judged here are the directories that the whole configuration results in, not the command line alone.
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
    before, now = flat(read_yaml(folder / "multirun.yaml")), flat(config)
    differing = [
        f"{key} (was {before.get(key)}, now {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(("hydra.", "sweep."))
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
