"""The command `generate`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import BYTES, random_net, reciting, save_checkpoint

from gpt_lightning.inference.text import TextGenerator

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says anything."""
    return save_checkpoint(tmp_path_factory.mktemp("any") / "best.ckpt", random_net())


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says one text, in which no character is a single token."""
    return save_checkpoint(tmp_path_factory.mktemp("known") / "best.ckpt", reciting("你好🦊é\n\nfin").net)


SETTINGS = ["max_new_tokens=12", "temperature=0.9", "top_k=40", "top_p=0.95", "seed=5"]
PYTHON = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 5}


def in_python(prompts: list[str], **options: Any) -> list[str]:
    return TextGenerator(random_net(), BYTES).generate(prompts, **{**PYTHON, **options})


@pytest.mark.parametrize(
    "prompt",
    ["Once upon a time", "", "ROMEO: it's me, ok?", 'a "b" [c] {d} ${e} x=1', "null and void", "7", "日本\\"],
)
def test_prompt_is_taken_literally_and_printed_with_its_continuation(
    prompt: str, call: Call, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("generate", f"checkpoint={checkpoint}", "device=cpu", f"prompt={prompt}", *SETTINGS)
    assert capsys.readouterr().out == prompt + in_python([prompt])[0] + "\n"


def test_stop_string_and_token_limit_end_a_text(
    call: Call, known: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, text in (
        ((), "你好🦊é\n\nfin\n"),
        (("stop=\n\n",), "你好🦊é\n"),
        (("max_new_tokens=4",), "你\ufffd\n"),
    ):
        call("generate", f"checkpoint={known}", "device=cpu", "prompt=", "temperature=0", *more)
        assert capsys.readouterr().out == text


def test_samples_of_default_prompts_have_headings(
    call: Call, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("generate", f"checkpoint={checkpoint}", "device=cpu", "num_samples=2", *SETTINGS)
    prompts = ["", "", "Once upon a time", "Once upon a time", "I", "I"]
    expected = [
        f"--- {i + 1} of 6\n{prompt}{text}\n"
        for i, (prompt, text) in enumerate(zip(prompts, in_python(prompts), strict=True))
    ]
    assert capsys.readouterr().out == "".join(expected)


def test_file_of_prompts_is_answered_line_by_line(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["first, with commas", "", "the third\u2028is one line"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    arguments = [
        f"checkpoint={checkpoint}",
        "device=cpu",
        f"prompt_file={tmp_path / 'prompts.txt'}",
        *SETTINGS,
    ]
    call("generate", *arguments, "repetition_penalty=1.3", "min_p=0.01")
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [answer["prompt"] for answer in answers] == prompts
    assert [a["text"] for a in answers] == in_python(prompts, repetition_penalty=1.3, min_p=0.01)
    assert all(a["finish"] in ("stop", "length") and a["tokens"] <= 12 for a in answers)
    call("generate", *arguments, "num_samples=2")
    answers = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [answer["text"] for answer in answers] == in_python([p for p in prompts for _ in range(2)])


def test_unknown_character_in_a_prompt_ends_the_command_before_any_answer(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt_lightning.data.tokenizer import Char

    letters = Char().build(lambda split: iter(["abc\n"]))
    path = save_checkpoint(tmp_path / "best.ckpt", random_net(letters), letters)
    (tmp_path / "prompts.txt").write_text("abc\nabZ\n")
    with pytest.raises(SystemExit):
        call("generate", f"checkpoint={path}", f"prompt_file={tmp_path / 'prompts.txt'}")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no token for 'Z'" in shown.err


def test_default_prompt_with_unknown_characters_is_skipped(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt_lightning.data.tokenizer import Char

    letters = Char().build(lambda split: iter(["abc\n"]))
    path = save_checkpoint(tmp_path / "best.ckpt", random_net(letters), letters)
    call("generate", f"checkpoint={path}", "device=cpu", "max_new_tokens=3", "default_prompts=['I','ab','']")
    out = capsys.readouterr().out
    assert out.startswith("--- 1 of 2\nab")
    assert "--- 2 of 2\n" in out


class Terminal:
    """A command on a pseudo-terminal, typed at and read from."""

    def __init__(self, *arguments: str):
        import pty

        self.screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt_lightning.generate", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # whose Ctrl-C it then gets
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"},
        )
        os.close(inside)
        self.shown = ""

    def until(self, end: str, seconds: float = 60) -> None:
        """Read on until a text has appeared; what follows it is for the next call."""
        deadline = time.monotonic() + seconds
        while end not in self.shown and time.monotonic() < deadline:
            if select.select([self.screen], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.screen, 4096).decode(errors="replace").replace("\r\n", "\n")
                except OSError:  # the other end is closed
                    break
        assert end in self.shown, f"{end!r} is not in {self.shown!r}"
        self.shown = self.shown.partition(end)[2]

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals")
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        os.close(one.screen)


@pytest.mark.slow
def test_interactive_mode_on_a_terminal(terminal: Callable[..., Terminal], checkpoint: Path) -> None:
    endless = [f"checkpoint={checkpoint}", "device=cpu", "max_new_tokens=1000000"]
    talk = terminal("interactive=true", *endless)
    talk.until("\n> ")
    for line in ("abc\n", "\x1b[A\n"):  # the second one is from the history
        talk.type(line)
        talk.until("abc\n")  # what was typed
        talk.until("abc")  # what is continued
        talk.type("\x03")  # Ctrl-C stops the answer and nothing else
        talk.until("\n> ")
    os.write(talk.screen, b"\xff\n")
    talk.until("error: character 0 of the text is half a surrogate pair; remove it\n> ")
    talk.type("\x04")  # Ctrl-D leaves
    assert talk.process.wait(timeout=30) == 0


@pytest.mark.slow
def test_generate_needs_only_the_checkpoint_file(known: Path, tmp_path: Path) -> None:
    path = tmp_path / "moved.ckpt"
    path.write_bytes(known.read_bytes())
    environment = {
        **os.environ,
        "GPT_LIGHTNING_CACHE": str(tmp_path / "none"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "gpt_lightning.generate", "checkpoint=moved.ckpt", "prompt=", "temperature=0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "你好🦊é\n\nfin\n"), done.stderr
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was written


@pytest.mark.slow
def test_interrupt_ends_the_command_quietly(checkpoint: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "gpt_lightning.generate",
        f"checkpoint={checkpoint}",
        "prompt=a",
        "device=cpu",
    ]
    process = subprocess.Popen(
        [*command, "max_new_tokens=1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.read(5)  # text comes long before the end
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == ""
