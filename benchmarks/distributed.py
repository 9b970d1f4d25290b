"""What sharing a run costs: two processes that each do the work of one, and a calculation for many GPUs.

Runs `train` with one process and with two processes and twice the batch, in turn. Prints the median time of
a step, the ratio, and the share of the step that is communication and contention. Then calculates that share
for data-parallel training of GPT-2 sizes; the assumptions are printed and can be changed.

    python benchmarks/distributed.py [--rounds 5] [--steps 30] [--calculate-only] [overrides of train …]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from gpt_lightning.rundir.metrics import read_metrics

SIZES = {"gpt2_small": 124e6, "gpt2_xl": 1558e6}  # parameters


def step_time(processes: int, steps: int, overrides: list[str], folder: Path) -> float:
    """Median milliseconds of a training step, without the first third of them."""
    command = [sys.executable, "-m", "gpt_lightning.train", *overrides, f"hydra.run.dir={folder}"]
    command += [f"device.devices={processes}", "trainer.log_every_steps=1", f"trainer.max_steps={steps}"]
    command += ["callbacks.samples=null", "callbacks.best=null", "callbacks.last=null", "logger=none"]
    command += [f"trainer.val_every_steps={steps}", "trainer.val_batches=1", "device=cpu"]
    command += [f"data.batch_size={4 * processes}", "device.micro_batch_size=4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a thread for each process
    subprocess.run(command, check=True, capture_output=True, env=environment)
    times = [
        float(row["speed/ms_per_step"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row
    ]
    return statistics.median(times[len(times) // 3 :])


def measure(rounds: int, steps: int, overrides: list[str]) -> None:
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for processes in times:
                place = Path(folder) / f"{number}-{processes}"
                times[processes].append(step_time(processes, steps, overrides, place))
            print(f"round {number + 1}: {times[1][-1]:.1f} ms alone, {times[2][-1]:.1f} ms in two processes")
    one, two = statistics.median(times[1]), statistics.median(times[2])
    ratios = [b / a for a, b in zip(times[1], times[2], strict=True)]
    print(f"median: {one:.1f} ms alone, {two:.1f} ms in two processes")
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"communication and contention: {1 - 1 / statistics.median(ratios):.0%} of a step")
    load = os.getloadavg()[0]
    if load > 2.5:
        print(f"the load average is {load:.1f}: other programs ran, and the figures say little")


def calculate(arguments: argparse.Namespace) -> None:
    """Time of a data-parallel step: compute, and the part of a ring all-reduce that it does not hide."""
    print(
        f"\nassumed, not measured: {arguments.tflops:g} TFLOP/s reached; {arguments.tokens:,} tokens "
        "per GPU and step; 6 FLOPs per parameter and token; gradients of 4 bytes, summed once per step by a "
        f"ring all-reduce at {arguments.inside:g} GB/s per GPU within a machine of 8 and "
        f"{arguments.between:g} GB/s between machines; {arguments.overlap:.0%} of it hidden behind the "
        "backward pass, if that takes long enough"
    )
    for name, parameters in SIZES.items():
        compute = 6 * parameters * arguments.tokens / (arguments.tflops * 1e12)
        for gpus in (8, 64, 512):
            bandwidth = (arguments.inside if gpus <= 8 else arguments.between) * 1e9
            sent = 2 * (gpus - 1) / gpus * 4 * parameters / bandwidth
            hidden = min(arguments.overlap * sent, compute * 2 / 3)  # the backward pass is two thirds
            step = compute + sent - hidden
            print(
                f"{name} on {gpus} GPUs: compute {1e3 * compute:.0f} ms, all-reduce {1e3 * sent:.0f} ms, "
                f"step {1e3 * step:.0f} ms, efficiency {compute / step:.0%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--calculate-only", action="store_true")
    parser.add_argument("--tflops", type=float, default=300.0, help="reached by a GPU, in 10^12 per second")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a GPU in a step")
    parser.add_argument("--inside", type=float, default=300.0, help="GB/s per GPU within a machine")
    parser.add_argument("--between", type=float, default=40.0, help="GB/s per GPU between machines")
    parser.add_argument(
        "--overlap", type=float, default=0.8, help="share of the all-reduce that can be hidden"
    )
    arguments, overrides = parser.parse_known_args()
    if not arguments.calculate_only:
        measure(arguments.rounds, arguments.steps, overrides)
    calculate(arguments)


if __name__ == "__main__":
    main()
