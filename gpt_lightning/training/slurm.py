"""The SLURM job that a process belongs to, and the jobs of a sweep."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

log = logging.getLogger(__name__)

SUBMITTED = "slurm.txt"  # in the directory of a sweep: the number of its array


def slurm_job() -> str | None:
    """The job as `scontrol requeue` names it, an array's with its task; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID")


def requeue() -> None:
    """Ask SLURM to start this job again."""
    job = slurm_job()
    assert job is not None
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
        log.info("asked SLURM to requeue job %s", job)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s could not be requeued (%s)", job, error)


def refuse_queued(sweep: Path) -> None:
    """Refuse to go on with a sweep of which jobs are queued or running.

    Raises:
        ValueError: If there are some, or SLURM does not say so.
    """
    try:
        number = (sweep / SUBMITTED).read_text().strip()
        found = subprocess.run(
            ["squeue", "--noheader", f"--jobs={number}"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # nothing was submitted, or this machine has no SLURM
        return
    if found.returncode and "Invalid job id" not in found.stderr:  # a job that ended long ago
        raise ValueError(f"squeue: {found.stderr.strip()}; the sweep may run as SLURM job {number}")
    if found.stdout.strip():
        raise ValueError(f"the sweep runs as SLURM job {number}; wait for it, or scancel {number}")
