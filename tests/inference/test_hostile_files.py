"""Files from others: whatever they hold, loading ends in one line, without building what they only claim."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import BYTES, random_net, save_checkpoint

from gpt_lightning.config.source import corpus_of_run
from gpt_lightning.inference.loading import read_model, start_from
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop.export import export

HUGE = 1_000_000_000
WTE = "net.transformer.wte.weight"
DEEP = 10_000


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def save(checkpoint: dict[str, Any], path: Path) -> Path:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    torch.save(checkpoint, path)
    sys.setrecursionlimit(limit)
    return path


def tokens(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["tokenizer"].update(changes)


def model(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["hyper_parameters"]["model"].update(changes)


def lora(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["hyper_parameters"].update(lora={"r": 2, **changes})


def weight(make: Callable[[torch.Tensor], object], name: str = WTE) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["state_dict"].update({name: make(checkpoint["state_dict"][name])})


def bare(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda checkpoint: checkpoint["hyper_parameters"]["model"].pop(name)


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{f"{key} huge": model(**{key: HUGE}) for key in ("n_layer", "vocab_size", "block_size")},
    **{f"{key} huge": model(**{key: HUGE}) for key in ("n_inner", "vocab_multiple")},
    "n_embd and n_head huge": model(n_embd=HUGE, n_head=HUGE),
    "n_embd beyond 64 bits": model(n_embd=2 << 80, n_head=1),
    "vocab_size beyond 64 bits": model(vocab_size=10**40),
    **{f"{key} null": model(**{key: None}) for key in ("n_layer", "vocab_size", "n_embd", "dropout", "bias")},
    **{f"{key} text": model(**{key: "2"}) for key in ("n_layer", "n_head", "dropout", "tie_weights")},
    "n_layer a tensor": model(n_layer=torch.tensor(2)),
    "n_layer nested": model(n_layer=nested(3000)),
    "n_layer negative": model(n_layer=-1),
    "dropout not a number": model(dropout=math.nan),
    "vocab_size missing": bare("vocab_size"),
    "unknown field": model(n_experts=4),
    "field that is no text": lambda c: c["hyper_parameters"]["model"].update({3: 4, "x": 5}),
    "class that is no text": model(_target_=["os.system"]),
    "vocabulary smaller than the tokenizer's": model(vocab_size=200, vocab_multiple=320),
    "rank huge": lora(r=HUGE),
    "rank text": lora(r="2"),
    "adapter option unknown": lora(rank=3),
    "adapter targets a number": lora(target_modules=3),
    "adapter targets nested": lora(target_modules=[["c_attn"]]),
    "adapter scale infinite": lora(lora_alpha=math.inf),
    "adapter scale beyond floats": lora(lora_alpha=10**400),
    "no weights": lambda c: c["state_dict"].clear(),
    "weight not a number": weight(lambda w: w.fill_(math.nan)),
    "weight infinite": weight(lambda w: w.double() * 1e300),
    "weight null": weight(lambda w: None),
    "weight nested": weight(lambda w: nested(3000)),
    "weight of whole numbers": weight(lambda w: w.int()),
    "weight complex": weight(lambda w: w.to(torch.complex64)),
    "weight sparse": weight(lambda w: w.to_sparse()),
    "weight without memory": weight(lambda w: w.to("meta")),
    "weight without dimensions": weight(lambda w: w.sum()),
    "weight of three dimensions": weight(lambda w: w[None]),
    "weights that repeat one number": lambda c: (
        model(vocab_size=HUGE)(c),
        weight(lambda w: torch.zeros(1, 1).expand(HUGE, 16))(c),
    ),
    "weight without a name": lambda c: c["state_dict"].update({7: torch.ones(1), "net.more": torch.ones(1)}),
    "tokenizer empty": lambda c: c["tokenizer"].clear(),
    "tokens nested": tokens(tokens=nested(3000)),
    "tokens not base64": tokens(tokens="ä 0"),
    "id negative": tokens(tokens="YQ== -1"),
    "id huge": tokens(tokens=f"YQ== {1 << 70}"),
    "id of many digits": tokens(tokens="YQ== " + "9" * 10_000),
    "special id negative": tokens(special_tokens={"<|endoftext|>": -1}),
    "special id not a number": tokens(special_tokens={"<|endoftext|>": math.nan}),
    "special token empty": tokens(special_tokens={"<|endoftext|>": 256, "": 257}),
    "special tokens a number": tokens(special_tokens=3),
    "name with a line break": tokens(name="a\nb"),
    "pattern null": tokens(pattern=None),
    "pattern empty": tokens(pattern=""),
    "pattern matches nothing": tokens(pattern="a*"),
    "pattern recursive": tokens(pattern="(?R)"),
    "pattern open": tokens(pattern="("),
    "pattern nested": tokens(pattern="(" * DEEP + "a" + ")" * DEEP),
    "pattern huge": tokens(pattern="(?:a{1000}){1000}"),
    "pattern that backtracks": tokens(pattern=r"(?:\p{L}+\p{L}+)+\d(?!z)|(?s:.)"),
    "pattern that loses text": tokens(pattern="[a-m]"),
    "byte without a token": tokens(pattern="(?s:.)", tokens="YWI= 0\nYg== 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("good") / "good.ckpt", random_net(vocab_size=257))


def check_refused(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever loads it gets one line that names it, and nothing is printed, by no library either."""
    for load in (read_model, lambda path: start_from(str(path))):
        with pytest.raises(ValueError, match=r"\S") as caught:
            load(path)
        line = str(caught.value)
        assert str(path) in line
        assert "\n" not in line
        assert len(line) < 1500
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_hostile_checkpoint_is_refused_in_one_line(
    name: str, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    CHECKPOINTS[name](checkpoint)
    check_refused(save(checkpoint, tmp_path / "bad.ckpt"), capfd)


def test_compressed_checkpoint_is_refused_before_it_is_read(good: Path, tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in source.infolist():
            bomb.writestr(entry.filename, source.read(entry))
        bomb.writestr("good/data/99", bytes(50_000_000))
    assert path.stat().st_size < 200_000
    check_refused(path, capfd)


@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters": {"name": nested(3000), "data": {"path": 3, "name": ["x"]}, "init_from": 3}},
        {"hyper_parameters": {"data": nested(3), "lora": "none"}, "progress": nested(3)},
        {"progress": {"step": "seven", "train_loss": torch.ones(2), "best_val_loss": None, "metrics": 3}},
        {"progress": {"step": None, "metrics": {"val/loss": "low", "val/perplexity": nested(3)}}},
    ],
)
def test_odd_values_about_a_model_are_left_out_of_its_card(
    changes: dict[str, Any], good: Path, tmp_path: Path
) -> None:
    checkpoint = torch.load(good, weights_only=True)
    checkpoint["hyper_parameters"] |= changes.pop("hyper_parameters", {})
    path = save(checkpoint | changes, tmp_path / "odd.ckpt")
    start_from(str(path))
    odd = read_model(path)
    assert all(value is None or isinstance(value, (str, int, float)) for value in odd.info.values())
    folder = export(odd, tmp_path / "new", format="weights")
    (folder / "card.json").write_text(json.dumps({"step": "x", "val_loss": [], "n_layer": 99, "other": 3}))
    start_from(str(folder))
    assert read_model(folder).info["n_layer"] == 2
    assert not read_model(folder).info.keys() & {"step", "val_loss", "other"}


def change(**changes: object) -> Callable[[Any], Any]:
    return lambda content: content | changes


def change_model(**changes: object) -> Callable[[Any], Any]:
    return lambda content: content | {"model": content["model"] | changes}


def text(value: str) -> Callable[[Any], str]:
    return lambda content: value


def split(pattern: object) -> Callable[[Any], Any]:
    def apply(content: Any) -> Any:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = pattern
        return content

    return apply


def word(token: str, rank: int) -> Callable[[Any], Any]:
    def apply(content: Any) -> Any:
        content["model"]["vocab"][token] = rank
        return content

    return apply


def end(rank: object) -> Callable[[Any], Any]:
    return change(added_tokens=[{"content": "<|endoftext|>", "id": rank}])


NO_OBJECT = ("[" * DEEP, '{"a":' * DEEP, "[]", "3", "\x00", "{", '{"a": ' + "9" * 10_000 + "}")
INDEX = "model.safetensors.index.json"
FOLDERS: dict[tuple[str, str], list[Callable[[Any], Any]]] = {  # of a file's JSON; a text replaces the file
    ("huggingface", "config.json"): [
        *(change(**{key: HUGE}) for key in ("n_layer", "vocab_size", "n_positions", "n_inner")),
        change(n_embd=HUGE, n_head=HUGE),
        *(change(**{key: None}) for key in ("n_layer", "n_embd", "n_positions", "resid_pdrop")),
        *(change(n_embd=value) for value in ({}, [], "16", 1e400, 16.0, True)),
        change(activation_function=[]),
        *map(text, NO_OBJECT),
    ],
    ("huggingface", INDEX): [
        *(text(json.dumps({"weight_map": value})) for value in (None, [], {"a": 3}, {})),
        *map(text, NO_OBJECT),
    ],
    ("huggingface", "tokenizer.json"): [
        *(change(**{key: None}) for key in ("model", "pre_tokenizer", "added_tokens")),
        *map(end, (-1, 1e400, HUGE, None)),
        word("a", -1),
        word("a" * 20_000, 300),
        *(split({"Regex": value}) for value in ("", "a*", "(", "(?R)", "(" * DEEP, "[a-m]", None, 3)),
        split({"String": " "}),
        *map(text, NO_OBJECT),
    ],
    ("huggingface", "card.json"): [*map(text, NO_OBJECT)],
    ("weights", "config.json"): [
        *(change_model(**{key: HUGE}) for key in ("n_layer", "vocab_size", "block_size", "n_inner")),
        *(change_model(**{key: None}) for key in ("n_layer", "vocab_size", "tie_weights")),
        *(change(model=value) for value in (None, [], {}, 3)),
        *map(text, NO_OBJECT),
    ],
    ("weights", "tokenizer.json"): [
        *(change(**{key: v}) for key in ("pattern", "tokens", "special_tokens") for v in (None, 3, "")),
        *map(text, NO_OBJECT),
    ],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for format in ("huggingface", "weights"):
        export(TextGenerator(random_net(vocab_multiple=1), BYTES), folder / format, format=format)
    return folder


@pytest.mark.parametrize(
    ("format", "file", "edit"), [(*where, edit) for where, edits in FOLDERS.items() for edit in edits]
)
def test_hostile_folder_is_refused_in_one_line(
    format: str, file: str, edit: Any, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad"
    shutil.copytree(exported / format, path)
    content = edit(json.loads((path / file).read_text()) if (path / file).exists() else None)
    (path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    check_refused(path, capfd)


def test_pipe_in_a_folder_is_not_waited_for(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    shutil.copytree(exported / "weights", path)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_model(path)


@pytest.mark.parametrize("format", ["huggingface", "weights"])
def test_hostile_weights_of_a_folder_are_refused_in_one_line(
    format: str, exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad"
    shutil.copytree(exported / format, path)
    weights = load_file(path / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight"
    for bad in (weights[name] * math.nan, weights[name][None], weights[name].long(), torch.zeros(0)):
        save_file({**weights, name: bad.contiguous()}, path / "model.safetensors")
        check_refused(path, capfd)


def test_corpus_that_no_run_wrote_is_not_built(good: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(good, weights_only=True)
    write = {"_target_": "gpt_lightning.data.files.write_json", "path": str(tmp_path / "x"), "content": {}}
    for corpus in ({"_target_": "os.mkdir", "path": str(tmp_path / "x")}, write, [write], 3):
        checkpoint["hyper_parameters"]["data"] = {"corpus": corpus}
        assert corpus_of_run(save(checkpoint, tmp_path / "odd.ckpt")) is None
    checkpoint["hyper_parameters"]["data"] = {"corpus": {"path": nested(3000)}}
    with pytest.raises(ValueError, match=r"odd\.ckpt has a configuration that no run has written"):
        corpus_of_run(save(checkpoint, tmp_path / "odd.ckpt"))
    assert [path.name for path in tmp_path.iterdir()] == ["odd.ckpt"]


@pytest.mark.parametrize("command", ["generate", "evaluate", "export", "train"])
def test_every_command_refuses_a_configuration_that_claims_more_than_its_weights(
    command: str, call: Callable[..., Any], good: Path, tiny: list[str], small_text: Path, tmp_path: Path,
    capsys: Any,
) -> None:  # fmt: skip
    checkpoint = torch.load(good, weights_only=True)
    model(n_layer=HUGE)(checkpoint)
    path = save(checkpoint, tmp_path / "bad.ckpt")
    source = f"init_from={path}" if command == "train" else f"checkpoint={path}"
    more = {"train": tiny, "evaluate": [f"text={small_text}"], "export": [f"output={tmp_path / 'new'}"]}
    with pytest.raises(SystemExit) as stop:
        call(command, source, *more.get(command, []))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.count("\n") == 1
    assert "has no weight 'transformer.h.2." in error
    assert [item.name for item in tmp_path.iterdir()] == ["bad.ckpt"]
