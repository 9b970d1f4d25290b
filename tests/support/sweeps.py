"""Sweeps as a user starts them, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import read_ledger
from support.runs import TINY
from support.zygote import Process, Zygote

OPTIONS = [*TINY, "logger=none", "callbacks.samples=null", "callbacks.layers=null"]


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning.train", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def fork(zygote: Zygote, folder: Path, *arguments: str) -> Process:
    """The same without the seconds of imports, neither of the command nor of its jobs."""
    return zygote.start("train", *arguments, cwd=folder, spares=1)


def ended(process: Process, code: int) -> str:
    assert process.wait(240) == code, process.out.read_text()
    return process.out.read_text()


def end(process: subprocess.Popen[str], code: int) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    return out


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def ledger(folder: Path) -> dict[str, dict[str, Any]]:
    return {job["name"]: job for job in read_ledger(folder)}


def reached(run: Path, step: int) -> Callable[[], bool]:
    path = run / "metrics.csv"
    return lambda: path.exists() and any(row["step"] >= step for row in read_metrics(path))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
