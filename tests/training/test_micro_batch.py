"""Micro-batches by trying, and what a run says when its device's memory is not enough."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gpt_lightning import memory
from gpt_lightning.config.command import ConfigError
from gpt_lightning.config.memory import FOUND, device_count, find_micro_batch, out_of_memory
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.plan import preview
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.training import micro_batch
from gpt_lightning.training.micro_batch import largest_that_fits, sizes_of
from gpt_lightning.training.optimizers import adamw


class Small(GPT):
    """Runs out of memory as a GPU does when it gets more sequences than it can hold."""

    def __init__(self, holds: int, tried: list[int]):
        super().__init__(GPTConfig(vocab_size=16, block_size=8, n_layer=1, n_head=1, n_embd=8))
        self.holds, self.tried = holds, tried

    def forward(self, idx: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        self.tried.append(len(idx))
        if len(idx) > self.holds:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(idx, *arguments, **options)


@pytest.mark.parametrize(("holds", "expected"), [(0, None), (1, 1), (7, 6), (16, 16), (40, 24), (480, 48)])
def test_largest_size_that_fits_is_found(holds: int, expected: int | None) -> None:
    tried: list[int] = []
    sizes = sizes_of(48)
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    found = largest_that_fits(
        lambda: Small(holds, tried), partial(adamw, lr=1e-3), sizes, block_size=8, device="cpu"
    )
    assert found == expected
    assert len(tried) <= 4  # not each of them


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def broken() -> GPT:
        raise RuntimeError("a kernel is missing")

    with pytest.raises(RuntimeError, match="a kernel is missing"):
        largest_that_fits(broken, partial(adamw, lr=1e-3), [1, 2], block_size=8, device="cpu")


def configuration(n_layer: int, block_size: int) -> Any:
    return OmegaConf.create(
        {
            "model": {"n_layer": n_layer, "n_embd": 768, "block_size": block_size, "vocab_size": 50257},
            "data": dict.fromkeys(("sequence_length", "stride", "drop_last", "random_offset"))
            | {"batch_size": 64},
            "device": {"precision": "bf16-mixed"},
        }
    )


@pytest.mark.parametrize(
    ("parameters", "micro_batch_size", "remedy"),
    [
        (124_000_000, 32, "use device.micro_batch_size=16 or auto; data.batch_size stays as it is"),
        (124_000_000, 1, "use model.block_size=4096 or a smaller model"),
        (7_000_000_000, 4, "take a smaller model"),
    ],
)
def test_out_of_memory_says_what_to_lower(parameters: int, micro_batch_size: int, remedy: str) -> None:
    line = str(out_of_memory(configuration(12, 8192), parameters, micro_batch_size))
    assert remedy in line
    assert f"micro-batches of {micro_batch_size} sequences of 8192 tokens" in line
    assert re.search(r"\(estimate: \d+\.\d GiB, most of it (logits|activations|optimizer)\)", line)
    assert "\n" not in line


def test_estimate_in_the_message_is_that_of_plan(
    call: Callable[..., Any],
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [*tiny, "model.block_size=256", "data.batch_size=16", "model.n_layer=12", "model.n_embd=512"]
    call("plan", *options, "device.micro_batch_size=16")
    (planned,) = re.findall(r"memory estimate +(\S+) GiB", capsys.readouterr().out)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to get 2.00 GiB.\nOf the allocated …")

    monkeypatch.setattr(GPT, "forward", full)
    with pytest.raises(SystemExit) as stop:
        call("train", *options, "device.micro_batch_size=16", "logger=none")
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("error: out of memory with micro-batches of 16 sequences of 256 tokens and ")
    assert f"estimate: {float(planned):.1f} GiB" in line
    assert "device.micro_batch_size=8 or auto" in line


def test_auto_on_a_cpu_takes_a_usual_size_and_a_resumed_run_the_same(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    call("train", *tiny, "device.micro_batch_size=auto", "logger=none", "callbacks.samples=null")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["hyper_parameters"]["device"]["micro_batch_size"] == 8
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    call("train", f"resume={tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"


def shared(devices: Any, accelerator: str = "cuda", num_nodes: int = 1, strategy: Any = "auto") -> Any:
    cfg = configuration(1, 8)
    cfg.device.update({"devices": devices, "accelerator": accelerator})
    cfg.trainer = {"num_nodes": num_nodes, "strategy": strategy}
    return cfg


@pytest.mark.parametrize(
    ("devices", "accelerator", "num_nodes", "count"),
    [
        (2, "cpu", 1, 2),
        (2, "cuda", 3, 6),
        ([0, 3], "cuda", 1, 2),
        ([0, 3], "cuda", 2, 4),
        ("auto", "cuda", 2, 8),
        ("auto", "auto", 1, 4),
        ("auto", "cpu", 1, 1),
        ("auto", "mps", 1, 1),
    ],
)
def test_devices_are_counted_as_the_trainer_counts_them(
    devices: Any, accelerator: str, num_nodes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_count(shared(devices, accelerator, num_nodes)) == count


def test_plan_shares_the_batch_among_listed_gpus(
    call: Callable[..., Any], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    call("plan", *tiny, "device.accelerator=cuda", "device.devices=[0,1]")
    assert " = 4 sequences × 1 accumulated × 2 device(s) × 32 tokens" in capsys.readouterr().out


def test_search_is_done_on_a_device_of_the_run_and_again_by_the_next_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []

    def found(*_: Any, device: str, **__: Any) -> int:
        tried.append(device)
        return 4

    monkeypatch.setattr(micro_batch, "largest_that_fits", found)
    monkeypatch.setattr(memory, "build", lambda node: node)
    for rank, size in ((None, 4), ("0", 4), ("1", 64)):  # further ranks take what the first one found
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", rank)
        cfg = shared([3, 1])
        cfg.optimizer = {}
        monkeypatch.setenv(FOUND, "64")  # for a first rank, that of the last job of a sweep
        assert find_micro_batch(cfg, 2) == size
    assert tried == ["cuda:3", "cuda:3"]


@pytest.mark.parametrize(
    "strategy", ["fsdp", {"_target_": "lightning.pytorch.strategies.FSDPStrategy", "state_dict_type": "full"}]
)
def test_search_does_not_try_out_what_several_devices_share(strategy: Any) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size=auto cannot try out trainer=fsdp; give a number"):
        find_micro_batch(shared(2, strategy=strategy), 2)


def test_preview_draws_a_schedule_beyond_its_bounds() -> None:
    line = preview(lambda step: 2.0 - step, 1e-3, 4, width=4)
    assert line == "██▁▁  2.0e-03 → 2.0e-03 → -1.0e-03"
