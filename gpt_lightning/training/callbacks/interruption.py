"""What ends a run early: a signal, its time limit, a cluster that wants the machine back."""

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
    """Something asked the run to stop; its state is written.

    Args:
        code: Exit code: 128 + the signal's number, as in a shell, or TIMED_OUT.
    """

    def __init__(self, code: int):
        reason = "its time limit" if code == TIMED_OUT else signal.Signals(code - 128).name
        super().__init__(f"stopped by {reason}")
        self.code = code


class Interruption:
    """Remembers that something asked the run to stop until the run comes to a place where it can.

    Args:
        deadline: When the run has to have stopped, in the seconds of time.monotonic(); None for never.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self._code = 0
        self._asked_at, self._slowest, self._saving = time.monotonic(), 0.0, 0.0  # seconds
        self._requeue_signal: signal.Signals | None = None

    def listen(self, trainer: pl.Trainer) -> None:
        """Handle signals from here on; after Lightning has set its own handlers, which stop within a step."""
        connector = trainer._signal_connector
        if connector.received_sigterm:  # while the run was set up
            connector.received_sigterm, self._code = False, 128 + signal.SIGTERM
        numbers = [signal.SIGINT, signal.SIGTERM]
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
            numbers.append(self._requeue_signal)
        for number in numbers:
            signal.signal(number, self._note)
        self._asked_at = time.monotonic()

    def _note(self, number: int, _: Any) -> None:
        if self._code == 128 + number == 128 + signal.SIGINT:
            raise Interrupted(self._code)  # the second Ctrl-C: at once
        self._code = 128 + number
        log.info("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)

    def code(self, trainer: pl.Trainer) -> int:
        """The exit code to stop with, 0 to go on; for wherever the run could stop, on all ranks at once."""
        now = time.monotonic()
        # the first steps compile; what took long once should not count for ever
        self._slowest = max(now - self._asked_at, 0.9 * self._slowest)
        self._asked_at = now
        due = self.deadline is not None and now + self._slowest + self._saving >= self.deadline
        code = self._code or (TIMED_OUT if due else 0)
        if trainer.world_size > 1:  # a signal may have reached one rank only
            noted = torch.tensor(code, device=trainer.strategy.root_device)
            code = int(trainer.strategy.reduce(noted, reduce_op="max"))
        return code

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long; the time limit leaves room for another."""
        self._saving = max(self._saving, seconds)
        self._asked_at = time.monotonic()  # the time of a checkpoint is not that of a step

    def leave(self, code: int, trainer: pl.Trainer) -> None:
        """End the run, whose state is written, with a requeue where the cluster announced its end.

        Raises:
            Interrupted: Always.
        """
        if self._requeue_signal is not None and code == 128 + self._requeue_signal and trainer.is_global_zero:
            requeue()
        raise Interrupted(code)
