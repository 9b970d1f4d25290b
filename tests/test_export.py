"""The command `export`, and training from exported folders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Evil, random_net, save_checkpoint

from gpt_lightning.inference.loading import read_model

transformers = pytest.importorskip("transformers")
Call = Callable[..., Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "any" / "best.ckpt", random_net())


def test_exported_run_generates_the_same_text_in_transformers(
    call: Call, tiny: list[str], tmp_path: Path, capsys: Capture
) -> None:
    call("train", *tiny, "tokenizer=bpe", "tokenizer.vocab_size=300", "model.block_size=64", "logger=none")
    call("export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'model'}")
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert shown.endswith(f"{tmp_path / 'model'}\n")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("the dog sees", return_tensors="pt").input_ids
    said = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    for source in ("run", "model"):
        capsys.readouterr()
        settings = ["prompt=the dog sees", "temperature=0", "max_new_tokens=40", "device=cpu"]
        call("generate", f"checkpoint={tmp_path / source}", *settings)
        assert capsys.readouterr().out == tokenizer.decode(said, skip_special_tokens=True) + "\n"


def test_gpt2_of_transformers_can_be_fine_tuned_and_exported(
    call: Call, tiny: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48}
    config = transformers.GPT2Config(vocab_size=257, **shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    begin = transformers.GPT2LMHeadModel(config)
    begin.save_pretrained(tmp_path / "begin")
    overrides = [override for override in tiny if not override.startswith("model.")]
    call("train", *overrides, f"init_from={tmp_path / 'begin'}", "optimizer.lr=1e-3", "logger=none")
    call(
        "export", f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}", f"output={tmp_path / 'end'}"
    )
    end = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end")
    assert end.config.n_inner == 48
    idx = torch.randint(0, 257, (2, 32))
    ours = read_model(tmp_path / "run" / "checkpoints" / "last.ckpt").net
    with torch.no_grad():
        torch.testing.assert_close(end(idx).logits, ours(idx)[..., :257], atol=1e-4, rtol=1e-4)
    moved = (end.transformer.wte.weight - begin.transformer.wte.weight).abs()
    assert 1e-5 < float(moved.detach().mean()) < 1e-2  # eight steps of 1e-3 from where it began
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss"] < 5.6  # ln 257 = 5.55 at the beginning


def test_exported_bpe_model_is_fine_tuned_with_its_own_tokenizer(
    call: Call, tiny: list[str], tmp_path: Path
) -> None:
    call("train", *tiny, "tokenizer=bpe", "tokenizer.vocab_size=290", "logger=none")
    call("export", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'model'}")
    overrides = [override for override in tiny if not override.startswith(("model.", "hydra.run.dir"))]
    begin = [f"init_from={tmp_path / 'model'}", "tokenizer=byte", f"hydra.run.dir={tmp_path / 'second'}"]
    call("train", *overrides, *begin, "logger=none", "optimizer.lr=1e-4")
    first, second = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("run", "second"))
    assert second["val_loss"] < first["val_loss"] + 0.05  # with other ids it would begin above ln 290 = 5.67
    assert read_model(tmp_path / "second").encode("the dog") == read_model(tmp_path / "run").encode("the dog")


def test_generate_reads_the_weights_format(
    call: Call, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    call("export", f"checkpoint={checkpoint}", f"output={tmp_path / 'bare'}", "format=weights")
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {
        "card.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    said = []
    for source in (checkpoint, tmp_path / "bare"):
        capsys.readouterr()
        call("generate", f"checkpoint={source}", "prompt=abc", "seed=3", "device=cpu", "max_new_tokens=30")
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    with pytest.raises(SystemExit):
        call("export", f"checkpoint={tmp_path / 'bare'}", f"output={tmp_path / 'bare'}", "overwrite=true")
    assert "is the folder that is exported; give another one" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_command_refuses_a_checkpoint_with_code(
    command: str, call: Call, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    torch.save({**contents, "callbacks": Evil(tmp_path / "ran")}, checkpoint)
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    more = [f"output={tmp_path / 'model'}"] if command == "export" else []
    for path in (checkpoint, tmp_path / "bare.ckpt"):
        with pytest.raises(SystemExit) as stop:
            call(command, f"checkpoint={path}", *more)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path} ")
        assert error.count("\n") == 1
    assert not (tmp_path / "ran").exists()
