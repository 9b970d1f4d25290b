"""The files that turn an exported model into a Hugging Face Space with the web page.

Source: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

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


def write_app(name: str, folder: Path) -> None:
    """Write app.py, requirements.txt, README.md and a copy of this package beside an exported model.

    The package is copied because it is on no package index, and so that the Space runs this version.

    Args:
        name: Of the model.
        folder: One that `gpt_lightning.load` reads.
    """
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        gradio = "6.31.0"  # the version of the tests
    text = README.format(title=json.dumps(name, ensure_ascii=False), name=name, gradio=gradio)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    # lines such as "gradio>=6; extra == 'demo'"
    required = (line.partition(";") for line in importlib.metadata.requires("gpt-lightning") or ())
    needed = [f"{line.strip()}\n" for line, _, marker in required if not marker or "demo" in marker]
    (folder / "requirements.txt").write_text("".join(needed), encoding="utf-8")
    package = Path(__file__).resolve().parents[1]
    code = folder / package.name
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", "input.txt"))
    if not (code / "conf").exists():  # it is beside the package in a checkout, inside it in a wheel
        shutil.copytree(package.parent / "conf", code / "conf")
