"""Every command in the README runs."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import ROOT, TINY
from support.zygote import Zygote

import gpt_lightning

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHRINK = [override for override in TINY if not override.startswith(("data=", "tokenizer=", "device="))]
RUN = [*TINY, "scheduler=constant", "data.path=my.txt", "hydra.run.dir=outputs/gpt/first"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_text: Path, zygote: Zygote) -> Path:
    """A folder with my.txt and a finished run."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(small_text, folder / "my.txt")
    code, out = zygote.run("train", *RUN, cwd=folder)
    assert code == 0, out
    return folder


def run(folder: Path, command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command of a shell, in which `python` is this one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # without what the make that runs the tests was given
    variables = {k: v for k, v in os.environ.items() if k != "ARGS" and not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**variables, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


def prepared(command: str) -> str:
    """The command with the run that exists, on this device, in seconds."""
    command = command.replace("RUN", "outputs/gpt/first").replace("device=mps", "device=cpu")
    command = command.replace("max_steps=4000", "max_steps=12")
    if re.search(r"(\.train|-train|\.plan) ", command) and "resume=" not in command and "--" not in command:
        shrink = [s for s in SHRINK if not ("init_from" in command and s.startswith("model."))]
        command += " " + " ".join(shrink)
        if "model=small" in command:
            command += " tokenizer=byte"  # GPT-2's own may have to be downloaded
    return command


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if not c.startswith("make") and ".demo" not in c],
)
def test_command_runs(command: str, place: Path, zygote: Zygote) -> None:
    module, *arguments = shlex.split(prepared(command).removeprefix("python -m gpt_lightning."))
    if not command.startswith("python -m"):
        run(place, prepared(command))  # a console script
    else:
        code, out = zygote.run(module, *arguments, cwd=place)
        assert code == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if "resume=" in c])
def test_resume_goes_on_with_an_interrupted_run(
    command: str,
    place: Path,
    call: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gpt_lightning.training.module import LanguageModel

    shutil.copy(place / "my.txt", tmp_path)
    shutil.copytree(place / "outputs" / "gpt" / "first", tmp_path / "outputs" / "gpt" / "before")
    monkeypatch.chdir(tmp_path)
    step = LanguageModel.training_step

    @functools.wraps(step)
    def terminated(self: LanguageModel, *batch: Any) -> Any:
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "training_step", terminated)
        with pytest.raises(SystemExit) as stop:
            call("train", *RUN)
    assert stop.value.code == 128 + signal.SIGTERM
    summary = tmp_path / "outputs" / "gpt" / "first" / "summary.json"
    left = json.loads(summary.read_text())
    assert (left["status"], left["steps"]) == ("interrupted", 6)
    program, *arguments = shlex.split(prepared(command).removeprefix("python -m gpt_lightning."))
    call(program, *arguments)
    assert re.search(r"^resuming from .* at step 6$", capsys.readouterr().out, re.M)
    done = json.loads(summary.read_text())
    assert (done["status"], done["steps"]) == ("finished", 12 if "max_steps" in command else 8)


def test_gpt2_on_a_mac_fits_into_16_gb_as_stated(small_text: Path) -> None:
    text = ["data=text", f"data.path={small_text}", "data.batch_size=8"]
    gpt2_vocabulary = ["tokenizer=byte", "model.vocab_size=50257"]  # without a download
    plan = gpt_lightning.plan("model=small", "device=mps", *text, *gpt2_vocabulary)
    needed = sum(plan.memory.values()) / 2**30
    assert f"into 16 GB (`plan` estimates {needed:.1f} GiB)" in README
    assert needed < 16 / 2


def test_figures_of_the_default_run_are_those_of_the_measurements() -> None:
    measured = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:validation loss|perplexity|bits per byte)  .*", README, re.M)
    loss, perplexity, bits, above, floor = re.findall(r"[\d.]*\d", "\n".join(lines))
    assert all(number in measured for number in (loss, bits, above, floor))
    assert math.exp(float(loss)) == pytest.approx(float(perplexity), abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "ready"),
    [("python -m gpt_lightning.demo checkpoint=RUN", "http://127.0.0.1:"), ("make tensorboard", "http://")],
)
def test_server_starts(command: str, ready: str, place: Path) -> None:
    assert command in COMMANDS
    if ".demo" in command:
        pytest.importorskip("gradio")
        command = prepared(command) + " port=0"
    else:
        if not (ROOT / ".venv" / ".core").exists():
            pytest.skip("needs the environment that make installs")
        command = f'make -C "{ROOT}" tensorboard ARGS="runs={place}/outputs tensorboard=0"'
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=place,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        seen, end = "", time.monotonic() + 120
        assert process.stdout is not None
        for line in process.stdout:
            seen += line
            if ready in line or time.monotonic() > end:
                break
        assert ready in seen, seen
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
def test_make_train_passes_overrides_on(tmp_path: Path) -> None:
    if not (ROOT / ".venv" / ".core").exists():
        pytest.skip("needs the environment that make installs")
    alone, command = (c for c in COMMANDS if c.startswith("make train"))
    assert run(ROOT, f"{alone} --dry-run").stdout.splitlines()[-1].split()[1:] == [
        "-m",
        "gpt_lightning.train",
    ]
    (given,) = re.findall(r'ARGS="(.*) device=mps"', command)
    arguments = [given, *SHRINK, "tokenizer=byte", "device=cpu", f"paths.outputs={tmp_path}"]
    run(ROOT, f'make train ARGS="{" ".join(arguments)}"')
    assert len(list(tmp_path.glob("*/*/summary.json"))) == 1


def test_make_help_lists_the_targets() -> None:
    text = run(ROOT, "make help").stdout
    for target in ("train", "test", "lint", "check", "docs", "tensorboard", "clean"):
        assert f"make {target} " in text


@pytest.mark.slow
def test_python_example_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = PYTHON
    overrides = '"model=tiny", "trainer.max_steps=200"'
    assert overrides in code
    monkeypatch.chdir(place)
    exec(code.replace(overrides, f"*{[*TINY, 'data.path=my.txt']}"), {})
    assert capsys.readouterr().out.rstrip().endswith("626176 16384")


def test_no_command_escapes_the_tests() -> None:
    shown = set(re.findall(r"(?:python -m gpt_lightning|make )[^`\n]*", README))
    tested = {*COMMANDS, "make help", "make docs"}  # which has a test of its own
    assert {command.strip() for command in shown} <= tested
