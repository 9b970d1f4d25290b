"""Exported folders in `transformers`, and back in this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from math import nan
from pathlib import Path

import pytest
import tiktoken
import torch
from support.models import BYTES, random_net
from support.runs import SHARED

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.loading import read_model, start_from
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop.export import export
from gpt_lightning.interop.folder import read_folder
from gpt_lightning.model.gpt import GPTConfig
from gpt_lightning.model.qwen3 import Qwen3Config, StarCoder2Config

transformers = pytest.importorskip("transformers")
TEXT = "Once upon a time there was a naïve fox who said: it's 12 o'clock!\n\n"


def gpt2() -> tiktoken.Encoding:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    if not Path(folder).is_dir():
        pytest.skip("needs ../shared/tiktoken_cache or TIKTOKEN_CACHE_DIR")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", folder)
        return tokenizers.GPT2().build(lambda split: iter(()))


ENCODINGS: dict[str, Callable[[], tiktoken.Encoding]] = {
    "bpe": lambda: tokenizers.BPE(vocab_size=290).build(lambda split: iter([TEXT * 3])),
    "gpt2": gpt2,
    "byte": lambda: BYTES,
}
SHAPES = {
    "tied, padded": {},
    "untied, not padded": {"tie_weights": False, "vocab_multiple": 1},
    "without biases, exact GELU": {"bias": False, "qkv_bias": False, "n_inner": 40, "exact_gelu": True},
    "Qwen3": {"kind": Qwen3Config, "n_kv_head": 1, "head_dim": 10},
    "Llama, untied": {"kind": Qwen3Config, "qk_norm": False, "tie_weights": False, "rope_theta": 500.0},
    "StarCoder2": {"kind": StarCoder2Config, "n_kv_head": 1, "rope_theta": 500.0},
    "StarCoder2, exact GELU": {"kind": StarCoder2Config, "exact_gelu": True},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_transformers_gives_the_same_logits_and_the_same_text(
    tmp_path: Path, encoding: str, shape: dict
) -> None:
    tokenizer = ENCODINGS[encoding]()
    model = TextGenerator(random_net(tokenizer, block_size=64, **shape), tokenizer, {"name": "x"})
    folder = export(model, tmp_path / "new", format="huggingface")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = their_tokenizer(TEXT[:30], return_tensors="pt").input_ids
    assert ids[0].tolist() == model.encode(TEXT[:30])
    with torch.no_grad():
        logits = model.net(ids)[..., : tokenizer.n_vocab]
        torch.testing.assert_close(theirs(ids).logits, logits, atol=2e-5, rtol=1e-5)
    new = 64 - ids.size(1)  # as long as no window has to move
    said = theirs.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.n_vocab - 1)
    text = their_tokenizer.decode(said[0, ids.size(1) :], skip_special_tokens=True)
    assert model.generate(TEXT[:30], max_new_tokens=new, temperature=0.0) == text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("format", ["huggingface", "weights"])
def test_exported_folder_round_trips(tmp_path: Path, format: str, encoding: str) -> None:
    tokenizer = ENCODINGS[encoding]()
    info = {"name": "x", "data": "tales", "val_loss": 1.5}
    model = TextGenerator(random_net(tokenizer, tie_weights=format == "weights"), tokenizer, info)
    again = read_model(export(model, tmp_path / "new", format=format))
    idx = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again.net(idx), model.net(idx), atol=1e-6, rtol=1e-6)
    assert again.encode(TEXT) == model.encode(TEXT)
    assert again.info.items() >= info.items()
    assert again.net.num_parameters() == again.info["parameters"]


def test_start_from_reads_an_exported_folder_with_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = ENCODINGS["bpe"]()
    model = TextGenerator(random_net(tokenizer, vocab_multiple=1), tokenizer)
    for format in ("huggingface", "weights"):
        net, found = start_from(str(export(model, tmp_path / format, format=format)), dropout=0.1)
        assert found is not None
        assert tokenizers.definition(found).ranks == tokenizers.definition(tokenizer).ranks
        assert net.training
        assert net.config.dropout == 0.1
        torch.testing.assert_close(net.lm_head.weight[: tokenizer.n_vocab], model.net.lm_head.weight)


def test_weights_format_keeps_options_that_gpt2_lacks(tmp_path: Path) -> None:
    model = TextGenerator(random_net(vocab_size=300), BYTES)  # ids to spare
    with pytest.raises(ValueError, match=r"43 ids that the tokenizer lacks.*format=weights"):
        export(model, tmp_path / "new", format="huggingface")
    assert list(tmp_path.iterdir()) == []  # neither the folder nor a part of it
    again = read_model(export(model, tmp_path / "new", format="weights"))
    assert again.net.config == model.net.config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        (GPTConfig, "GPT2LMHeadModel"),
        (Qwen3Config, "Qwen3ForCausalLM"),
        (StarCoder2Config, "Starcoder2ForCausalLM"),
    ],
)
def test_transformers_loads_an_export_without_this_package(kind: type, theirs: str, tmp_path: Path) -> None:
    net = random_net(kind=kind)
    folder = export(TextGenerator(net, BYTES), tmp_path / "new", format="huggingface")
    code = f"""
import sys, torch
sys.modules["gpt_lightning"] = sys.modules["tiktoken"] = None  # importing them is an error
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
ids = tokenizer("naïve 你好").input_ids
print(type(model).__name__, tokenizer.decode(ids))
print(model(torch.tensor([ids])).logits[0, -1].tolist())
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    name, _, logits = done.stdout.partition("\n")
    assert name == f"{theirs} naïve 你好", done.stderr
    with torch.no_grad():
        expected = net(torch.tensor([BYTES.encode("naïve 你好")]))[0, -1, : BYTES.n_vocab]
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, atol=2e-5, rtol=1e-5)


def test_export_needs_an_empty_folder_or_overwrite(tmp_path: Path) -> None:
    model = TextGenerator(random_net(), BYTES)
    folder = export(model, tmp_path / "deep" / "new", format="weights")
    with pytest.raises(FileExistsError, match="holds an export; add overwrite=true"):
        export(model, folder, format="weights")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("thesis.txt", "card.json"):  # also a card of another program
        (mine / name).write_text('{"name": "mine", "files": []}')
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="a folder with other files"):
                export(model, mine, format="weights", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="is a file"):
            export(model, mine / name, format="weights", overwrite=True)
        (mine / name).unlink()
    export(model, mine, format="weights")


def test_overwrite_replaces_what_an_export_wrote_and_nothing_else(tmp_path: Path) -> None:
    first, second = (TextGenerator(random_net(seed=seed), BYTES, {"val_loss": nan}) for seed in (1, 2))
    folder = export(first, tmp_path / "new", format="weights")
    (folder / ".git").mkdir()
    kept = {"README.md": "of the user", ".git/HEAD": "a commit", "notes.txt": "mine"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    export(second, folder, format="huggingface", overwrite=True)
    assert {name: (folder / name).read_text() for name in kept} == kept
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt2"
    idx = torch.arange(9)[None]
    assert torch.equal(read_model(folder).net(idx)[..., :257], second.net(idx)[..., :257])
    export(first, folder, format="weights", overwrite=True)
    assert {path.name for path in folder.iterdir()} == {
        *("card.json", "config.json", "model.safetensors", "tokenizer.json"),
        *("README.md", ".git", "notes.txt"),
    }
    assert torch.equal(read_model(folder).net(idx)[..., :257], first.net(idx)[..., :257])
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("change", ["edited", "link", "folder"])
def test_overwrite_refuses_before_anything_is_replaced_where_a_file_is_not_an_exports(
    tmp_path: Path, change: str
) -> None:
    model = TextGenerator(random_net(), BYTES)
    folder = export(model, tmp_path / "new", format="weights")
    (tmp_path / "secret").write_text("secret")
    config = folder / "config.json"
    text = config.read_text()
    config.unlink()
    if change == "folder":
        config.mkdir()
    elif change == "link":
        config.symlink_to(tmp_path / "secret")
    else:
        config.write_text(text + " ")
    before = {path: path.stat() for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match=r"config\.json was not written by an export, or was changed"):
        export(model, folder, format="huggingface", overwrite=True)
    after = {path: path.stat() for path in tmp_path.rglob("*")}
    assert {path: (s.st_mtime_ns, s.st_ino) for path, s in after.items() if path != folder} == {
        path: (s.st_mtime_ns, s.st_ino) for path, s in before.items() if path != folder
    }


@pytest.mark.parametrize("stop", range(4))
def test_interrupted_overwrite_leaves_no_model_of_two_and_can_be_repeated(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (TextGenerator(random_net(seed=seed), BYTES) for seed in (1, 2))
    folder = export(first, tmp_path / "new", format="weights")
    moves, replace = [], Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) > stop:
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(second, folder, format="weights", overwrite=True)
    if (folder / "config.json").exists():
        assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "tokenizer.json"}
    again = read_model(export(second, folder, format="weights", overwrite=True))
    assert torch.equal(again.net.lm_head.weight, second.net.lm_head.weight)


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format='onnx' does not exist; use huggingface, weights"):
        export(TextGenerator(random_net(), BYTES), tmp_path / "new", format="onnx")


def test_damaged_folders_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = export(TextGenerator(random_net(), BYTES), tmp_path / "new", format="weights")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["config.json"])
    config["model"]["n_experts"] = 4
    changes = {
        "config.json": [b"{", b"[]", b'{"model_type": "bert"}', json.dumps(config).encode()],
        "model.safetensors": [b"", files["model.safetensors"][:-9], b"\x80\x04."],
        "tokenizer.json": [b"{}", files["tokenizer.json"][:50]],
        "card.json": [b"{", b"3"],
    }
    for name, contents in changes.items():
        for content in contents:
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=r"\S") as caught:
                read_model(folder)
            assert str(folder) in str(caught.value)
            assert "\n" not in str(caught.value)
        (folder / name).write_bytes(files[name])
    read_model(folder)


def test_folder_without_a_tokenizer_can_only_be_trained_further(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=99, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        read_model(tmp_path)
    net, tokenizer, _ = read_folder(tmp_path)
    assert isinstance(net.config, GPTConfig)
    assert tokenizer is None
