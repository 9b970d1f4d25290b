"""The plugin in examples/ runs with the commands of its README and of docs/extending.md."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import ROOT
from support.shown import commands

from gpt_lightning.data.tokenizer import encode_array

PLUGIN = ROOT / "examples" / "plugin"
TARGETS = "".join(path.read_text(encoding="utf-8") for path in PLUGIN.glob("conf/*/*.yaml"))
TRAIN, GENERATE, EVALUATE = (shlex.split(command)[3:] for command in commands("extending"))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> object:
    import importlib

    monkeypatch.syspath_prepend(PLUGIN)
    return importlib.import_module("plugin")


@pytest.mark.slow
def test_plugin_trains_with_its_choices_and_its_run_is_read(
    command: Callable[..., Any], plugin: Any, tmp_path: Path
) -> None:
    assert commands("extending")[0] in (PLUGIN / "README.md").read_text(encoding="utf-8").splitlines()
    shutil.copytree(PLUGIN, tmp_path, dirs_exist_ok=True)
    result = command("train", *TRAIN, "device=cpu", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # embeddings, hidden layer and output layer for 10 digits, 2 signs and <|endoftext|>
    assert summary["parameters"] == 13 * 16 + (8 * 16 + 1) * 128 + (128 + 1) * 13
    assert summary["steps"] == 500
    # two numbers below 100 in a document of 8.3 bytes on average
    assert math.isclose(summary["floor_bits_per_byte"], 2 * math.log2(100) / 8.3, rel_tol=0.01)
    assert summary["val_loss"] < 1.8  # 2.52 is the entropy of how often each character occurs
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert all(set(of_one) == {"momentum"} for of_one in state["state"].values())
    metrics = check_metrics(tmp_path / "run")
    assert math.isclose(metrics[496, "train/lr"], 1e-3 * math.sqrt(50 / 496))
    expected = accuracy(plugin, checkpoint["state_dict"])
    assert math.isclose(metrics[500, "val/accuracy"], expected, abs_tol=2e-4)  # rounding may move a token
    check_shown_commands(command, summary)
    refusal = command("train", "resume=run").stderr  # without --config-dir
    assert set(re.findall(r"plugin\.\w+", refusal)) == set(re.findall(r"plugin\.\w+", TARGETS)), refusal


def check_metrics(run: Path) -> dict[tuple[int, str], float]:
    """The metrics of each step, which metrics.jsonl and metrics.csv have alike."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    found = {(one["step"], key): one[key] for one in lines for key in one.keys() - {"step"}}
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    in_csv = {(int(row["step"]), key): float(row[key]) for row in rows for key in row if row[key]}
    assert found == {place: value for place, value in in_csv.items() if place[1] != "step"}
    return found


def accuracy(plugin: Any, state: dict[str, torch.Tensor]) -> float:
    """Share of the validation tokens but the first that have the highest logit, in windows of 64 tokens."""
    net = plugin.MLP(vocab_size=13, block_size=64, window=8, n_embd=16, n_hidden=128)
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    documents = plugin.Additions(limit=100, val_fraction=0.1).documents("val")
    # <|endoftext|>, 12, is before and after each document
    ids = torch.tensor([12, *(i for text in documents for i in (*map("0123456789+=".index, text), 12))])
    windows = zip(ids[:-1].split(64), ids[1:].split(64), strict=True)
    right = sum(int((net(idx[None])[0].argmax(-1) == targets).sum()) for idx, targets in windows)
    return right / (len(ids) - 1)


def check_shown_commands(command: Callable[..., Any], summary: dict[str, Any]) -> None:
    """Run the commands that the page has for a trained model, which do not name the tokenizer."""
    generate, evaluate = ([text.replace("RUN", "run") for text in given] for given in (GENERATE, EVALUATE))
    result = command("generate", *generate, "max_new_tokens=2", "temperature=0")
    assert re.fullmatch(r"12\+30=\d\d\n", result.stdout), result.stderr
    result = command("evaluate", *evaluate)
    (bits,) = re.findall(r"bits_per_byte +([\d.]+)\n", result.stdout)
    # windows that overlap give tokens more context than those of the training's validation
    assert summary["floor_bits_per_byte"] < float(bits) < summary["bits_per_byte"]


def test_sums_are_split_without_overlap_and_are_correct(plugin: object) -> None:
    corpus = plugin.Additions(limit=10, val_fraction=0.1)  # type: ignore[attr-defined]
    train, val = (list(corpus.documents(split)) for split in ("train", "val"))
    assert (len(train), len(val), len({*train, *val})) == (90, 10, 100)
    for text in train + val:
        a, b, total = map(int, re.split("[+=]", text))
        assert a + b == total
    assert corpus.digest() != plugin.Additions(limit=11, val_fraction=0.1).digest()  # type: ignore[attr-defined]


def test_model_predicts_from_its_window_alone(plugin: object) -> None:
    torch.manual_seed(0)
    net = plugin.MLP(vocab_size=7, block_size=12, window=3, n_embd=4, n_hidden=5)  # type: ignore[attr-defined]
    idx = torch.randint(7, (2, 12))
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % 7
    differs = (net(idx) != net(changed)).any(2).any(0)
    assert differs.nonzero().flatten().tolist() == [5, 6, 7]
    losses = net(idx, idx, reduction="none")
    assert losses.shape == (2, 12)
    assert torch.allclose(losses.mean(), net(idx, idx))


def test_lion_takes_steps_of_one_size_along_the_sign_of_the_gradient(plugin: object) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = plugin.Lion([weight], lr=0.1, beta1=0.9, beta2=0.99)  # type: ignore[attr-defined]
    weight.grad = torch.tensor([5.0, -0.01, 0.0])
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([0.9, -1.9, 3.0]))


def test_schedule_rises_to_one_and_falls_with_the_square_root(plugin: object) -> None:
    factors = [plugin.inverse_sqrt(step, warmup_steps=4) for step in (0, 1, 3, 15)]  # type: ignore[attr-defined]
    assert factors == [0.25, 0.5, 1.0, 0.5]


def test_tokenizer_numbers_its_characters_and_refuses_others(plugin: Any) -> None:
    encoding = plugin.Alphabet("ACGTA").build(None)
    assert encode_array(encoding, "GATTACA").tolist() == [2, 0, 3, 3, 0, 1, 0]
    assert (encoding.eot_token, encoding.n_vocab) == (4, 5)
    with pytest.raises(ValueError, match="no token for 'N'"):
        encode_array(encoding, "GAN")


def test_logger_appends_a_line_for_each_call(plugin: Any, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    plugin.JSONLines(str(path)).log_metrics({"train/loss": 2.5}, step=1)
    plugin.JSONLines(str(path)).log_metrics({"val/loss": 2.25, "val/accuracy": 0.5}, step=1)  # a resumed run
    assert path.read_text() == (
        '{"step": 1, "train/loss": 2.5}\n{"step": 1, "val/loss": 2.25, "val/accuracy": 0.5}\n'
    )
