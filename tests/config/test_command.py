"""The configuration as a user meets it: help, choices, errors, choices of their own."""

from __future__ import annotations

import json
import logging.config
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support.runs import BIGRAM

from gpt_lightning.config.command_line import readable, verbatim
from gpt_lightning.config.errors import one_line, suggestion
from gpt_lightning.config.resolvers import detect_device
from gpt_lightning.generate import main as generate
from gpt_lightning.train import main


def error_of(call: Callable[..., Any], capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command leaves on standard error."""
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    assert stop.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_refused_command_leaves_nothing(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error_of(call, capsys, "train", *tiny, "optimizer.lr=-1")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    error_of(call, capsys, "train", *tiny, "data.path=nowhere.txt")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "arguments",
    ["train -m optimizer.lr=1,1", "train -m sed=1,2", "train -m model=nope,tiny", "train seed=-1",
     "train name=a/../../b", "generate"],
)  # fmt: skip
def test_refused_command_leaves_no_empty_folder(
    arguments: str, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        call(*arguments.split(), "device=cpu")
    assert list(tmp_path.iterdir()) == []


def test_setting_that_is_written_as_a_flag_is_told(
    call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in (["--max_steps", "10"], ["--lr=1e-3"], ["seed=1", "-x"]):
        told = error_of(call, capsys, "train", *wrong)
        assert told.startswith(f"error: there is no flag {wrong[-1] if 'seed=1' in wrong else wrong[0]}; ")
    call("train", "--cfg", "job", "--resolve", "seed=3")
    assert "seed: 3" in capsys.readouterr().out


def test_full_error_shows_the_traceback(command: Callable[..., Any], tiny: list[str]) -> None:
    result = command("train", *tiny, "trainer.max_steps=0", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_ctrl_c_that_a_library_turns_into_an_error_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("lost")
    except ValueError as error:
        lost = error
    with pytest.raises(SystemExit) as stop:
        main.fail(lost)
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_wrong_job_of_a_sweep_is_told_and_the_others_train(
    command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    options = [option for option in tiny if not option.startswith("hydra.run.dir")]
    jobs = ["optimizer.lr=1e-3,-1,3e-3", "hydra.sweep.dir=sweep", "logger=none", "callbacks.samples=null"]
    result = command("train", "-m", *options, *jobs, "hydra/launcher=basic")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: optimizer.lr=-1 must be")
    trained = {job: (tmp_path / "sweep" / job / "summary.json").exists() for job in ("0", "1", "2")}
    assert trained == {"0": True, "1": False, "2": True}


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    program = (
        "import importlib, sys\n"
        "for name in ('train', 'prepare', 'plan', 'generate'):\n"
        "    for flag in ('--help', '--cfg=job'):\n"
        "        sys.argv = [name, flag]\n"
        "        try: importlib.import_module('gpt_lightning.' + name).main()\n"
        "        except SystemExit as stop: assert not stop.code, stop.code\n"
        "        assert not {'torch', 'lightning'} & set(sys.modules), name\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(" key=value …") == 4  # each --help
    assert len(re.findall("^paths:$", result.stdout, re.M)) == 4  # each configuration


def test_garbage_collector_is_spared_the_first_imports_alone() -> None:
    program = """
import gc
from gpt_lightning.config.command import imports
with imports():
    import torch
    assert not gc.isenabled()
frozen = gc.get_freeze_count()
assert gc.isenabled() and frozen > 100_000, frozen
garbage = [[number] for number in range(1000)]
with imports():
    assert gc.isenabled()
assert gc.get_freeze_count() <= frozen  # what a notebook has made since may be collected
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_device_is_one_that_torch_has() -> None:
    import torch

    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert detect_device() == expected


@pytest.mark.parametrize(("gpus", "expected"), [(True, "cuda"), (False, "cpu")])
def test_torch_itself_is_asked_for_amd_gpus(
    gpus: bool, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "version.py").write_text("cuda = None\nhip = '6.4.43482'\n")
    (package / "__init__.py").write_text(f"class cuda:\n    is_available = staticmethod(lambda: {gpus})\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    assert detect_device() == expected


def hydra_reads(argument: str) -> Any:
    """The value that reaches the configuration, interpolations resolved."""
    override = OverridesParser.create().parse_override(argument)
    cfg = OmegaConf.create({"name": "gpt"})
    OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
    return OmegaConf.select(cfg, override.key_or_group)


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/ü/é.txt",
        "~/x.txt",
        "run(1)",
        "a#b",
        "it's",
        "a=b",
        "a;b & 'c' !",
        "x\\'ü\\",
        "日本, 東京",
        "a{b",
    ],
)
def test_plain_text_that_hydra_cannot_read_stays_as_it_is(text: str) -> None:
    (argument,) = readable([f"data.path={text}"])
    assert hydra_reads(argument) == text
    assert readable([argument]) == [argument]


@pytest.mark.parametrize(
    "argument",
    [
        "seed=3", "data.path=a/b.txt", "data.path=[a,ü]", "+x={a: ü}", "x='ü'", 'x="ü"', "x=[ü", "x=", "seed",
        "--config-dir=ü", "x=a,b", "x=${name}/a", "x=null",
    ],
)  # fmt: skip
def test_what_hydra_reads_and_what_is_its_own_language_is_left_to_it(argument: str) -> None:
    assert readable([argument]) == [argument]


def test_values_of_a_sweep_stay_several_and_places_mean_what_a_shell_means(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/ü")
    assert readable(["-m", "data.path=ü,é", "name=ü"]) == ["-m", "data.path=ü,é", "name='ü'"]
    (place,) = readable(["hydra.run.dir=~/${name}"])
    assert hydra_reads(place) == "/home/ü/gpt"


@pytest.mark.parametrize(
    "prompt",
    ['"Hi," said Tom. "Bye."', '"Oh no!"', "'a' and 'b'", "'", '"', "'a\\'", "it's \\' so", "'' ''"],
)
def test_quotes_belong_to_a_text_unless_it_is_quoted_as_a_whole(prompt: str) -> None:
    (argument,) = verbatim("prompt")([f"prompt={prompt}"])
    assert hydra_reads(argument) == prompt
    assert verbatim("prompt")([argument]) == [argument]  # quoted as a whole


def test_run_goes_where_hydra_cannot_read_and_repeats_and_resumes_there(
    command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "é (1).txt"
    text.write_text("the cat sees a dog.\n" * 900, encoding="utf-8")
    given = [*(option for option in tiny if not option.startswith(("data.path", "hydra"))), "logger=none"]
    given += [f"data.path={text}", "hydra.run.dir=it's #1", "callbacks.samples=null"]
    run = tmp_path / "it's #1"
    result = command("train", *given)
    assert result.returncode == 0, result.stderr
    result = command("train", *given)
    line = f"{run} holds a run; go on with resume={run} or name another directory"
    assert result.stderr == f"error: {line}\n"
    result = command("train", "resume=it's #1")
    assert (result.returncode, result.stdout) == (
        0,
        f"the run in {run} is finished; there is nothing to resume\n",
    )
    result = command("train", f"repeat={run}", "hydra.run.dir=and it's ü")
    assert result.returncode == 0, result.stderr
    first, second = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in (run, "and it's ü")
    )
    assert second["val_loss"] == first["val_loss"]


def test_missing_package_names_the_extra() -> None:
    assert one_line(ModuleNotFoundError(name="datasets")) == (
        "the package datasets is not installed; pip install 'gpt-lightning[hf]'"
    )


CORPUS_AND_SCHEDULE = '''
class Digits:
    """A corpus of one's own: the numbers from one to n in words of digits."""
    separated = True
    def __init__(self, n):
        self.n = n
    def digest(self):
        return f"digits-{self.n}"
    def documents(self, split):
        return (str(i) * 8 for i in range(1, self.n) if (i % 10 == 0) == (split == "val"))
    def floor_bits(self, document):
        return None

def halving(step, *, every):
    return 0.5 ** (step // every)
'''


def test_own_model_corpus_optimizer_and_schedule_need_no_change_of_the_core(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "plugin.py").write_text(BIGRAM + CORPUS_AND_SCHEDULE)
    files = {
        "model/bigram.yaml": "_target_: plugin.Bigram\nvocab_size: null\nblock_size: 8\n",
        "data/digits.yaml": "defaults: [_windows, _self_]\nbatch_size: 4\n"
        "corpus: {_target_: plugin.Digits, n: 300}\n",
        "optimizer/sgd.yaml": "_target_: torch.optim.SGD\n_partial_: true\nlr: 30.0\n",
        "scheduler/halving.yaml": "_target_: plugin.halving\n_partial_: true\nevery: 50\n",
    }
    for name, text in files.items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    result = command(
        "train", "--config-dir", str(tmp_path / "mine"), "model=bigram", "data=digits", "optimizer=sgd",
        "scheduler=halving", "tokenizer=byte", "trainer.max_steps=200", "trainer.val_every_steps=200",
        "hydra.run.dir=run", "device=cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters"] == 257 * 257
    assert summary["train_loss"] < 4.0  # it began at about ln 257 = 5.5


def test_help_and_suggestions_know_the_choices_of_a_users_own(
    tmp_path: Path, command: Callable[..., Any]
) -> None:
    (tmp_path / "my 'é', conf" / "model").mkdir(parents=True)
    text = "# comment\n_target_: plugin.Bigram\nblock_size: 8\nwidening: 2  # of the hidden layer\n"
    (tmp_path / "my 'é', conf" / "model" / "bigram.yaml").write_text(text)
    own = ("--config-dir", "my 'é', conf", "model=bigram")
    shown = command("train", *own, "--help").stdout
    assert re.search(r"^model: .*\bbigram, .*\bgpt2_small\b", shown, re.M)
    assert "  widening: 2  # of the hidden layer\n" in shown
    refused = command("train", *own, "model.wideninng=3")
    assert re.search(r"^error: .*wideninng.*did you mean model\.widening\b", refused.stderr), refused.stderr


def test_names_of_nanogpt_have_suggestions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train"])
    meant = {
        "eval_interval": "trainer.val_every_steps",
        "eval_iters": "trainer.val_batches",
        "log_interval": "trainer.log_every_steps",
        "learning_rate": "optimizer.lr",
        "min_lr": "scheduler.min_lr_ratio",
        "warmup_iters": "scheduler.warmup_steps",
        "lr_decay_iters": "scheduler.max_steps",
        "decay_lr": "scheduler",
        "max_iters": "trainer.max_steps",
        "grad_clip": "trainer.clip_norm",
        "gradient_accumulation_steps": "device.micro_batch_size",
    }
    assert {name: suggestion(name, main.keys()) for name in meant} == meant
    assert suggestion("start", generate.keys()) == "prompt"


@pytest.mark.parametrize("more", [[], ["--help"]])
def test_file_of_a_users_own_that_is_no_yaml_is_named(
    tmp_path: Path, command: Callable[..., Any], more: list[str]
) -> None:
    path = tmp_path / "mine" / "model" / "broken.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("a: [1\n")
    result = command("train", "--config-dir", "mine", "model=broken", *more)
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert f'{path.relative_to(tmp_path)}", line 2' in line
    assert result.returncode == 1


def test_two_starts_at_once_get_two_run_directories() -> None:
    from hydra import compose, initialize_config_dir

    from gpt_lightning.config.resolvers import CONF

    folders = set()
    for _ in range(2):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            folders.add(compose("train", return_hydra_config=True).hydra.run.dir)
        time.sleep(0.001)
    assert len(folders) == 2


def test_ctrl_c_while_python_cleans_up_after_a_command_is_ignored() -> None:
    code = "import atexit, sys, time\n"
    code += "atexit.register(lambda: (print('leaving', flush=True), time.sleep(1)))\n"
    code += "from gpt_lightning.plan import main\nsys.argv = ['plan', '--help']\nmain()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert next(line for line in process.stdout if line == "leaving\n")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_log_that_cannot_be_opened_is_told_with_the_reason(tmp_path: Path) -> None:
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "missing" / "train.log")}
    with pytest.raises(ValueError, match="Unable to configure handler") as caught:
        logging.config.dictConfig(
            {"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"]}}
        )
    assert one_line(caught.value) == f"{handler['filename']}: No such file or directory; " + (
        "it is needed and not there; was it deleted?"
    )
