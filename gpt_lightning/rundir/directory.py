"""A run directory: where runs are found, and the lock that keeps two processes from training one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt_lightning.data.files import read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HYDRA = ".hydra"  # subfolder with the configuration of a run


def runs_below(root: str | Path) -> list[Path]:
    """The run directories below a folder whose training has begun."""
    runs = (path.parent.parent for path in Path(root).expanduser().glob(f"**/{HYDRA}/overrides.yaml"))
    return [run.resolve() for run in runs if (run / "summary.json").is_file()]


def newest_run(root: str | Path, *, prefer_unfinished: bool = False, with_checkpoint: bool = False) -> Path:
    """The run below a folder that was written to last.

    Args:
        root: The folder.
        prefer_unfinished: Whether any unfinished run comes before all finished ones.
        with_checkpoint: Whether to skip runs that have no checkpoint.

    Raises:
        FileNotFoundError: If there is no run.
    """

    def rank(run: Path) -> tuple[bool, float]:
        finished = read_json(run / "summary.json").get("status") == "finished"
        return prefer_unfinished and not finished, (run / "summary.json").stat().st_mtime

    runs = [run for run in runs_below(root) if not with_checkpoint or any(run.glob("checkpoints/*.ckpt"))]
    if not runs:
        kind = "run with a checkpoint" if with_checkpoint else "run"
        raise FileNotFoundError(f"there is no {kind} below {Path(root).expanduser().resolve()}")
    return max(runs, key=rank)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory.

    Raises:
        ValueError: If another process holds it.
    """
    path = folder / HYDRA / "hydra.yaml"
    if fcntl is None or not path.is_file():
        yield
        return
    with path.open("r+") as file:  # a record lock: workers do not inherit it, and it ends with the process
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains the run in {folder}; wait for it or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
