"""Runs of several processes: who starts them, and what happens if one of them is missing, killed or silent.

The processes are real ones, with the environment that torchrun and srun give them.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ranks import STARTERS, free_port, srun, start, torchrun
from support.runs import TINY
from support.shown import commands
from support.zygote import Process, Zygote

from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import read_summary

TRAINING_STEP = "gpt_lightning.training.module:LanguageModel.training_step"
FAILING = """
import lightning.pytorch as pl

class Failing(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise ValueError("only rank 1 fails")
"""


@pytest.fixture
def options(small_text: Path, tmp_path: Path) -> list[str]:
    kept = [option for option in TINY if not option.startswith(("trainer.max_steps", "callbacks"))]
    kept += ["trainer.max_steps=8", "callbacks.samples=null", "logger=none", f"data.path={small_text}"]
    return [*kept, f"paths.outputs={tmp_path / 'outputs'}", "name=run", "device.devices=2"]


def shown(starter: str) -> list[str]:
    """The arguments of a command of docs/scaling.md, for two processes of this machine."""
    (line,) = (command for command in commands("scaling") if command.startswith(starter))
    for several, two in {
        "--nnodes=2 --nproc-per-node=4": "--nnodes=1 --nproc-per-node=2",
        "HOST:29500": f"127.0.0.1:{free_port()}",
        "device.devices=4 trainer.num_nodes=2": "device.devices=2",
    }.items():
        line = line.replace(several, two)
    return line.split()[1:]


def runs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "outputs" / "run").iterdir())


def last_line(process: Process) -> str:
    text = process.out.read_text()
    assert "Traceback" not in text
    return text.splitlines()[-1]


def test_one_directory_and_one_log_whoever_starts_the_processes(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    for starter in STARTERS:
        arguments = shown(starter)
        arguments = arguments[arguments.index("gpt_lightning.train") + 1 :]
        for process in start(zygote, [*arguments, *options], starter):
            assert process.wait() == 0, process.out.read_text()
    first, second = runs(tmp_path)
    assert first.name.partition(".")[0] != second.name
    losses = []
    for run in (first, second):
        assert [path.name for path in run.glob("*.log")] == ["train.log"]
        assert (run / "train.log").read_text().count("] run: ") == 1
        assert (read_summary(run)["status"], read_summary(run)["processes"]) == ("finished", 2)
        losses.append([row.get("train/loss") for row in read_metrics(run / "metrics.csv")])
    assert losses[0] == losses[1]
    # the second process has the run to resume from the first one, too, which finds nothing to do
    for process in start(zygote, [f"resume={first}"]):
        assert process.wait() == 0, process.out.read_text()
    assert runs(tmp_path) == [first, second]


@pytest.mark.slow
def test_torchrun_itself_starts_one_run(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", *shown("torchrun"), *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (run,) = runs(tmp_path)
    assert (read_summary(run)["status"], read_summary(run)["processes"]) == ("finished", 2)
    assert [path.name for path in run.glob("*.log")] == ["train.log"]


def test_process_whose_partner_never_comes_says_that_it_waits_and_ends(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    limit = "trainer.timeout_seconds=7"
    other = f"paths.outputs={tmp_path / 'other'}"
    second = zygote.start("train", *options, other, limit, **torchrun(1, free_port()))
    first = zygote.start("train", *options, limit, **torchrun(0, free_port()))
    for process, missing in ((second, "rank 0"), (first, "1 of 2 processes")):
        assert process.wait() == 1
        assert process.out.read_text().count(f"waiting for {missing}") == 1
        assert last_line(process).startswith(f"error: waited 7 s for {missing}")
        assert "trainer.timeout_seconds= waits longer" in last_line(process)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_other_process_ends_in_one_line_if_one_is_killed(
    zygote: Zygote, options: list[str], rank: int, tmp_path: Path
) -> None:
    both = start(zygote, options, slow={TRAINING_STEP: 0.3})
    both[0].wait_for(lambda: "step 2/" in both[0].out.read_text())
    both[rank].kill()
    other = both[1 - rank]
    assert other.wait(60) == 1, other.out.read_text()
    (run,) = runs(tmp_path)
    expected = f"error: another process of the run ended or cannot be reached; go on with resume={run}"
    assert last_line(other) == expected


def test_process_that_answers_no_more_ends_the_others(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    """As if the link were dead: a stopped process keeps its connections."""
    slow = {TRAINING_STEP: 0.3}
    first, second = start(zygote, [*options, "trainer.timeout_seconds=10"], slow=slow)
    first.wait_for(lambda: "step 2/" in first.out.read_text())
    second.kill(signal.SIGSTOP)
    try:
        assert first.wait(60) == 1
    finally:
        second.kill()
    (run,) = runs(tmp_path)
    line = f"did not answer within trainer.timeout_seconds=; go on with resume={run}"
    assert last_line(first) == f"error: another process of the run {line}"


def test_error_of_one_process_alone_ends_the_other(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    spy = ["+callbacks.failing._target_=failing.Failing"]
    first, second = start(zygote, [*options, *spy], cwd=tmp_path)
    assert second.wait(60) == 1
    assert last_line(second) == "error: only rank 1 fails"
    assert first.wait(60) == 1
    assert last_line(first).startswith("error: another process of the run ended")


@pytest.mark.slow
def test_process_that_lightning_started_says_that_the_first_one_was_killed(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    first = zygote.start("train", *options, slow={TRAINING_STEP: 0.3}, spares=1)
    first.wait_for(lambda: "step 2/" in first.out.read_text())
    (child,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    (run,) = runs(tmp_path)
    line = f"rank 1: the first process ({first.pid}) was ended; go on with resume={run}"
    assert line in first.out.read_text()  # the output of both


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("starter", STARTERS)
def test_sweep_that_torchrun_or_srun_would_start_several_times_is_refused(
    zygote: Zygote, options: list[str], starter: str, rank: int, tmp_path: Path
) -> None:
    process = zygote.start("train", "-m", *options, "seed=1,2", **STARTERS[starter](rank, free_port(), 2))
    assert process.wait() == 1
    variable = "WORLD_SIZE" if starter == "torchrun" else "SLURM_NTASKS"
    text = f"error: {variable}=2 in the environment: each of these processes would start the whole sweep"
    assert process.out.read_text().startswith(text)
    assert process.out.read_text().count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("environment", "override", "line"),
    [
        (torchrun(0, 1), "device.devices=1", "trainer.num_nodes=1 is 1 process, but WORLD_SIZE=2"),
        (torchrun(0, 1), "device.devices=4", "set device.devices=2 trainer.num_nodes=1, or start as many"),
        (srun(0, 1) | {"SLURM_NNODES": "2"}, "device.devices=1", "set device.devices=1 trainer.num_nodes=2"),
        ({"SLURM_NTASKS": "2"}, "device.devices=2", "SLURM_NTASKS=2: give srun --ntasks-per-node="),
        ({}, "trainer.num_nodes=8", "trainer.num_nodes=8: nothing has started processes on other machines"),
    ],
    ids=["fewer", "more", "srun", "tasks", "no starter"],
)  # fmt: skip
def test_other_number_of_processes_is_refused_before_anything_is_written(
    call: Callable[..., Any], options: list[str], environment: dict[str, str], override: str, line: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        call("train", *options, override)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert (error.count("\n"), line in error) == (1, True), error
    assert not (tmp_path / "outputs").exists()
