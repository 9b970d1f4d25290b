"""Hydra's sweeper of a search: the next trial is chosen when another one ends, hopeless ones are stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.rules import check, number, optional_text, text
from gpt_lightning.rundir.summary import PRUNED
from gpt_lightning.sweeping.launcher import ProcessLauncher
from gpt_lightning.sweeping.search import Search, pruner_of, sampler_of, shared_storage
from gpt_lightning.sweeping.slurm import SlurmLauncher
from gpt_lightning.sweeping.space import read_space

RULES = {
    "sweep.n_trials": number(int, least=1, most=1_000_000),
    "sweep.study": text,
    "sweep.storage": optional_text,
    "sweep.sampler.seed": number(int, least=0, optional=True),
}
POLL = 0.5  # seconds between looks at the validations of the trials


class OptunaSweeper(Sweeper):
    """Searches with Optuna; the jobs are those of hydra/launcher=processes."""

    def __init__(self, params: Mapping[str, Any] | None = None):
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config: DictConfig = config
        self.hydra_context: HydraContext = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the study until it has sweep.n_trials trials.

        Raises:
            ConfigError: If something is wrong with the space or the study.
            SystemExit: If the command was told to end.
        """
        launcher = self.launcher
        if not isinstance(launcher, ProcessLauncher) or isinstance(launcher, SlurmLauncher):
            raise ConfigError(
                "sweep=optuna waits for its trials, so it needs hydra/launcher=processes; on a cluster, "
                "start this command in several jobs that share a sweep.storage="
            )
        import optuna  # noqa: F401 (the line about a missing package comes before anything else)

        check(self.config, RULES)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        space, fixed = read_space(self.params, arguments, parser)
        one = [text for dimension in space for text in dimension.overrides(dimension.first)]
        self.validate_batch_is_legal([[*fixed, *one]])
        sampler_of(self.config, 0)  # a mistake in it ends the command before anything is written
        pruner, place = pruner_of(self.config), self.config.sweep.storage
        storage = None if place is None else shared_storage(place)
        with launcher.sweep() as folder:
            search = Search(self.config, folder, space, fixed, storage=storage, pruner=pruner)
            OmegaConf.save(self.config, folder / "multirun.yaml")
            launcher.ledger, launcher.total = search.ledger, self.config.sweep.n_trials
            search.ledger.write()
            with _pruning(launcher, search):
                launcher.run_all(search.jobs())
            search.ledger.write()
        print(search.best(), flush=True)


@contextmanager
def _pruning(launcher: ProcessLauncher, search: Search) -> Iterator[None]:
    """Ask hopeless jobs to stop while the block runs them."""
    asked: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL):
            with launcher.guard:
                for job in search.ledger.jobs:
                    process = launcher.running.get(job.name)
                    if process is None or job.name in asked or (reason := search.hopeless(job)) is None:
                        continue
                    asked.add(job.name)
                    with suppress(OSError):  # it has ended, or the disk is full: then it goes on
                        (search.ledger.place(job) / PRUNED).write_text(reason, encoding="utf-8")
                        os.kill(int(process.pid or 0), signal.SIGTERM)

    launcher.on_end = search.end
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
