"""What happens to a run of several processes when one of them dies."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.distributed import DistError

log = logging.getLogger(__name__)
FIRST_RANK = "GPT_LIGHTNING_FIRST_RANK"  # environment variable with its process id
QUIET = "TORCH_CPP_LOG_LEVEL", "ERROR"  # else torch shows its stack for each connection that is lost


class Ranks(Callback, AbstractContextManager):
    """Ends a process in one line if another one of the run dies or cannot be reached.

    A collective operation may wait long for the other rank, and Lightning kills the first one without a word
    if another rank that it started dies. As a context manager around the training, it also replaces the
    errors of a broken connection.

    Raises:
        ChildProcessError, ConnectionError: With the line.
    """

    def __init__(self, remedy: str):
        self.remedy = remedy
        self._ended = threading.Event()  # the training
        self._processes: list[subprocess.Popen] = []

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._ended.set()
        if not isinstance(error, RuntimeError):
            if isinstance(error, Exception):  # whose line is to be the last one
                self._end_others()
            return
        if line := self._death(patience=2):
            self._end_others()
            raise ChildProcessError(line) from error
        if not isinstance(error, DistError) and not re.search("gloo|NCCL|pair closure", str(error)):
            return
        if _started_by_another_rank():
            time.sleep(30)  # the first rank has the reason; its end is that of this process
        how = "ended or cannot be reached"
        if "connectFullMesh" in str(error):  # gloo connects, and calls a refusal a timeout
            how += " at the address of its host name (GLOO_SOCKET_IFNAME= names a network interface instead)"
        elif re.search("[Tt]imed? ?out", str(error)):
            how = "did not answer within trainer.timeout_seconds="
        raise ConnectionError(f"another process of the run {how}; {self.remedy}") from error

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
                self._end_others()
                os._exit(1)

    def _end_others(self) -> None:
        for process in self._processes:
            process.kill()

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
    """Whether Lightning started this process; torchrun sets RANK, and srun sets no LOCAL_RANK."""
    lightning = "PL_GLOBAL_SEED" in os.environ and "RANK" not in os.environ
    return lightning and int(os.environ.get("LOCAL_RANK", 0)) > 0


def end_with_parent(folder: Path) -> None:
    """Let a rank that Lightning started end, with a line, soon after the first rank, to free its GPU.

    Raises:
        SystemExit: If the first rank is dead already.
    """
    if not _started_by_another_rank():
        os.environ[FIRST_RANK] = str(os.getpid())  # for the ranks that this one starts
        os.environ.setdefault(*QUIET)
        return
    first = int(os.environ.get(FIRST_RANK, os.getppid()))
    if os.getppid() != first:
        raise SystemExit(1)

    def watch() -> None:
        while os.getppid() == first:
            time.sleep(0.5)
        log.error("the first process (%d) was ended; go on with resume=%s", first, folder)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
