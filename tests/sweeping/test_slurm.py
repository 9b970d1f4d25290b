"""The array that is submitted: to programs whose answers are made up, and to SLURM where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.comparison import differences
from support.ranks import srun
from support.runs import SHARED, TINY
from support.sweeps import OPTIONS, end, ledger, reached, start, wait_for

from gpt_lightning.sweeping.note import note

SWEEP = "it's a sweep"


@pytest.fixture
def sweep(small_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a sweep, and programs of SLURM: squeue prints the file queue, or fails with broken."""
    (tools := tmp_path / "tools").mkdir()
    queue = "[ ! -f broken ] || { cat broken >&2; exit 1; }; cat queue 2>/dev/null || true"
    for name, answer in {"sbatch": "echo '77;main'", "squeue": queue}.items():
        (tools / name).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\n{answer}\n')
        (tools / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    options = [*TINY, f"data.path={small_text}", "logger=none", "callbacks.samples=null", "-m", "seed=1,2"]
    return [*options, f"hydra.sweep.dir={tmp_path / SWEEP}", "hydra/launcher=slurm"]


def of_task(task: str, tasks: int = 1) -> dict[str, str]:
    """The environment of the script of a job, outside of srun."""
    array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "77"}
    variables = os.environ | srun(0, 77, tasks) | array
    return {key: value for key, value in variables.items() if key != "SLURM_STEP_ID"}


def submitted(tmp_path: Path) -> int:
    return (tmp_path / "asked").read_text().count("--parsable")


@pytest.mark.slow
def test_jobs_are_submitted_as_an_array_of_plain_commands_and_only_once(
    sweep: list[str], tmp_path: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options, folder = sweep, tmp_path / SWEEP
    call("train", *options, "sweep.jobs=2", "+hydra.launcher.sbatch.time=24:00:00")
    assert (tmp_path / "asked").read_text() == f"--parsable {folder}/sweep.sh\n"
    script = (folder / "sweep.sh").read_text()
    for option in ("array=0-1%2", "time=24:00:00", "signal=B:USR1@60", "ntasks=1"):
        assert f"#SBATCH --{option}\n" in script
    assert "#SBATCH --requeue\n" in script

    result = subprocess.run(["bash", folder / "sweep.sh"], env=of_task("1"), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "seed=2" / "summary.json").read_text())
    assert (summary["seed"], summary["status"]) == (2, "finished")
    assert not (folder / "seed=1").exists()
    found = ledger(folder)
    job = found["seed=2"]
    assert (job["status"], job["attempts"], job["exit_code"]) == ("finished", 1, 0)
    assert job["result"] == summary["best_val_loss"]
    assert 1 <= job["seconds"] < 100
    assert (found["seed=1"]["status"], found["seed=1"]["attempts"]) == ("waiting", 0)

    with subprocess.Popen(["bash", folder / "sweep.sh"], env=of_task("0")) as process:
        wait_for(lambda: ledger(folder)["seed=1"]["status"] == "running", process)
        process.send_signal(signal.SIGUSR1)  # as SLURM does before the time limit
    assert process.returncode == 128 + signal.SIGUSR1
    found = ledger(folder)["seed=1"]
    assert (found["status"], found["error"], found["exit_code"]) == ("interrupted", "SIGUSR1", 138)

    (folder / "slurm-0.log").write_text("some text\nerror: no space left\n\n")
    for code, error in ((1, "no space left"), (137, "killed by SIGKILL")):
        note(folder, "seed=1", "0", code, 7)
        found = ledger(folder)["seed=1"]
        assert (found["status"], found["error"], found["seconds"]) == ("failed", error, 7)

    call("train", *options)
    assert "SLURM job 77: 1 jobs" in capsys.readouterr().out
    script = (folder / "sweep.sh").read_text()
    assert "#SBATCH --array=0-0\n" in script
    assert "seed=1" in script
    assert "seed=2" not in script


def test_sweep_that_slurm_has_or_may_have_is_not_submitted_again_and_keeps_its_ledger(
    sweep: list[str], tmp_path: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    call("train", *sweep)
    assert "#SBATCH --array=0-1\n" in (tmp_path / SWEEP / "sweep.sh").read_text()
    note(tmp_path / SWEEP, "seed=1", "0")
    names = ("sweep.jsonl", "multirun.yaml")
    before = [(tmp_path / SWEEP / name).read_text() for name in names]
    runs = "the sweep runs as SLURM job 77; wait for it, or scancel 77"
    lost = "slurm_load_jobs error: Unable to contact slurm controller"
    for name, said, line in (("queue", "77_0 main RUNNING", runs), ("broken", lost, f"squeue: {lost}")):
        (tmp_path / name).write_text(said)
        for again in (sweep, [*sweep[:-1], "hydra/launcher=processes"], [f"resume={tmp_path / SWEEP}"]):
            with pytest.raises(SystemExit):
                call("train", *again)
            assert capsys.readouterr().err.startswith(f"error: {line}")
        assert [(tmp_path / SWEEP / name).read_text() for name in names] == before
        assert submitted(tmp_path) == 1
        (tmp_path / name).unlink()
    (tmp_path / "broken").write_text("slurm_load_jobs error: Invalid job id specified")  # long ended
    call("train", *sweep, "sweep.jobs=1")
    assert submitted(tmp_path) == 2
    assert "#SBATCH --array=0-1%1\n" in (tmp_path / SWEEP / "sweep.sh").read_text()


def test_job_on_several_machines_is_refused_before_anything_is_written(
    sweep: list[str], tmp_path: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("train", *sweep, "trainer.num_nodes=2", "+hydra.launcher.sbatch.nodes=2")
    assert "error: trainer.num_nodes=2: a job of a sweep is on one machine; " in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"tools"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "processes"])
def test_job_of_two_devices_trains_in_the_script_of_a_slurm_job(
    sweep: list[str], tmp_path: Path, launcher: str
) -> None:
    options = [*sweep, f"hydra/launcher={launcher}", "seed=1", "trainer=ddp", "device.devices=2"]
    process = start(tmp_path, *options, env=of_task("0", tasks=2))
    end(process, 0)
    if launcher == "slurm":
        command = ["bash", tmp_path / SWEEP / "sweep.sh"]
        result = subprocess.run(command, env=of_task("0"), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / SWEEP).glob("*/summary.json")
    summary = json.loads(run.read_text())
    assert (summary["status"], summary["processes"], summary["slurm_job"]) == ("finished", 2, "77_0")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SLURM with this machine as its only node; its programs know it by an environment variable."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    missing = [name for name in programs if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing or os.geteuid() or not (SHARED / "slurm" / "slurm.conf").is_file():
        pytest.skip(
            f"needs root, {' '.join(missing) or 'SLURM'} (apt-get install slurm-wlm) and its configuration"
        )
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path, which the user munge can read
    folder.chmod(0o755)
    for name in ("state", "spool", "log", "munge"):
        (folder / name).mkdir()
    shutil.chown(folder / "munge", "munge")
    host = socket.gethostname().partition(".")[0]
    text = (SHARED / "slurm" / "slurm.conf").read_text().replace("@HOST@", host).replace("@DIR@", str(folder))
    wait = "cred_expire=5"  # seconds until a job that was queued again may start, 120 by default
    (folder / "slurm.conf").write_text(f"{text}AuthInfo=socket={folder}/munge/socket,{wait}\n")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [f"--{kind}-file={folder}/munge/{kind}" for kind in ("pid", "log", "seed")]
    munged = ["runuser", "-u", "munge", "--", "munged", "-F", f"--socket={folder}/munge/socket", *files]
    daemons = [munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]]
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        for command in daemons:
            process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            stack.callback(process.terminate)
            if command is munged:
                wait_for((folder / "munge" / "socket").exists, process)
        wait_for(lambda: " idle" in out("sinfo", "--noheader"), process)
        yield


def out(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_job_that_slurm_signals_while_it_trains_and_while_it_imports_is_queued_again_and_resumes(
    slurm: None, small_text: Path, tmp_path: Path
) -> None:
    options = [*OPTIONS, f"data.path={small_text}", "trainer.max_steps=400", "trainer.save_every_steps=50"]
    undisturbed = start(tmp_path, *options, "seed=1", f"hydra.run.dir={tmp_path / 'alone' / 'seed=1'}")
    end(undisturbed, 0)
    sweep = tmp_path / "sweep"
    process = start(tmp_path, *options, "-m", "seed=1,2", f"hydra.sweep.dir={sweep}", "hydra/launcher=slurm")
    said = end(process, 0)
    number = said.partition("SLURM job ")[2].partition(":")[0]

    def state(task: int) -> str:
        return out("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={number}_{task}").strip()

    def ask() -> None:  # as SLURM does before the time limit
        subprocess.run(["scancel", "--signal=USR1", "--batch", f"{number}_0"], check=True)

    def wait(condition: Callable[[], object]) -> None:
        wait_for(condition, process=sleeper)

    with subprocess.Popen(["sleep", "240"]) as sleeper:
        wait(reached(sweep / "seed=1", 100))
        ask()
        wait(lambda: state(0) == "PENDING")
        assert ledger(sweep)["seed=1"]["status"] == "interrupted"
        wait(lambda: ledger(sweep)["seed=1"]["attempts"] == 2)  # SLURM says RUNNING before its script runs
        ask()  # Python imports for some seconds
        wait(lambda: state(0) == "PENDING")
        wait(lambda: (state(0), state(1)) == ("COMPLETED", "COMPLETED"))
        sleeper.kill()
    log = (sweep / "slurm-0.log").read_text()
    found = differences(sweep / "seed=1", tmp_path / "alone" / "seed=1")
    assert set(found) <= {".hydra/overrides.yaml differs"}, log  # in their order
    jobs = [(job["status"], job["attempts"], job["exit_code"]) for job in ledger(sweep).values()]
    assert jobs == [("finished", 3, 0), ("finished", 1, 0)]
