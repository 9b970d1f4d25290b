"""What is in a checkpoint of a run, and how many are kept."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_lightning.rundir.checkpoint import read_checkpoint, write_checkpoint
from gpt_lightning.training.callbacks.checkpoints import random_state, set_random_state


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_number_of_kept_checkpoints(
    links: bool, call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    call(
        "train", *tiny, "trainer.max_steps=11", "trainer.save_every_steps=2", "trainer.keep_last=3",
        "trainer.snapshot_every_steps=5", "logger=none", "callbacks.samples=null",
    )  # fmt: skip
    folder = tmp_path / "run" / "checkpoints"
    steps = {path.name: read_checkpoint(path)["progress"]["step"] for path in folder.iterdir()}
    best = steps.pop("best.ckpt")
    assert best in (4, 8, 11)
    assert steps == {
        "last.ckpt": 11,
        "last-1.ckpt": 10,
        "last-2.ckpt": 8,
        "step-5.ckpt": 5,
        "step-10.ckpt": 10,
    }


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]


def test_random_state_restores_every_generator(tmp_path: Path) -> None:
    draws()  # leaves half a pair of normal numbers in two of the generators
    state = random_state()
    expected = [draws() for _ in range(3)]
    write_checkpoint({"state": state}, tmp_path / "state.ckpt")
    set_random_state(torch.load(tmp_path / "state.ckpt", weights_only=True)["state"])  # no other objects
    assert [draws() for _ in range(3)] == expected
