"""Every command of the README and of the pages of docs/ runs."""

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
from support.hub import dataset
from support.runs import ROOT, TINY
from support.shown import PAGES, blocks, commands
from support.zygote import Zygote

import gpt_lightning

README = PAGES["README"]
COMMANDS = commands("README")
# What other tests run: test_server_starts and those of make below, training/test_processes.py
ELSEWHERE = ("python -m gpt_lightning.demo checkpoint=RUN", "make ", "torchrun ", "srun ")
# Of the reproductions: test_presets.py trains and plans them, and test_docs.py composes the rest
PRESETS = re.compile("experiment=|benchmarks/reproduce.py|data=huggingface")


def sessions() -> dict[str, list[str]]:
    """For each page, the commands that no page before it shows."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        before = [command for of_page in found.values() for command in of_page]
        new = [c for c in commands(page) if c not in before and not c.startswith(ELSEWHERE)]
        if page == "reproductions":
            new = [command for command in new if not PRESETS.search(command)]
        if new and page != "extending":  # which test_examples.py runs
            found[page] = new
    return found


SHRINK = [override for override in TINY if not override.startswith(("data=", "tokenizer=", "device="))]
RUN = [*TINY, "scheduler=constant", "data.path=my.txt", "hydra.run.dir=outputs/gpt/first"]
INSTEAD = {  # so that a command takes seconds on any machine
    "checkpoint=RUN": "checkpoint=latest",  # of the commands before it
    "=RUN": "=outputs/gpt/first",
    "RUN/": "outputs/gpt/first/",
    "texts/*.txt": "corpus/*.txt",
    "=hf:gpt2": "=weights",
    "=mps": "=cpu",
    "trainer=ddp device=cuda": "trainer=ddp",
    "device.devices=4": "device.devices=2",
    "max_steps=4000": "max_steps=12",
    "max_steps=500": "max_steps=8",
    "n_trials=50": "n_trials=2",
    "min_resource=100": "min_resource=4",
    "shards=4 'shard=range(4)'": "shards=2 'shard=range(2)'",
    "shards=8 'shard=range(8)'": "shards=2 'shard=range(2)'",
    "shards=8 shard=0": "shards=2 shard=0",
    "shards=16 'shard=range(16)'": "shards=2 'shard=range(2)'",
    "data.name=Skylion007/openwebtext": "data.name=hub",
    "data.val_fraction=0.0005 tokenizer=gpt2": "data.val_fraction=0.1 tokenizer=byte",
    "device.devices=8": "device.devices=2",
    "shuffle_buffer=16384": "shuffle_buffer=8",
    "val_batches=20 data.val_fraction=0.01": "val_batches=1",
    "postgresql://user@host/studies": "sqlite:///studies.db",
}
# What a command has in addition, and how the overrides of SHRINK begin that it must not have
ADDED: dict[str, tuple[str, tuple[str, ...]]] = {
    "init_from=": ("", ("model.",)),
    "experiment=finetune_gpt2": ("init_from=weights tokenizer=byte", ("model.",)),
    "model=small": ("tokenizer=byte", ()),  # GPT-2's own may have to be downloaded
    "trainer=ddp": ("device=cpu", ()),
    "gpt2_124m": (
        "data.name=hub data.val_fraction=0.1 tokenizer=byte device.micro_batch_size=4",
        (),
    ),
    "device=cuda": ("tokenizer=byte", ("",)),  # a plan alone, which no size makes slow
    "sweep=learning_rate": ("optimizer.lr=1e-3,3e-3 seed=1", ()),
    "sweep=optuna": ("sweep.n_trials=2", ()),
    "sweep=optuna_optimizer": ("scheduler.warmup_steps=range(0,5,2)", ("scheduler.",)),
    "sweep=optuna_shape": ("", ("model.n_layer", "model.n_embd")),
    "HyperbandPruner": ("sweep.n_trials=3", ()),  # goes on with the same study
    "RandomSampler": ("sweep.n_trials=4", ()),
    "experiment=scaling": (
        "size=w16,w24 tokenizer.vocab_size=300 data.stories=300",
        ("model.n_", "trainer.max_steps"),
    ),
    "experiment=scaling sweep.jobs": ("trainer.tokens_per_parameter=0.2,0.4", ()),
    "sweep=isoflop": ("trainer.max_flops=2e8", ()),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_text: Path, zygote: Zygote) -> Path:
    """A folder with texts, conversations, a finished run, and its model in Hugging Face's format."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copy(small_text, folder / "my.txt")
    (folder / "corpus").mkdir()
    for number in range(20):
        sums = [f"{number} plus {n} is {number + n}." for n in range(50)]
        (folder / "corpus" / f"{number}.txt").write_text(f"Text {number} of a corpus.\n" + " ".join(sums))
    dataset(folder / "hub", [small_text.read_text().split(".\n")[start::2] for start in range(2)])
    chats = ({"prompt": f"{n} + 1", "response": str(n + 1)} for n in range(50))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "answers.jsonl").write_text('{"prompt": "", "text": "A text of a corpus."}\n')
    (folder / "references.txt").write_text("Text 3 of a corpus.\n")
    for name, *arguments in (("train", *RUN), ("export", "checkpoint=latest", "output=weights")):
        code, out = zygote.run(name, *arguments, cwd=folder)
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
    """The command with a run that exists, on this device, in seconds."""
    for shown, text in INSTEAD.items():
        command = command.replace(shown, text)
    if not re.search(r"[.-](train|plan)\b", command) or re.search(r"resume=|repeat=|check=| --", command):
        return command
    found = [ADDED[shown] for shown in ADDED if shown in command]
    given = [text.partition("=")[0] + "=" for text in shlex.split(command)]
    without = (*given, *(start for _, starts in found for start in starts))
    shrink = [override for override in SHRINK if not override.startswith(without)]
    return shlex.join([*shlex.split(command), *shrink, *" ".join(added for added, _ in found).split()])


@pytest.mark.slow
@pytest.mark.parametrize("page", sessions())
def test_commands_of_a_page_run_in_their_order(
    page: str, place: Path, zygote: Zygote, tmp_path: Path
) -> None:
    folder = shutil.copytree(place, tmp_path / "user")
    for command in map(prepared, sessions()[page]):
        before = set(folder.rglob("summary.json"))
        module, *arguments = shlex.split(command.removeprefix("python -m gpt_lightning."))
        if not command.startswith("python -m"):
            run(folder, command)  # a console script
        else:
            code, out = zygote.run(module, *arguments, cwd=folder, spares=1)
            assert code == 0, f"{command}\n{out}"
            assert "gpt2_124m" not in command or "tokenizing" not in out  # the command before it did so
        if module.endswith("train") and not re.search("resume=| --", command):
            assert set(folder.rglob("summary.json")) > before, f"{command} trained nothing"


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
def test_server_starts(command: str, ready: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command in COMMANDS
    if ".demo" in command:
        pytest.importorskip("gradio")
        pytest.importorskip("openai")
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
        if ".demo" in command:  # the client of docs/inference.md
            (code,) = blocks("inference", "python")
            assert "http://127.0.0.1:7860/v1" in code
            names: dict[str, Any] = {}
            exec(code.replace("http://127.0.0.1:7860", seen.split()[-1]), names)
            names["client"].close()
            assert capsys.readouterr().out
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


def test_make_bench_measures_all_that_a_cpu_can() -> None:
    shown = run(ROOT, "make -n bench NANOGPT=DIR TEXT=FILE").stdout
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert set(re.findall(r"benchmarks/(\w+\.py)", shown)) == scripts - {"gpu.py", "reproduce.py"}


@pytest.mark.slow
def test_python_example_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = blocks("README", "python")
    overrides = '"model=tiny", "trainer.max_steps=200"'
    assert overrides in code
    monkeypatch.chdir(place)
    exec(code.replace(overrides, f"*{[*TINY, 'data.path=my.txt']}"), {})
    assert capsys.readouterr().out.rstrip().endswith("626176 16384")


@pytest.mark.slow
def test_example_draws_the_curves_as_pdf(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("training", "python")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("RUN/", f"{place}/outputs/gpt/first/"), {})
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF-")


def test_no_command_escapes_the_tests() -> None:
    shown = re.findall(r"(?:python -m gpt_lightning|make )[^`\n]*", README)
    others = "\n".join(text for page, text in PAGES.items() if page not in ("README", "reproductions"))
    shown += re.findall(r"(?<!srun )python -m gpt_lightning[^`\n]*", others)
    tested = {*(c for page in PAGES for c in commands(page)), "make help", "make docs"}
    tested.add("python -m gpt_lightning.report runs=outputs tensorboard=6006")  # what make tensorboard runs
    assert {command.strip() for command in shown} <= tested
