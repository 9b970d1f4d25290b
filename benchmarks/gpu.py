"""GPT-2 small on a CUDA GPU, in one short call: tokens/s and MFU beside nanoGPT's network.

    python benchmarks/gpu.py [--nanogpt DIR] [--micro-batches 8 16 32] [--steps 20] [--peak TFLOPS] [--eager]
    python benchmarks/gpu.py --device cpu --shape 1 2 32 64 100 --steps 2 --eager

Trains the shape (layers, heads, width, block, vocabulary) on random ids: bfloat16 autocast, fused AdamW,
clipping, attention by the backend that torch chooses, compiled unless --eager is given; torch keeps what it
compiled in TORCHINDUCTOR_CACHE_DIR. The networks take turns in one process; times are those of CUDA events.
MFU is the share of the device's peak that the FLOPs of `flops_per_token` (Chowdhery et al., "PaLM",
appendix B) need at the measured speed; the peak is that of PEAKS or --peak. At the
end, the operations that took the most time in eager steps of the last micro-batch that fitted. It has not run
on a GPU yet; the second command shows on a CPU that it works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from steps import network
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gpt_lightning.training.speed import PEAKS

GPT2_SMALL = (12, 12, 768, 1024, 50304)
Step = Callable[[], None]


def new_step(variant: str, shape: tuple[int, ...], nanogpt: str | None, device: str, eager: bool) -> Step:
    """A function that trains a new network of the shape for a step."""
    _, _, _, block_size, vocab_size, batch_size = shape
    torch.manual_seed(0)
    net, loss_of = network(variant, shape, nanogpt)
    net.to(device)
    if not eager:
        net.compile()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    idx, targets = torch.randint(vocab_size, (2, batch_size, block_size), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of(idx, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, steps: int, device: str) -> float:
    """Mean time of a step."""
    if device != "cuda":
        started = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - started) / steps
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / steps


def compare(shape: tuple[int, ...], arguments: argparse.Namespace, flops: float, peak: float | None) -> bool:
    """Print a row for each network at a micro-batch; False if the memory is not enough."""
    variants = ["ours", *(["nanoGPT"] if arguments.nanogpt else [])]
    device, batch_size, tokens = arguments.device, shape[-1], shape[-1] * shape[3]
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    memory: dict[str, float] = {}
    try:
        steps = {}
        for variant in variants:
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            steps[variant] = new_step(variant, shape, arguments.nanogpt, device, arguments.eager)
            for _ in range(3):  # compiles
                steps[variant]()
            memory[variant] = (
                (torch.cuda.max_memory_allocated() - before) / 2**30 if device == "cuda" else 0.0
            )
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
        for _ in range(arguments.rounds):
            for variant, step in steps.items():
                found[variant].append(seconds(step, arguments.steps, device))
    except torch.cuda.OutOfMemoryError:
        print(f"| {batch_size} | | out of memory | | | | |", flush=True)
        return False
    for variant, times in found.items():
        median = statistics.median(times)
        mfu = f"{flops * tokens / median / peak:.1%}" if peak else ""
        ratio = ""
        if arguments.nanogpt:
            ratio = f"{statistics.median(b / a for a, b in zip(times, found['nanoGPT'], strict=True)):.2f}"
        cells = [f"{1000 * median:.1f}", f"{tokens / median:,.0f}", mfu, ratio, f"{memory[variant]:.2f}"]
        print(f"| {batch_size} | {variant} | {' | '.join(cells)} |", flush=True)
    return True


def operations(shape: tuple[int, ...], device: str) -> str:
    """A table of the operations of three eager steps that took the most time."""
    step = new_step("ours", shape, None, device, eager=True)
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(3):
            step()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", type=int, nargs=5, default=GPT2_SMALL)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak", type=float, help="TFLOP/s in dense bfloat16")
    parser.add_argument("--eager", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    peak = arguments.peak or next((tflops for part, tflops in PEAKS.items() if part in name.lower()), None)
    torch.set_float32_matmul_precision("high")
    net: Any = network("ours", (*arguments.shape, 1), None)[0]
    flops = net.flops_per_token()
    print(f"{name}, torch {torch.__version__}, peak {f'{peak:.0f} TFLOP/s' if peak else 'unknown'}\n")
    print(
        "| micro-batch | | step, ms | tokens/s | MFU | x nanoGPT | peak, GiB |\n| ---: | --- |"
        + " ---: |" * 5
    )
    fitted = None
    for batch_size in arguments.micro_batches:
        shape = (*arguments.shape, batch_size)
        if not compare(shape, arguments, flops, peak and 1e12 * peak):
            break
        fitted = shape
    if fitted:
        print(f"\n{operations(fitted, arguments.device)}")


if __name__ == "__main__":
    main()
