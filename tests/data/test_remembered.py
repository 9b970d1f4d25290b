"""What is kept of large files, and when it is computed again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data import remembered as module
from gpt_lightning.data.corpus.base import digest_files, file_sha256
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.remembered import remember_in, remembered
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import Byte

PROCESS = """
import logging
import sys
import time
from pathlib import Path
from gpt_lightning.data import remembered as module

logging.basicConfig(level="INFO", format="%(message)s")
module.LARGE, module.SETTLED = 0, 0.0
file, folder, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def compute():
    (folder.parent / f"{name} computes").touch()
    end = time.monotonic() + 30
    while not (folder.parent / f"{name} may end").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return file.read_text()

module.remember_in(folder)
print(module.remembered([file, file], "text", compute))
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder; files of any size and age are remembered."""
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "SETTLED", 0.0)
    monkeypatch.setattr(module, "_memories", [])
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


def place_of_the_value(kept: Path) -> Path:
    (place,) = (path for path in kept.iterdir() if path.suffix != ".lock")
    return place


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
    place_of_the_value(kept).write_text("{")
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


def test_verification_computes_once_more_and_names_the_file_whose_content_changed(
    kept: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert reads(file)
    remember_in(kept, verify=True)
    assert [reads(file), reads(file)] == [True, False]
    assert not caplog.messages
    place_of_the_value(kept).write_text('{"value": "old text"}')
    remember_in(kept)
    assert remembered([file], "text", str) == "old text"
    remember_in(kept, verify=True)
    assert reads(file)
    (line,) = caplog.messages
    assert line.startswith(f"{file} has the same size and times")
    remember_in(kept)
    assert not reads(file)


def test_command_verifies_the_text_and_the_tokens_of_any_size(
    kept: Path, small_text: Path, tmp_path: Path, call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("gpt_lightning.data.token_store.VERIFY_BELOW", 0)
    cache = tmp_path / "cache"
    options = ["data=text", f"data.path={small_text}", "tokenizer=byte", f"paths.cache={cache}"]
    call("prepare", *options)
    (store,) = (path.parent for path in cache.glob("*/meta.json"))
    files = {path.name: path.read_bytes() for path in store.iterdir()}
    (store / "val.bin").write_bytes(bytes(len(files["val.bin"])))
    call("prepare", *options)
    assert files != {path.name: path.read_bytes() for path in store.iterdir()}
    place_of_the_value(cache / "remembered").write_text(f'{{"value": "{64 * "0"}"}}')
    call("prepare", *options, "verify=true")
    assert files == {path.name: path.read_bytes() for path in store.iterdir()}
    assert list(cache.glob("*/meta.json")) == [store / "meta.json"]
    assert f"{small_text} has the same size and times" in capfd.readouterr().err


@pytest.mark.parametrize("killed", [False, True])
def test_one_of_two_processes_reads_and_the_other_waits_for_it(
    file: Path, tmp_path: Path, killed: bool
) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, str(file), str(tmp_path / "kept"), name]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def wait_for(name: str) -> None:
        end = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < end
            time.sleep(0.01)

    with start("first") as first:
        wait_for("first computes")
        with start("second") as second:
            assert second.stderr
            line = f"waiting for another process that reads {file} and 1 more file\n"
            assert second.stderr.readline() == line
            (tmp_path / "second may end").touch()
            if killed:
                first.kill()
            (tmp_path / "first may end").touch()
            assert second.communicate(timeout=60)[0] == "one text\n"
        assert killed or first.communicate(timeout=60)[0] == "one text\n"
    assert (tmp_path / "second computes").exists() == killed
