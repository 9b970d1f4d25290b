"""Atomic file writes.

They are in data/, the lowest folder, because the token cache needs them as well as the run directory.
"""

from __future__ import annotations

import errno
import hashlib
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


def finite(value: Any) -> Any:
    """A value for JSON, which lacks NaN and infinities: they become null."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Mapping[Any, Any]) -> None:
    """Write a JSON file atomically; numbers that are not finite become null."""
    with atomic_write(path, text=True) as file:
        file.write(json.dumps(finite(content), indent=2) + "\n")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own checksum, for `unsealed`."""
    text = json.dumps(finite(content), sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def unsealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON object from `sealed`; files of older releases have no checksum.

    Raises:
        ValueError: If it is not what was sealed.
    """
    bare = {key: value for key, value in content.items() if key != "sha256"}
    if "sha256" in content and sealed(bare)["sha256"] != content["sha256"]:
        raise ValueError("its checksum differs")
    return bare


@contextmanager
def reading(source: object, problem: str, remedy: str = "use another one") -> Iterator[None]:
    """Turns every error that the content of a file can cause into one line that names the file.

    Raises:
        ValueError: `source` `problem` (the reason); `remedy`.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        text = " ".join(str(error).split()).split(" (Could this error")[0][:500]  # torch asks for reports
        reason = text if type(error) is ValueError else f"{type(error).__name__}: {text}"
        raise ValueError(f"{source} {problem} ({reason}); {remedy}") from error


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError, RecursionError, ValueError: If there is none.
    """
    if not path.is_file():  # a pipe would be waited for without end
        raise FileNotFoundError(errno.ENOENT, "there is no ordinary file", str(path))
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        return json_object(path)
    except (OSError, RecursionError, ValueError):
        return {}
