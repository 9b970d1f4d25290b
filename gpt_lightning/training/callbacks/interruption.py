"""Early ends of a run: signals, the time limit, preemption by a cluster."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from typing import Any

import lightning.pytorch as pl
import torch

from gpt_lightning.data.signals import ENDING
from gpt_lightning.training.slurm import requeue, slurm_job

log = logging.getLogger(__name__)

TIMED_OUT = 124  # exit code, that of timeout(1)
IMPATIENCE = 2.0  # seconds after the second Ctrl-C in which a third one leaves at once


class Interrupted(BaseException):
    """The run was asked to stop, and its state is on the disk; like KeyboardInterrupt, it is no error.

    Args:
        code: Exit code: 128 + the signal's number, as in a shell, or TIMED_OUT.
    """

    def __init__(self, code: int):
        reason = "its time limit" if code == TIMED_OUT else signal.Signals(code - 128).name
        super().__init__(f"stopped by {reason}")
        self.code = code


class Interruption:
    """Remembers a request to stop until the run reaches a point where it can stop.

    Requests are SIGINT, SIGTERM, SIGHUP (the terminal was closed) and the signal with which SLURM requeues a
    job. A signal that is ignored when the run starts, as under nohup, stays ignored.

    Args:
        deadline: When the run must have stopped, in the seconds of time.monotonic(); None for never.
    """

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline
        self._code = 0
        self._asked_at, self._slowest, self._saving = time.monotonic(), 0.0, 0.0  # seconds
        self._asked_again_at = -math.inf
        self._requeue_signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}  # handlers
        self._process = os.getpid()  # workers inherit the handlers

    def listen(self, trainer: pl.Trainer) -> None:
        """Handle the signals; in other threads than the main one, that is not possible."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = set(ENDING)
        environment = getattr(trainer.strategy, "cluster_environment", None)  # a single device has none
        if slurm_job() is not None and getattr(environment, "auto_requeue", True):
            self._requeue_signal = getattr(environment, "requeue_signal", None) or signal.SIGUSR1
            numbers.add(self._requeue_signal)
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before.setdefault(number, signal.signal(number, self._note))

    def stop_listening(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # after the third Ctrl-C, until the command ends
                signal.signal(number, handler)

    def begin(self, trainer: pl.Trainer) -> None:
        """Replace Lightning's handlers, which would stop in the middle of an optimizer step.

        Called when training starts, since Lightning sets its own shortly before.

        Raises:
            Interrupted: If a signal came before.
        """
        self.listen(trainer)
        if code := self._over_ranks(self._code, trainer):
            raise Interrupted(code)
        self._asked_at = time.monotonic()

    def _note(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            return
        first, self._code = not self._code, self._code or 128 + number  # before the line, which is answered
        if first:
            log.info("%s: finishing the step and writing a checkpoint", signal.Signals(number).name)
        elif number == signal.SIGINT:
            now = time.monotonic()
            if now - self._asked_again_at <= IMPATIENCE:
                signal.signal(number, signal.SIG_IGN)
                raise Interrupted(self._code)
            self._asked_again_at = now
            log.info("please wait; another Ctrl-C now ends the run without a checkpoint of the last steps")

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
