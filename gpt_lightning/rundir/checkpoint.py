"""The checkpoint format: written, verified and read here, without running code from a file."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from gpt_lightning.data.files import atomic_write
from gpt_lightning.rundir.directory import leads_out
from gpt_lightning.rundir.metrics import read_metrics

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when an older release would misread a new checkpoint
MODEL_KEYS = {"state_dict", "hyper_parameters", "tokenizer"}  # needed to load the model
RESUME_KEYS = {"loops", "optimizer_states", "progress", "random_states"}  # needed to resume the run


class Position(TypedDict):
    """How far a run has come; losses in nats per token."""

    step: int
    train_loss: float
    best_val_loss: float
    lr: float
    metrics: dict[str, float]


class Checkpoint(TypedDict, total=False):
    """Content of a checkpoint; the keys that are not described here are Lightning's."""

    format_version: int  # 1 if it is missing
    state_dict: dict[str, Tensor]  # the network's names after "net."
    hyper_parameters: dict[str, Any]  # the run's resolved configuration in plain containers
    tokenizer: dict[str, Any]  # as `data.tokenizer.to_state` returns it
    corpus_digest: str  # of the text that it was trained on
    tokenizer_digest: str
    progress: Position
    random_states: list[dict[str, Any]]  # of each rank
    pending: dict[str, bool]  # "stop": the run ended early; "validation": one was interrupted
    global_step: int
    epoch: int
    loops: dict[str, Any]
    callbacks: dict[str, Any]
    optimizer_states: list[Any]
    lr_schedulers: list[Any]


class NewerFormatError(ValueError):
    """A checkpoint of a format that this release does not know."""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint at a path: the file itself, or the best, else the last one of a run directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a run directory has a link to it.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for candidate in ("best.ckpt", "last.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        if (path / candidate).is_file():
            if leads_out(path / candidate, path):
                raise ValueError(f"{path / candidate} leads out of the run directory; name what it leads to")
            return path / candidate
    found = "it has no checkpoints/best.ckpt or last.ckpt" if path.is_dir() else "it does not exist"
    found = "it is neither a file nor a folder" if path.exists() and not path.is_dir() else found
    raise FileNotFoundError(f"no checkpoint at {path}: {found}")


def find_curves(checkpoint: str | Path) -> Path | None:
    """curves.png of the run that a checkpoint belongs to, None if there is none, or a link to one."""
    path = Path(checkpoint).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    folder = folder.parent if folder.name == "checkpoints" else folder
    curves = folder / "curves.png"
    return curves if curves.is_file() and not leads_out(curves, folder) else None


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically, with the version of the format.

    Raises:
        OSError: If there is no space or no permission; an earlier file at `path` is unchanged.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **checkpoint}, file)
    except (OSError, RuntimeError) as error:
        # torch replaces an error of the file by one of its own
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(
            f"cannot write the checkpoint {path} ({reason.strerror}); make room or give the right to "
            f"write there, then go on from the checkpoint before it with resume={path.parent.parent}"
        ) from error


def read_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint without running code that it may contain.

    Args:
        path: As in `find_checkpoint`.
        verify: Whether to compare the checksums, which torch does not; takes a second per gigabyte.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, contains code, is of a newer format or not from gpt_lightning.
    """
    path = find_checkpoint(path)
    try:
        with zipfile.ZipFile(path) as archive:  # the container that torch.save writes, uncompressed
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it claims to hold more than it does")
            if verify and (bad := archive.testzip()):
                raise ValueError(f"{bad} has a wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, so it is not loaded") from error
    except PermissionError:
        raise
    except Exception as error:  # the type depends on where the file is damaged
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); use another one") from error
    if not isinstance(checkpoint, dict) or any(not isinstance(checkpoint.get(k), dict) for k in MODEL_KEYS):
        missing = ", ".join(sorted(MODEL_KEYS))
        raise ValueError(f"{path} is not a checkpoint of gpt_lightning: it lacks {missing}")
    version = checkpoint.get("format_version", 1)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{path} has checkpoint format {version} and this release reads up to {FORMAT_VERSION}; "
            "use a newer release of gpt_lightning"
        )
    if not isinstance(checkpoint["hyper_parameters"].get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of gpt_lightning: its configuration has no model")
    return cast(Checkpoint, checkpoint)


def newest_valid_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint that a run can go on from; None if the run is to begin again.

    These are last.ckpt, last-1.ckpt, … and the snapshots, step-<n>.ckpt. A run without them begins again if
    it has no other checkpoint either, or the best.ckpt of its first step alone, after which it was ended.

    Raises:
        ValueError: If there are checkpoints and none of them will do, or one is of a newer format.
    """
    numbered = {kind: _by_number(folder, kind) for kind in ("last", "step")}
    names = [folder / "last.ckpt", *numbered["last"], *reversed(numbered["step"])]
    damaged: list[str] = []
    for path in filter(Path.exists, names):
        problem = _damage(path)
        if problem is None:
            if damaged:
                log.warning("damaged: %s; going on from %s", "; ".join(damaged), path)
            return path
        damaged.append(f"{path} ({problem})")
    others = sorted(str(path) for path in folder.glob("*.ckpt") if path not in names)
    if damaged or (others and not _of_first_step(folder, others)):
        reason = (
            f"every checkpoint of the run is damaged: {'; '.join(damaged)}"
            if damaged
            else "the run has no last.ckpt to go on from, and does not begin again over what it has"
        )
        source = f" with init_from={others[0]}" if others else ""
        raise ValueError(f"{reason}; begin a new run in another directory{source}")
    return None


def _of_first_step(folder: Path, others: list[str]) -> bool:
    """Whether a run has nothing but the best.ckpt of its first step."""
    best, metrics = folder / "best.ckpt", folder.parent / "metrics.csv"
    if others != [str(best)] or _damage(best) or read_checkpoint(best)["progress"]["step"] > 1:
        return False
    return not metrics.exists() or all(row["step"] <= 1 for row in read_metrics(metrics))


def _by_number(folder: Path, kind: str) -> list[Path]:
    """Checkpoints such as last-2.ckpt, ordered by their number."""
    found = (path for path in folder.glob(f"{kind}-*.ckpt") if path.stem[5:].isdecimal())
    return sorted(found, key=lambda path: int(path.stem[5:]))


def _damage(path: Path) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None if it can."""
    try:
        missing = RESUME_KEYS - read_checkpoint(path).keys()
        return f"it lacks {', '.join(sorted(missing))}" if missing else None
    except NewerFormatError:
        raise
    except (OSError, ValueError) as error:
        return str(error).removeprefix(f"{path} ").removesuffix("; use another one")
