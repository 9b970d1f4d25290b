"""How the token cache is written: under locks, into temporary folders, with errors that name the cache."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from gpt_lightning.data.files import atomic_write

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to the token cache {folder} ({error.strerror or error}); "
            "make room or give the right to write there, or set paths.cache= to another folder"
        ) from error


@contextlib.contextmanager
def file_lock(path: Path, doing: str = "") -> Iterator[None]:
    """Hold a lock file against other processes, also on other machines that share the folder.

    A process that must wait says what the other one is doing.
    """
    lock = filelock.FileLock(f"{path}.lock")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that %s", doing or f"prepares {path}")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `folder` when the block ends; an error removes it.

    The caller holds the lock of `folder`, so an existing temporary folder was left by a killed process.
    """
    partial, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    with writing(folder.parent):
        for left_over in (partial, old):
            if left_over.exists():
                shutil.rmtree(left_over)
        partial.mkdir()
    try:
        yield partial
        with writing(folder.parent):
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def output(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Open a new file for writing; only errors of the file itself are reported as errors of the cache."""

    def write(data: bytes) -> None:
        with writing(path.parent):
            file.write(data)
            file.flush()  # for those who read it meanwhile

    with contextlib.ExitStack() as stack:
        with writing(path.parent):
            file = stack.enter_context(atomic_write(path))
        yield write
        with writing(path.parent):
            stack.close()
