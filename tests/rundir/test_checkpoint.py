"""The checkpoint format: atomic writes, detection of damage, versions."""

from __future__ import annotations

import logging
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt_lightning.rundir.checkpoint import (
    FORMAT_VERSION,
    find_checkpoint,
    find_curves,
    newest_valid_checkpoint,
    read_checkpoint,
    write_checkpoint,
)


def content(value: float = 1.0) -> dict[str, Any]:
    """The least that passes for a checkpoint of a run."""
    weights = {"w": torch.full((300,), value), "b": torch.ones(7)}
    rest: list[str] = ["tokenizer", "loops", "optimizer_states", "progress", "random_states"]
    return {"state_dict": weights, "hyper_parameters": {"model": {}}, **{name: {} for name in rest}}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with last.ckpt, whose weights are 2, and the one before it, whose weights are 1."""
    write_checkpoint(content(2.0), tmp_path / "last.ckpt")
    write_checkpoint(content(1.0), tmp_path / "last-1.ckpt")
    return tmp_path


def weight(path: Path | None) -> float:
    assert path is not None
    return float(read_checkpoint(path)["state_dict"]["w"][0])


def test_newest_undamaged_checkpoint_is_chosen(two: Path) -> None:
    assert weight(newest_valid_checkpoint(two)) == 2
    (two / "last.ckpt").unlink()
    (two / "last-old.ckpt").write_text("a file of the user")
    (two / "last-2.ckpt").write_text("")
    assert weight(newest_valid_checkpoint(two)) == 1


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt.tmp").write_bytes(b"half of one")
    assert newest_valid_checkpoint(tmp_path) is None
    assert newest_valid_checkpoint(tmp_path / "nowhere") is None


def test_truncated_checkpoint_is_not_used(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = (two / "last.ckpt").read_bytes()
    draw = random.Random(0)
    for length in (0, 1, 100, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))):
        (two / "last.ckpt").write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert weight(newest_valid_checkpoint(two)) == 1, length
        (line,) = caplog.messages
        reason = r"\(is damaged or not a checkpoint \([^;]+\)\)"
        assert re.fullmatch(rf"damaged: {two}/last.ckpt {reason}; going on from {two / 'last-1.ckpt'}", line)


def test_flipped_bit_is_detected_or_changes_no_weight(two: Path) -> None:
    whole = (two / "last.ckpt").read_bytes()
    draw, found = random.Random(1), 0
    for _ in range(300):
        position = draw.randrange(len(whole))
        changed = bytes([whole[position] ^ (1 << draw.randrange(8))])
        (two / "last.ckpt").write_bytes(whole[:position] + changed + whole[position + 1 :])
        path = newest_valid_checkpoint(two)
        found += path == two / "last-1.ckpt"
        if path == two / "last.ckpt":
            weights = read_checkpoint(path)["state_dict"]
            assert torch.equal(weights["w"], torch.full((300,), 2.0)), position
            assert torch.equal(weights["b"], torch.ones(7)), position
    assert found > 50


def test_checkpoint_without_optimizer_state_is_not_resumed(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = content()
    del bare["loops"], bare["progress"]
    write_checkpoint(bare, two / "last.ckpt")
    assert newest_valid_checkpoint(two) == two / "last-1.ckpt"
    (line,) = caplog.messages
    assert (
        line
        == f"damaged: {two / 'last.ckpt'} (it lacks loops, progress); going on from {two / 'last-1.ckpt'}"
    )


def test_error_names_all_checkpoints_if_all_are_damaged(two: Path) -> None:
    for name in ("last.ckpt", "last-1.ckpt"):
        (two / name).write_bytes((two / name).read_bytes()[:500])
    begin = rf"^every checkpoint of the run is damaged: {two}/last\.ckpt \(.+\); {two}/last-1\.ckpt \(.+\); "
    end = "begin a new run in another directory{}$"
    with pytest.raises(ValueError, match=begin + end.format("")) as caught:
        newest_valid_checkpoint(two)
    assert "\n" not in str(caught.value)
    write_checkpoint(content(), two / "mine.ckpt")
    write_checkpoint(content(), two / "best.ckpt")
    with pytest.raises(ValueError, match=begin + end.format(f" with init_from={two}/best.ckpt")):
        newest_valid_checkpoint(two)
    for name in ("last.ckpt", "last-1.ckpt"):
        (two / name).unlink()
    alone = "^the run has no last.ckpt to go on from, and does not begin again over what it has; "
    with pytest.raises(ValueError, match=alone + end.format(f" with init_from={two}/best.ckpt")):
        newest_valid_checkpoint(two)


@pytest.mark.parametrize(("step", "rows", "again"), [(1, "1", True), (1, "1 2", False), (2, "1", False)])
def test_run_begins_again_over_a_best_checkpoint_of_its_first_step_alone(
    tmp_path: Path, step: int, rows: str, again: bool
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    write_checkpoint(content() | {"progress": {"step": step}}, folder / "best.ckpt")
    if again:
        assert newest_valid_checkpoint(folder) is None
    (tmp_path / "metrics.csv").write_text("\r\n".join(["step", *rows.split(), ""]))
    if again:
        assert newest_valid_checkpoint(folder) is None
    else:
        with pytest.raises(ValueError, match=r"no last\.ckpt to go on from"):
            newest_valid_checkpoint(folder)


def test_candidates_are_taken_from_the_newest_to_the_oldest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["last.ckpt", "last-1.ckpt", "last-2.ckpt", "last-10.ckpt", "step-100.ckpt", "step-20.ckpt"]
    for name in names:
        write_checkpoint(content(), tmp_path / name)
    for name in names:
        assert newest_valid_checkpoint(tmp_path) == tmp_path / name
        (tmp_path / name).write_bytes(b"damaged")
    both = rf"{tmp_path}/last\.ckpt \([^;]+\); {tmp_path}/last-1\.ckpt \([^;]+\)"
    assert re.fullmatch(f"damaged: {both}; going on from {tmp_path}/last-2.ckpt", caplog.messages[1])


def test_checkpoint_of_a_run_is_its_best_or_last_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint(tmp_path / "run")
    assert str(caught.value) == f"no checkpoint at {tmp_path / 'run'}: it does not exist"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match=r"pipe: it is neither a file nor a folder$"):
            find_checkpoint(tmp_path / "pipe")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint(tmp_path / "run")
    reason = "it has no checkpoints/best.ckpt or last.ckpt"
    assert str(caught.value) == f"no checkpoint at {tmp_path / 'run'}: {reason}"
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "last.ckpt", "best.ckpt"):
        (tmp_path / "run" / name).touch()
        assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / name  # each before those above


def test_curves_of_a_checkpoint_are_those_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, curves = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "run" / "curves.png"
    last.parent.mkdir(parents=True)
    last.touch()
    assert find_curves(last) is None
    curves.touch()
    places = [last, last.parent, tmp_path / "run", curves]
    assert [find_curves(place) for place in places] == [curves] * 4
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(last.parent)
    assert find_curves("~/run") == find_curves("last.ckpt") == curves


FOREIGN = "is not a checkpoint of gpt_lightning"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer": None},
            "is not a checkpoint of gpt_lightning: it lacks hyper_parameters, state_dict, tokenizer",
        ),
        ({"hyper_parameters": {}}, "is not a checkpoint of gpt_lightning: its configuration has no model"),
        (
            {"format_version": "x"},
            f"has checkpoint format x and this release reads up to {FORMAT_VERSION}; use a newer release of "
            "gpt_lightning",
        ),
    ],
    ids=str,
)
def test_content_of_another_kind_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_checkpoint(content() | changes, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="checkpoint") as caught:
        read_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'last.ckpt'} {message}"


def test_damage_is_told_with_its_reason(two: Path) -> None:
    path = two / "last.ckpt"
    with zipfile.ZipFile(path) as archive:
        entry = next(info for info in archive.infolist() if info.filename.endswith("/data/0"))
    whole = bytearray(path.read_bytes())
    whole[whole.index(torch.full((300,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="checksum") as caught:
        read_checkpoint(path)
    reason = f"{entry.filename} has a wrong checksum"
    assert str(caught.value) == f"{path} is damaged or not a checkpoint ({reason}); use another one"
    assert weight_unverified(path) != 2.0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100_000))
    with pytest.raises(ValueError, match="damaged") as caught:
        read_checkpoint(path)
    reason = "it claims to hold more than it does"
    assert str(caught.value) == f"{path} is damaged or not a checkpoint ({reason}); use another one"
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="it lacks"):
        read_checkpoint(path)
    torch.save({"x": Path("/")}, path)
    with pytest.raises(ValueError, match="holds") as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path} holds more than tensors and plain values, so it is not loaded"


def weight_unverified(path: Path) -> float:
    return float(read_checkpoint(path, verify=False)["state_dict"]["w"][0])


class Breaks:
    """Fails while it is being written, as a full disk does."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_failed_write_leaves_the_old_file_and_nothing_else(two: Path) -> None:
    before = (two / "last.ckpt").read_bytes()
    with pytest.raises(OSError, match="cannot write") as caught:
        write_checkpoint({"a": torch.ones(9), "b": Breaks()}, two / "last.ckpt")
    assert str(caught.value) == (
        f"cannot write the checkpoint {two / 'last.ckpt'} (No space left on device); make room or give "
        f"the right to write there, then go on from the checkpoint before it with resume={two.parent}"
    )
    assert (two / "last.ckpt").read_bytes() == before
    assert sorted(path.name for path in two.iterdir()) == ["last-1.ckpt", "last.ckpt"]
    with pytest.raises((AttributeError, pickle.PicklingError)):  # another error stays what it is
        write_checkpoint({"a": lambda: None}, two / "last.ckpt")
    assert (two / "last.ckpt").read_bytes() == before


def test_disk_without_room_is_named_as_the_reason(two: Path) -> None:
    resource = pytest.importorskip("resource")
    before = (two / "last.ckpt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:  # torch then raises an error of its own
        with pytest.raises(OSError, match=r"last\.ckpt \(File too large\); make room"):
            write_checkpoint({"a": torch.ones(1_000_000)}, two / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (two / "last.ckpt").read_bytes() == before


def test_checkpoint_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    write_checkpoint(content(), tmp_path / "new" / "last.ckpt")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its name, the folder


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
def test_values_are_read_back_unchanged(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.ckpt"
    write_checkpoint(tree, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded.pop("format_version") == FORMAT_VERSION
    assert same(loaded, tree)


def test_checkpoint_without_a_version_is_read(tmp_path: Path) -> None:
    torch.save(content(3.0), tmp_path / "last.ckpt")
    assert weight(newest_valid_checkpoint(tmp_path)) == 3
    assert weight(tmp_path / "last.ckpt") == 3


def test_checkpoint_of_a_newer_format_is_refused(two: Path) -> None:
    write_checkpoint(content() | {"format_version": FORMAT_VERSION + 1}, two / "last.ckpt")
    line = rf"last\.ckpt has checkpoint format {FORMAT_VERSION + 1} and .* reads up to {FORMAT_VERSION}; "
    for read in (read_checkpoint, newest_valid_checkpoint):  # nor is the older one used without saying so
        with pytest.raises(ValueError, match=line) as caught:
            read(two)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["{run}", "{run}/checkpoints", "{run}/checkpoints/last.ckpt"])
def test_links_out_of_a_run_directory_are_not_followed(place: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_checkpoint(content(), run / "checkpoints" / "last.ckpt")
    for name in ("secret.png", "secret.ckpt"):
        (tmp_path / name).write_text("secret")
    (run / "inner.png").write_text("inner")
    given = place.format(run=run)

    (run / "curves.png").symlink_to("inner.png")
    assert find_curves(given) == run / "curves.png"
    (run / "curves.png").unlink()
    (run / "curves.png").symlink_to("../secret.png")
    assert find_curves(given) is None

    assert find_checkpoint(given) == run / "checkpoints" / "last.ckpt"
    (run / "checkpoints" / "best.ckpt").symlink_to(tmp_path / "secret.ckpt")
    if not given.endswith(".ckpt"):
        with pytest.raises(ValueError, match=r"best.ckpt leads out of the run directory"):
            find_checkpoint(given)
