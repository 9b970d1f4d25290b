"""Gradients that are not finite and loss spikes: reports, stopped runs, skipped steps."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.training.callbacks.incidents import gradient_norms

LAYER = "transformer.h.1.mlp.c_fc"


class Poison(Callback):
    """Corrupts a gradient, or the weights for one step, as bad data or hardware might."""

    def __init__(self, step: int, times: int = 1, value: float = math.nan, weights: bool = False):
        self.steps, self.value, self.weights = range(step, step + times), value, weights
        self.kept: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.weights and trainer.global_step + 1 in self.steps and self.kept is None:
            self.kept = pl_module.net.transformer.wte.weight.detach().clone()
            pl_module.net.transformer.wte.weight.data *= 60

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.kept is not None and trainer.global_step + 1 == self.steps.stop:
            pl_module.net.transformer.wte.weight.data = self.kept
            self.kept = None

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if not self.weights and trainer.global_step + 1 in self.steps:
            pl_module.net.get_submodule(LAYER).weight.grad[3, 4] = self.value


def poison(**options: Any) -> list[str]:
    settings = [f"+callbacks.poison.{key}={value}" for key, value in options.items()]
    return [f"+callbacks.poison._target_={__name__}.Poison", *settings]


@pytest.fixture
def train(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Run with two micro-batches a step; returns the run directory."""
    monkeypatch.setitem(sys.modules, "incidents_of_a_user", sys.modules[__name__])
    monkeypatch.setattr(Poison, "__module__", "incidents_of_a_user")

    def run(*arguments: str, name: str = "run") -> Path:
        folder = tmp_path / name
        arguments = tuple(argument.replace(__name__, "incidents_of_a_user") for argument in arguments)
        call(
            "train", "model=gpt", *tiny, "device.micro_batch_size=4", "logger=none", "callbacks.samples=null",
            f"hydra.run.dir={folder}", *arguments,
        )  # fmt: skip
        return folder

    return run


def report(run: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((run / f"incident-{step}.json").read_text()))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"])


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_gradient_that_is_not_finite_stops_the_run_before_the_step(
    train: Callable[..., Path], tmp_path: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(*poison(step=6))
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(r"error: step 6: the gradient is not finite \(loss \d\.\d+, gradient norm nan\); ", error)
    assert f"see {run / 'incident-6.json'}" in error
    assert f"resume={run} callbacks.nonfinite=skip" in error
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert all(weight.isfinite().all() for weight in weights(run).values())

    found = report(run, 6)
    assert (found["step"], found["kind"], found["action"]) == (6, "nonfinite", "stop")
    assert found["gradient_norm"] == "nan"
    assert [layer for layer, norm in found["gradient_norms"].items() if norm == "nan"] == [LAYER]
    assert {"transformer.wte", "transformer.h.0.attn.c_attn"} < found["gradient_norms"].keys()
    assert sum(found["micro_batch_losses"]) / 2 == pytest.approx(found["loss"], rel=1e-6)
    assert 0 < found["learning_rate"] < 1
    text = small_text.read_bytes()
    assert [window["micro_batch"] for window in found["batch"]] == [0] * 4 + [1] * 4
    for window in found["batch"]:  # a token is a byte here
        start = window["first_token"]
        assert window["text"] == text[start : start + 33].decode()

    # resuming with skip equals a run that skipped from the start
    train(*poison(step=6), f"resume={run}", "callbacks.nonfinite=skip", "trust=true")
    skipped = train(*poison(step=6), "callbacks.nonfinite=skip", name="skip")
    assert equal(weights(run), weights(skipped))
    for folder in (run, skipped):
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["skipped_steps"]) == ("finished", 1)
    assert report(run, 6) == {**found, "action": "skip"}


def test_skipped_step_changes_neither_weights_nor_optimizer(train: Callable[..., Path]) -> None:
    run = train(*poison(step=8), "callbacks.nonfinite=skip", "trainer.save_every_steps=7")
    last, before = (read_checkpoint(run / "checkpoints" / name) for name in ("last.ckpt", "last-1.ckpt"))
    assert (last["progress"]["step"], before["progress"]["step"]) == (8, 7)
    assert equal(last["state_dict"], before["state_dict"])
    old, new = (checkpoint["optimizer_states"][0]["state"] for checkpoint in (before, last))
    assert old
    for index, state in old.items():
        assert equal(state, new[index])
    assert "train/skipped_steps" in (run / "metrics.csv").read_text()


def test_ten_skipped_steps_in_a_row_end_the_run(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(*poison(step=2, times=99), "callbacks.nonfinite=skip", "trainer.max_steps=20")
    assert "error: step 11: the gradient is not finite" in capsys.readouterr().err
    assert len(list((tmp_path / "run").glob("incident-*.json"))) == 10


def test_loss_spike_is_reported_and_the_run_goes_on(train: Callable[..., Path]) -> None:
    run = train(*poison(step=24, times=2, weights="true"), "trainer.max_steps=30")
    found = report(run, 24)
    assert (found["kind"], found["action"]) == ("spike", None)
    assert found["loss"] > 2 * found["mean_loss"] > 4
    assert len(found["batch"]) == 8
    assert len(list(run.glob("incident-*.json"))) == 1  # for a spike of two steps
    assert json.loads((run / "summary.json").read_text())["steps"] == 30


def test_checks_do_not_change_the_training(train: Callable[..., Path]) -> None:
    watched = train("trainer.max_steps=30", "model.dropout=0.1", name="watched")
    alone = train("trainer.max_steps=30", "model.dropout=0.1", "callbacks.incidents=null", name="alone")
    assert equal(weights(watched), weights(alone))
    assert not list(watched.glob("incident-*"))


def test_gradient_norms_are_those_of_each_layer() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1, bias=False))
    net(torch.ones(4, 3)).sum().backward()
    weight, bias, last = (p.grad.flatten().tolist() for p in net.parameters() if p.grad is not None)
    assert gradient_norms(net) == pytest.approx({"0": math.hypot(*weight, *bias), "2": math.hypot(*last)})
