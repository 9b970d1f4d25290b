"""Hydra's launcher for SLURM: the jobs of a sweep as one array of the same plain commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command_line import as_given, key_of
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.sweeping.jobs import Job
from gpt_lightning.sweeping.launcher import ProcessLauncher
from gpt_lightning.sweeping.note import ledger_lock
from gpt_lightning.sweeping.process import OWN, PREFIXES
from gpt_lightning.training.slurm import SUBMITTED

SCRIPT = "sweep.sh"
# SLURM signals the script before it ends the job. A run that trains writes a checkpoint and asks for
# its job to be queued again; one that is still importing is ended by the signal, and the script asks.
# What becomes of the job is noted in sweep.jsonl, early where SLURM may end the script before its last line.
TEMPLATE = """#!/bin/bash
{options}
cd {folder} || exit 1
unset {own}  # the script is one process, whatever the tasks of the job are
note() {{ {note} "$job" "$SLURM_ARRAY_TASK_ID" "$@"; }}
trap 'asked=1; kill -USR1 $run; note 138 $SECONDS' USR1
trap 'kill -TERM $run' TERM
case $SLURM_ARRAY_TASK_ID in
{commands}
esac
{{ note; exec "$@"; }} &
run=$!
wait $run; code=$?
while kill -0 $run 2>/dev/null; do wait $run; code=$?; done
note $code $SECONDS
if [ -n "$asked" ] && [ $code = 138 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" 2>/dev/null
fi
exit $code
"""


class SlurmLauncher(ProcessLauncher):
    """Submits the jobs that are not finished as one array, and does not wait for them.

    A job that is preempted or reaches its time limit is queued again and resumes. The same command again
    submits what is left, once no job of the array is queued or running.

    Args:
        sbatch: Options of sbatch by their long names, such as partition, time and gpus.
    """

    def __init__(self, sbatch: Mapping[str, str | int] | None = None):
        self.sbatch = dict(sbatch or {})

    def setup(self, *, config: DictConfig, **given: Any) -> None:
        super().setup(config=config, **given)
        if (nodes := OmegaConf.select(config, "trainer.num_nodes", default=1)) != 1:
            raise ConfigError(
                f"trainer.num_nodes={nodes}: a job of a sweep is on one machine; start a run on several "
                "with sbatch and srun, without -m"
            )

    @contextmanager
    def sweep(self) -> Iterator[Path]:
        """The directory of the sweep; until it is submitted, no job notes anything in sweep.jsonl."""
        with super().sweep() as folder, ledger_lock(folder):
            yield folder

    def run_all(self, jobs: Iterable[Job]) -> None:
        folder, at_once, waiting = self.ledger.folder, self.config.sweep.jobs, list(jobs)
        if not waiting:
            return
        given = [key_of(text) for text in as_given(self.config.hydra.overrides.task)]
        limit = f"%{at_once}" if at_once > 1 or "sweep.jobs" in given else ""  # the default is none
        options: dict[str, str | int] = {
            "job-name": folder.name,
            "array": f"0-{len(waiting) - 1}{limit}",
            "ntasks": 1,
            "signal": "B:USR1@60",
            "open-mode": "append",
            "output": f"{folder}/slurm-%a.log",
        }
        lines = [f"#SBATCH --{key}={value}" for key, value in {**options, **self.sbatch}.items()]
        program = [sys.executable, "-m", f"gpt_lightning.{self.command}"]
        commands = [
            f"{index}) job={shlex.quote(job.name)}; set -- "
            f"{shlex.join([*program, *self.arguments(job, self.ledger.place(job))])} ;;"
            for index, job in enumerate(waiting)
        ]
        script = TEMPLATE.format(
            options="\n".join([*lines, "#SBATCH --requeue"]),
            folder=shlex.quote(str(Path.cwd())),
            own=" ".join([*sorted(OWN), *(f"${{!{prefix}@}}" for prefix in PREFIXES)]),
            note=shlex.join([sys.executable, "-m", "gpt_lightning.sweeping.note", str(folder)]),
            commands="\n".join(commands),
        )
        (folder / SCRIPT).write_text(script, encoding="utf-8")
        try:
            answer = subprocess.run(
                ["sbatch", "--parsable", str(folder / SCRIPT)], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
            raise ConfigError(f"sbatch: {reason}; hydra/launcher=slurm needs SLURM") from error
        number = answer.stdout.strip().partition(";")[0]
        (folder / SUBMITTED).write_text(f"{number}\n")
        print(f"SLURM job {number}: {len(waiting)} jobs; report runs={folder} shows how they stand")
