"""The files that make an exported model a Hugging Face Space with the web page.

Source: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

APP = '''"""The web page of the model in this folder; takes settings, as in `python app.py port=7861`."""

import sys
from pathlib import Path

from gpt_lightning.demo import main

sys.argv[1:1] = [f"checkpoint={Path(__file__).resolve().parent}", "host=0.0.0.0", "port=7860"]
main()
'''

README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
---
# {name}

Text from a language model trained with gpt_lightning; completions in OpenAI's format are under `/v1`.
`pip install -r requirements.txt && python app.py` starts it on this machine, and
`hf upload USER/NAME . --repo-type=space` in this folder puts it on a Space.
"""


def write_app(info: Mapping[str, Any], folder: Path) -> None:
    """Write app.py, requirements.txt, README.md and this package beside an exported model.

    Args:
        info: What is known about the model, for its name.
        folder: One that `gpt_lightning.load` reads.
    """
    name = " ".join(str(info.get("name") or "gpt_lightning").split())
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        gradio = "6.31.0"  # the version that the tests ran with
    (folder / "app.py").write_text(APP, encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed()), encoding="utf-8")
    text = README.format(title=json.dumps(name, ensure_ascii=False), name=name, gradio=gradio)
    (folder / "README.md").write_text(text, encoding="utf-8")
    # the package itself, so that the page runs with the version that exported it
    package = Path(__file__).resolve().parents[1]
    code = folder / package.name
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", "input.txt"))
    if not (code / "conf").exists():  # a checkout has it beside the package, a wheel inside
        shutil.copytree(package.parent / "conf", code / "conf")


def needed() -> list[str]:
    """What pip has to install for the page, as in requirements.txt."""
    found = [Requirement(line) for line in importlib.metadata.requires("gpt-lightning") or ()]
    return [f"{r.name}{r.specifier}" for r in found if not r.marker or r.marker.evaluate({"extra": "demo"})]
