"""Hydra's launcher of a sweep: a process per job, several at once, finished ones skipped."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from gpt_lightning.config.command_line import as_given, flags_of, key_of, verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.recorded import is_harmless
from gpt_lightning.data.signals import ENDING
from gpt_lightning.rundir.directory import HYDRA, is_locked, locked
from gpt_lightning.rundir.report import overview, read_results
from gpt_lightning.sweeping.jobs import Job, Ledger, jobs_of
from gpt_lightning.sweeping.process import PRELOADED, Pool

log = logging.getLogger(__name__)


class ProcessLauncher(Launcher):
    """Runs each job as a process of its own, with the command line `COMMAND OVERRIDES hydra.run.dir=DIR`.

    A crash, a kill or a time limit of one job ends no other. The same sweep started again skips the jobs that
    are finished, resumes those that were interrupted, and tries the failed ones again.

    Args of `setup`: as Hydra gives them. `sweep.jobs` is how many run at once, `sweep.retries` how often a
    failed one is resumed before the next sweep.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.stopped = config, 0
        # train, or prepare, whose jobs leave no run directories and know themselves what is finished
        self.command = str(getattr(getattr(task_function, "__self__", None), "config_name", "this program"))
        if self.command not in PRELOADED:
            raise ConfigError(
                f"hydra.launcher={config.hydra.launcher._target_} starts jobs of {' and '.join(PRELOADED)}, "
                f"not of {self.command}; leave hydra/launcher= out"
            )
        self.running: dict[str, BaseProcess] = {}
        self.guard = threading.RLock()  # of the ledger and its jobs
        self.on_end: Callable[[Job], None] = lambda job: None
        self.total: int | None = None  # jobs there will be, if they are not all in the ledger yet

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs.

        Raises:
            ConfigError: After all have run, if one failed, or if two are the same.
            SystemExit: If the sweep was told to end; its jobs have written checkpoints.
        """
        jobs = jobs_of(job_overrides, as_given(self.config.hydra.overrides.task), self.command)
        with self.sweep() as folder:
            self.ledger = Ledger(folder, jobs)
            self.ledger.write()
            waiting = [job for job in jobs if job.status != "finished"]
            log.info("sweep: %d jobs, %d of them finished before", len(jobs), len(jobs) - len(waiting))
            self.run_all(waiting)
        refuse_unfinished(jobs, folder)
        return [_result(job) for job in jobs]

    @contextmanager
    def sweep(self) -> Iterator[Path]:
        """The directory of the sweep, locked; shows its report at the end, and ends the command if told to.

        Raises:
            SystemExit: If a signal came.
        """
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(str(self.config.hydra.sweep.dir)).resolve()
        with locked(folder), self._signals():
            yield folder
        if self.command == "train":
            print(f"\n{overview(read_results([folder]))}")
        print(f"sweep: {folder}", flush=True)
        if self.stopped:
            log.info("the sweep was interrupted; the same command goes on with it")
            raise SystemExit(128 + self.stopped)

    def run_all(self, jobs: Iterable[Job]) -> None:
        """Run jobs, `sweep.jobs` at once; a job is taken from the iterable when it can start."""
        self.pool, iterator = Pool(self.command), iter(jobs)

        def work(variables: dict[str, str]) -> None:
            while not self.stopped:
                with self.guard:
                    job = next(iterator, None)
                if job is None:
                    return
                self._run(job, variables)

        with ThreadPoolExecutor(self.config.sweep.jobs) as threads:
            list(threads.map(work, shares(self.config.sweep.jobs)))

    def _run(self, job: Job, variables: dict[str, str]) -> None:
        """Run a job, again if it fails and there are retries left."""
        folder = self.ledger.place(job)
        for left in reversed(range(1 + self.config.sweep.retries)):
            wait_for_lock(folder)
            if self.stopped:
                return
            job.begin()
            ended = self.pool.run(
                self.arguments(job, folder),
                variables=variables,
                show=lambda line: print(f"[{job.name}] {line}", flush=True),
                started=lambda process: self._started(job, process),
            )
            with self.guard:
                self.running.pop(job.name)
                job.end(folder, *ended)
                if self.stopped and job.status == "failed":  # the signal may have come while it was starting
                    job.status = "interrupted"
                again = job.status == "failed" and left > 0
                if not again:
                    self.on_end(job)
                self.ledger.write()
                print(self._progress(job), flush=True)
            if not again:
                return

    def _started(self, job: Job, process: BaseProcess) -> None:
        with self.guard:
            self.running[job.name], job.pid = process, process.pid
            self.ledger.write()
            if self.stopped:  # the signal came a moment ago
                os.kill(int(process.pid or 0), self.stopped)

    def arguments(self, job: Job, folder: Path) -> list[str]:
        """The command line of a job; a run that has begun is resumed."""
        if (folder / "summary.json").is_file() and (folder / HYDRA / "overrides.yaml").is_file():
            harmless = [text for text in job.overrides if is_harmless(key_of(text))]
            return [*verbatim("resume")([f"resume={folder}"]), "trust=true", *harmless]
        place = verbatim("hydra.run.dir")([f"hydra.run.dir={folder}"]) if self.command == "train" else []
        return [*flags_of(self.config.hydra, self.command), *job.overrides, *place]

    def _progress(self, job: Job) -> str:
        """The line of a job that ended."""
        jobs, total = self.ledger.jobs, self.total or len(self.ledger.jobs)
        over = [one for one in jobs if one.status not in ("waiting", "running")]
        text = f"[{len(over)}/{total}] {job.name}: {job.status}"
        if job.status == "finished" and job.result is not None:
            text += f", best validation loss {job.result:.4f}"
        if job.error:
            text += f" ({job.error})"
        results = [(one.result, one.name) for one in jobs if one.result is not None]
        if results:
            text += " | best so far {:.4f} of {}".format(*min(results))
        seconds = [one.seconds for one in over if one.seconds and one.status == "finished"]
        if seconds and len(over) < total:
            left = statistics.median(seconds) * (total - len(over)) / (len(self.running) + 1)
            text += f" | about {left / 60:.0f} min left" if left >= 60 else f" | about {left:.0f} s left"
        return text

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on to the jobs, which then write their checkpoints, and start no more of them."""

        def stop(number: int, _: Any) -> None:
            self.stopped = number
            for process in list(self.running.values()):
                with suppress(ProcessLookupError):
                    os.kill(int(process.pid or 0), number)

        before = {number: signal.signal(number, stop) for number in ENDING}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)


def refuse_unfinished(jobs: Sequence[Job], folder: Path) -> None:
    """End the command with an error after a sweep of which jobs are to be done again.

    Raises:
        ConfigError: Names them.
    """
    if failed := [job.name for job in jobs if job.status == "failed"]:
        raise ConfigError(
            f"{len(failed)} of {len(jobs)} jobs failed: {' '.join(failed)}; their last lines are in "
            f"{folder / 'sweep.jsonl'}, and the same command tries them again"
        )
    if stopped := [job.name for job in jobs if job.status == "interrupted"]:
        raise ConfigError(
            f"{len(stopped)} of {len(jobs)} jobs were interrupted: {' '.join(stopped)}; the same command "
            "goes on with them"
        )


def wait_for_lock(folder: Path, seconds: float = 60) -> None:
    """Wait for the job of a sweep that was killed, which writes a checkpoint before it ends."""
    end = time.monotonic() + seconds
    while is_locked(folder) and time.monotonic() < end:
        time.sleep(0.1)


def shares(at_once: int) -> list[dict[str, str]]:
    """Variables that share the cores and the GPUs of this machine among jobs that run at once."""
    if at_once == 1:
        return [{}]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // at_once)))
    variables = [{"OMP_NUM_THREADS": threads} for _ in range(at_once)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    if gpus := [gpu for gpu in visible.split(",") if gpu]:
        for slot, of_job in enumerate(variables):
            of_job["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot::at_once] or [gpus[slot % len(gpus)]])
    return variables


def _result(job: Job) -> JobReturn:
    found = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    found.return_value = job.result
    return found
