"""Time and peak memory of a training step: our network, nanoGPT's and that of transformers, and our variants.

Each measurement is a process of its own, which trains on random ids with AdamW and clipping, for five
steps and five seconds at least, and prints the median time of a step and the most memory that it ever had.
The variants take turns. Beside the times stands how many times as fast as each peer that is (median of the
rounds), and the share of this machine's rate of products of matrices in 32 bits, measured in the same
process, that the step has by 6 x parameters + 12 x layers x width x block FLOPs per token.

    python benchmarks/steps.py [--nanogpt DIR] [--shapes NAME …] [--variants NAME …] [--rounds 3] [--steps 5]

DIR is a checkout of https://github.com/karpathy/nanoGPT. Ours runs with what device.precision=auto chooses
for the network, has nanoGPT's exact GELU and keeps freed memory, as `train` does. "32 bits" and "all logits"
are the same without that precision, and without a loss in chunks; "tanh" has GPT-2's GELU, as transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt_lightning.model import gpt
from gpt_lightning.training.memory import keep_freed_memory
from gpt_lightning.training.precision import choose_precision, has_amx, multiplies_bfloat16

SHAPES = {  # layers, heads, width, block, vocabulary, windows
    "4/4/128": (4, 4, 128, 64, 65, 12),
    "6/6/384": (6, 6, 384, 256, 65, 4),
    "6/6/384 of 50,304 ids": (6, 6, 384, 256, 50304, 4),
    "8/8/512": (8, 8, 512, 512, 50304, 8),
}
OURS = ("ours", "32 bits", "all logits", "tanh", "Muon")
PEERS = ("nanoGPT", "transformers")
LEAST = 5.0  # seconds of steps that are measured


def network(
    variant: str, shape: tuple[int, ...], nanogpt: str | None
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A network of the shape, and what computes its loss from ids and targets."""
    n_layer, n_head, n_embd, block_size, vocab_size, _ = shape
    if variant == "nanoGPT":
        sys.path.insert(0, str(nanogpt))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]

        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        net: nn.Module = GPT(GPTConfig(**sizes, vocab_size=vocab_size, dropout=0.0, bias=True))
        return net, lambda x, y: net(x, y)[1]
    if variant == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": block_size}
        none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        theirs = GPT2LMHeadModel(GPT2Config(**sizes, **none, vocab_size=vocab_size, use_cache=False))
        return theirs, lambda x, y: theirs(x, labels=x).loss
    if variant == "all logits":
        gpt.CHUNK = sys.maxsize
    net = gpt.build_gpt(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        block_size=block_size,
        vocab_size=vocab_size,
        vocab_multiple=1,
        exact_gelu=variant != "tanh",
    )
    return net, net


def matmul_rate() -> float:
    """FLOP/s of a product of two matrices of 2,048 rows and columns in 32 bits."""
    a = torch.randn(2048, 2048)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds)


def measure(variant: str, shape: tuple[int, ...], steps: int, nanogpt: str | None) -> dict[str, float]:
    """Seconds of a step after the first two, peak memory in GiB and the share of the rate of products."""
    from gpt_lightning.training.muon import muon
    from gpt_lightning.training.optimizers import parameter_groups

    n_layer, _, n_embd, block_size, vocab_size, batch_size = shape
    net, loss_of = network(variant, shape, nanogpt)
    parameters = sum(p.numel() for p in net.parameters())
    has_bfloat16 = multiplies_bfloat16("cpu")
    precision = choose_precision("cpu", parameters, has_bfloat16=has_bfloat16, amx=has_amx())
    if variant == "Muon":
        optimizer: Any = muon(parameter_groups(net, by_role=True), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), fused=variant in OURS)
    idx, targets = torch.randint(vocab_size, (2, batch_size, block_size))
    seconds = []
    bf16 = variant in ("ours", "tanh", "Muon") and precision == "bf16-mixed"
    with keep_freed_memory("cpu" if variant in OURS else "", large=variant != "all logits"):
        while len(seconds) < steps + 2 or sum(seconds) < LEAST:
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = loss_of(idx, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    unit = 2**30 if sys.platform == "darwin" else 2**20  # of ru_maxrss: bytes there, KiB elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    flops = (6 * parameters + 12 * n_layer * n_embd * block_size) * idx.numel()
    median = statistics.median(seconds[2:])
    return {
        "seconds": median,
        "peak": peak,
        "share": flops / median / matmul_rate(),
        "loss": float(loss.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=OURS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a process that measures
    arguments = parser.parse_args()
    if arguments.one:
        variant, name = arguments.one
        print(json.dumps(measure(variant, SHAPES[name], arguments.steps, arguments.nanogpt)))
        return
    peers = PEERS[not arguments.nanogpt :]
    variants = dict.fromkeys([*(arguments.variants or OURS), *peers])
    heads = ["shape", "", "step, ms", *(f"x {peer}" for peer in peers), "share of products", "peak, GiB"]
    print(f"| {' | '.join(heads)} |\n| --- | --- |{' ---: |' * (len(heads) - 2)}")
    for name in arguments.shapes:
        rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
        for _ in range(arguments.rounds):
            for variant, found in rows.items():
                command = [sys.executable, *sys.argv, "--one", variant, name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        for variant, found in rows.items():
            of = {key: statistics.median(one[key] for one in found) for key in found[0]}
            ratios = [
                statistics.median(b["seconds"] / a["seconds"] for a, b in zip(found, rows[peer], strict=True))
                for peer in peers
            ]
            cells = [f"{1000 * of['seconds']:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
            print(
                f"| {name} | {variant} | {' | '.join(cells)} | {of['share']:.0%} | {of['peak']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
