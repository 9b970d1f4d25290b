"""What happens to a run of several processes when one of them dies."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError

log = logging.getLogger(__name__)
FIRST_RANK = "GPT_LIGHTNING_FIRST_RANK"  # environment variable with its process id


class Ranks(Callback, AbstractContextManager):
    """Ends the first rank in one line if another rank that it started dies.

    A collective operation may wait forever for the other rank, and Lightning kills this process without a
    word. As a context manager around the training, it also replaces the errors of a broken connection.

    Args:
        remedy: End of the line.

    Raises:
        ChildProcessError: With the line.
    """

    def __init__(self, remedy: str):
        self.remedy = remedy
        self._ended = threading.Event()  # the training
        self._processes: list[subprocess.Popen] = []

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        if isinstance(error, RuntimeError) and (line := self._death(patience=2)):
            raise ChildProcessError(line) from error
        if _started_by_another_rank() and ("gloo" in str(error) or isinstance(error, DistError)):
            time.sleep(30)  # the first rank has the reason; its end is that of this process

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        started = getattr(trainer.strategy.launcher, "procs", [])
        self._processes = list(started)
        started.clear()  # ends the thread of Lightning that would kill this process
        if self._processes:
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            if (line := self._death()) and not self._ended.wait(3):  # else the main thread found an error
                log.error(line)
                os._exit(1)

    def _death(self, patience: float = 0.0) -> str | None:
        """The line about a process that died, if one does within `patience` seconds."""
        end = time.monotonic() + patience
        while True:
            for rank, process in enumerate(self._processes, start=1):
                if code := process.poll():
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed ({code})"
                    return f"rank {rank} (process {process.pid}) {how}; {self.remedy}"
            if not self._processes or time.monotonic() >= end:
                return None
            time.sleep(0.05)


def _started_by_another_rank() -> bool:
    return "PL_GLOBAL_SEED" in os.environ and int(os.environ.get("LOCAL_RANK", 0)) > 0


def end_with_parent() -> None:
    """Let the kernel kill a rank that Lightning started when the first rank dies, to free its GPU.

    Raises:
        SystemExit: If the first rank is dead already.
    """
    if not _started_by_another_rank():
        os.environ[FIRST_RANK] = str(os.getpid())  # for the ranks that this one starts
    elif sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see prctl(2)
        if os.environ.get(FIRST_RANK, str(os.getppid())) != str(os.getppid()):
            raise SystemExit(1)
