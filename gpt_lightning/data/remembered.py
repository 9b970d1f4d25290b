"""What was computed from large files, kept as long as they stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt_lightning.data.cache_files import file_lock
from gpt_lightning.data.files import atomic_write

log = logging.getLogger(__name__)

LARGE = 64 << 20  # bytes, from which on something is kept; smaller files are read each time
SETTLED = 2.0  # seconds that a file must be unchanged, because the clocks of file systems are coarse


@dataclass
class _Memory:
    folder: Path  # where values are kept
    verify: bool
    verified: set[Path] = field(default_factory=set)  # what was computed since


_memories: list[_Memory] = []  # at most one


def remember_in(folder: str | Path, *, verify: bool = False) -> None:
    """Keep values in a folder, in this process from now on.

    With `verify`, values that were kept before are computed again, and a warning says which were wrong.
    """
    _memories[:] = [_Memory(Path(folder).expanduser(), verify)]


def verifying() -> bool:
    """Whether `remember_in` was told to trust nothing that was kept."""
    return any(memory.verify for memory in _memories)


def remembered(files: Sequence[Path], what: str, compute: Callable[[], Any]) -> Any:
    """A value that depends on the bytes of files alone.

    It is not computed again while the path, size, inode and times of every file are the same, and only one of
    several processes computes it. Without a call of `remember_in`, everything is computed again.
    """
    before = _identity(files)
    if not _memories or sum(size for _, size, *_ in before) < LARGE:
        return compute()
    memory = _memories[0]
    place = memory.folder / hashlib.sha256(json.dumps([what, before]).encode()).hexdigest()
    trusted = not memory.verify or place in memory.verified
    if trusted and (known := _read(place)) is not None:
        return known
    more = len(files) - 1
    name = f"{files[0]}{f' and {more} more file' + 's' * (more > 1) if more else ''}"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):  # a process that gets no lock does not wait
            stack.enter_context(file_lock(place, f"reads {name}"))
        known = _read(place)
        if trusted and known is not None:
            return known
        value, changed = compute(), max(max(times) for _, _, _, *times in before)
        if known not in (None, value):
            log.warning("%s has the same size and times as when it was read, but another content", name)
        if _identity(files) == before and time.time() - changed / 1e9 > SETTLED:
            with contextlib.suppress(OSError):  # it is computed again next time
                with atomic_write(place, text=True, suffix=f".{os.getpid()}.tmp") as file:
                    json.dump({"value": value}, file)
                memory.verified.add(place)
    return value


def _read(place: Path) -> Any:
    """The value that is kept there; None if there is none."""
    try:
        return json.loads(place.read_text(encoding="utf-8"))["value"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(files: Sequence[Path]) -> list[tuple[str, int, int, int, int]]:
    """Path, size in bytes, inode, and the times of the last change of content and of the inode, in ns."""
    stats = [(str(file.resolve()), file.stat()) for file in files]
    return [(path, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]
