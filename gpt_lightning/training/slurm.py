"""The SLURM job that a process belongs to."""

from __future__ import annotations

import logging
import os
import subprocess

log = logging.getLogger(__name__)


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
