"""What was computed from large files, kept as long as they stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.data.files import atomic_write

LARGE = 64 << 20  # bytes, from which on something is kept; smaller files are read each time
SETTLED = 2.0  # seconds that a file must be unchanged, because the clocks of file systems are coarse
_folders: list[Path] = []  # where it is kept


def remember_in(folder: str | Path) -> None:
    """Keep values in a folder, in this process from now on."""
    _folders[:] = [Path(folder).expanduser()]


def remembered(files: Sequence[Path], what: str, compute: Callable[[], Any]) -> Any:
    """A value that depends on the bytes of files alone.

    It is not computed again while the path, size, inode and times of every file are the same. Without a call
    of `remember_in`, everything is computed again.
    """
    before = _identity(files)
    if not _folders or sum(size for _, size, *_ in before) < LARGE:
        return compute()
    place = _folders[0] / hashlib.sha256(json.dumps([what, before]).encode()).hexdigest()
    try:
        return json.loads(place.read_text(encoding="utf-8"))["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    value, changed = compute(), max(max(times) for _, _, _, *times in before)
    if _identity(files) == before and time.time() - changed / 1e9 > SETTLED:
        try:
            with atomic_write(place, text=True, suffix=f".{os.getpid()}.tmp") as file:
                json.dump({"value": value}, file)
        except OSError:
            pass  # it is computed again next time
    return value


def _identity(files: Sequence[Path]) -> list[tuple[str, int, int, int, int]]:
    """Path, size in bytes, inode, and the times of the last change of content and of the inode, in ns."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return [(path, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]
