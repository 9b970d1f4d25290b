"""Ranks that Lightning started end together with the first one."""

from __future__ import annotations

import ctypes
import os
import sys
import time

import pytest

from gpt_lightning.training.callbacks.ranks import FIRST_RANK, Ranks, end_with_parent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_rank_whose_first_rank_died_while_it_started_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(FIRST_RANK, "of an earlier run")
    end_with_parent()  # the first rank
    assert os.environ[FIRST_RANK] == str(os.getpid())
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        with pytest.raises(SystemExit):
            end_with_parent()  # its parent is not this process, but whatever took its place
        monkeypatch.setenv(FIRST_RANK, str(os.getppid()))
        end_with_parent()
    finally:
        ctypes.CDLL(None).prctl(1, 0)  # this process need not end with its parent


def test_rank_leaves_it_to_the_first_one_to_tell_why_the_connection_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    for rank, text in (
        ("0", "gloo: closed by peer"),
        ("1", "index 3 is out of bounds"),
        ("1", "gloo: closed"),
    ):
        assert not waited
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(RuntimeError, match=text), Ranks("go on"):
            raise RuntimeError(text)
    assert len(waited) == 1
