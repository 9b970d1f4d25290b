"""Early ends of a run: signals, the time limit, preemption by a cluster."""

from __future__ import annotations

import logging
import signal
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from gpt_lightning.training.slurm import requeue

log = logging.getLogger(__name__)

TIMED_OUT = 124  # exit code, that of timeout(1)


class Interrupted(Exception):
    """The run was asked to stop, and its state is on the disk.

    Args:
        code: Exit code: 128 + the signal's number, as in a shell, or TIMED_OUT.
    """

    def __init__(self, code: int):
        reason = "its time limit" if code == TIMED_OUT else signal.Signals(code - 128).name
        super().__init__(f"stopped by {reason}")
        self.code = code


class Interruption:
    """Remembers a request to stop until the run reaches a point where it can stop.

    Args:
        deadline: When the run must have stopped, in the seconds of time.monotonic(); None for never.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self._code = 0
        self._asked_at, self._slowest, self._saving = time.monotonic(), 0.0, 0.0  # seconds
        self._requeue_signal: signal.Signals | None = None

    def listen(self, trainer: pl.Trainer) -> None:
        """Replace Lightning's signal handlers, which would stop in the middle of an optimizer step.

        Called when training starts, since Lightning sets its own shortly before.

        Raises:
            Interrupted: If SIGTERM came in between.
        """
        if code := self._over_ranks(128 + signal.SIGTERM if trainer.received_sigterm else 0, trainer):
            raise Interrupted(code)
        numbers = [signal.SIGINT, signal.SIGTERM]
        environment = getattr(trainer.strategy, "cluster_environment", None)  # a single device has none
        if SLURMEnvironment.detect() and getattr(environment, "auto_requeue", True):
            self._requeue_signal = getattr(environment, "requeue_signal", None) or signal.SIGUSR1
            numbers.append(self._requeue_signal)
        for number in numbers:
            signal.signal(number, self._note)
        self._asked_at = time.monotonic()

    def _note(self, number: int, _: Any) -> None:
        if self._code == 128 + number == 128 + signal.SIGINT:
            raise Interrupted(self._code)  # a second Ctrl-C stops at once
        self._code = 128 + number
        log.info("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)

    def code(self, trainer: pl.Trainer) -> int:
        """The exit code to stop with, 0 to continue; called by all ranks where the run can stop."""
        now = time.monotonic()
        # the longest time between two calls, which fades since the first steps may compile
        self._slowest = max(now - self._asked_at, 0.9 * self._slowest)
        self._asked_at = now
        due = self.deadline is not None and now + self._slowest + self._saving >= self.deadline
        return self._over_ranks(self._code or (TIMED_OUT if due else 0), trainer)

    @staticmethod
    def _over_ranks(code: int, trainer: pl.Trainer) -> int:
        """The largest code of all ranks: a signal may have reached only one of them."""
        if trainer.world_size == 1:
            return code
        noted = torch.tensor(code, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(noted, reduce_op="max"))

    def saved(self, seconds: float) -> None:
        """Reserve the time that a checkpoint took, so that another one fits before the time limit."""
        self._saving = max(self._saving, seconds)
        self._asked_at = time.monotonic()  # saving is not part of the next step

    def leave(self, code: int, trainer: pl.Trainer) -> None:
        """End the run; if the cluster announced a preemption, requeue its job before.

        Raises:
            Interrupted: Always.
        """
        if self._requeue_signal is not None and code == 128 + self._requeue_signal and trainer.is_global_zero:
            requeue()
        raise Interrupted(code)
