"""A run directory belongs to one run: it is locked before anything is written, and never overwritten."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.config.start import start_arguments

FAST = [*TINY, "logger=none", "callbacks.samples=null", "callbacks.layers=null", "trainer.max_steps=4"]


@pytest.fixture
def refused(call: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line with which a start is refused."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            call("train", *arguments)
        assert stop.value.code == 1
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_directory_of_a_run_is_refused_however_it_is_spelled(
    call: Callable[..., Any],
    refused: Callable[..., str],
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*FAST, f"data.path={small_text}", "name=x"]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  run: {dir: 'runs/${name}'}\n"
    (tmp_path / "mine" / "experiment" / "here.yaml").write_text(text)
    assert "optimizer.lr=-1" in refused(*options, "hydra.run.dir=runs/x", "optimizer.lr=-1")
    assert not (tmp_path / "runs").exists()  # a start that trained nothing leaves nothing
    call("train", *options, "hydra.run.dir=runs/x")
    before = contents(tmp_path)
    spellings = [
        ["hydra.run.dir=runs/x"],
        ["hydra.run.dir=runs/${name}"],
        ["++hydra.run.dir=runs/x"],
        ["hydra.run={dir: runs/x}"],
        ["--config-dir", "mine", "experiment=here"],
        [f"repeat={tmp_path / 'runs' / 'x'}", "hydra.run.dir=runs/x"],
    ]
    for spelling in spellings:
        assert f"{tmp_path / 'runs' / 'x'} holds a run; go on with resume=" in refused(*options, *spelling)
    assert "set hydra.run.dir instead" in refused(*options, "paths.run=runs/x")
    for rank in ("LOCAL_RANK", "SLURM_PROCID"):  # the first rank may have made the directory
        monkeypatch.setenv(rank, "0")
        assert "holds a run" in refused(*options, "hydra.run.dir=runs/x")
        monkeypatch.delenv(rank)
    assert contents(tmp_path) == before


def test_sweep_does_not_overwrite_a_sweep_or_its_own_jobs(
    call: Callable[..., Any], refused: Callable[..., str], small_text: Path, tmp_path: Path
) -> None:
    options = [*FAST, f"data.path={small_text}", f"hydra.sweep.dir={tmp_path / 'sweep'}", "-m"]
    assert "jobs are named by what they override" in refused(*options, "seed=1,2", "hydra.sweep.subdir=x")
    options.insert(0, "hydra/launcher=basic")
    assert "is the same for all jobs" in refused(*options, "seed=1,2", "hydra.sweep.subdir=x")
    assert not (tmp_path / "sweep").exists()
    call("train", *options, "seed=1")
    before = contents(tmp_path)
    assert "holds a sweep" in refused(*options, "seed=2")
    assert contents(tmp_path) == before
    with pytest.raises(SystemExit):  # the second job
        call("train", *options[:-2], f"hydra.sweep.dir={tmp_path / 'two'}", "-m", "seed=1,2",
             "hydra.sweep.subdir=${trainer.max_steps}")  # fmt: skip
    summary = json.loads((tmp_path / "two" / "4" / "summary.json").read_text())
    assert (summary["seed"], summary["status"]) == (1, "finished")


def test_second_start_while_the_data_is_prepared_changes_nothing(
    zygote: Zygote, small_text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = [*FAST, f"data.path={small_text}", f"hydra.run.dir={run}"]
    first = zygote.start("train", *options, "seed=1", slow={"gpt_lightning.data.token_store:prepare": 60})
    first.wait_for((run / "train.log").exists)
    first.wait_for(lambda: "command:" in (run / "train.log").read_text())
    before = contents(run)
    for second in ([*options, "seed=2"], [f"resume={run}"]):
        code, out = zygote.run("train", *second)
        assert (code, out) == (1, f"error: another process trains in {run}; wait for it or end it\n")
    assert contents(run) == before
    first.kill(signal.SIGKILL)
    first.wait()
    code, out = zygote.run("train", f"resume={run}")
    assert code == 0, out
    assert json.loads((run / "summary.json").read_text())["seed"] == 1


def test_empty_value_of_resume_or_repeat_is_refused(refused: Callable[..., str]) -> None:
    for key in ("resume", "repeat"):
        for value in ("", "''", "  "):
            assert f"{key}= is empty, as an unset variable is" in refused(f"{key}={value}")


def test_commands_that_only_show_something_judge_no_directory(tiny: list[str]) -> None:
    for flags in (["--cfg", "job"], ["-c=job"], ["--help"], ["--info", "config"], ["-m"]):
        assert start_arguments([*tiny, *flags]) == [*flags, *tiny]
