"""A folder for Hugging Face Spaces, started as a Space starts it, and stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from support.runs import ROOT

import gpt_lightning

START = """
import runpy, sys
sys.path = [entry for entry in sys.path if entry != {root!r}]
sys.path.insert(0, {app!r}.rpartition("/")[0])
runpy.run_path({app!r}, run_name="__main__")
"""
openai = pytest.importorskip("openai", reason="the package openai is not installed")


@pytest.mark.slow
def test_exported_space_answers_until_ctrl_c(
    serve: Callable[..., Any], checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "space"
    command = [sys.executable, "-m", "gpt_lightning.export", f"checkpoint={checkpoint}", f"output={folder}"]
    subprocess.run([*command, "format=space"], check=True, capture_output=True)

    header = SpaceCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (header.title, header.sdk, header.app_file) == ("letters", "gradio", "app.py")
    needed = {Requirement(line).name for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"torch", "hydra-core", "tiktoken", "safetensors", "gradio", "fastapi", "uvicorn"} <= needed
    assert not needed & {"gpt-lightning", "transformers", "pytest"}
    assert (folder / "curves.png").read_bytes() == (checkpoint / "curves.png").read_bytes()

    # as on a machine without this package: the checkout is out of sight
    start = tmp_path / "start.py"
    start.write_text(START.format(root=str(ROOT), app=str(folder / header.app_file)))
    server = serve(start, "port=0", "host=127.0.0.1", "max_new_tokens=100000")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="letters", prompt="a", max_tokens=12, temperature=0)
        expected = gpt_lightning.load(checkpoint, "cpu").generate("a", max_new_tokens=12, temperature=0)
        assert answer.choices[0].text == expected

        stream = client.completions.create(model="letters", prompt="a", max_tokens=100_000, stream=True)
        next(stream)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        output, _ = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert output.splitlines()[-1] == "stopped"
    assert server.log.read_text() == ""
