"""A run directory of an older release is resumed, repeated and loaded.

tests/fixtures/older_run was written by release 0.1.0 at revision 80455d2 and interrupted at step 13 of 24.
The expected losses are those of the same run, which that revision trained without an interruption.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import ROOT

import gpt_lightning
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics

TRAIN_LOSS, VAL_LOSS = 4.516323566436768, 4.521380910029014  # at step 24


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, with its corpus in the working directory."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "older_run", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def test_run_of_an_older_release_is_resumed_with_its_own_values(
    older: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    call("train", f"resume={older}")
    assert "resuming from" in capsys.readouterr().out
    summary = json.loads((older / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 24)
    assert summary["train_loss"] == pytest.approx(TRAIN_LOSS, rel=1e-5)  # bit for bit on one kind of CPU
    assert summary["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-5)
    rates = {row["step"]: row["train/lr"] for row in read_metrics(older / "metrics.csv")}
    assert rates[4] == pytest.approx(6e-3, rel=0.01)  # which that release gave every model=tiny
    assert rates[14] == pytest.approx(3.0e-3, rel=0.01)  # and its cosine from there


def test_key_that_the_older_release_had_not_means_what_it_did(older: Path, call: Callable[..., Any]) -> None:
    for group, choice, key in (("data", "text", "align_documents"), ("model", "tiny", "exact_gelu")):
        (older / "mine" / group).mkdir(parents=True)
        text = f"defaults: [{choice}, _self_]\n{key}: true\n"
        (older / "mine" / group / "stories.yaml").write_text(text)
    overrides, hydra = (older / ".hydra" / name for name in ("overrides.yaml", "hydra.yaml"))
    overrides.write_text("- model=stories\n" + overrides.read_text().replace("data=text", "data=stories"))
    choices = (
        hydra.read_text().replace("data: text", "data: stories").replace("model: tiny", "model: stories")
    )
    hydra.write_text(choices)
    call("train", f"resume={older}", "--config-dir", str(older / "mine"))
    recorded = read_checkpoint(older / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert (recorded["data"]["align_documents"], recorded["model"]["exact_gelu"]) == (False, False)


def test_what_would_change_a_run_of_an_older_release_is_refused(
    older: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (older / "metrics.csv").read_bytes()
    with pytest.raises(SystemExit):
        call("train", f"resume={older}", "optimizer.lr=1e-3", "logger=none")
    assert "optimizer.lr (was 0.006, now 0.001)" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # its cosine would have been another one
        call("train", f"resume={older}", "trainer.max_steps=48")
    assert "trainer.max_steps (was 24, now 48)" in capsys.readouterr().err
    assert (older / "metrics.csv").read_bytes() == before


def test_run_of_an_older_release_is_repeated(older: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    call("train", f"repeat={older}", "hydra.run.dir=again", "callbacks.samples=null")
    assert json.loads(Path("again/summary.json").read_text())["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-5)
    call("train", f"repeat={tmp_path / 'again'}", "hydra.run.dir=third", "callbacks.samples=null")
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (Path("again"), Path("third")))
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())


def test_model_of_an_older_release_is_loaded(older: Path) -> None:
    assert gpt_lightning.load(older).generate("a", max_new_tokens=2, seed=1)


def test_run_whose_choice_no_longer_exists_is_resumed(older: Path, call: Callable[..., Any]) -> None:
    """The recorded values stand for a file that a release removed or renamed."""
    overrides = older / ".hydra" / "overrides.yaml"
    overrides.write_text("- model=size_that_was_removed\n" + overrides.read_text())
    call("train", f"resume={older}")
    summary = json.loads((older / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(VAL_LOSS, rel=1e-5)


def test_older_micro_batch_size_auto_is_what_it_was_on_a_cpu(older: Path, call: Callable[..., Any]) -> None:
    config = older / ".hydra" / "config.yaml"
    text = config.read_text()
    assert "micro_batch_size: 32\n" in text
    config.write_text(text.replace("micro_batch_size: 32\n", "micro_batch_size: auto\n"))
    call("train", f"resume={older}")
    assert json.loads((older / "summary.json").read_text())["status"] == "finished"
