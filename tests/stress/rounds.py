"""One round: a run that nothing happens to, and the same run with interruptions, compared at the end."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.stress.configurations import Material, draw_configuration
from tests.support.comparison import differences
from tests.support.zygote import Process, Zygote

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SLOW = {"os:fsync": 0.05}  # so that a signal more often comes while something is written
MAX_ENDS = 6  # interruptions of a run
PATIENCE = 300  # seconds that a run may take
REMAINS = 60  # seconds that processes of a run may outlive it


class Failure(Exception):
    """A promise that did not hold."""


@dataclass
class Round:
    """A round of the stress program.

    Args:
        number: Of the round; with the seed, it determines everything but the moments of the signals.
        seed: Of the program.
        zygote: Starts the processes.
        material: What the runs read.
        folder: Where the round writes; made here.
    """

    number: int
    seed: int
    zygote: Zygote
    material: Material
    folder: Path
    counts: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)  # what happened to the run
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.draw = random.Random(f"{self.seed} {self.number}")
        self.run = self.folder / "run"
        self.sessions: list[Process] = []

    def play(self) -> None:
        """Play the round.

        Raises:
            Failure: With one line per promise that did not hold.
        """
        self.folder.mkdir(parents=True)
        configuration = draw_configuration(self.draw, self.material)
        self.features = configuration.features
        (self.folder / "arguments.txt").write_text("\n".join(configuration.arguments))
        reference = self.folder / "reference" / "run"  # the name of the other one, which is in its picture
        begun = time.monotonic()
        self.arguments = configuration.arguments
        process = self._start([*self.arguments, f"hydra.run.dir={reference}"], cache="cache of the reference")
        if self._wait(process) != 0:
            raise Failure(f"the undisturbed run failed: {process.out.read_text()[-2000:]}")
        self.seconds, self.steps = time.monotonic() - begun, logged_step(reference)
        if self.draw.random() < 0.2:
            self._on_a_small_disk(reference)
        else:
            self._interrupted()
            self._compare(reference)

    def _compare(self, reference: Path) -> None:
        found = differences(self.run, reference)
        if (
            found == ["curves.png differs"]
            and "curves.png was not drawn" in self.sessions[-1].out.read_text()
        ):
            found = []  # it had no room, and was said
        if found:
            raise Failure("\n  ".join(found))
        self.counts["runs that ended as if nothing had happened"] += 1

    # sessions: the processes of a run one after the other

    def _start(self, arguments: list[str], *, cache: str = "cache", slow: bool = False) -> Process:
        process = self.zygote.start(
            "train",
            *arguments,
            cwd=self.folder,
            slow=SLOW if slow else {},
            GPT_LIGHTNING_CACHE=str(self.folder / cache),
        )
        self.sessions.append(process)
        return process

    def _begin_or_resume(self, *, slow: bool = False) -> Process:
        """Go on with the run, or begin it if it was not there yet."""
        if not (self.run / ".hydra" / "overrides.yaml").exists() or not (self.run / "train.log").exists():
            return self._start([*self.arguments, f"hydra.run.dir={self.run}"], slow=slow)
        more = []
        if self.draw.random() < 0.2 and "two processes" not in self.features:
            more.append(f"data.num_workers={self.draw.choice([0, 1])}")
        if slow and self.draw.random() < 0.2:
            more.append(f"time_limit=0:00:0{self.draw.randint(2, 5)}")
        for happens in (self._delete_cache, self._move, self._damage_checkpoint, self._damage_summary):
            if self.draw.random() < 0.1:
                happens()
        return self._start([f"resume={self.run}", *more], slow=slow)

    def _delete_cache(self) -> None:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        self._tell("cache deleted")

    def _move(self) -> None:
        self.run = self.run.rename(self.run.parent / f"moved {len(self.sessions)}")
        self._tell("run directory moved")

    def _damage_checkpoint(self) -> None:
        """Cut last.ckpt or change a byte of it, if there is the one before."""
        if finished(self.run):  # then nobody reads it
            return
        last, before = self.run / "checkpoints" / "last.ckpt", self.run / "checkpoints" / "last-1.ckpt"
        if not last.exists() or not before.exists() or last.samefile(before):
            return
        content = bytearray(last.read_bytes())
        place = self.draw.randrange(len(content))
        if cut := self.draw.random() < 0.5:
            del content[place:]
        else:
            content[place] ^= 1
        last.unlink()  # another name may be the same file
        last.write_bytes(content)
        self._tell(f"last.ckpt {'cut' if cut else 'with a wrong bit'}")

    def _damage_summary(self) -> None:
        path = self.run / "summary.json"
        if path.exists() and not finished(self.run):
            text = path.read_text()
            path.write_text(text[: self.draw.randrange(len(text) + 1)])
            self._tell("summary.json cut")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        self.counts[what] += 1

    def _wait(self, process: Process) -> int:
        try:
            return process.wait(PATIENCE)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise Failure(f"it hangs: {process.out.read_text()[-2000:]}") from None

    def _interrupted(self) -> None:
        """End the run at random moments until it finishes."""
        for _ in range(self.draw.randint(1, MAX_ENDS)):
            process = self._begin_or_resume(slow=self.draw.random() < 0.5)
            if self._end(process) == 0:
                break
        else:
            process = self._begin_or_resume()
            if (code := self._wait(process)) != 0:
                raise Failure(f"it did not go on (exit code {code}): {process.out.read_text()[-2000:]}")
        self._nothing_is_left()

    def _end(self, process: Process) -> int:
        """Send a signal at a random moment; the exit code."""
        number = self.draw.choice(SIGNALS)
        moment, due = self._moment(process)
        ended = self._until(process, due)
        step = logged_step(self.run)
        target, pids = self._target(process)
        if ended:
            self.counts["sessions that ended before their signal"] += 1
        else:
            for _ in range(3 if number != signal.SIGKILL and self.draw.random() < 0.2 else 1):
                send(number, pids)
                time.sleep(self.draw.random() * 0.3)
            self.counts[f"{number.name} to {target}"] += 1
            self.counts[f"signals {moment}"] += 1
            self.told.append(f"{number.name} to {target} at step {step}")
        code = self._wait(process)
        self._check(process, 0 if ended else number, code, alone=target != "one rank")
        return code

    def _moment(self, process: Process) -> tuple[str, Callable[[], bool]]:
        """A random moment of the run, and whether it has come."""
        kind = self.draw.choice(["at any time", "at any time", "after a step", "while writing"])
        if kind == "at any time":
            left = 1 - logged_step(self.run) / max(self.steps, 1)
            end = time.monotonic() + self.draw.random() * (1 + left * (self.seconds - 1))
            return kind, lambda: time.monotonic() >= end
        if kind == "after a step":
            step = logged_step(self.run) + self.draw.randint(1, 20)
            return kind, lambda: logged_step(self.run) >= step
        writes, seen = self.draw.randint(1, 6), set()

        def writing() -> bool:
            for path in self.run.glob("**/*.tmp"):
                with contextlib.suppress(OSError):
                    seen.add((path.name, path.stat().st_ino))
            return len(seen) >= writes

        return kind, writing

    @staticmethod
    def _until(process: Process, due: Callable[[], bool]) -> bool:
        """Wait for a moment; whether the process ended before."""
        end = time.monotonic() + PATIENCE
        while not due() and time.monotonic() < end:
            if process.poll() is not None:
                return True
            time.sleep(0.003)
        return process.poll() is not None

    def _target(self, process: Process) -> tuple[str, list[int]]:
        """Which processes get the signal: the first, all of the group, or one rank of two."""
        kind = self.draw.choice(["the process", "the process", "the whole group"])
        if "two processes" in self.features:
            kind = self.draw.choice(["the process", "the whole group", "one rank"])
        if kind == "the process":
            return kind, [process.pid]
        others = [pid for pid in group(process.pid) if pid != process.pid]
        if kind == "the whole group":
            return kind, [process.pid, *others]
        ranks = [pid for pid in others if environment(pid).get("LOCAL_RANK") == "1"]
        return (kind, ranks[:1]) if ranks else ("the process", [process.pid])

    def _check(self, process: Process, number: int, code: int, *, alone: bool) -> None:
        """Whether a session ended as it should have after a signal (0: after none)."""
        out = process.out.read_text()
        codes = {0, 124, -number, 128 + number} if number else {0, 124}  # 124: the time limit
        if not alone and number == signal.SIGKILL:
            codes = {0, 1, 124}  # one line says that a rank is gone
        if (
            "two processes" in self.features
            and code == -signal.SIGKILL
            and (number != signal.SIGKILL or not alone)
        ):
            codes.add(code)  # Lightning kills the first rank if another one dies before they have met
            self.counts["first rank killed because another died at its start"] += 1
        if code not in codes:
            raise Failure(f"exit code {code} after {number}: {out[-2000:]}")
        if "Traceback" in out and code != -signal.SIGKILL:  # whose other processes may complain
            raise Failure(f"a traceback after {number}: {out[-3000:]}")
        self.counts["time limits"] += code == 124
        if number and code == 128 + number and "go on with resume=" in out:
            self.counts["signals that saved the run"] += 1

    def _nothing_is_left(self) -> None:
        end = time.monotonic() + REMAINS
        while left := [pid for process in self.sessions for pid in group(process.pid)]:
            if time.monotonic() > end:
                names = [f"{pid} {command_line(pid)}" for pid in left]
                send(signal.SIGKILL, left)
                raise Failure(f"processes are left: {names}")
            time.sleep(0.1)

    # a disk that fills

    def _on_a_small_disk(self, reference: Path) -> None:
        """Run on a disk that is too small, and enlarge it step by step."""
        disk = self.folder / "disk"
        disk.mkdir()
        self.run = disk / "run"
        used = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file()) // 1024
        files = sum(1 for _ in reference.rglob("*"))
        if few_files := self.draw.random() < 0.25:
            limits = [f"nr_inodes={n}" for n in sorted(self.draw.sample(range(3, files + 8), 3))]
        else:
            limits = [f"size={self.draw.randint(20, int(used * 1.3))}k" for _ in range(3)]
            limits.sort(key=lambda limit: int(limit[5:-1]))
        with mounted(disk, limits[0]) as resize:
            if resize is None:
                self.told.append("no disk: mounting is not allowed here")
                self.counts["skipped: mounting is not allowed here"] += 1
                return
            for limit in [*limits, "size=50m,nr_inodes=1000"]:
                resize(limit)
                self.told.append(f"disk of {limit}")
                process = self._begin_or_resume()
                code = self._wait(process)
                if code == 0:
                    break
                self._check_full(process, code)
                self.counts["few files" if few_files else "full disks"] += 1
            if code != 0:
                raise Failure(f"it did not go on with room: {process.out.read_text()[-2000:]}")
            self._compare(reference)

    @staticmethod
    def _check_full(process: Process, code: int) -> None:
        out = process.out.read_text()
        lines = [line for line in out.splitlines() if line]
        if code != 1 or "Traceback" in out or not re.match("error: .*No space left on device", lines[-1]):
            raise Failure(f"exit code {code} on a full disk: {out[-3000:]}")


@contextlib.contextmanager
def mounted(folder: Path, limit: str) -> Iterator[Callable[[str], None] | None]:
    """A small disk at a folder; gives a function that changes its size, None if mounting is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", limit, "small", str(folder)]
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if not root or subprocess.run(command, capture_output=True).returncode != 0:
        yield None
        return

    def resize(more: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{more}", str(folder)], check=True)

    try:
        yield resize
    finally:
        shutil.copytree(folder, folder.parent / "disk_after", dirs_exist_ok=True)
        subprocess.run(["umount", "-l", str(folder)], check=True)


def finished(run: Path) -> bool:
    path = run / "summary.json"
    return path.exists() and '"finished"' in path.read_text()


def logged_step(run: Path) -> int:
    """The last step in metrics.csv, 0 if there is none."""
    try:
        last = (run / "metrics.csv").read_text().splitlines()[-1].partition(",")[0]
    except (OSError, IndexError):
        return 0
    return int(last) if last.isdecimal() else 0


def group(pid: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == pid and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def environment(pid: int) -> dict[str, str]:
    """The variables that a process was started with."""
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
