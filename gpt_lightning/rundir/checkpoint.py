"""The format of checkpoints: found, verified and read without running code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch


def find_checkpoint(path: str | Path) -> Path:
    """The file that a user means: a checkpoint, or the best (else the last) one of a run directory.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for candidate in ("best.ckpt", "last.ckpt", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        if (path / candidate).is_file():
            return path / candidate
    found = "it has no checkpoints/best.ckpt or last.ckpt" if path.is_dir() else "it does not exist"
    raise FileNotFoundError(f"no checkpoint at {path}: {found}")


def find_curves(checkpoint: str | Path) -> Path | None:
    """The picture of the run that a checkpoint is from, if it is there."""
    path = Path(checkpoint).expanduser().absolute()
    folder = path.parent if path.is_file() else path
    curves = (folder.parent if folder.name == "checkpoints" else folder) / "curves.png"
    return curves if curves.is_file() else None


def read_checkpoint(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Args:
        path: As in `find_checkpoint`.
        verify: Whether to compare the checksums first, which torch does not do; a second per gigabyte.

    Returns:
        `state_dict`, `hyper_parameters` (the run's configuration), `tokenizer`, `progress`, and what
        Lightning needs to resume.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds code, or is not one of gpt_lightning's.
    """
    path = find_checkpoint(path)
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:  # which torch.save writes
                if bad := archive.testzip():
                    raise ValueError(f"{bad} has a wrong checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, so it is not loaded") from error
    except PermissionError:
        raise
    except Exception as error:  # what is raised for a damaged file depends on where the damage is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); use another one") from error
    keys = {"state_dict", "hyper_parameters", "tokenizer"}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in keys):
        raise ValueError(f"{path} is not a checkpoint of gpt_lightning: it lacks {', '.join(sorted(keys))}")
    if not isinstance(checkpoint["hyper_parameters"].get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of gpt_lightning: its configuration has no model")
    return checkpoint
