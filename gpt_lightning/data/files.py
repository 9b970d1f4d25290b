"""Atomic file writes.

They are in data/, the lowest folder, because the token cache needs them as well as the run directory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, *, text: bool = False, suffix: str = ".tmp") -> Iterator[IO[Any]]:
    """Write to a temporary file that replaces `path` when the block ends and all bytes are on the disk.

    If the block raises, `path` is unchanged and the temporary file is removed.

    Args:
        path: The file; missing folders are created.
        text: Whether to open the file for UTF-8 text, without newline translation, instead of bytes.
        suffix: Appended to the name of the temporary file; unique where several processes may write.
    """
    temporary = path.with_name(path.name + suffix)
    options: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""} if text else {"mode": "wb"}
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open(**options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows cannot open folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # so that the new name survives a power cut as well
            finally:
                os.close(folder)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write a JSON file atomically; NaN and infinities, which JSON lacks, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with atomic_write(path, text=True) as file:
        file.write(json.dumps(finite(content), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}
