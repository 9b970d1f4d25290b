"""What is kept of large files, and when it is computed again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import remembered as module
from gpt_lightning.data.corpus.base import digest_files, file_sha256
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.remembered import remember_in, remembered
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import Byte


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder; files of any size and age are remembered."""
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "SETTLED", 0.0)
    monkeypatch.setattr(module, "_folders", [])
    remember_in(tmp_path / "kept")
    return tmp_path / "kept"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one text")
    return path


def reads(path: Path) -> bool:
    """Whether the file is read to answer; the answer is checked."""
    calls: list[int] = []

    def compute() -> str:
        calls.append(1)
        return path.read_text()

    assert remembered([path], "text", compute) == path.read_text()
    return bool(calls)


def test_unchanged_file_is_read_once(kept: Path, file: Path) -> None:
    assert [reads(file), reads(file), reads(file)] == [True, False, False]


def test_bytes_that_change_under_the_same_size_and_time_are_noticed(kept: Path, file: Path) -> None:
    assert reads(file)
    before = file.stat()
    file.write_bytes(b"two text")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert reads(file)


def test_file_in_the_place_of_another_is_noticed(kept: Path, file: Path, tmp_path: Path) -> None:
    assert reads(file)
    other = tmp_path / "other"
    other.write_bytes(b"new text")
    os.replace(other, file)
    assert reads(file)


def test_file_that_has_just_been_written_is_not_trusted(
    kept: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED", 60.0)
    assert [reads(file), reads(file)] == [True, True]


def test_file_that_changes_while_it_is_read_is_not_remembered(kept: Path, file: Path) -> None:
    def compute() -> str:
        text = file.read_text()
        file.write_bytes(b"changed meanwhile")
        return text

    assert remembered([file], "text", compute) == "one text"
    assert reads(file)


def test_small_files_are_read_each_time(kept: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 9)
    assert [reads(file), reads(file)] == [True, True]


def test_damaged_memory_and_a_folder_that_cannot_be_written_cost_only_time(kept: Path, file: Path) -> None:
    assert reads(file)
    (place,) = kept.iterdir()
    place.write_text("{")
    assert [reads(file), reads(file)] == [True, False]
    remember_in(file / "below a file")
    assert [reads(file), reads(file)] == [True, True]


def test_remembered_digest_is_that_of_the_bytes(kept: Path, file: Path) -> None:
    first = digest_files(["a"], [file])
    assert digest_files(["a"], [file]) == first != digest_files(["b"], [file])
    assert first == file_sha256(file, start=b'[["a"], [[["text", false, 8]]]]')


def test_bins_have_the_same_numbers_when_they_are_remembered(kept: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        np.array([72, 105, 256, 72, 33] * 50, dtype="<u2").tofile(tmp_path / f"{split}.bin")
    first, again = (prepare(TokenBins(str(tmp_path)), Byte(), tmp_path / "cache").meta for _ in range(2))
    assert first == again
    assert (first.splits["val"].tokens, first.splits["val"].bytes, first.splits["val"].documents) == (
        250,
        200,
        50,
    )
