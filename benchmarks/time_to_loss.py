"""Seconds from the start of the command to nanoGPT's loss on tiny Shakespeare by characters, beside nanoGPT.

    python benchmarks/time_to_loss.py --nanogpt DIR --text FILE [--seeds 1 2 3] [--threads 2] [experiment …]

DIR is a checkout of nanoGPT, which gets FILE, tiny Shakespeare, as its data. For each seed nanoGPT's
train.py runs with the settings that its README gives for a CPU, then each experiment of ours, all as
processes of their own, one after the other. The seconds are of the whole process: start, data, every
validation, checkpoints. The loss is over the whole validation split in windows of the block size, end to
end, computed afterwards: nanoGPT's from the checkpoint that it leaves, ours from the last one. Prints every
run, then medians and ratios. An experiment may carry overrides: "NAME trainer.max_steps=2000".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = 64  # of every model here
RECIPE = (  # nanoGPT's README, "I only have a macbook"
    f"--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size={BLOCK} --batch_size=12 "
    "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
EXPERIMENTS = ["nanogpt_shakespeare_char_cpu", "fast_shakespeare_char_cpu"]
WHOLE_SPLIT = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load(sys.argv[2], weights_only=True)
net = GPT(GPTConfig(**saved["model_args"])).eval()
net.load_state_dict(saved["model"])
ids = torch.from_numpy(np.fromfile(sys.argv[3], dtype=np.uint16).astype(np.int64))
T, total = net.config.block_size, 0.0
with torch.no_grad():
    for start in range(0, len(ids) - 1, T):
        x, y = ids[start : start + T][: len(ids) - 1 - start], ids[start + 1 : start + 1 + T]
        total += len(y) * net(x[None], y[None])[1].item()
print(total / (len(ids) - 1))
"""
Result = tuple[float, float]  # seconds, loss in nats


def timed(command: list[str], folder: Path, threads: int) -> float:
    """Seconds of a command, which must succeed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds


def nanogpt(checkout: Path, folder: Path, seed: int, threads: int) -> Result:
    """nanoGPT's recipe, with another seed in a copy of its script, which has a fixed one."""
    script = (checkout / "train.py").read_text(encoding="utf-8")
    changed = script.replace("torch.manual_seed(1337 +", f"torch.manual_seed({seed} +")
    assert changed != script or seed == 1337, "nanoGPT's train.py sets its seed in another way"
    copy = checkout / "train_seed.py"
    copy.write_text(changed, encoding="utf-8")
    command = [sys.executable, copy.name, "config/train_shakespeare_char.py", *RECIPE.split()]
    try:
        seconds = timed([*command, f"--out_dir={folder}"], checkout, threads)
    finally:
        copy.unlink()
    data = checkout / "data" / "shakespeare_char" / "val.bin"
    loss = [sys.executable, "-c", WHOLE_SPLIT, str(checkout), str(folder / "ckpt.pt"), str(data)]
    printed = subprocess.run(loss, check=True, capture_output=True, text=True).stdout  # also what GPT prints
    return seconds, float(printed.split()[-1])


def ours(experiment: str, text: Path, folder: Path, seed: int, threads: int) -> Result:
    """`python -m gpt_lightning.train` as a user starts it."""
    name, *overrides = experiment.split()
    run = folder / "run"
    command = [sys.executable, "-m", "gpt_lightning.train", f"experiment={name}", f"data.path={text}"]
    seconds = timed([*command, f"seed={seed}", f"hydra.run.dir={run}", *overrides], folder, threads)
    command = [sys.executable, "-m", "gpt_lightning.evaluate", f"checkpoint={run}/checkpoints/last.ckpt"]
    timed([*command, f"stride={BLOCK}", "output=loss.json"], folder, threads)
    return seconds, json.loads((folder / "loss.json").read_text())["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("experiments", nargs="*", default=EXPERIMENTS)
    arguments = parser.parse_args()
    checkout, text, threads = arguments.nanogpt.resolve(), arguments.text.resolve(), arguments.threads
    for file in (checkout / "train.py", text):
        if not file.is_file():
            parser.error(f"there is no file {file}")
    data = checkout / "data" / "shakespeare_char"
    (data / "input.txt").write_bytes(text.read_bytes())
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    rows: dict[str, list[Result]] = {name: [] for name in ["nanoGPT", *arguments.experiments]}
    for seed in arguments.seeds:
        for name, results in rows.items():
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                if name == "nanoGPT":
                    results.append(nanogpt(checkout, folder, seed, threads))
                else:
                    results.append(ours(name, text, folder, seed, threads))
            print(f"seed {seed}: {name}: {results[-1][0]:.1f} s, loss {results[-1][1]:.4f}", flush=True)
    print("\n| | seconds, median | x nanoGPT, per seed | loss, mean | losses |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, results in rows.items():
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(results, rows["nanoGPT"], strict=True)]
        seconds, losses = zip(*results, strict=True)
        print(
            f"| {name} | {statistics.median(seconds):.1f} | {', '.join(f'{ratio:.2f}' for ratio in ratios)} "
            f"| {statistics.mean(losses):.4f} | {', '.join(f'{loss:.4f}' for loss in losses)} |"
        )


if __name__ == "__main__":
    main()
