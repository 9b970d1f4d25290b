"""A network of the user's own: trained, sampled, planned, evaluated and loaded by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import BYTES
from support.runs import BIGRAM
from torch import Tensor, nn

import gpt_lightning
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.inference.decoding import generate
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.own import as_causal_lm

CONFIG = {
    "_target_": "own_bigram.Bigram",
    "vocab_size": "null",
    "block_size": 16,
    "recommended": "{lr: 0.1}",
}


WIDER = """
class Wider(Bigram):
    def __init__(self, vocab_size, block_size):
        super().__init__(vocab_size + 1, block_size)
"""


@pytest.fixture
def run(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_bigram.py").write_text(BIGRAM + WIDER)
    for name, more in (("bigram", {}), ("other", {"_target_": "own_bigram.Wider"})):
        path = tmp_path / "mine" / "model" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{key}: {value}\n" for key, value in {**CONFIG, **more}.items()))
    options = [option for option in tiny if not option.startswith("model.")]
    options += [f"--config-dir={tmp_path / 'mine'}", "model=bigram", "logger=none", "model.block_size=8"]

    def train() -> Path:
        plan = gpt_lightning.plan(*options)
        assert (plan.block_size, plan.parameters, plan.flops_per_token) == (8, 257**2, 6 * 257**2)
        return gpt_lightning.train(*options).folder

    return train


@pytest.mark.slow
def test_users_network_is_trained_sampled_evaluated_and_generates(
    run: Callable[[], Path], tmp_path: Path
) -> None:
    folder, mine = run(), f"--config-dir={tmp_path / 'mine'}"
    assert (folder / "samples.md").read_text().count("## Step") == 2
    saved = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    log_p = saved["state_dict"]["net.table.weight"].log_softmax(-1)
    (tmp_path / "new.txt").write_text("the old dog sees it")
    ids = torch.tensor(list(b"the old dog sees it"))
    loss = -log_p[ids[:-1], ids[1:]].mean()
    given = [mine, "model=bigram", "device=cpu", f"checkpoint={folder}"]
    found = gpt_lightning.evaluate(*given, f"text={tmp_path / 'new.txt'}")
    assert math.isclose(found["loss"], loss, rel_tol=1e-6)
    assert found["block_size"] == 8  # of the run, not of the file
    text = [ord("d")]
    for _ in range(20):
        text.append(int(log_p[text[-1]].argmax()))
    greedy = ["prompt=d", "temperature=0", "max_new_tokens=20"]
    assert gpt_lightning.generate(*given, *greedy) == [BYTES.decode(text[1:])]
    import own_bigram  # type: ignore[import-not-found]

    model = gpt_lightning.load(folder, "cpu", model=own_bigram.Bigram)
    assert model.generate("d", temperature=0, max_new_tokens=20) == BYTES.decode(text[1:])
    assert model.info["parameters"] == 257**2
    assert gpt_lightning.load(folder, "cpu", "bfloat16", model=own_bigram.Bigram).generate("d")
    for arguments, message in (
        (
            [*given[2:]],
            r"its model is a own_bigram\.Bigram, which a file cannot make this program import: name",
        ),
        ([*given, "model.block_size=4"], r"^model\.block_size=4: a trained model has the values of its"),
        ([mine, "model=other", *given[2:]], r"its model, own_bigram\.Bigram, is not what model= builds \("),
        ([*given, "dtype=int8"], r"dtype=int8: .* has a model of your own; use dtype=bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            gpt_lightning.generate(*arguments)


class LastToken(nn.Module):
    """Says the token after the last one, and counts the positions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(1)), 0

    def forward(self, idx: Tensor) -> Any:
        self.seen = max(self.seen, idx.size(1))
        return nn.functional.one_hot((idx + 1) % 257, 300).float() + self.weight


def test_network_without_cache_sees_at_most_its_block_and_no_unknown_ids() -> None:
    net = LastToken()
    wrapped = as_causal_lm(net, vocab_size=257, block_size=5)
    settings = SamplingSettings(max_new_tokens=12, temperature=0, repetition_penalty=1.01)
    assert generate(wrapped, [[250]], settings) == [[251, 252, 253, 254, 255, 256, *range(6)]]
    assert net.seen == 5
    assert net.training
    assert as_causal_lm(wrapped, vocab_size=1, block_size=1) is wrapped


def test_network_that_returns_no_logits_is_refused_in_one_line() -> None:
    net = nn.Embedding(257, 16)
    model = TextGenerator(as_causal_lm(net, vocab_size=257, block_size=8), BYTES)
    with pytest.raises(
        ValueError, match=r"^Embedding without targets returns a Tensor of shape \(1, 1, 16\); .*257"
    ):
        model.generate()
