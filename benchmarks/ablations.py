"""What each ingredient of a modern network gains: loss at equal tokens over seeds, and time per step.

    python benchmarks/ablations.py DIR [--seeds 1 2 3] [--steps 1000] [--jobs 2]

Trains modern_tiny with each change of CHANGES and each seed as one sweep in DIR, which the same
command continues when it was interrupted; then times the steps of all networks in turns. Prints a table: the
mean of the validation losses with their standard deviation, how far above the floor that is, the differences
to the unchanged network with the same seeds, and the time of a forward and backward pass beside that of the
unchanged network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_lightning.model.qwen3 import Qwen3, Qwen3Config, Rotary, build_starcoder2

CHANGES = {
    "none": "none: rotary positions, RMSNorm, QK-norm, SwiGLU, tied head",
    "learned_positions": "learned positions, not rotary ones",
    "layer_norm": "LayerNorm without a bias, not RMSNorm",
    "no_qk_norm": "no QK-norm",
    "gelu": "GELU of four times the width, not SwiGLU",
    "relu2": "squared ReLU of four times the width, not SwiGLU",
    "zero_init": "projections into the residual stream begin at zero",
    "untied": "a head of its own",
    "soft_cap": "logits soft-capped at 30",
    "value_residual": "values mixed with those of the first layer",
    "starcoder2": "StarCoder2: GELU, LayerNorm, biases, no QK-norm",
}


class MLP(nn.Module):
    """A feed-forward layer with one activation, of as many parameters as SwiGLU with 8/3 of the width."""

    def __init__(self, width: int, n_layer: int, squared_relu: bool):
        super().__init__()
        self.squared_relu = squared_relu
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.up_proj.weight, std=0.02)
        nn.init.normal_(self.down_proj.weight, std=0.02 / (2 * n_layer) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up_proj(x)
        return self.down_proj(F.relu(x).square() if self.squared_relu else F.gelu(x, approximate="tanh"))


def mix_values(net: Qwen3) -> None:
    """Values of later layers become a learned mixture with the first layer's: Zhou et al., "Value Residual
    Learning" (2024)."""
    first: list[Tensor] = []
    net.shares = nn.ParameterList([torch.tensor(0.5) for _ in net.blocks[1:]])

    def keep(_: nn.Module, __: Any, values: Tensor) -> None:
        first[:] = [values]

    net.blocks[0].self_attn.v_proj.register_forward_hook(keep)
    for share, block in zip(net.shares, net.blocks[1:], strict=True):
        block.self_attn.v_proj.register_forward_hook(
            lambda _, __, values, share=share: values + share * (first[0] - values)
        )


def build(change: str, **options: Any) -> Rotary:
    """A Qwen3 with one change, or a StarCoder2, for `model._target_`."""
    if change == "starcoder2":
        return build_starcoder2(**{key: options[key] for key in options.keys() - {"qk_norm", "head_dim"}})
    options |= {"no_qk_norm": {"qk_norm": False}, "untied": {"tie_weights": False}}.get(change, {})
    config = Qwen3Config(**options)
    net, C = Qwen3(config), config.n_embd
    if change == "learned_positions":
        net.model.rotation[0], net.model.rotation[1] = 1, 0  # cosines and sines of no angle
        net.positions = nn.Embedding(config.block_size, C)
        nn.init.normal_(net.positions.weight, std=0.02)
        net.embedding.register_forward_hook(lambda _, __, x: x + net.positions.weight[: x.size(1)])
    if change == "layer_norm":
        net.model.norm = nn.LayerNorm(C, bias=False)
    if change == "value_residual":
        mix_values(net)
    if change == "soft_cap":
        net.lm_head.register_forward_hook(lambda _, __, logits: 30 * torch.tanh(logits / 30))
    for block in net.blocks:
        if change == "layer_norm":
            block.input_layernorm = nn.LayerNorm(C, bias=False)
            block.post_attention_layernorm = nn.LayerNorm(C, bias=False)
        if change in ("gelu", "relu2"):
            block.mlp = MLP(C, config.n_layer, squared_relu=change == "relu2")
        if change == "zero_init":
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)
    return net


def train(folder: Path, seeds: list[int], steps: int, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """Summaries of the runs of each change, in the order of the seeds."""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-m", "gpt_lightning.train", "-m", "model=modern_tiny", "optimizer=muon"]
    command += ["model._target_=ablations.build", f"+model.change={','.join(CHANGES)}"]
    command += [
        f"trainer.val_every_steps={max(1, steps // 4)}",
        f"seed={','.join(map(str, seeds))}",
        f"trainer.max_steps={steps}",
        f"sweep.jobs={jobs}",
    ]
    command += [f"hydra.sweep.dir={folder}", "callbacks.samples=null", "logger=none"]
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    results: dict[str, list[dict[str, Any]]] = {}
    for line in (folder / "sweep.jsonl").read_text(encoding="utf-8").splitlines():
        job = json.loads(line)
        options = dict(override.lstrip("+").split("=") for override in job["overrides"])
        summary = json.loads((folder / job["name"] / "summary.json").read_text(encoding="utf-8"))
        results.setdefault(options["model.change"], []).append(summary)
    return results


def step_times(rounds: int = 9, steps: int = 20) -> dict[str, float]:
    """Median time of forward and backward passes of each change, as a multiple of the unchanged network's."""
    options = {"vocab_size": 1536, "block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 128}
    nets = {change: build(change, **options) for change in CHANGES}
    idx, targets = torch.randint(1536, (2, 4, 256))
    ratios: dict[str, list[float]] = {change: [] for change in CHANGES}
    for _ in range(rounds):
        seconds = {}
        for change, net in nets.items():
            net(idx, targets).backward()
            started = time.perf_counter()
            for _ in range(steps):
                net(idx, targets).backward()
            seconds[change] = time.perf_counter() - started
        for change in CHANGES:
            ratios[change].append(seconds[change] / seconds["none"])
    return {change: statistics.median(found) for change, found in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    results = train(arguments.folder.resolve(), arguments.seeds, arguments.steps, arguments.jobs)
    times = step_times()
    print("| change | parameters | loss | above the floor | difference of losses, per seed | time per step |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for change, runs in results.items():
        losses = [run["val_loss"] for run in runs]
        above = statistics.mean(run["bits_per_byte"] / run["floor_bits_per_byte"] - 1 for run in runs)
        differences = [loss - run["val_loss"] for loss, run in zip(losses, results["none"], strict=True)]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(
            f"| {CHANGES[change]} | {runs[0]['parameters']:,} | {statistics.mean(losses):.4f} ± {spread:.4f} "
            f"| {above:.1%} | {', '.join(f'{d:+.4f}' for d in differences)} | {times[change]:.2f} |"
        )


if __name__ == "__main__":
    main()
