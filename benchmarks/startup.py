"""How long commands take to start, beside what they import.

    python benchmarks/startup.py [--rounds 5] [--megabytes 300] [overrides of train …]

Runs in turn, each in a process of its own: imports of torch and of Lightning; `train --help`; and `train` up
to its first step, with its data prepared before, for the default corpus and for a text of so many MB. Prints
the median and the range of the seconds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from preparation import write_text

TRAIN = [sys.executable, "-m", "gpt_lightning.train"]
QUIET = ["logger=none", "callbacks.samples=null", "trainer.log_every_steps=1", "trainer.val_batches=1"]


def seconds(command: list[str], until: str, folder: Path) -> float:
    """From the start of a command to the first line of its output that begins with `until`, or to its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if until and line.startswith(until):
                break
        else:
            if process.wait() or until:
                sys.exit(f"{' '.join(command)} failed")
        taken = time.perf_counter() - started
        process.terminate()
        process.communicate()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=300)
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        folder, text = Path(place), Path(place) / "text"
        text.mkdir()
        write_text(text, arguments.megabytes * 1_000_000)
        train = [*TRAIN, *QUIET, f"paths.cache={folder}/cache", f"paths.outputs={folder}/outputs", *overrides]
        large = f"{arguments.megabytes} MB"
        ways = {
            "import torch": ([sys.executable, "-c", "import torch"], ""),
            "import lightning.pytorch": ([sys.executable, "-c", "import lightning.pytorch"], ""),
            "train --help": ([*TRAIN, "--help"], ""),
            "train, to its first step": (train, "step 1/"),
            f"the same, with {large} of text": ([*train, "data=text", f"data.path={text}"], "step 1/"),
        }
        print("| | seconds | range |\n| --- | ---: | ---: |")
        first = {name: seconds(*way, folder) for name, way in ways.items()}
        rounds = [
            {name: seconds(*way, folder) for name, way in ways.items()} for _ in range(arguments.rounds)
        ]
    for name, alone in first.items():
        times = [found[name] for found in rounds]
        print(f"| {name} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} |")
        if "to its first step" in name or large in name:
            print(f"| at the first start, which prepares the data | {alone:.2f} | |")


if __name__ == "__main__":
    main()
