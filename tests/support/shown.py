"""What the README and the pages of docs/ show."""

from __future__ import annotations

import re

from support.runs import ROOT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README": (ROOT / "README.md").read_text(encoding="utf-8"), **PAGES}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def commands(page: str) -> list[str]:
    """The lines of its blocks for bash, those that are continued as one, and the commands of its tables."""
    text = "".join(blocks(page, "bash")).replace("\\\n", "")
    rows = "\n".join(re.findall(r"^\|.*", PAGES[page], re.M))
    shown = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [*shown, *re.findall(r"`(python (?:-m gpt_lightning|-c |benchmarks/)[^`]+)`", rows)]
