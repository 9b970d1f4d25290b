"""Generation beside transformers' own, same weights: tokens per second, first token, memory, loss.

    python benchmarks/generation.py                     # GPT-2 small, random weights, CPU
    python benchmarks/generation.py --device cuda
    python benchmarks/generation.py --weights gpt2 --text FILE   # and the loss of each type on a text

Every round times every row of the table once, so that a busy moment hits them all; ratios are taken
within a round, and medians over the rounds are printed. The limit of memory bandwidth is the time of
reading a step's weights once at the best speed at which a large tensor was summed meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt_lightning.inference.cpu_kernels import pack
from gpt_lightning.inference.decoding import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.interop.gpt2 import load_gpt2, save_gpt2
from gpt_lightning.model.gpt import GPT, GPTConfig

Generate = Callable[[list[list[int]], int, bool], list[list[int]]]  # prompts, new tokens, sampled
OURS = ("plain", "float32", "bfloat16", "int8")
BYTES = {"transformers": 4, "plain": 4, "float32": 4, "bfloat16": 2, "int8": 1}


def build(name: str, folder: str, device: str) -> Generate:
    """A row of the table: transformers, or ours with layers as they are or packed."""
    if name == "transformers":
        return build_transformers(folder, device)
    net = load_gpt2(folder, dropout=0.0).to(device).eval()
    if name != "plain":
        pack(net, name)

    def run(prompts: list[list[int]], new: int, sampled: bool) -> list[list[int]]:
        settings = SamplingSettings(max_new_tokens=new, temperature=0.8 if sampled else 0.0, top_k=50)
        return generate(net, prompts, settings, static_shapes=device == "cuda")

    return run


def build_transformers(folder: str, device: str) -> Generate:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    net.to(device)

    def run(prompts: list[list[int]], new: int, sampled: bool) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 50} if sampled else {"do_sample": False}
        out = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            use_cache=True,
            pad_token_id=0,
            **options,
        )
        return out[:, ids.size(1) :].tolist()

    return run


def bandwidth(device: str) -> float:
    """Bytes per second at which the device reads memory."""
    x = torch.ones(1 << 26, device=device)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        times.append(time.perf_counter() - start)
    return 4 * len(x) / min(times)


def measure(
    rows: dict[str, Generate], batches: Sequence[int], rounds: int, prompt: int, new: int, device: str
) -> dict[tuple[int, bool], dict[str, list[tuple[float, float, float]]]]:
    """(seconds to the first token, seconds, bandwidth) per round, row, batch size and way of sampling."""
    results: dict[tuple[int, bool], dict[str, list[tuple[float, float, float]]]] = {}
    for round_ in range(-1, rounds):  # the first one warms up
        for batch in batches:
            torch.manual_seed(round_ + 1)
            prompts = torch.randint(50257, (batch, prompt)).tolist()
            for sampled in (False, True):
                speed = bandwidth(device)
                answers = {}
                for name, run in rows.items():
                    start = time.perf_counter()
                    run(prompts, 1, sampled)
                    middle = time.perf_counter()
                    answers[name] = run(prompts, new, sampled)
                    end = time.perf_counter()
                    if round_ >= 0:
                        cell = results.setdefault((batch, sampled), {}).setdefault(name, [])
                        cell.append((middle - start, end - middle, speed))
                if not sampled and answers["transformers"] != answers["float32"]:
                    print(f"batch {batch}: greedy tokens differ from transformers'", file=sys.stderr)
    return results


def peak_memory(name: str, folder: str, device: str) -> float:
    """MiB that a process needs to load the model and generate, by starting one."""
    command = [sys.executable, "-W", "ignore", __file__, "--device", device, "--peak", name, folder]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(name: str, folder: str, device: str) -> None:
    build(name, folder, device)([[1] * 32], 16, False)
    status = Path("/proc/self/status")  # getrusage would count the process that started this one
    peak = float("nan")
    if status.exists():
        peak = next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) / 1024
    print(peak)


def best_bandwidth(results: dict) -> float:
    """Of all rounds: other work on the machine only ever takes some of it."""
    return max(r[2] for cell in results.values() for rounds in cell.values() for r in rounds)


def print_table(results: dict, memory: dict[str, float], weights: int, new: int) -> None:
    print(
        "| batch | sampling | | tokens/s | x transformers | of bandwidth limit | first token | peak memory |"
    )
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    speed = best_bandwidth(results)
    for (batch, sampled), cell in results.items():
        base = cell["transformers"]
        for name, rounds in cell.items():
            rate = statistics.median(batch * new / total for _, total, _ in rounds)
            ratio = statistics.median(b[1] / r[1] for b, r in zip(base, rounds, strict=True))
            limit = weights * BYTES[name] / speed  # seconds per step
            step = statistics.median((total - first) / (new - 1) for first, total, _ in rounds)
            first = statistics.median(first for first, _, _ in rounds)
            way = "top-k 50" if sampled else "greedy"
            print(
                f"| {batch} | {way} | {name} | {rate:.1f} | {ratio:.2f} | {limit / step:.0%} "
                f"| {first * 1e3:.0f} ms | {memory[name]:.0f} MiB |"
            )


@torch.no_grad()
def print_losses(folder: str, text: Path) -> None:
    import tiktoken

    ids = torch.tensor(tiktoken.get_encoding("gpt2").encode_ordinary(text.read_text())[: 16 * 1024 + 1])
    net = load_gpt2(folder, dropout=0.0).eval()
    losses = {}
    for name in OURS:
        packed = net if name == "plain" else pack(copy.deepcopy(net), name)
        total = 0.0
        for x, y in zip(ids[:-1].split(512), ids[1:].split(512), strict=True):
            total += torch.nn.functional.cross_entropy(packed(x[None])[0].float(), y, reduction="sum").item()
        losses[name] = total / (len(ids) - 1)
        print(f"loss {name}: {losses[name]:.4f} ({losses[name] / losses['plain'] - 1:+.3%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", help="folder or hub name; random GPT-2 small if not given")
    parser.add_argument("--text", type=Path, help="file whose loss is compared between the types")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        name, folder = args.peak
        return print_peak(name, folder, args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        return print("not run: there is no CUDA device")
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        net = load_gpt2(args.weights) if args.weights else GPT(GPTConfig(vocab_size=50257))
        save_gpt2(net, scratch)
        weights = net.num_parameters(embeddings=False)
        del net
        names = ["transformers", *(OURS if args.device == "cpu" else ("plain", "bfloat16"))]
        memory = {name: peak_memory(name, scratch, args.device) for name in names}
        rows = {name: build(name, scratch, args.device) for name in names}
        results = measure(rows, args.batches, args.rounds, args.prompt, args.new, args.device)
        speed = best_bandwidth(results)
        print(f"{args.prompt} + {args.new} tokens, {torch.get_num_threads()} threads, {speed / 1e9:.1f} GB/s")
        print_table(results, memory, weights, args.new)
        if args.text:
            print_losses(scratch, args.text)


if __name__ == "__main__":
    main()
