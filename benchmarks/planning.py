"""How near the predictions of `plan` are to runs: time of a step and peak memory over a grid of sizes.

One size after the other is varied around a middle one (a GPT-2 of 6 layers, width 384, block 256,
micro-batches of 4 sequences, a vocabulary of 257). For each, `plan` predicts in a process of its own, and
`train` runs a few steps in another. Memory is the most that the process had, less that of
a run with next to no network.

    python benchmarks/planning.py [--rounds 1] [--steps 12] [--sizes n_layer …] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.training.memory import GIB

GRID: dict[str, tuple[str, list[int]]] = {
    "layers": ("model.n_layer", [2, 6, 12]),
    "width": ("model.n_embd", [192, 384, 768]),
    "block": ("model.block_size", [64, 256, 1024]),
    "micro-batch": ("device.micro_batch_size", [1, 4, 16]),
    "vocabulary": ("model.vocab_size", [257, 8192, 50304]),
}
MIDDLE = {"model.n_layer": 6, "model.n_head": 6, "model.n_embd": 384, "model.block_size": 256}
MIDDLE |= {"device.micro_batch_size": 4, "model.vocab_size": 257}
SMALLEST = {**MIDDLE, "model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16, "model.block_size": 8}
FIXED = [
    "model=gpt",
    "optimizer=adamw",
    "tokenizer=byte",
    "device=cpu",
    "device.precision=32-true",
    "trainer.val_batches=1",
]
QUIET = ["logger=none", "callbacks.samples=null", "callbacks.best=null", "callbacks.last=null"]
PLAN = """
import json, sys, gpt_lightning
plan = gpt_lightning.plan(*sys.argv[1:])
print(json.dumps([plan.seconds, sum(plan.memory.values())]))
"""
Row = tuple[float, float]  # milliseconds of a step, GiB


def overrides(sizes: dict[str, int], steps: int) -> list[str]:
    given = [f"{key}={value}" for key, value in sizes.items()]
    given += [f"data.batch_size={sizes['device.micro_batch_size']}"]
    return [*FIXED, *given, f"trainer.max_steps={steps}", f"trainer.val_every_steps={steps}"]


def predicted(sizes: dict[str, int]) -> Row:
    """Of a run so long that its validation counts for nothing."""
    command = [sys.executable, "-c", PLAN, *overrides(sizes, 1000)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory / GIB


def measured(sizes: dict[str, int], steps: int) -> Row:
    """The median step of a run, and the most memory of its process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gpt_lightning.train", *overrides(sizes, steps), *QUIET]
        command += ["trainer.log_every_steps=1", f"hydra.run.dir={folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
        rows = [row for row in read_metrics(Path(folder) / "run" / "metrics.csv") if "train/loss" in row]
    times = [float(row["speed/ms_per_step"]) for row in rows[steps // 4 :]]
    return statistics.median(times), max(float(row["speed/memory_gib"]) for row in rows)


def draw(rows: dict[str, list[tuple[int, Row, Row]]], path: Path) -> None:
    """Time and memory against each size, measured and predicted."""
    figure = Figure(figsize=(3 * len(rows), 5), layout="constrained")
    axes = figure.subplots(2, len(rows), squeeze=False)
    for column, (name, points) in enumerate(rows.items()):
        for line, unit in enumerate(("ms per step", "peak memory, GiB")):
            axis, sizes = axes[line][column], [size for size, _, _ in points]
            axis.plot(sizes, [mine[line] for _, _, mine in points], "o-", label="measured")
            axis.plot(sizes, [plan[line] for _, plan, _ in points], "x--", label="predicted by plan")
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel=unit, xticks=sizes)
            axis.set_xticklabels(map(str, sizes))
            axis.minorticks_off()
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--sizes", nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    nothing = measured(SMALLEST, arguments.steps)[1]
    print(f"a run with next to no network: {nothing:.2f} GiB\n")
    print("| | | ms per step | predicted | | GiB | predicted | |\n| --- " + "| ---: " * 7 + "|")
    rows: dict[str, list[tuple[int, Row, Row]]] = {}
    for name in arguments.sizes:
        key, values = GRID[name]
        for value in values:
            sizes = {**MIDDLE, key: value}
            rounds = [(predicted(sizes), measured(sizes, arguments.steps)) for _ in range(arguments.rounds)]
            (plan_ms, plan_gib), (ms, gib) = (
                [statistics.median(column) for column in zip(*side, strict=True)]
                for side in zip(*rounds, strict=True)
            )
            gib -= nothing
            rows.setdefault(name, []).append((value, (plan_ms, plan_gib), (ms, gib)))
            print(
                f"| {name} | {value} | {ms:.1f} | {plan_ms:.1f} | {plan_ms / ms - 1:+.0%} "
                f"| {gib:.2f} | {plan_gib:.2f} | {plan_gib / gib - 1:+.0%} |",
                flush=True,
            )
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
