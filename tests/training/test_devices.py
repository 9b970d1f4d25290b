"""One run on one device and on several: the same data, losses, checkpoints and samples."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import random_net
from support.ranks import start
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.inference.loading import load
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training.strategies import blocks, recompute

CLOSE = 1e-5  # of losses, in nats
STEPS = 12
STOPPED = 128 + signal.SIGTERM
TRAINING_STEP = "gpt_lightning.training.module:LanguageModel.training_step"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(zygote: Zygote, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains or resumes with so many processes; returns the run directory."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, *overrides: str, size: int = 1, stop: bool = False, copy: str = "") -> Path:
        """With `stop`, it gets a signal after its third step; with `copy`, a copy of that run goes on."""
        if copy:
            shutil.copytree(folder / copy, folder / name)
        options = [f"resume={folder / name}", *overrides]
        if not copy:
            options = [
                "model=gpt",
                *TINY,
                f"trainer.max_steps={STEPS}",
                f"data.path={small_text}",
                "logger=none",
            ]
            options += ["data.batch_size=4", "device.micro_batch_size=1", "trainer.val_batches=9"]
            options += [f"hydra.run.dir={folder / name}", *overrides]
        slow = {TRAINING_STEP: 0.1} if stop else {}
        started = start(zygote, [*options, f"device.devices={size}"], size=size, slow=slow)
        if stop:
            started[0].wait_for(lambda: "step 3/" in started[0].out.read_text())
            started[-1].kill(signal.SIGTERM)
        for process in started:
            assert process.wait() == (STOPPED if stop else 0), process.out.read_text()
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


@pytest.fixture(scope="module")
def stopped(train: Train) -> dict[str, int]:
    """Runs that were interrupted early, and the number of their processes."""
    train("single stopped", stop=True)
    run = train("sharded stopped", "trainer.strategy=fsdp", size=2, stop=True)
    assert read_summary(run)["steps"] < STEPS - 4
    return {"single stopped": 1, "sharded stopped": 2}


def test_sharded_run_has_the_losses_of_one_device(single: Path, sharded: Path) -> None:
    one, two = read_summary(single), read_summary(sharded)
    assert two["processes"] == 2
    assert abs(one["train_loss"] - two["train_loss"]) < CLOSE
    assert largest_difference(single, sharded) < CLOSE
    assert max(value for (_, key), value in losses(single).items() if key == "train/grad_norm") > 1  # clipped
    assert (sharded / "samples.md").read_text() == (single / "samples.md").read_text()


def test_sharded_run_with_muon_has_the_losses_of_one_device_and_goes_on_exactly(train: Train) -> None:
    muon, fsdp = "optimizer=muon", "trainer.strategy=fsdp"
    one, two = train("muon", muon), train("muon sharded", muon, fsdp, size=2)
    assert largest_difference(one, two) < CLOSE
    train("muon stopped", muon, fsdp, size=2, stop=True)
    resumed = train("muon resumed", size=2, copy="muon stopped")
    assert losses(resumed) == losses(two)


def test_sharded_run_in_mixed_precision_has_the_losses_of_one_device(train: Train) -> None:
    mixed = "device.precision=bf16-mixed"
    runs = train("mixed", mixed), train("mixed sharded", mixed, "trainer.strategy=fsdp", size=2)
    assert largest_difference(*runs) < 1e-3  # bfloat16 has steps of 8e-3 at 2


def test_four_processes_have_the_losses_of_one_device(single: Path, train: Train) -> None:
    four = train("four", size=4)
    assert read_summary(four)["processes"] == 4
    assert largest_difference(single, four) < CLOSE


def test_sharded_checkpoint_is_that_of_one_device(single: Path, sharded: Path) -> None:
    one, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (single, sharded))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, weight in one["state_dict"].items():
        assert type(other["state_dict"][name]) is torch.Tensor
        torch.testing.assert_close(other["state_dict"][name], weight, rtol=0, atol=1e-4)
    (a,), (b,) = one["optimizer_states"], other["optimizer_states"]
    ids = [[group["params"] for group in state["param_groups"]] for state in (a, b)]
    assert ids[0] == ids[1]
    for index, state in a["state"].items():
        torch.testing.assert_close(b["state"][index]["exp_avg"], state["exp_avg"], rtol=0, atol=1e-4)
    texts = [load(run).generate("the", max_new_tokens=20, temperature=0) for run in (single, sharded)]
    assert texts[0] == texts[1]


def test_sharded_run_goes_on_exactly(train: Train, sharded: Path, stopped: dict[str, int]) -> None:
    resumed = train("sharded resumed", size=2, copy="sharded stopped")
    assert losses(resumed) == losses(sharded)
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (resumed, sharded))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("before", "strategy", "size"),
    [("single stopped", "auto", 2), ("single stopped", "fsdp", 2), ("sharded stopped", "auto", 1)],
    ids=["1 to 2", "1 to 2 sharded", "2 sharded to 1"],
)
def test_run_goes_on_with_another_number_of_processes(
    train: Train, single: Path, stopped: dict[str, int], before: str, strategy: str, size: int
) -> None:
    run = train(f"{before} to {size} {strategy}", f"trainer.strategy={strategy}", size=size, copy=before)
    assert read_summary(run)["processes"] == size
    assert largest_difference(single, run) < CLOSE


def test_recomputed_blocks_run_twice_in_training_only() -> None:
    net = random_net()
    calls: list[int] = []
    for number, block in enumerate(blocks(net)):
        recompute(block)
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    ids = torch.zeros(1, 8, dtype=torch.long)
    net(ids, ids).backward()
    assert calls == [0, 1, 1, 0]
    with torch.no_grad():
        net(ids)
    assert calls == [0, 1, 1, 0, 0, 1]


def test_recomputed_blocks_change_no_bit(train: Train, single: Path) -> None:
    again = train("recomputed", "trainer.activation_checkpointing=true")
    assert losses(again) == losses(single)


def test_loss_in_chunks_is_that_of_one_device(train: Train) -> None:
    many = ["model.vocab_multiple=1048576", "model.n_embd=2", "trainer.max_steps=3", "trainer.val_batches=1"]
    many += ["data.batch_size=2", "callbacks.samples=null"]  # two chunks per sequence
    runs = train("one chunked", *many), train("chunked", *many, "trainer.strategy=fsdp", size=2)
    one, other = map(losses, runs)
    assert one.keys() == other.keys()
    assert max(abs(one[key] - other[key]) for key in one) < CLOSE
