"""`python -m tests.stress`: rounds of random interruptions for some minutes, then what was tried and held.

Each round is printed in a line. What a round draws depends on the seed and the number of the round alone (but
for the speed of the machine), so `--seed 7 --round 12`, with the same `--sweeps`, repeats one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

from tests.stress.configurations import Material
from tests.stress.rounds import Failure, Round
from tests.stress.sweeps import SweepRound
from tests.support.zygote import Zygote


class Stress:
    """Plays rounds in several lanes at a time and counts."""

    def __init__(
        self, folder: Path, material: Material, seed: int, end: float, only: int | None, sweeps: float
    ):
        self.folder, self.material, self.seed, self.end = folder, material, seed, end
        self.sweeps = sweeps
        self.numbers = iter([only]) if only is not None else itertools.count(1)
        self.counts: Counter[str] = Counter()
        self.failed: list[int] = []
        self.lock = threading.Lock()

    def lane(self, number: int) -> None:
        """Play rounds until the time is over."""
        out = self.folder / f"lane{number}"
        out.mkdir()
        with Zygote(out) as zygote:
            while time.monotonic() < self.end and (round_number := self.next()) is not None:
                folder = self.folder / f"round{round_number}"
                is_sweep = random.Random(f"{self.seed} {round_number} sweep").random() < self.sweeps
                kind = SweepRound if is_sweep else Round
                self.tell(kind(round_number, self.seed, zygote, self.material, folder))

    def next(self) -> int | None:
        with self.lock:
            return next(self.numbers, None)

    def tell(self, played: Round) -> None:
        """Play a round and print its line."""
        begun, problem = time.monotonic(), ""
        try:
            played.play()
        except Failure as failure:
            problem = str(failure)
        except Exception:
            problem = traceback.format_exc()
        what = f"{', '.join(played.features)}: {', '.join(played.told) or 'nothing happened'}"
        outcome = "FAILED" if problem else "held"
        with self.lock:
            print(f"round {played.number} {outcome} ({time.monotonic() - begun:.0f} s) {what}", flush=True)
            self.counts += played.counts
            self.counts.update(f"with {feature}" for feature in played.features)
            self.counts["rounds"] += 1
            if problem:
                self.failed.append(played.number)
                again = f"--seed {self.seed} --round {played.number}"
                print(f"  {problem}\n  kept in {played.folder}; again: {again}", flush=True)
        if not problem:
            shutil.rmtree(played.folder)
            return
        for number, session in enumerate(played.sessions):
            shutil.copy(session.out, played.folder / f"session{number}.txt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__.split(":")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--round", type=int, help="play this round alone")
    parser.add_argument("--lanes", type=int, default=1, help="rounds at a time")
    parser.add_argument("--sweeps", type=float, default=0.15, help="share of rounds that interrupt a sweep")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stress-"))
    what = f"seed {options.seed}, {options.minutes:g} minutes, {options.lanes} rounds at a time"
    print(f"{what}, in {folder}", flush=True)
    material = Material.make(folder)
    with Zygote(folder) as zygote:
        code, out = zygote.run("train", *material.base, f"hydra.run.dir={folder / 'base'}")
    assert code == 0, out
    end = time.monotonic() + 60 * options.minutes
    stress = Stress(folder, material, options.seed, end, options.round, options.sweeps)
    lanes = [threading.Thread(target=stress.lane, args=(number,)) for number in range(options.lanes)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    print(f"\nseed {options.seed}")
    for name, count in sorted(stress.counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{count:6} {name}")
    print(f"{len(stress.failed):6} rounds failed", *stress.failed)
    if not stress.failed:
        shutil.rmtree(folder)
    return 1 if stress.failed or not stress.counts["rounds"] else 0


if __name__ == "__main__":
    sys.exit(main())
