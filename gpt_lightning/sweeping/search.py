"""An Optuna study as a source of jobs: asks for trials, reports validation losses, tells how trials ended."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build
from gpt_lightning.config.resolvers import sweep_digest
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.report_study import JOURNAL
from gpt_lightning.rundir.summary import LEDGER, read_ledger, read_summary
from gpt_lightning.sweeping.jobs import Job, Ledger, name_of
from gpt_lightning.sweeping.space import Dimension

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial

IN_A_ROW = 3  # trials that may fail without a result before the study stops
ONE_SEED = ("GridSampler", "QMCSampler")  # go through one sequence, which their seed determines


class Search:
    """The trials of a study that belong to a directory; no method may run in two threads at once.

    Args:
        config: The whole configuration; its `sweep` says what the study is.
        folder: The directory of the sweep, which only this process writes to.
        space, fixed: What the trials vary, and the overrides of all of them.
        storage: Of the study, if it is not in the directory.

    Raises:
        ConfigError: If the study is there already and searches something else.
    """

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        space: Sequence[Dimension],
        fixed: Sequence[str],
        *,
        storage: BaseStorage | None,
        pruner: BasePruner,
    ):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config, self.space, self.fixed, self.shared = config, space, fixed, storage is not None
        self.study = optuna.create_study(
            storage=storage or own_journal(folder),
            study_name=config.sweep.study,
            pruner=pruner,
            sampler=sampler_of(config, 0),
            load_if_exists=True,
        )
        # what a sampler calls that has tried everything; Optuna's own works in its own loop only
        self.study.stop = lambda: self.study.set_user_attr("exhausted", True)  # type: ignore[method-assign]
        self._check_same_study()
        self.trials: dict[str, Trial] = {}  # not over yet, by the names of their jobs
        self.reported: dict[str, set[int]] = {}  # steps of their validations
        self.failures = 0  # trials in a row
        self.folder = folder
        self.ledger = Ledger(folder, self._earlier_jobs())

    def _check_same_study(self) -> None:
        """Refuse a study of other values; what it searches is noted in a new one."""
        now = {"values": sweep_digest(_root_=self.config)}
        now |= {d.name: json.dumps([d.kind, d.arguments]) for d in self.space}
        before = self.study.user_attrs.get("search", now)
        if before != now:
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            what = [f"{k} (was {before.get(k, 'fixed')}, now {now.get(k, 'fixed')})" for k in keys]
            raise ConfigError(
                f"the study {self.study.study_name} has other values or another space: {'; '.join(what)}; "
                "name another hydra.sweep.dir=, or another sweep.study= if it has a sweep.storage="
            )
        self.study.set_user_attr("search", now)

    def _earlier_jobs(self) -> list[Job]:
        """The jobs of earlier starts in this directory."""
        from optuna.trial import Trial

        numbers = {job.get("number") for job in read_ledger(self.folder)}
        jobs = []
        for frozen in self.study.get_trials(deepcopy=False):
            if self.shared and frozen.number not in numbers:
                continue  # another directory's
            if frozen.state.is_finished():
                job = self._job(frozen.number, frozen.params)
                job.status = status_of(frozen)
                job.result = frozen.value if job.status != "failed" else None
            else:  # Optuna has no public way to go on with a trial that is not new
                trial = Trial(self.study, frozen._trial_id)
                job = self._begin(trial, set(frozen.intermediate_values))
            jobs.append(job)
        return jobs

    def _job(self, number: int, values: dict[str, Any]) -> Job:
        overrides = [text for d in self.space for text in d.overrides(values[d.name])]
        short = [text for d in self.space for text in d.overrides(values[d.name], short=True)]
        return Job(f"{number:03d}-{name_of(short)}", [*self.fixed, *overrides], number)

    def _begin(self, trial: Trial, reported: set[int]) -> Job:
        """The job of a trial; values that it has already stay as they are."""
        self.study.sampler = sampler_of(self.config, trial.number)
        values = {d.name: getattr(trial, f"suggest_{d.kind}")(d.name, **d.arguments) for d in self.space}
        job = self._job(trial.number, values)
        self.trials[job.name], self.reported[job.name] = trial, reported
        trial.set_user_attr("run", str(self.folder / job.name))
        return job

    def jobs(self) -> Iterator[Job]:
        """The jobs to run: first those that were interrupted, then new ones, until there are n_trials
        or the sampler has tried everything.

        Raises:
            ConfigError: If trials fail one after the other.
        """
        for job in [job for job in self.ledger.jobs if job.name in self.trials]:
            if job.status in ("finished", "pruned"):  # the command was killed before it told the study
                self.end(job)
            else:
                yield job
        while not self.study.user_attrs.get("exhausted") and self._count() < self.config.sweep.n_trials:
            if self.failures >= IN_A_ROW:
                failed = [job for job in self.ledger.jobs if job.status == "failed"]
                raise ConfigError(
                    f"{IN_A_ROW} trials in a row have failed, the last one with: {failed[-1].error}"
                )
            job = self._begin(self.study.ask(), set())
            self.ledger.jobs.append(job)
            self.ledger.write()  # which says whose trial it is
            yield job

    def _count(self) -> int:
        return len(self.study.get_trials(deepcopy=False))

    def hopeless(self, job: Job) -> str | None:
        """Report the validations of a job since the last call; why the pruner would stop it, if it does."""
        trial, reported = self.trials[job.name], self.reported[job.name]
        try:
            rows = read_metrics(self.folder / job.name / "metrics.csv")
        except OSError:
            return None  # it has not begun
        for row in rows:
            if "val/loss" in row and int(row["step"]) not in reported:
                reported.add(int(row["step"]))
                trial.report(row["val/loss"], int(row["step"]))
                if trial.should_prune():
                    return (
                        f"pruned by {type(self.study.pruner).__name__} of the study {self.study.study_name}: "
                        f"validation loss {row['val/loss']:.4f} at step {row['step']:.0f}"
                    )
        return None

    def end(self, job: Job) -> None:
        """Tell the study how a job ended; one that was interrupted goes on in the next start.

        A run that fails while it trains, as one that diverges, has an infinite loss, so that the sampler
        avoids its values. Any other failure tells nothing about them.
        """
        from optuna.trial import TrialState

        if job.status == "interrupted":
            return
        self.hopeless(job)  # reports its last validations
        trial, failures = self.trials.pop(job.name), self.failures
        self.failures = 0
        if job.status == "pruned":
            self.study.tell(trial, state=TrialState.PRUNED)
        elif job.status == "finished" and job.result is not None:
            self.study.tell(trial, job.result)
        elif read_summary(self.folder / job.name).get("status") == "failed":
            self.study.tell(trial, math.inf)
        else:
            self.failures = failures + 1
            job.status, job.error = "failed", job.error or "it has no validation loss"
            self.study.tell(trial, state=TrialState.FAIL)

    def best(self) -> str:
        """The best trial of the study, its directory and its command line.

        Raises:
            ConfigError: If no trial has a result.
        """
        trials = self.study.get_trials(deepcopy=False)
        counts = Counter(map(status_of, trials))
        states = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        if not counts["finished"]:
            reasons = self.folder / LEDGER
            raise ConfigError(f"no trial of the study has a result ({states}); the reasons are in {reasons}")
        best = min((t for t in trials if status_of(t) == "finished"), key=lambda trial: trial.values[0])
        overrides = self._job(best.number, best.params).overrides
        return (
            f"trials of the study: {states}\n"
            f"best trial: {best.number}, validation loss {best.values[0]:.4f}, in {best.user_attrs['run']}\n"
            f"command: python -m gpt_lightning.train {shlex.join(overrides)}"
        )


def status_of(trial: FrozenTrial) -> Literal["finished", "pruned", "failed", "running"]:
    """How a trial stands; an infinite loss is that of a run that failed."""
    from optuna.trial import TrialState

    if trial.state == TrialState.COMPLETE:
        return "finished" if math.isfinite(trial.values[0]) else "failed"
    if trial.state == TrialState.PRUNED:
        return "pruned"
    return "failed" if trial.state == TrialState.FAIL else "running"


def sampler_of(config: DictConfig, number: int) -> BaseSampler:
    """The sampler of a trial: a seed is mixed with its number, so that no start repeats draws."""
    import numpy as np

    node = config.sweep.sampler
    if node.get("seed") is None or str(node.get("_target_")).endswith(ONE_SEED):
        found: BaseSampler = build(config, "sweep.sampler")
    else:
        seed = int(np.random.SeedSequence([node.seed, number]).generate_state(1)[0])
        found = build(config, "sweep.sampler", seed=seed)
    return found


def pruner_of(config: DictConfig) -> BasePruner:
    """The pruner of a study."""
    import optuna

    found: BasePruner = (
        optuna.pruners.NopPruner() if config.sweep.pruner is None else build(config, "sweep.pruner")
    )
    return found


def shared_storage(place: str) -> BaseStorage:
    """A storage that several directories share: a database by its URL, or the file of a journal.

    Raises:
        ConfigError: If it cannot be opened.
    """
    import optuna

    try:
        return optuna.storages.RDBStorage(place) if "://" in place else _journal(Path(place).expanduser())
    except Exception as error:  # of SQLAlchemy, of the database's driver, or of the file
        raise ConfigError(f"sweep.storage={place} cannot be opened: {error}") from error


def own_journal(folder: Path) -> BaseStorage:
    """The storage of a study in its directory, which no other process uses: what a crash left is mended."""
    path = folder / JOURNAL
    if path.exists():
        Path(f"{path}.lock").unlink(missing_ok=True)
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])
    return _journal(path)


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
