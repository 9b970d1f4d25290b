"""A run directory: where runs are found, and the lock that keeps two processes from training one run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gpt_lightning.data.files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
HYDRA = ".hydra"  # subfolder with the configuration of a run
_locks: dict[Path, IO[Any]] = {}  # held by this process, by run directory


def holds_run(folder: Path) -> bool:
    """Whether a run has trained in a directory; one that ended before has nothing to lose."""
    return (folder / "summary.json").exists() or any(folder.glob("checkpoints/*.ckpt"))


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path below a folder leads out of it by a symbolic link.

    A run directory may be somebody else's, who would have the user's own files read or overwritten.
    """
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def refuse_links(folder: Path) -> None:
    """Refuse a run directory that has symbolic links out of it.

    Raises:
        ValueError: Names the first one.
    """
    for path in folder.rglob("*") if (folder / HYDRA).exists() else ():
        if path.is_symlink() and leads_out(path, folder):
            raise ValueError(f"{path} is a link out of the run directory; put what it leads to in its place")


def runs_below(root: str | Path) -> list[Path]:
    """The run directories below a folder whose training has begun."""
    runs = (path.parent.parent for path in Path(root).expanduser().glob(f"**/{HYDRA}/overrides.yaml"))
    return [run.resolve() for run in runs if (run / "summary.json").is_file()]


def find_run(
    name: str | Path,
    root: str | Path = "outputs",
    *,
    prefer_unfinished: bool = False,
    with_checkpoint: bool = False,
) -> Path:
    """The path that a name of a run or a checkpoint stands for.

    `latest` is the run below a folder that was written to last, `NAME/latest` the one below its subfolder
    NAME. With `prefer_unfinished`, any run that can go on comes before those that finished, and those that
    failed before their first checkpoint.

    Raises:
        FileNotFoundError: If there is no run.
    """
    path = Path(name).expanduser()
    if path.name != "latest" or path.exists():
        return path

    def has_checkpoint(run: Path) -> bool:
        return any(run.glob("checkpoints/*.ckpt"))

    def rank(run: Path) -> tuple[bool, float]:
        status = read_json(run / "summary.json").get("status")
        unfinished = status not in ("finished", "pruned") and (status != "failed" or has_checkpoint(run))
        return prefer_unfinished and unfinished, (run / "summary.json").stat().st_mtime

    folder = Path(root) / path.parent
    runs = [run for run in runs_below(folder) if not with_checkpoint or has_checkpoint(run)]
    if not runs:
        kind = "run with a checkpoint" if with_checkpoint else "run"
        raise FileNotFoundError(f"there is no {kind} below {folder.expanduser().resolve()}")
    run = max(runs, key=rank)
    log.info("%s is %s", path, run)
    return run


def take_lock(folder: Path) -> None:
    """Take the lock of a run directory for this process, unless it has it already.

    Raises:
        ValueError: If another process holds it.
    """
    if fcntl is None or folder in _locks:
        return
    path = folder / HYDRA / "lock"
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    file = path.open("a")  # a record lock: workers do not inherit it, and it ends with the process
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)  # longer than `is_locked` of another process takes
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process trains in {folder}; wait for it or end it") from None
    except OSError:
        pass  # a file system without locks
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        file.close()  # its last holder has removed the file meanwhile
        return take_lock(folder)
    _locks[folder] = file


def release_lock(folder: Path) -> None:
    """Release the lock if this process holds it."""
    if (file := _locks.pop(folder, None)) is not None:
        file.close()


def is_locked(folder: Path) -> bool:
    """Whether a process, this one or another, holds the lock of a run directory."""
    if fcntl is None or folder in _locks:
        return folder in _locks
    try:
        with (folder / HYDRA / "lock").open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or the file system has none
        pass
    return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory, and release it also if it was taken before.

    Raises:
        ValueError: If another process holds it.
    """
    take_lock(folder)
    try:
        yield
    finally:
        release_lock(folder)
