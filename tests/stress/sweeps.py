"""A round of the stress program that interrupts a sweep instead of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tests.stress.rounds import SIGNALS, Failure, Round, send
from tests.support.comparison import differences
from tests.support.zygote import Process

VALUES = {"seed": [1, 2, 3], "optimizer.lr": [0.001, 0.01, 0.1]}


class SweepRound(Round):
    """A sweep of three jobs whose own process, or one of its jobs, is ended at random moments.

    The same command, or resume= of its directory, goes on until it succeeds. Each job must be as in the
    same sweep that nothing happened to.
    """

    def play(self) -> None:
        """As `Round.play`."""
        self.folder.mkdir(parents=True)
        at_once, key = self.draw.choice([1, 2]), self.draw.choice(list(VALUES))
        self.features = ("sweep", f"{at_once} jobs at once")
        steps = self.draw.randint(20, 60)
        few = [
            "logger=none",
            "callbacks.samples=null",
            f"trainer.max_steps={steps}",
            "trainer.save_every_steps=7",
        ]
        values = ",".join(map(str, VALUES[key]))
        self.arguments = ["-m", *self.material.base, *few, f"sweep.jobs={at_once}", f"{key}={values}"]
        (self.folder / "arguments.txt").write_text("\n".join(self.arguments))
        reference, begun = self.folder / "reference", time.monotonic()
        process = self._start([*self.arguments, f"hydra.sweep.dir={reference}"])
        if self._wait(process) != 0:
            raise Failure(f"the undisturbed sweep failed: {process.out.read_text()[-2000:]}")
        self.seconds = time.monotonic() - begun
        for _ in range(self.draw.randint(1, 4)):
            if self._interrupt(self._begin_or_resume()) == 0:
                break
        code = self._wait(process := self._begin_or_resume())
        if code != 0:
            raise Failure(f"it did not go on (exit code {code}): {process.out.read_text()[-2000:]}")
        self._nothing_is_left()
        jobs = {job["name"]: job["status"] for job in ledger(self.run)}
        if set(jobs.values()) != {"finished"} or len(jobs) != len(VALUES[key]):
            raise Failure(f"sweep.jsonl has {jobs}")
        found = [
            f"{name}: {what}" for name in jobs for what in differences(self.run / name, reference / name)
        ]
        if found:
            raise Failure("\n  ".join(found))
        self.counts["sweeps that ended as if nothing had happened"] += 1

    def _begin_or_resume(self, *, slow: bool = False) -> Process:
        if ledger(self.run) and self.draw.random() < 0.5:
            return self._start([f"resume={self.run}"], slow=slow)
        return self._start([*self.arguments, f"hydra.sweep.dir={self.run}"], slow=slow)

    def _interrupt(self, process: Process) -> int:
        """Send a signal to the sweep or to one of its jobs at a random moment; the exit code of the sweep."""
        number, end = self.draw.choice(SIGNALS), time.monotonic() + self.draw.uniform(0.1, 0.7) * self.seconds
        ended = self._until(process, lambda: time.monotonic() >= end)
        jobs = [job["pid"] for job in ledger(self.run) if job["status"] == "running" and job["pid"]]
        target, pids = "the sweep", [process.pid]
        if jobs and self.draw.random() < 0.5:
            target, pids = "a job", [self.draw.choice(jobs)]
        if not ended:
            send(number, pids)
            self.counts[f"{number.name} to {target}"] += 1
            self.told.append(f"{number.name} to {target}")
        code, out = self._wait(process), process.out.read_text()
        codes = {0, -number, 128 + number} if target == "the sweep" else {0, 1}
        if code not in codes and not (ended and code == 0):
            raise Failure(f"exit code {code} after {number} to {target}: {out[-2000:]}")
        if "Traceback" in out:
            raise Failure(f"a traceback after {number} to {target}: {out[-3000:]}")
        return code


def ledger(sweep: Path) -> list[dict[str, Any]]:
    """The lines of sweep.jsonl, none if it is not there."""
    path = sweep / "sweep.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
