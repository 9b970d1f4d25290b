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

import gpt_lightning

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
    requirement = Requirement((folder / "requirements.txt").read_text().strip())
    assert (requirement.name, requirement.extras) == ("gpt-lightning", {"demo"})
    assert requirement.specifier.contains(gpt_lightning.__version__)

    server = serve(folder / header.app_file, "port=0", "host=127.0.0.1", "max_new_tokens=100000")
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
