"""The estimate of memory, and what a run says when its device's memory is not enough."""

from __future__ import annotations

import platform
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.qwen3 import Qwen3, Qwen3Config, StarCoder2, StarCoder2Config
from gpt_lightning.plan import device_count, preview
from gpt_lightning.training.memory import keep_freed_memory, memory_estimate, out_of_memory

MIB = 2**20


@pytest.mark.parametrize(
    ("parameters", "micro_batch_size", "remedy"),
    [
        (124_000_000, 32, "use device.micro_batch_size=16; data.batch_size stays as it is"),
        (124_000_000, 1, "use model.block_size=4096 or a smaller model"),
        (7_000_000_000, 4, "take a smaller model"),
    ],
)
def test_out_of_memory_says_what_to_lower(parameters: int, micro_batch_size: int, remedy: str) -> None:
    needs = memory_estimate(
        parameters=parameters,
        trained=parameters,
        tokens=micro_batch_size * 8192,
        n_embd=768,
        n_layer=12,
        vocab_size=50257,
        precision="bf16-mixed",
    )
    error = out_of_memory(needs, parameters=parameters, micro_batch_size=micro_batch_size, block_size=8192)
    line = str(error)
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
    options = [
        "model=gpt",
        *tiny,
        "model.block_size=256",
        "data.batch_size=16",
        "model.n_layer=4",
        "model.n_embd=256",
    ]
    monkeypatch.setattr("gpt_lightning.training.speed.measure_speed", lambda *_, **__: None)  # takes seconds
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
    assert "device.micro_batch_size=8; data.batch_size stays" in line


def shared(devices: Any, accelerator: str, num_nodes: int) -> Any:
    return OmegaConf.create(
        {"device": {"devices": devices, "accelerator": accelerator}, "trainer": {"num_nodes": num_nodes}}
    )


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


def test_preview_draws_a_schedule_beyond_its_bounds() -> None:
    line = preview([2e-3, 1e-3, 0.0, -1e-3], 2e-3)
    assert line == "█▅▁▁  2.0e-03 → 2.0e-03 → -1.0e-03"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_is_kept_while_training_and_returned_afterwards() -> None:
    def new_memory(size: int) -> int:
        """MiB that the system gives to fill four blocks of so many MiB, which are freed at once."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(size * MIB // 4)
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return pages * resource.getpagesize() // MIB

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with keep_freed_memory("cuda", large=True):
        assert new_memory(100) >= 400
    with keep_freed_memory("cpu", large=False):
        new_memory(30)
        assert new_memory(30) < 2
        assert new_memory(100) >= 400
    before = held()
    with keep_freed_memory("cpu", large=True):
        new_memory(100)
        assert new_memory(100) < 2
        assert held() > before + 90 * MIB
    assert held() < before + 10 * MIB


def test_estimate_of_shards_and_of_recomputed_blocks() -> None:
    shape = {"parameters": 1000, "trained": 1000, "tokens": 10, "n_embd": 8, "n_layer": 3, "vocab_size": 5}
    whole = memory_estimate(**shape, precision="32-true")  # type: ignore[arg-type]
    parts = memory_estimate(**shape, precision="32-true", shards=4, recomputed=True)  # type: ignore[arg-type]
    for name in ("weights", "gradients", "optimizer"):
        assert parts[name] == whole[name] / 4
    assert whole["activations"] == 3 * 17 * 4 * 10 * 8
    assert parts["activations"] == (17 * 4 + 3 * 4) * 10 * 8  # one block, and the inputs of three
    assert parts["logits"] == whole["logits"]


def test_estimate_of_a_loss_in_chunks() -> None:
    shape = {"parameters": 10, "trained": 10, "n_embd": 8, "n_layer": 3, "vocab_size": 2**16}
    few, many = (memory_estimate(**shape, tokens=n, precision="32-true", chunked=True) for n in (256, 257))  # type: ignore[arg-type]
    assert few["logits"] == 2**24 * 8
    assert many["logits"] == 2**24 * 8 + 2**16 * 8 * 4  # one chunk, and the head's gradient again


@pytest.mark.parametrize(
    ("precision", "weights", "others", "activations"),
    [("32-true", 4, 4, 68), ("64-true", 8, 8, 136), ("bf16-true", 2, 2, 34), ("16-mixed", 6, 4, 34)],
)
def test_estimate_follows_the_precision(precision: str, weights: int, others: int, activations: int) -> None:
    """Mixed precision multiplies copies of the weights in 16 bits, and trains those in 32."""
    shape = {"parameters": 100, "trained": 100, "tokens": 10, "n_embd": 8, "n_layer": 3, "vocab_size": 5}
    needs = memory_estimate(**shape, precision=precision, cpu=True)  # type: ignore[arg-type]
    assert needs["weights"] == weights * 100
    assert (needs["gradients"], needs["optimizer"]) == (others * 100, 2 * others * 100)
    assert needs["activations"] == 3 * activations * 10 * 8
    assert needs["allocator"] == pytest.approx(0.35 * (needs["activations"] + needs["logits"]))


PEAK = """
import torch
from pathlib import Path
from gpt_lightning.model.{module} import {build}
from gpt_lightning.training.memory import keep_freed_memory
def train(**sizes):
    net = {build}(**sizes)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    for _ in range(2):
        net(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(p.numel() for p in net.parameters())
def peak():  # KiB; ru_maxrss would begin with that of the process which started this one
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
idx = torch.zeros(1, 8, dtype=torch.long)
train(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=16)
before = peak()
idx = torch.randint(257, (8, 256))
with keep_freed_memory("cpu", large=True):
    parameters = train(vocab_size=257, block_size=256, n_layer=6, n_head=6, n_embd=384)
print(parameters, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc, and the allocator, are those of Linux")
@pytest.mark.parametrize("config", [GPTConfig, Qwen3Config, StarCoder2Config])
def test_estimate_is_near_what_a_process_takes(config: Any) -> None:
    """benchmarks/planning.py has more sizes; other allocators than glibc's may keep more or less."""
    build = f"build_{config.__name__.removesuffix('Config').lower()}"
    script = PEAK.format(module=config.__module__.rpartition(".")[2], build=build)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, kib = map(int, done.stdout.split())
    sizes = {"tokens": 8 * 256, "n_embd": 384, "n_layer": 6, "vocab_size": 257}
    shape = sizes | {"parameters": parameters, "trained": parameters, "network": config.__name__}
    needs = memory_estimate(**shape, precision="32-true", cpu=True)  # type: ignore[arg-type]
    assert sum(needs.values()) == pytest.approx(1024 * kib, rel=0.25)


@pytest.mark.parametrize(
    ("kind", "config"), [(GPT, GPTConfig), (Qwen3, Qwen3Config), (StarCoder2, StarCoder2Config)]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_estimate_of_activations_is_what_autograd_keeps(kind: Any, config: Any, precision: str) -> None:
    """Of a layer; in mixed precision also its weights at 16 bits, which do not grow with the tokens."""
    width, tokens = 256, 512

    def kept(n_layer: int) -> int:
        sizes = {"vocab_size": 65, "block_size": 128, "n_head": 4, "n_embd": width}
        net = kind(config(**sizes, n_layer=n_layer))
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        found: dict[int, int] = {}

        def see(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        idx = torch.zeros(tokens // 128, 128, dtype=torch.long)
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        with mixed, torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
            loss = net(idx, idx)
        assert loss.requires_grad
        return sum(found.values())

    weights = 2 * 12 * width**2 if precision == "bf16-mixed" else 0
    shape = {"parameters": 0, "trained": 0, "tokens": tokens, "n_embd": width, "n_layer": 1, "vocab_size": 65}
    planned = memory_estimate(**shape, precision=precision, network=config.__name__)  # type: ignore[arg-type]
    assert planned["activations"] == pytest.approx(kept(2) - kept(1) - weights, rel=0.1)
