"""What a job of SLURM notes in the sweep.jsonl of its sweep: `note SWEEP JOB TASK [CODE SECONDS]`."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import filelock

from gpt_lightning.rundir.summary import read_ledger
from gpt_lightning.sweeping.jobs import ENDED, Job, Ledger


def note(folder: Path, name: str, task: str, code: int | None = None, seconds: float = 0) -> None:
    """Note that a job begins, or how it ended; jobs on other machines wait for each other.

    Args:
        folder: Of the sweep.
        name: Of the job.
        task: Its number in SLURM's array, which names its log.
        code: Exit code as a shell has it; None if it begins.
        seconds: Since it began.
    """
    with ledger_lock(folder):
        ledger = Ledger(folder, [Job(**line) for line in read_ledger(folder)])
        (job,) = (one for one in ledger.jobs if one.name == name)
        if code is None:
            job.begin()
        else:
            killed = 128 < code < 160 and code not in ENDED  # as a shell reports a signal
            job.end(ledger.place(job), 128 - code if killed else code, seconds, _last_line(folder, task))
        ledger.write()


def ledger_lock(folder: Path) -> filelock.BaseFileLock:
    """Held while sweep.jsonl is read and written."""
    return filelock.FileLock(folder / "sweep.lock")


def _last_line(folder: Path, task: str) -> str:
    with suppress(OSError):
        text = (folder / f"slurm-{task}.log").read_text("utf-8", "replace")
        return text.rstrip().rpartition("\n")[2]
    return ""


if __name__ == "__main__":
    _, place, name, task, *ended = sys.argv
    note(Path(place), name, task, *map(int, ended))
