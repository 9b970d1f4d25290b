"""The same configuration gives the same run, however it is shared among micro-batches and processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import Row, read_metrics

RUN = [*TINY, "trainer.val_batches=null", "callbacks.samples=null", "logger=none"]
DDP = ["device.devices=2", "trainer=ddp", *(option for option in TINY if option.startswith("trainer."))]
CLOSE = 1e-5  # of losses, in nats, where float32 adds in another order; 5e-7 was measured

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(zygote: Zygote, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A run directory, trained with these overrides."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str) -> Path:
        options = [*RUN, f"data.path={small_text}", *overrides, f"hydra.run.dir={folder / name}"]
        code, out = zygote.run("train", *options)
        assert code == 0, out
        return folder / name

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"])


def same_weights(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(run: Path) -> list[Row]:
    """The rows of metrics.csv without what a clock measured."""
    return [
        {key: value for key, value in row.items() if not key.startswith("speed/")}
        for row in read_metrics(run / "metrics.csv")
    ]


def summary(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "summary.json").read_text()))


@pytest.mark.slow
def test_two_runs_of_one_seed_are_equal_and_another_seed_differs(train: Train) -> None:
    options = ["model.dropout=0.2", "device.micro_batch_size=4"]
    a, b = train("a", *options), train("b", *options)
    assert same_weights(a, b)
    assert metrics(a) == metrics(b)
    differing = {key for key, value in summary(a).items() if summary(b)[key] != value}
    assert differing <= {"seconds", "tokens_per_second", "best_checkpoint", "git_revision"}
    other = train("other", *options, "seed=2")
    for name, weight in weights(a).items():  # not only another order of the data
        if weight.dim() == 2:
            assert (weight - weights(other)[name]).norm() > weight.norm(), name


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Every training and validation loss that was logged, by step."""
    return {
        (int(row["step"]), key): float(row[key])
        for row in read_metrics(run / "metrics.csv")
        for key in ("train/loss", "val/loss")
        if key in row
    }


def largest_difference(a: Path, b: Path) -> float:
    one, other = losses(a), losses(b)
    assert one.keys() == other.keys()
    assert len(one) == 20 + 5  # every step, every fourth validated
    return max(abs(one[key] - other[key]) for key in one)


SHARED = ["data.batch_size=4", "trainer.max_steps=20", "model.dropout=0"]


@pytest.fixture(scope="module")
def whole(train: Train) -> Path:
    """A run in which a batch is one forward of one process."""
    return train("whole", *SHARED, "device.micro_batch_size=4")


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_do_not_change_the_losses(train: Train, whole: Path, micro_batch_size: int) -> None:
    parts = train(f"parts of {micro_batch_size}", *SHARED, f"device.micro_batch_size={micro_batch_size}")
    assert largest_difference(whole, parts) < CLOSE
    assert not same_weights(whole, parts)  # else nothing was split
    assert losses(whole)[20, "val/loss"] < losses(whole)[4, "val/loss"] - 0.1  # there was something to learn


SPY = """
import lightning.pytorch as pl, torch

class Spy(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        with open(f"{self.folder}/{trainer.global_rank}.txt", "w") as file:
            file.write(str(torch.get_num_threads()))
"""


@pytest.fixture(scope="module")
def two(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as `whole` in two processes with accumulation; beside it, the threads that each had."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "spy.py").write_text(SPY)
    options = [*RUN, *DDP, *SHARED, "device.micro_batch_size=1", "trainer.val_batches=null"]
    options += [f"data.path={small_text}", "+callbacks.spy._target_=spy.Spy"]
    options += [f"+callbacks.spy.folder={folder}"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    paths = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "-m", "gpt_lightning.train", *options, f"hydra.run.dir={folder / 'run'}"],
        env={**environment, "PYTHONPATH": paths},  # as many threads as a user gets
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_processes_do_not_change_the_losses(two: Path, whole: Path) -> None:
    assert summary(two / "run")["processes"] == 2
    assert largest_difference(whole, two / "run") < CLOSE


@pytest.mark.slow
def test_summary_counts_the_threads_that_trained(two: Path) -> None:
    used = [int((two / f"{rank}.txt").read_text()) for rank in range(2)]
    assert used == [summary(two / "run")["threads"]] * 2


# -- a run again -------------------------------------------------------------------------------------


@pytest.fixture
def first(zygote: Zygote, small_text: Path, whole: Path, tmp_path: Path) -> Path:
    """A run with a relative path, that began from weights with another dropout, in its own directory."""
    shutil.copy(small_text, tmp_path / "my.txt")
    shutil.copy(whole / "checkpoints" / "last.ckpt", tmp_path / "begin.ckpt")
    options = [*RUN, "data.path=my.txt", "init_from=begin.ckpt", "model.dropout=0.3", "paths.outputs=results"]
    options = [option for option in options if not option.startswith(("model.n", "model.b"))]
    code, out = zygote.run("train", *options, cwd=tmp_path)
    assert code == 0, out
    (run,) = (tmp_path / "results" / "gpt").iterdir()
    return run


def test_run_is_repeated_from_its_configuration_elsewhere(
    first: Path, zygote: Zygote, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    code, out = zygote.run("train", f"repeat={first}", cwd=elsewhere)
    assert code == 0, out
    (run,) = (elsewhere / "results" / "gpt").iterdir()
    assert out.splitlines()[0] == f"run: {run}"  # logged as every run is
    assert same_weights(first, run)
    assert metrics(first) == metrics(run)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["hyper_parameters"]["model"]["dropout"] == 0.3
    # what repeats a run can itself go on, without the first and without the weights it began with
    before = weights(run)
    shutil.rmtree(first)
    (tmp_path / "begin.ckpt").unlink()
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "interrupted"}))
    code, out = zygote.run("train", f"resume={run}", cwd=elsewhere)
    assert code == 0, out
    assert summary(run)["status"] == "finished"
    assert all(torch.equal(weight, before[name]) for name, weight in weights(run).items())


def test_repeated_run_may_have_one_thing_changed(first: Path, tmp_path: Path) -> None:
    """From the real command line, and with a class of the user's own from where the command is started."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "spy.py").write_text(SPY)
    arguments = [f"repeat={first}", "seed=3", "hydra.run.dir=new=run"]
    arguments += ["+callbacks.spy._target_=spy.Spy", f"+callbacks.spy.folder={elsewhere}"]
    command = [sys.executable, "-m", "gpt_lightning.train", *arguments]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert summary(elsewhere / "new=run")["seed"] == 3
    assert not same_weights(first, elsewhere / "new=run")
    assert (elsewhere / "0.txt").exists()
