"""The jobs of a sweep: their names, their directories, and the file that says how each of them stands."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gpt_lightning.config.command_line import as_of_job, key_of
from gpt_lightning.data.files import atomic_write, write_json
from gpt_lightning.rundir.summary import LEDGER, pruned_by, read_ledger, read_summary

LONGEST_NAME = 120  # bytes
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # Windows has the first two
ENDED = {124: "time limit"} | {128 + getattr(signal, name): name for name in SIGNALS if hasattr(signal, name)}


@dataclass
class Job:
    """One run of a sweep."""

    name: str  # what it overrides; also the name of its directory
    overrides: list[str]  # its command line
    number: int | None = None  # of the trial, in a search
    status: Literal["waiting", "running", "finished", "interrupted", "failed", "pruned"] = "waiting"
    attempts: int = 0  # how often it was started
    pid: int | None = None  # of the process that runs it
    started: str | None = None  # local time of the last attempt, as the next three
    seconds: float | None = None
    exit_code: int | None = None  # negative for a signal that killed it
    error: str | None = None  # the last line of an attempt that failed
    result: float | None = None  # best validation loss, in nats per token
    command: str = "train"  # that it runs

    def begin(self) -> None:
        self.status, self.attempts = "running", self.attempts + 1
        self.started, self.error = time.strftime("%Y-%m-%d %H:%M:%S"), None

    def end(self, folder: Path, exit_code: int, seconds: float, last_line: str) -> None:
        """Note how an attempt ended, by its exit code and its summary.json."""
        summary = read_summary(folder)
        self.exit_code, self.seconds, self.pid = exit_code, round(seconds, 1), None
        self.result = summary.get("best_val_loss")
        if exit_code == 0 or summary.get("status") == "finished":  # a signal came when all was written
            self.status = "finished"
        elif summary.get("status") == "pruned":
            self.status = "pruned"
        elif summary and pruned_by(folder):  # a run that goes on was asked to stop before it listened
            self.status = "pruned"
            write_json(folder / "summary.json", {**summary, "status": "pruned"})
        elif exit_code in ENDED:
            self.status, self.error = "interrupted", ENDED[exit_code]
        else:
            killed = f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""
            self.status, self.error = "failed", killed or last_line.removeprefix("error: ")


class Ledger:
    """sweep.jsonl: a line for each job, rewritten atomically whenever one changes.

    Args:
        folder: Of the sweep.
        jobs: As the command line has them; how far they came is taken from the file that is there, and from
            the summaries of their runs.
    """

    def __init__(self, folder: Path, jobs: Sequence[Job]):
        self.folder, self.jobs = folder, list(jobs)
        known = {job["name"]: job for job in read_ledger(folder)}
        for job in self.jobs:
            earlier, summary = known.pop(job.name, {}), read_summary(self.place(job))
            for key in ("attempts", "started", "seconds", "exit_code", "error"):
                setattr(job, key, earlier.get(key, getattr(job, key)))
            if (status := summary.get("status")) in ("finished", "pruned"):
                job.status, job.result = status, summary.get("best_val_loss")
        self._others = list(known.values())  # of an earlier, larger sweep

    def place(self, job: Job) -> Path:
        """The run directory of a job."""
        return self.folder / job.name

    def write(self) -> None:
        with atomic_write(self.folder / LEDGER, text=True) as file:
            file.writelines(json.dumps(job) + "\n" for job in [*self._others, *map(asdict, self.jobs)])


def name_of(swept: Sequence[str]) -> str:
    """A name for a directory from the overrides that differ between jobs; their order does not matter.

    Keys are shortened to their last part if that tells them apart: `lr=0.003,seed=2`. A digest of the
    overrides is added where values have characters that a name cannot have, or the name is too long.
    """
    keys = {text: key_of(text) for text in swept}
    count = Counter(key.rpartition(".")[2] for key in keys.values())
    parts, exact = [], True
    for text, key in keys.items():
        last, value = key.rpartition(".")[2], text.partition("=")[2]
        clean = re.sub(r"[^\w.+-]+", "_", value).strip("_") or "empty"
        exact = exact and clean == value
        parts.append(f"{last if count[last] == 1 else key.replace('/', '.')}={clean}")
    name = ",".join(sorted(parts)) or "job"
    if exact and len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b("\n".join(sorted(swept)).encode(), digest_size=4).hexdigest()
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def jobs_of(
    job_overrides: Sequence[Sequence[str]], given: Sequence[str], command: str = "train"
) -> list[Job]:
    """The jobs of a sweep, with directories of their own.

    Args:
        job_overrides: The overrides of each.
        given: The overrides of the sweep; those that are the same in a job do not vary.
        command: That they run.

    Raises:
        ValueError: If two jobs are the same, or there is none.
    """
    if not job_overrides:
        raise ValueError("the sweep has no job; one of its keys has no value")
    jobs = []
    fixed = {key_of(text): as_of_job(text) for text in given}  # the last one of a key counts
    for overrides in job_overrides:
        overrides = [text for text in overrides if not key_of(text).startswith("sweep.")]
        swept = [text for text in overrides if text != fixed.get(key_of(text))]
        jobs.append(Job(name_of(swept), overrides, command=command))
    counts = Counter(job.name for job in jobs)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(f"jobs of the sweep are the same: {', '.join(twice)}; name each value once")
    return jobs
