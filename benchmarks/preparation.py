"""How fast text is tokenized and in how much memory, beside a loop with tiktoken and `datasets.map`.

The text is that of the bundled stories, repeated with a number before each of them, in .jsonl files of 20 MB.
Each measurement is a process of its own; the ways take turns. They use GPT-2's tokenizer, which has to be in
TIKTOKEN_CACHE_DIR, and write all tokens into a file.

    python benchmarks/preparation.py [--megabytes 20 200] [--rounds 1] [--workers 2]

Prints seconds, MB per second and processor seconds of each way, imports included, and the most memory
that one of its processes had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = 20_000_000  # bytes
TIKTOKEN = """
import json, pathlib, sys
import numpy as np, tiktoken
encode = tiktoken.get_encoding("gpt2").encode_ordinary
with open("tokens.bin", "wb") as out:
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jsonl")):
        for line in path.open():
            np.array(encode(json.loads(line)["text"]) + [50256], dtype=np.uint16).tofile(out)
"""
DATASETS = """
import sys
import numpy as np, tiktoken
from datasets import load_dataset

def tokens(rows):
    encode = tiktoken.get_encoding("gpt2").encode_ordinary
    return {"ids": [encode(text) + [50256] for text in rows["text"]]}

rows = load_dataset("json", data_files=sys.argv[1] + "/*.jsonl", split="train", cache_dir="cache")
rows = rows.map(tokens, batched=True, num_proc=int(sys.argv[2]), remove_columns=["text"])
with open("tokens.bin", "wb") as out:
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        np.concatenate(batch["ids"]).astype(np.uint16).tofile(out)
"""


def write_text(folder: Path, size: int) -> None:
    """Files of stories, all different, of about so many bytes together."""
    stories = (ROOT / "input.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    numbers = itertools.count()
    for index in range(-(-size // FILE)):
        with (folder / f"{index:04}.jsonl").open("w", encoding="utf-8") as file:
            written, most = 0, min(FILE, size - index * FILE)
            while written < most:
                number = next(numbers)
                text = f"{number} {stories[number % len(stories)].strip()}"
                written += file.write(json.dumps({"text": text}) + "\n")


def measure(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds with those of all children, and the peak memory of one process in MiB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[:4]} failed:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def ways(text: Path, workers: int) -> dict[str, list[str]]:
    """The commands that are compared."""
    python = sys.executable
    prepare = [python, "-m", "gpt_lightning.prepare", "data=text", f"data.path={text}", "tokenizer=gpt2"]
    return {
        "prepare": [*prepare, "paths.cache=cache"],
        "tiktoken in a loop": [python, "-c", TIKTOKEN, str(text)],
        f"datasets.map, {workers} workers": [python, "-c", DATASETS, str(text), str(workers)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print("| | MB | seconds | MB/s | processor s | peak, MiB |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as place:
        for size in arguments.megabytes:
            text = Path(place) / str(size)
            text.mkdir()
            write_text(text, size * 1_000_000)
            found: dict[str, list[tuple[float, float, float]]] = {}
            for _ in range(arguments.rounds):
                for name, command in ways(text, arguments.workers).items():
                    with tempfile.TemporaryDirectory(dir=place) as folder:
                        found.setdefault(name, []).append(measure(command, Path(folder)))
            for name, rounds in found.items():
                seconds, processor, peak = map(statistics.median, zip(*rounds, strict=True))
                cells = [f"{seconds:.1f}", f"{size / seconds:.1f}", f"{processor:.1f}", f"{peak:.0f}"]
                print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
