"""Which code a run was made with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from contextlib import suppress
from pathlib import Path

PACKAGES = ("gpt-lightning", "torch", "lightning", "hydra-core", "omegaconf", "tiktoken", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine what a run computes."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_revision() -> str | None:
    """Commit of the checkout that the package runs from, with a + where files differ; None without one."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "conf" / "train.yaml").exists():  # installed from a wheel
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
