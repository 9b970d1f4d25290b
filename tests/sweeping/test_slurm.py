"""The array that is submitted to SLURM: the answers of its programs are made up, and bash runs the script."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import TINY


@pytest.mark.slow
def test_jobs_are_submitted_as_an_array_of_plain_commands_and_only_once(
    small_text: Path,
    tmp_path: Path,
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tools := tmp_path / "tools").mkdir()
    for name, answer in {"sbatch": "77;main", "squeue": "$(cat queue 2>/dev/null)"}.items():
        (tools / name).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\necho "{answer}"\n')
        (tools / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    sweep = tmp_path / "it's a sweep"
    options = [*TINY, f"data.path={small_text}", "logger=none", "callbacks.samples=null"]
    options += ["-m", f"hydra.sweep.dir={sweep}", "hydra/launcher=slurm", "seed=1,2"]
    call("train", *options, "sweep.jobs=2", "+hydra.launcher.sbatch.time=24:00:00")
    assert (tmp_path / "asked").read_text() == f"--parsable {sweep}/sweep.sh\n"
    script = (sweep / "sweep.sh").read_text()
    for option in ("array=0-1%2", "time=24:00:00", "signal=B:USR1@60", "ntasks=1"):
        assert f"#SBATCH --{option}\n" in script
    assert "#SBATCH --requeue\n" in script

    job = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77"}
    result = subprocess.run(["bash", sweep / "sweep.sh"], env=job, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((sweep / "seed=2" / "summary.json").read_text())
    assert (summary["seed"], summary["status"]) == (2, "finished")
    assert not (sweep / "seed=1").exists()

    (tmp_path / "queue").write_text("77_0 main RUNNING")
    with pytest.raises(SystemExit):
        call("train", *options)
    assert "error: the sweep runs as SLURM job 77; wait for it, or scancel 77\n" in capsys.readouterr().err
    (tmp_path / "queue").unlink()
    call("train", *options)
    assert "SLURM job 77: 1 jobs" in capsys.readouterr().out
    script = (sweep / "sweep.sh").read_text()
    assert "#SBATCH --array=0-0\n" in script
    assert "seed=1" in script
    assert "seed=2" not in script
