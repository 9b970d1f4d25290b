"""The files that make an exported model a Hugging Face Space with the web page.

Source: https://huggingface.co/docs/hub/spaces-config-reference.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """Write app.py, requirements.txt and README.md beside an exported model.

    Args:
        info: What is known about the model, for its name.
        folder: One that `gpt_lightning.load` reads.
    """
    name = " ".join(str(info.get("name") or "gpt_lightning").split())
    try:
        gradio = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        gradio = "6.31.0"  # the version that the tests ran with
    package = importlib.metadata.version("gpt-lightning")
    (folder / "app.py").write_text(APP, encoding="utf-8")
    (folder / "requirements.txt").write_text(f"gpt-lightning[demo]=={package}\n", encoding="utf-8")
    text = README.format(title=json.dumps(name, ensure_ascii=False), name=name, gradio=gradio)
    (folder / "README.md").write_text(text, encoding="utf-8")
