"""Size of a checkpoint, and seconds to write, to verify and to load it, for sizes of GPT-2.

A checkpoint has the weights and AdamW's two averages in 32 bits. Their memory is allocated and never
written to, so that the largest fits into the memory of a laptop; the files have their full size.

    python benchmarks/checkpoints.py [--folder DIR] [--sizes gpt2_small …] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from gpt_lightning.config.build import build_net
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.rundir.checkpoint import read_checkpoint, write_checkpoint

SIZES = ["gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"]


def checkpoint_of(size: str) -> tuple[int, dict[str, Any]]:
    """Parameters of a model, and what a run writes of it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"model={size}"])
    with torch.device("meta"):
        parameters = dict(build_net(cfg, 50257).named_parameters())
    count = sum(p.numel() for p in parameters.values())
    three = [{name: torch.empty(p.shape) for name, p in parameters.items()} for _ in range(3)]
    content = {"state_dict": three[0], "optimizer_states": three[1:], "tokenizer": {}}
    return count, {**content, "hyper_parameters": {"model": {}}}


def seconds(function: Any, *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where to write; default: the system's, for temporary files"
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print("| | parameters | GB | write, s | GB/s | verify and open, s |\n| --- " + "| ---: " * 5 + "|")
    for size in arguments.sizes:
        parameters, content = checkpoint_of(size)
        times = []
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "last.ckpt"
            for _ in range(arguments.rounds):
                times.append((seconds(write_checkpoint, content, path), seconds(read_checkpoint, path)))
            size_gb = path.stat().st_size / 1e9
        write, read = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {size} | {parameters:,} | {size_gb:.2f} | {write:.1f} | {size_gb / write:.2f} | {read:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
