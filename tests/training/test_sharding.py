"""trainer=fsdp: the same run as on one device, with weights, gradients and optimizer state in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.ranks import start
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import read_summary

CLOSE = 1e-5  # of losses, in nats
STEPS = 12
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


@pytest.fixture(scope="module")
def train(zygote: Zygote, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains or resumes with so many processes; returns the run directory."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str, size: int = 1) -> Path:
        options = [f"resume={folder / name}", *overrides]
        if not (folder / name).exists():
            options = [*TINY, f"trainer.max_steps={STEPS}", f"data.path={small_text}", "logger=none"]
            options += ["data.batch_size=4", "device.micro_batch_size=1", "trainer.val_batches=9"]
            options += [f"hydra.run.dir={folder / name}", *overrides]
        for process in start(zygote, [*options, f"device.devices={size}"], size=size):
            assert process.wait() == 0, process.out.read_text()
        return folder / name

    return run


def losses(run: Path) -> dict[tuple[int, str], float]:
    """Losses and gradient norms that were logged, by step."""
    return {
        (int(row["step"]), key): float(row[key])
        for row in read_metrics(run / "metrics.csv")
        for key in ("train/loss", "val/loss", "train/grad_norm")
        if key in row
    }


def largest_difference(a: Path, b: Path) -> float:
    one, other = losses(a), losses(b)
    assert one.keys() == other.keys()
    assert len(one) == 2 * STEPS + STEPS // 4
    return max(abs(one[key] - other[key]) for key in one)


@pytest.fixture(scope="module")
def single(train: Train) -> Path:
    return train("single")


@pytest.fixture(scope="module")
def sharded(train: Train) -> Path:
    return train("sharded", "trainer.strategy=fsdp", size=2)


def test_sharded_run_has_the_losses_of_one_device(single: Path, sharded: Path) -> None:
    assert read_summary(sharded)["processes"] == 2
    assert largest_difference(single, sharded) < CLOSE
    assert (sharded / "samples.md").read_text().count("## Step") == STEPS // 4


def test_sharded_checkpoint_is_that_of_one_device(single: Path, sharded: Path) -> None:
    one, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (single, sharded))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        assert type(other["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=0, atol=1e-4)
    (a,), (b,) = one["optimizer_states"], other["optimizer_states"]
    assert [group["params"] for group in a["param_groups"]] == [
        group["params"] for group in b["param_groups"]
    ]
    for index, state in a["state"].items():
        torch.testing.assert_close(b["state"][index]["exp_avg"], state["exp_avg"], rtol=0, atol=1e-4)
