"""Ranks that Lightning started end with the first one; tests/training/test_processes.py has the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt_lightning.training.callbacks.ranks import FIRST_RANK, Ranks, end_with_parent


def test_rank_whose_first_rank_died_while_it_started_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(FIRST_RANK, "of an earlier run")
    end_with_parent(Path())  # the first rank
    assert os.environ[FIRST_RANK] == str(os.getpid())
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        end_with_parent(Path())  # its parent is not this process, but whatever took its place


def test_rank_leaves_it_to_the_first_one_to_tell_why_the_connection_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    for rank, text, line in (
        ("0", "gloo: closed by peer", "another process of the run ended or cannot be reached; go on"),
        ("0", "gloo: Timed out", "did not answer within trainer.timeout_seconds=; go on"),
        ("0", "gloo connectFullMesh: timed out connecting", "or cannot be reached at .*; go on"),
        ("0", "Application timeout caused pair closure", "did not answer within trainer.timeout_seconds="),
        ("1", "index 3 is out of bounds", "index 3 is out of bounds"),
        ("1", "gloo: closed", "another process of the run ended"),
    ):
        assert not waited
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises((RuntimeError, OSError), match=line), Ranks("go on"):
            raise RuntimeError(text)
    assert len(waited) == 1


def test_error_of_the_first_rank_ends_the_others_before_they_say_anything() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        ranks = Ranks("go on")
        ranks._processes = [other]
        with pytest.raises(OSError, match="disk is full"), ranks:
            raise OSError("disk is full")
        assert other.wait(timeout=30) == -signal.SIGKILL
