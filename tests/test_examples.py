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

PLUGIN = ROOT / "examples" / "plugin"
TRAIN, GENERATE, EVALUATE = (shlex.split(command)[3:] for command in commands("extending"))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> object:
    import importlib

    monkeypatch.syspath_prepend(PLUGIN)
    return importlib.import_module("plugin")


@pytest.mark.slow
def test_plugin_trains_with_its_model_optimizer_schedule_and_corpus(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    assert commands("extending")[0] in (PLUGIN / "README.md").read_text(encoding="utf-8").splitlines()
    shutil.copytree(PLUGIN, tmp_path, dirs_exist_ok=True)
    result = command("train", *TRAIN, "device=cpu", "hydra.run.dir=run")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # embeddings, hidden layer and output layer for 256 bytes and <|endoftext|>
    assert summary["parameters"] == 257 * 16 + (8 * 16 + 1) * 128 + (128 + 1) * 257
    assert summary["steps"] == 500
    # two numbers below 100 in a document of 8.3 bytes on average
    assert math.isclose(summary["floor_bits_per_byte"], 2 * math.log2(100) / 8.3, rel_tol=0.01)
    assert summary["val_loss"] < 1.8  # 2.52 is the entropy of how often each byte occurs
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    assert all(set(of_one) == {"momentum"} for of_one in state["state"].values())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = {int(row["step"]): float(row["train/lr"] or "nan") for row in csv.DictReader(file)}
    assert math.isclose(rates[496], 1e-3 * math.sqrt(50 / 496))
    (tmp_path / "my.txt").write_text("1+2=3\n10+20=30\n")
    generate, evaluate = ([text.replace("RUN", "run") for text in given] for given in (GENERATE, EVALUATE))
    result = command("generate", *generate, "max_new_tokens=2", "temperature=0")
    assert re.fullmatch(r"12\+30=\d\d\n", result.stdout), result.stderr
    result = command("evaluate", *evaluate)
    assert result.returncode == 0, result.stderr


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
