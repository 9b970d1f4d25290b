"""Every choice composes, and every preset trains a step when it is shrunk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from support import ROOT, SHARED

from gpt_lightning.checks import check
from gpt_lightning.config import CONF, build

GROUPS = (
    "model",
    "data",
    "tokenizer",
    "optimizer",
    "scheduler",
    "device",
    "trainer",
    "callbacks",
    "logger",
    "sweep",
)
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
CHOICES = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if not path.stem.startswith("_")
]
GPT2_VOCABULARY = 50_257


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["paths.run=run", *overrides])  # which a command has from Hydra


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_choice_composes_and_passes_the_checks(group: str, choice: str) -> None:
    cfg = composed(f"{group}={choice}")
    check(cfg)


@pytest.mark.parametrize(
    ("overrides", "tokenizer"),
    [
        (["model=gpt2_small"], "GPT2"),
        (["model=small"], "GPT2"),
        (["model=small", "tokenizer=bpe"], "BPE"),
        (["model=tiny"], "BPE"),
        (["experiment=nanogpt_shakespeare_char"], "Char"),
    ],
)
def test_model_chooses_its_tokenizer_unless_told_otherwise(overrides: list[str], tokenizer: str) -> None:
    assert composed(*overrides).tokenizer._target_.rsplit(".", 1)[1] == tokenizer


def parameters(*overrides: str, vocab_size: int = GPT2_VOCABULARY) -> int:
    cfg = composed(*overrides, f"model.vocab_size={vocab_size}")
    with torch.device("meta"):
        return build(cfg.model).num_parameters()


@pytest.mark.parametrize(
    ("experiment", "count"),
    [("shakespeare_target_loss", 51_237_888), ("shakespeare_gpt2_small_amp", 124_475_904)],
)
def test_preset_has_the_published_number_of_parameters(experiment: str, count: int) -> None:
    assert parameters(f"experiment={experiment}") == count


@pytest.mark.parametrize(
    ("model", "count"),
    # as transformers counts them, with 50,257 ids
    [
        ("gpt2_small", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_gpt2_sizes(model: str, count: int) -> None:
    assert parameters(f"model={model}", "model.vocab_multiple=1") == count


def test_all_published_systems_have_a_preset() -> None:
    assert set(EXPERIMENTS) >= {
        "shakespeare_target_loss", "shakespeare_gpt2_small", "shakespeare_gpt2_small_amp", "bpe_from_scratch",
        "tinystories_124m", "nanogpt_shakespeare_char", "nanogpt_shakespeare_char_cpu",
    }  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_preset_says_what_it_reproduces_needs_and_promises(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    for word in ("Needs:", "Published:"):
        assert word in head


SHRINK = [
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "data.batch_size=4",
    "trainer.max_steps=1", "trainer.val_batches=1", "scheduler.warmup_steps=0", "device=cpu", "logger=none",
    "callbacks.samples.max_new_tokens=4",
]  # fmt: skip


def data_for(experiment: str, folder: Path, small_text: Path) -> list[str]:
    """A small corpus of the preset's own kind."""
    if experiment.startswith("tinystories"):
        if not (SHARED / "data" / "tinystories" / "hub").is_dir():
            pytest.skip("needs ../shared/data/tinystories/hub")
        return [f"data.name={SHARED / 'data' / 'tinystories' / 'hub'}"]
    if experiment.startswith("finetune"):
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=GPT2_VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
        return [f"init_from={folder / 'gpt2'}", f"data.path={small_text}"]
    return [f"data.path={small_text}"]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_preset_trains_a_step(
    experiment: str,
    call: Callable[..., Any],
    small_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = composed(f"experiment={experiment}")
    shrink = [o for o in SHRINK if not (experiment.startswith("finetune") and o.startswith("model."))]
    if cfg.tokenizer._target_.endswith("GPT2"):
        cached = os.environ.get("TIKTOKEN_CACHE_DIR") or str(SHARED / "tiktoken_cache")
        if not Path(cached).is_dir():
            pytest.skip("needs ../shared/tiktoken_cache or TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cached)
    if cfg.tokenizer.get("vocab_size"):
        shrink = [*shrink, "tokenizer.vocab_size=300"]
    if cfg.data.sequence_length:
        shrink = [*shrink, "data.sequence_length=8"]
    data = data_for(experiment, tmp_path, small_text)
    call("train", f"experiment={experiment}", *shrink, *data, f"hydra.run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 1
    assert summary["val_loss"] > 0


def test_every_key_of_the_configuration_resolves() -> None:
    cfg = composed("data.path=x", "data=text", "hydra.run.dir=.")
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


def test_readme_lists_every_choice() -> None:
    readme = (ROOT / "README.md").read_text()
    for group, choice in [*CHOICES, *(("experiment", name) for name in EXPERIMENTS)]:
        assert f"`{choice}`" in readme, f"README's table lacks {group}={choice}"


def test_each_line_is_a_document(
    call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("".join(f"line {number}\n" for number in range(40)))
    path = f"data.path={tmp_path / 'lines.txt'}"
    call("prepare", "data=lines", path, "tokenizer=byte", f"paths.cache={tmp_path}")
    out = capsys.readouterr().out
    # 9, 19, 29 and 39 are for validation; an end-of-text id stands at each end and between two documents
    assert "train: 280 tokens, 36 documents, 243 bytes" in out
    assert "val: 32 tokens, 4 documents, 27 bytes" in out
