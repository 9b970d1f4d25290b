# ruff: noqa: E501 (a row of the table is a line)
"""Wrong uses: each ends in one line that names what is wrong, with exit code 1, and nothing half-written."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import TINY

pytestmark = pytest.mark.slow  # a third of a second each, most of it Hydra's

# command, its arguments, what the line says (a regular expression). In the arguments, a name of a file below
# stands for that file. `train` and `plan` run on a good configuration in which one thing is wrong.
TABLE: list[tuple[str, str, str]] = [
    # -- keys that do not exist, and what Hydra refuses
    ("train", "model.nlayer=3", r"there is no key model.nlayer; did you mean n_layer\?"),
    ("train", "sed=3", r"there is no key sed; did you mean seed\?"),
    ("train", "model=gpt3", "Could not find 'model/gpt3' Available options in 'model': baby"),
    ("train", "experiment=mine", "Could not find 'experiment/mine' Available options in 'experiment':"),
    ("train", "seed", "Error parsing override 'seed' missing EQUAL"),
    ("train", "data.path=[a", "no viable alternative at input"),
    ("train", "model._target_=torch.nn.Foo", "model: Error loading 'torch.nn.Foo'"),
    ("train", "+model.n_experts=8", "model.n_experts is no argument of GPTConfig; it takes vocab_size, block_size"),
    ("train", "+optimizer.momentum=0.9", "optimizer.momentum is no argument of adamw; it takes params, lr, betas"),
    ("train", "+scheduler.power=2", "scheduler.power is no argument of cosine; it takes step, max_steps"),
    ("train", "+callbacks.mine=3", "callbacks.mine=3 must have a _target_, the name of a class, or be null"),
    ("train", "+trainer.lightning.foo=1", "trainer.lightning.foo is no argument of Trainer; it takes fast_dev_run"),
    ("train", "+trainer.lightning.max_steps=1", "trainer.lightning.max_steps has another key, .* leave it out"),
    ("train", "+trainer.lightning.overfit_batches=x", "trainer.lightning.overfit_batches='x' must be a number"),
    # -- types and ranges
    ("train", "seed=-1", "seed=-1 must be a whole number of at least 0"),
    ("train", "seed=abc", "seed='abc' must be a whole number"),
    ("train", "name=../elsewhere", "name='../elsewhere' names a folder"),
    ("train", "target_loss=0", "target_loss=0 must be a number above 0 or null"),
    ("train", "time_limit=1:99:00", "time_limit='1:99:00' must be HH:MM:SS"),
    ("train", "time_limit=soon", "time_limit='soon' must be HH:MM:SS"),
    ("train", "data.batch_size=0", "data.batch_size=0 must be a whole number of at least 1"),
    ("train", "data.batch_size=2.5", "data.batch_size=2.5 must be a whole number"),
    ("train", "data.stride=0", "data.stride=0 must be a whole number of at least 1 or null"),
    ("train", "data.sequence_length=0", "data.sequence_length=0 must be"),
    ("train", "data.num_workers=-1", "data.num_workers=-1 must be a whole number of at least 0"),
    ("train", "data.shuffle=maybe", "data.shuffle='maybe' must be true or false"),
    ("train", "data.drop_last=7", "data.drop_last=7 must be true or false"),
    ("train", "data.val_fraction=2", "data.val_fraction=2 must be above 0 and below 1"),
    ("train", "data.separator=3", "data.separator=3 must be text"),
    ("train", "paths.cache=3", "paths.cache=3 must be the name of a folder"),
    ("train", "tokenizer=bpe tokenizer.vocab_size=100", "tokenizer.vocab_size=100 must be .* from 257"),
    ("train", "model.n_layer=0", "model.n_layer=0 must be a whole number of at least 1"),
    ("train", "model.n_layer=1.5", "model.n_layer=1.5 must be a whole number"),
    ("train", "model.n_head=5", "model.n_embd=32 is not divisible by model.n_head=5"),
    ("train", "model.dropout=1", r"model.dropout=1 must lie in \[0, 1\)"),
    ("train", "model.bias=x", "model.bias='x' must be true or false"),
    ("train", "model.vocab_size=x", "model.vocab_size='x' must be a whole number"),
    ("train", "model.vocab_size=10", "model.vocab_size=10 is smaller than the tokenizer's 257 ids"),
    ("train", "optimizer.lr=0", "optimizer.lr=0 must be a finite number above 0"),
    ("train", "optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
    ("train", "optimizer.lr=inf", "optimizer.lr=inf must be a finite number above 0"),
    ("train", "optimizer.betas=[0.9]", r"optimizer.betas=\[0.9\] must be two numbers"),
    ("train", "optimizer.eps=-1", "optimizer.eps=-1 must be a finite number of at least 0"),
    ("train", "optimizer.weight_decay=-1", "optimizer.weight_decay=-1 must be a finite number of at least 0"),
    ("train", "optimizer.fused=x", "optimizer.fused='x' must be true or false or null"),
    ("train", "scheduler.warmup_steps=-1", "scheduler.warmup_steps=-1 must be"),
    ("train", "scheduler.min_lr_ratio=2", r"scheduler.min_lr_ratio=2 is a share, so it must lie in \[0, 1\]"),
    ("train", "device.accelerator=gpux", "device.accelerator='gpux' must be auto, cpu, cuda or mps"),
    ("train", "device.devices=0", "device.devices=0 must be how many, auto for all, or a list"),
    ("train", "device.devices=[0]", r"device.devices=\[0\] names GPUs; on a CPU it is a number"),
    ("train", "device.precision=8", "device.precision=8 must be 32-true, bf16-mixed, 16-mixed"),
    ("train", "device.micro_batch_size=x", "device.micro_batch_size='x' must be .*, or auto"),
    ("train", "device.matmul_precision=low", "device.matmul_precision='low' must be highest, high or medium"),
    ("train", "trainer.max_steps=0", "trainer.max_steps=0 must be a whole number of at least 1 or null"),
    ("train", "trainer.val_every_steps=0", "trainer.val_every_steps=0 must be"),
    ("train", "trainer.keep_last=0", "trainer.keep_last=0 must be"),
    ("train", "trainer.clip_norm=-1", "trainer.clip_norm=-1 must be a number above 0 or null"),
    ("train", "trainer.strategy=fast", "invalid strategy name: `strategy='fast'`"),
    ("train", "trainer.deterministic=x", "trainer.deterministic='x' must be true, false or warn"),
    ("train", "trainer.lightning=3", "trainer.lightning=3 must be keys with values"),
    ("train", "callbacks.nonfinite=ignore", "callbacks.nonfinite='ignore' must be stop or skip"),
    ("train", "callbacks.incidents.spike=1", "callbacks.incidents.spike=1 is a multiple, so it must exceed 1"),
    ("train", "callbacks.best.monitor=loss", "callbacks.best.monitor='loss' must be one of val/loss"),
    ("train", "callbacks.samples.top_k=0", "top_k=0 must be a whole number of at least 1"),
    # -- combinations
    ("train", "trainer.max_steps=null", "trainer.max_steps and trainer.max_epochs are both null"),
    ("train", "scheduler.warmup_steps=8", "scheduler.warmup_steps=8 .* smaller than the run's 8 optimizer steps"),
    ("train", "data.sequence_length=64", "data.sequence_length=64 exceeds model.block_size=32"),
    ("train", "data.batch_size=7 device.devices=2", "data.batch_size=7 cannot be shared by 2 devices"),
    ("train", "data.batch_size=5000", "windows of 32 tokens, fewer than data.batch_size=5000"),
    ("train", "model.block_size=100000", "fewer than one window of 100000"),
    ("train", "device.precision=16-mixed", "device.precision=16-mixed needs a CUDA GPU"),
    ("train", "trainer=fsdp", "strategy `fsdp` requires a GPU"),
    ("train", "time_limit=1:00:00 callbacks.last=null", "time_limit= needs the checkpoints of callbacks.last"),
    ("train", "resume=run init_from=run", "resume=.* and init_from=.* exclude each other"),
    ("train", "model.n_embd=100000000", "out of memory .* use a smaller model"),
    # -- text
    ("train", "data.path=nowhere.txt", "nowhere.txt does not exist"),
    ("train", "data.path=null", "data.path=None must be text or a list"),
    ("train", "data.path=empty.txt", "empty.txt holds no text"),
    ("train", "data.path=latin.txt", "latin.txt: byte 3 is not UTF-8"),
    ("train", "data.path=short.txt", "the training split has 4 tokens"),
    ("train", "data.path=broken.jsonl", "broken.jsonl:2 is not JSON"),
    ("train", "data.path=other.jsonl", "other.jsonl:1 has no data.field=text; it has body"),
    ("train", "data.path=broken.parquet", "broken.parquet is no readable parquet file"),
    ("train", "data.path=folder", "folder holds no file that ends in .txt"),
    ("train", "data.val_path=nowhere.txt", "data.val_path=.*nowhere.txt does not exist"),
    ("prepare", "data=text", "data.path= must be given"),
    ("prepare", "data=bin data.path=bins tokenizer=byte", "train.bin has 3 bytes, no whole number"),
    ("prepare", "data=text data.path=good.txt shard=1", "shard=1 and shards=None go together"),
    ("prepare", "data=text data.path=good.txt shard=5 shards=2", "shard=5 must lie in 0 … 1"),
    ("prepare", "data=text data.path=good.txt shard=a shards=2", "shard='a' must be a whole number"),
    ("prepare", "data=text data.path=good.txt shard=0 shards=0", "shards=0 must be a whole number of at least 1"),
    ("plan", "scheduler.warmup_steps=8", "scheduler.warmup_steps=8 must be"),
    ("plan", "optimizer.lr=-1", "optimizer.lr=-1 must be a finite number above 0"),
    ("plan", "model.n_head=3", "model.n_embd=32 is not divisible by model.n_head=3"),
    # -- checkpoints and runs
    ("train", "init_from=nowhere", "no checkpoint at .*nowhere: it does not exist"),
    ("train", "init_from=folder", "no checkpoint at .*folder: it has no checkpoints/best.ckpt"),
    ("train", "init_from=noise.ckpt", "noise.ckpt is damaged or not a checkpoint"),
    ("train", "init_from=other.ckpt", "other.ckpt is not a checkpoint of gpt_lightning"),
    ("train", "init_from=code.ckpt", "code.ckpt holds more than tensors and plain values"),
    ("train", "init_from=cut.ckpt", "cut.ckpt is damaged or not a checkpoint"),
    ("train", "init_from=run model.n_layer=3", "the weights do not fit the model: transformer.h.2"),
    ("train", "resume=nowhere", "nowhere is not a run directory"),
    ("train", "resume=good.txt", "good.txt is not a run directory"),
    ("train", "resume=latest paths.outputs=folder", "resume=latest: there is no run below .*folder"),
    ("train", "resume=run seed=2", r"these would change it: seed \(was 1337, now 2\)"),
    ("train", "resume=run -m", "resume= continues one run"),
    ("train", "resume=run hydra.run.dir=folder", "resume=.* goes on in .*run; leave out hydra.run.dir="),
    ("train", "resume=unfinished", "every checkpoint of the run is damaged: .*last.ckpt"),
    ("generate", "", "checkpoint= is missing"),
    ("generate", "checkpoint=cut.ckpt", "cut.ckpt is damaged"),
    ("generate", "checkpoint=run temperature=-1", "temperature=-1 must be a number at least 0"),
    ("generate", "checkpoint=run top_p=2", "top_p=2 must be"),
    ("generate", "checkpoint=run max_new_tokens=0", "max_new_tokens=0 must be"),
    ("generate", "checkpoint=run dtype=int3", "dtype='int3' does not exist; use float32"),
    ("generate", "checkpoint=run prompt=a prompt_file=good.txt", "prompt= and prompt_file= exclude each other"),
    ("generate", "checkpoint=run prompt_file=latin.txt", "latin.txt is not UTF-8"),
    ("evaluate", "checkpoint=run", "nothing to evaluate; give data=, text="),
    ("evaluate", "checkpoint=run text=nowhere.txt", "nowhere.txt does not exist"),
    ("evaluate", "checkpoint=run text=good.txt stride=99", "stride=99 must be a whole number from 1 to .*32"),
    ("evaluate", "checkpoint=run text=good.txt per_document=x", "per_document='x' must be true or false"),
    ("export", "checkpoint=run", "output= is missing"),
    ("export", "checkpoint=run output=new format=onnx", "format='onnx' does not exist; use huggingface"),
    ("export", "checkpoint=run output=bins", "bins is a folder with other files"),
    ("demo", "checkpoint=run port=99999", "port=99999 must be a whole number from 0 to 65535"),
    # -- the machine
    ("train", "paths.cache=good.txt", "cannot write to the token cache .*good.txt"),
    ("train", "hydra.run.dir=good.txt/run", "good.txt/run: Not a directory; name a place below a folder"),
    ("generate", "checkpoint=run prompt=a output=good.txt/answers", "File exists.*name another place|Not a dir"),
]  # fmt: skip


class Code:
    """Would run when it is unpickled."""

    def __reduce__(self) -> Any:
        return (print, ("this must not be printed",))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good text, and with what is wrong with files."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("folder", "bins"):
        (folder / name).mkdir()
    (folder / "good.txt").write_text("the cat sees a dog.\n" * 900)
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("hello")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 500)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"txt": 3\n')
    (folder / "other.jsonl").write_text('{"body": "a"}\n' * 10)
    (folder / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    for split in ("train", "val"):
        (folder / "bins" / f"{split}.bin").write_bytes(b"123")
    (folder / "noise.ckpt").write_bytes(random.Random(3).randbytes(5000))
    torch.save({"a": 1}, folder / "other.ckpt")
    torch.save({"state_dict": Code()}, folder / "code.ckpt")
    return folder


@pytest.fixture(scope="module")
def options(files: Path) -> list[str]:
    """A configuration in which nothing is wrong."""
    return [*TINY, f"data.path={files / 'good.txt'}", "logger=none", "callbacks.layers=null"]


@pytest.fixture(scope="module")
def places(files: Path, options: list[str]) -> set[str]:
    """Names in `files` that arguments may have; makes a run there."""
    import sys

    from gpt_lightning import train

    before = sys.argv
    sys.argv = ["train", *options, f"hydra.run.dir={files / 'run'}", "trainer.max_steps=2"]
    sys.argv += ["scheduler.warmup_steps=0", "trainer.val_every_steps=2"]
    train.main()
    sys.argv = before
    run, unfinished = files / "run", files / "unfinished"
    (files / "cut.ckpt").write_bytes((run / "checkpoints" / "best.ckpt").read_bytes()[:9000])
    (unfinished / "checkpoints").mkdir(parents=True)
    for path in (run / ".hydra").iterdir():
        (unfinished / ".hydra").mkdir(exist_ok=True)
        (unfinished / ".hydra" / path.name).write_bytes(path.read_bytes())
    (unfinished / "checkpoints" / "last.ckpt").write_bytes(b"nothing")
    return {path.name for path in files.iterdir()} | {"nowhere", "nowhere.txt", "new"}


def placed(argument: str, files: Path, places: set[str]) -> str:
    """An argument with the place of the file that it names."""
    key, _, value = argument.partition("=")
    if value.split("/")[0] in places and key in KEYS_OF_FILES:
        return f"{key}={files / value}"
    return argument


KEYS_OF_FILES = {
    "data.path", "data.val_path", "init_from", "resume", "checkpoint", "prompt_file", "text", "output", "paths.cache",
    "paths.outputs", "hydra.run.dir",
}  # fmt: skip


def listing(folder: Path) -> set[Path]:
    """All but what Hydra writes: its configuration, and the log, which holds the traceback."""
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path for path in found if ".hydra" not in path.parts and path.name != "train.log"}


@pytest.mark.parametrize(("name", "arguments", "line"), TABLE, ids=[f"{row[0]} {row[1]}" for row in TABLE])
def test_wrong_use_ends_in_one_line(
    name: str,
    arguments: str,
    line: str,
    call: Callable[..., Any],
    files: Path,
    places: set[str],
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = [placed(argument, files, places) for argument in arguments.split()]
    if name in ("train", "plan") and "resume" not in arguments.split("=")[0]:
        run = [] if any(argument.startswith("hydra.run.dir") for argument in wrong) else ["hydra.run.dir=run"]
        wrong = [*options, *run, *wrong]
    before = listing(files)
    with pytest.raises(SystemExit) as stop:
        call(name, *wrong)
    out, error = capfd.readouterr()
    assert stop.value.code == 1, error
    assert error.count("\n") == 1, error
    assert error.startswith("error: ")
    assert re.search(line, error), error
    assert "Traceback" not in out
    assert "this must not be printed" not in out
    assert listing(files) == before
    assert listing(tmp_path) <= {Path("run")}


@pytest.mark.parametrize("argument", ["--steps=3", "-x"])
def test_unknown_flag_ends_as_hydra_has_it(
    argument: str, call: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        call("train", argument)
    assert stop.value.code == 2
    assert f"error: unrecognized arguments: {argument}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["device=cuda"], "device.accelerator=cuda: there is no NVIDIA GPU"),
        (["tokenizer=gpt2"], "the GPT-2 vocabulary is not in tiktoken's cache .* set TIKTOKEN_CACHE_DIR"),
        (["logger=wandb"], "wandb.*pip install"),
        (["data.path=nowhere.txt"], "nowhere.txt does not exist"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_environment_ends_in_one_line_of_a_real_process(
    arguments: list[str], line: str, command: Callable[..., Any], options: list[str], tmp_path: Path
) -> None:
    if arguments == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if arguments == ["logger=wandb"]:
        pytest.importorskip("wandb", reason="inverted below") if False else None
    nowhere = {"TIKTOKEN_CACHE_DIR": str(tmp_path / "none"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = {**os.environ, **nowhere, "OMP_NUM_THREADS": "1"}
    result = command("train", *options, "hydra.run.dir=run", *arguments, env=environment)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(line, result.stderr)
    assert "Traceback" not in result.stdout
