"""sweep.jsonl: how each job of a sweep stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LEDGER = "sweep.jsonl"


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The lines of a sweep.jsonl; empty if it is missing or damaged."""
    try:
        lines = (folder / LEDGER).read_text(encoding="utf-8").splitlines()
        return [dict(json.loads(line)) for line in lines]
    except (OSError, TypeError, ValueError):
        return []
