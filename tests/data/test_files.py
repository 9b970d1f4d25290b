"""Atomic writes: a file appears only when it is complete."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpt_lightning.data.files import atomic_write, read_json, write_json


def test_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, rename, events = os.fsync, os.replace, []

    def fsync(file: int) -> None:
        status = os.fstat(file)
        events.append("folder flushed" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes flushed")
        flush(file)

    def replace(source: Path, target: Path) -> None:
        events.append(f"named {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(tmp_path / "new" / "summary.json", {"status": "finished"})
    assert (tmp_path / "new" / "summary.json").read_text() == '{\n  "status": "finished"\n}\n'
    assert events == ["27 bytes flushed", "named summary.json", "folder flushed"]


@pytest.mark.parametrize("old", [None, b"old"])
def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"new", None])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("file", old)] if old else [])


def test_text_is_utf8_without_newline_translation(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file", text=True) as file:
        file.write("é\r\n\n")
    assert (tmp_path / "file").read_bytes() == "é\r\n\n".encode()


def test_json_has_null_for_what_is_not_finite_and_damage_reads_as_empty(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": float("nan"), "b": {"c": float("inf"), "d": 1}})
    assert read_json(path) == {"a": None, "b": {"c": None, "d": 1}}
    path.write_text('{"a": 1')
    assert read_json(path) == {} == read_json(tmp_path / "nothing.json")
