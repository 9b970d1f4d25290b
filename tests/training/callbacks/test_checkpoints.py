"""Checkpoint files: whole or not there, checked before use; what is kept and for how long."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.training.callbacks.checkpoints import (
    AtomicCheckpointIO,
    good_checkpoint,
    random_state,
    set_random_state,
)


def content(value: float = 1.0) -> dict[str, Any]:
    """The least that passes for a checkpoint of a run."""
    weights = {"w": torch.full((300,), value), "b": torch.ones(7)}
    rest: list[str] = ["tokenizer", "loops", "optimizer_states", "progress", "random_states"]
    return {"state_dict": weights, "hyper_parameters": {"model": {}}, **{name: {} for name in rest}}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with last.ckpt, whose weights are 2, and the one before it, whose weights are 1."""
    AtomicCheckpointIO().save_checkpoint(content(2.0), tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "last-1.ckpt")
    return tmp_path


def weight(path: Path | None) -> float:
    assert path is not None
    return float(read_checkpoint(path)["state_dict"]["w"][0])


def test_newest_whole_checkpoint_is_chosen(two: Path) -> None:
    assert weight(good_checkpoint(two)) == 2
    (two / "last.ckpt").unlink()
    (two / "last-old.ckpt").write_text("a file of the user")
    (two / "last-2.ckpt").write_text("")
    assert weight(good_checkpoint(two)) == 1


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half of one")
    assert good_checkpoint(tmp_path) is None
    assert good_checkpoint(tmp_path / "nowhere") is None


def test_checkpoint_cut_anywhere_is_not_used(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (two / "last.ckpt").read_bytes()
    draw = random.Random(0)
    for length in (0, 1, 100, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))):
        (two / "last.ckpt").write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert weight(good_checkpoint(two)) == 1, length
        (line,) = caplog.messages
        assert str(two / "last.ckpt") in line
        assert f"going on from {two / 'last-1.ckpt'}" in line
        assert "\n" not in line


def test_changed_byte_is_found_or_changes_nothing(two: Path) -> None:
    whole = (two / "last.ckpt").read_bytes()
    draw, found = random.Random(1), 0
    for _ in range(300):
        position = draw.randrange(len(whole))
        changed = bytes([whole[position] ^ (1 << draw.randrange(8))])
        (two / "last.ckpt").write_bytes(whole[:position] + changed + whole[position + 1 :])
        path = good_checkpoint(two)
        found += path == two / "last-1.ckpt"
        if path == two / "last.ckpt":
            weights = read_checkpoint(path)["state_dict"]
            assert torch.equal(weights["w"], torch.full((300,), 2.0)), position
            assert torch.equal(weights["b"], torch.ones(7)), position
    assert found > 50


def test_weights_without_a_run_are_not_gone_on_from(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = content()
    del bare["loops"]
    AtomicCheckpointIO().save_checkpoint(bare, two / "last.ckpt")
    assert good_checkpoint(two) == two / "last-1.ckpt"
    assert "it lacks loops" in caplog.text


def test_only_damaged_checkpoints_are_an_error_that_names_them(two: Path) -> None:
    for name in ("last.ckpt", "last-1.ckpt"):
        (two / name).write_bytes((two / name).read_bytes()[:500])
    with pytest.raises(ValueError, match=r"last\.ckpt \(.*last-1\.ckpt \(.*init_from=") as caught:
        good_checkpoint(two)
    assert "\n" not in str(caught.value)


class Breaks:
    """Fails while it is being written, as a full disk does."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_failed_write_leaves_the_old_file_and_nothing_else(two: Path) -> None:
    before = (two / "last.ckpt").read_bytes()
    with pytest.raises(
        OSError, match=rf"cannot write the checkpoint {two / 'last.ckpt'} \(No space left"
    ) as caught:
        AtomicCheckpointIO().save_checkpoint({"a": torch.ones(9), "b": Breaks()}, two / "last.ckpt")
    assert str(two / "last.ckpt") in str(caught.value)
    assert f"resume={two.parent}" in str(caught.value)
    assert (two / "last.ckpt").read_bytes() == before
    assert sorted(path.name for path in two.iterdir()) == ["last-1.ckpt", "last.ckpt"]


def test_new_name_appears_only_when_all_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    AtomicCheckpointIO().save_checkpoint(content(), tmp_path / "new" / "last.ckpt")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_as_many_checkpoints_are_kept_as_asked_for(
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
    AtomicCheckpointIO().save_checkpoint(
        {"state": state}, tmp_path / "state.ckpt"
    )  # tensors and numbers only
    set_random_state(torch.load(tmp_path / "state.ckpt", weights_only=True)["state"])
    assert [draws() for _ in range(3)] == expected


scalars = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text()
arrays = st.sampled_from([np.float32, np.float64, np.int64, np.uint8]).flatmap(
    lambda kind: hnp.arrays(kind, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
trees = st.recursive(
    scalars | arrays.map(torch.from_numpy),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, max_examples=60)
@given(tree=st.dictionaries(st.text(), trees, max_size=5))
def test_what_is_saved_comes_back(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round.ckpt"
    AtomicCheckpointIO().save_checkpoint(tree, path)
    assert same(torch.load(path, weights_only=True), tree)
