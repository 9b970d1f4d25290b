"""The commands as functions of Python."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpt_lightning


def test_names_that_are_public() -> None:
    assert {"train", "plan", "evaluate", "generate", "report", "load", "Run", "TextGenerator"} <= set(
        dir(gpt_lightning)
    )
    assert all(not name.startswith("_") or name == "__version__" for name in dir(gpt_lightning))


def test_run_is_trained_measured_and_used(tiny: list[str], small_text: Path, tmp_path: Path) -> None:
    def state() -> object:
        return logging.getLogger().handlers[:], Path.cwd(), sys.argv[:], signal.getsignal(signal.SIGINT)

    before = state()
    run = gpt_lightning.train(*tiny)
    assert run.folder == tmp_path / "run"
    assert run.summary["status"] == "finished"
    assert run.summary["overrides"] == tiny[:-1]  # hydra.run.dir= says where, not what
    assert run.metrics["step"].tolist() == list(range(1, 9))
    assert np.isfinite(run.metrics["train/loss"]).all()
    assert np.flatnonzero(np.isfinite(run.metrics["val/loss"])).tolist() == [3, 7]  # steps 4 and 8
    assert run.load().generate("the ", max_new_tokens=3, seed=1)
    result = gpt_lightning.evaluate(f"checkpoint={run.folder}", f"text={small_text}")
    assert result["loss"] == pytest.approx(run.summary["val_loss"], rel=0.05)
    texts = gpt_lightning.generate(
        f"checkpoint={run.folder}", "prompt=the ", "num_samples=2", "max_new_tokens=3"
    )
    assert len(texts) == 2
    again = gpt_lightning.train(*tiny[:-1], "seed=2", f"hydra.run.dir={tmp_path / 'second'}")
    assert again.summary["train_loss"] != run.summary["train_loss"]
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latest", "mine/latest"])
def test_latest_stands_for_a_run_wherever_one_is_taken(
    name: str, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*tiny[:-1], "logger=none", "callbacks.samples=null"]
    run = tmp_path / "outputs" / "mine" / "a"
    loss = gpt_lightning.train(*options, f"hydra.run.dir={run}").summary["train_loss"]
    assert gpt_lightning.load(name).info["name"] == "gpt"
    assert gpt_lightning.plan(f"resume={name}").max_steps == 8
    repeated = gpt_lightning.train(f"repeat={name}", f"hydra.run.dir={tmp_path / 'repeated'}")
    assert repeated.summary["train_loss"] == loss
    assert gpt_lightning.train(f"resume={name}").folder == run
    next_run = f"hydra.run.dir={tmp_path / 'outputs' / 'next'}"
    tuned = gpt_lightning.train(*options, f"init_from={name}", "optimizer.lr=1e-9", next_run)
    assert f"init_from='{run}'" in tuned.summary["overrides"]  # the same one in every later start
    assert tuned.summary["train_loss"] < loss
    assert gpt_lightning.plan(*options, f"init_from={name}").parameters == tuned.summary["parameters"]
    with pytest.raises(ValueError, match="init_from=no/latest: there is no run with a checkpoint below"):
        gpt_lightning.train("init_from=no/latest")


def test_run_that_its_time_limit_ends_is_returned_as_interrupted(tiny: list[str]) -> None:
    run = gpt_lightning.train(*tiny, "trainer.max_steps=100000", "time_limit=2")
    assert run.summary["status"] == "interrupted"
    assert 0 < run.summary["steps"] < 100000


def output_of(program: Path) -> list[str]:
    """The lines that a program prints, which must succeed, in its folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, program.name], cwd=program.parent, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_runs_of_several_processes_follow_each_other(tiny: list[str], tmp_path: Path) -> None:
    several = [*tiny[:-1], "logger=none", "callbacks.samples=null", f"paths.outputs={tmp_path / 'outputs'}"]
    (tmp_path / "runs.py").write_text(
        "import os, gpt_lightning\n"
        "variables = dict(os.environ)\n"
        "for _ in range(2):\n"
        f"    run = gpt_lightning.train(*{several!r}, 'device.devices=2')\n"
        "    print('trained', run.summary['processes'], run.metrics['train/loss'].tolist())\n"
        "    assert os.environ == variables\n"
    )
    printed = output_of(tmp_path / "runs.py")
    found = [line for line in printed if line.startswith("trained 2 [")]
    assert len(found) == 2
    assert found[0] == found[1]
    assert len(list((tmp_path / "outputs").glob("*/*"))) == 2


def test_plan_gives_numbers(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = gpt_lightning.plan(*tiny)
    assert (plan.max_steps, plan.tokens_per_step, plan.tokens) == (8, 8 * 32, 8 * 8 * 32)
    assert capsys.readouterr().out == ""


def test_mistake_is_an_exception_with_the_line_of_the_shell(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"^there is no key lr; did you mean optimizer\.lr\?$"):
        gpt_lightning.train("lr=3")
    with pytest.raises(ValueError, match=r"^optimizer\.lr=-1 must be a finite number above 0"):
        gpt_lightning.train(*tiny, "optimizer.lr=-1")
    with pytest.raises(ValueError, match=r"^interactive=true asks for prompts in a terminal; .*give prompt="):
        gpt_lightning.generate("checkpoint=nowhere", "interactive=true")
    assert capsys.readouterr().err == ""  # Hydra tells of it otherwise
    assert not (tmp_path / "run").exists()


def test_library_works_inside_another_hydra_program(tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import hydra, gpt_lightning\n"
        "from hydra.core.hydra_config import HydraConfig\n"
        "@hydra.main(version_base='1.3', config_path=None)\n"
        "def main(cfg):\n"
        f"    run = gpt_lightning.train(*{tiny!r}, 'logger=none')\n"
        "    print('trained', run.summary['steps'], HydraConfig.get().job.name)\n"
        "main()\n"
    )
    printed = output_of(tmp_path / "other.py")
    assert printed[-1] == "trained 8 other"
