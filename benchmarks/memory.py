"""Peak memory and time of a training step: all logits at once, the loss in chunks, and nanoGPT's model.

Each measurement is a process of its own, which trains on random ids with fused AdamW in 32 bits and prints
the most memory that it ever had and the median time of a step. The variants take turns.

    python benchmarks/memory.py [--nanogpt DIR] [--rounds 3] [--steps 3] [--n_layer 8] [--n_embd 512] …

DIR is a checkout of https://github.com/karpathy/nanoGPT.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import nn

from gpt_lightning.model import gpt

SHAPE = {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512, "vocab_size": 50304}


def network(variant: str, shape: dict[str, int], nanogpt: str | None) -> nn.Module:
    """A network of the shape, called as `net(idx, targets)`."""
    if variant == "nanoGPT":
        sys.path.insert(0, str(nanogpt))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        return GPT(GPTConfig(**shape, dropout=0.0, bias=True))  # type: ignore[no-any-return]
    if variant == "all logits":
        gpt.CHUNK = sys.maxsize
    return gpt.build_gpt(**shape)


def measure(net: nn.Module, shape: dict[str, int], batch_size: int, steps: int) -> dict[str, Any]:
    """Peak memory in GiB, that before the first step included, and seconds of a step after the first."""
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    idx, targets = torch.randint(shape["vocab_size"], (2, batch_size, shape["block_size"]))
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        found = net(idx, targets)
        loss = found[1] if isinstance(found, tuple) else found  # nanoGPT returns the logits, too
        del found
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"peak": peak, "seconds": statistics.median(seconds[1:]), "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    for key, value in SHAPE.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # of a process that measures
    arguments = parser.parse_args()
    shape = {key: getattr(arguments, key) for key in SHAPE}
    if arguments.variant:
        net = network(arguments.variant, shape, arguments.nanogpt)
        print(json.dumps(measure(net, shape, arguments.batch_size, arguments.steps)))
        return
    variants = ["all logits", "chunks", *(["nanoGPT"] if arguments.nanogpt else [])]
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(arguments.rounds):
        for variant, found in rows.items():
            command = [sys.executable, *sys.argv, "--variant", variant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{variant}: {found[-1]}", flush=True)
    last, medians = variants[-1 if arguments.nanogpt else 0], {}
    for variant, found in rows.items():
        medians[variant] = {key: statistics.median(one[key] for one in found) for key in ("peak", "seconds")}
    print("| | peak, GiB | step, s | memory | time |\n| --- | ---: | ---: | ---: | ---: |")
    for variant, of in medians.items():
        memory, times = (of[key] / medians[last][key] for key in ("peak", "seconds"))
        print(f"| {variant} | {of['peak']:.2f} | {of['seconds']:.2f} | {memory:.2f} x | {times:.2f} x |")


if __name__ == "__main__":
    main()
