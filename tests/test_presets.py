"""Every choice composes, and every preset trains a step when it is shrunk."""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from stress.configurations import Material, draw_configuration
from support.hub import dataset
from support.runs import ROOT, SHARED
from support.shown import commands

from gpt_lightning.config.build import build_net
from gpt_lightning.config.nodes import build
from gpt_lightning.config.parts import with_length
from gpt_lightning.config.resolvers import CONF, detect_device
from gpt_lightning.config.rules import validate
from gpt_lightning.data.windows import split_batch

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
    validate(cfg)


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
        return int(build_net(cfg, vocab_size).num_parameters())


@pytest.mark.parametrize(
    ("experiment", "count"),
    [("shakespeare_target_loss device=cuda", 51_237_888), ("shakespeare_gpt2_small_amp", 124_475_904)],
)
def test_preset_has_the_published_number_of_parameters(experiment: str, count: int) -> None:
    assert parameters(*f"experiment={experiment}".split()) == count


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


def test_shapes_that_a_search_varies_can_be_built_and_have_the_size_that_it_says() -> None:
    space = OmegaConf.load(CONF / "sweep" / "optuna_shape.yaml").hydra.sweeper.params
    (shapes,) = (values for keys, values in space.items() if "n_layer" in keys)
    pairs = re.findall(r"\[(\d+),(\d+)\]", shapes)
    assert len(pairs) > 3
    for layers, width in pairs:
        all_of_them = parameters(f"model.n_layer={layers}", f"model.n_embd={width}", vocab_size=256)
        in_blocks = all_of_them - 256 * int(width) - 2 * int(width)  # less embedding and last norm
        assert in_blocks == pytest.approx(400_000, rel=0.05)


def test_all_published_systems_have_a_preset() -> None:
    assert set(EXPERIMENTS) >= {
        "shakespeare_target_loss", "shakespeare_gpt2_small", "shakespeare_gpt2_small_amp", "bpe_from_scratch",
        "tinystories_124m", "nanogpt_shakespeare_char", "nanogpt_shakespeare_char_cpu",
    }  # fmt: skip


Published = dict[str, Any]


def shape(n_layer: int, n_head: int, n_embd: int, block_size: int) -> Published:
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    return {f"model.{key}": size for key, size in sizes.items()}


def batches(micro_batch_size: int, accumulation: int) -> Published:
    return {
        "data.batch_size": micro_batch_size * accumulation,
        "device.micro_batch_size": micro_batch_size,
        "accumulation": accumulation,
    }


# What their authors published, by the keys of the configuration. Beside these: accumulation, and the rates of
# the first step, after the warm-up and at the end of the schedule.
TARGET_LOSS: Published = {
    "target_loss": 0.099999, "tokenizer": "GPT2", "scheduler": "cosine",
    "first_rate": 3e-7, "peak_rate": 3e-4, "scheduler.warmup_steps": 1000, "trainer.max_steps": 100_000,
    "trainer.log_every_steps": 50,
}  # fmt: skip
GPT2_SMALL: Published = {
    **shape(12, 12, 768, 1024), **batches(16, 1), "vocabulary": 50_257, "model.tie_weights": True,
    "tokenizer": "GPT2", "data.sequence_length": 128, "data.shuffle": False, "scheduler": "cosine",
    "peak_rate": 6e-4, "optimizer.weight_decay": 0.1, "scheduler.warmup_steps": 100,
    "trainer.max_steps": 5000, "trainer.clip_norm": 1.0,
}  # fmt: skip
GPT2_SMALL_AMP: Published = {
    **shape(12, 12, 768, 1024), **batches(8, 4), "vocabulary": 50_304, "block": 7_087_872,
    "tokenizer": "GPT2", "device.precision": "bf16-mixed", "device.matmul_precision": "high",
    "optimizer.fused": True, "scheduler": "cosine", "peak_rate": 1e-3, "last_rate": 1e-4,
    "scheduler.warmup_steps": 100, "trainer.max_steps": 500, "trainer.clip_norm": 1.0,
}  # fmt: skip
BPE: Published = {
    **batches(16, 4), "tokenizer": "BPE", "model.tie_weights": True, "scheduler": "cosine",
    "optimizer.lr": 3e-4, "trainer.max_steps": None, "trainer.max_epochs": 10, "trainer.clip_norm": 1.0,
    "trainer.log_every_steps": 100, "trainer.val_every_steps": 500, "trainer.save_every_steps": 1000,
    "trainer.snapshot_every_steps": 1000,
}  # fmt: skip
TINYSTORIES: Published = {
    **batches(8, 1), "vocabulary": 50_257, "tokenizer": "GPT2", "model.dropout": 0.1, "model.qkv_bias": False,
    "model.tie_weights": False, "optimizer.lr": 5e-4, "optimizer.weight_decay": 0.1,
    "trainer.max_steps": None, "trainer.max_epochs": 20, "data.shuffle": True, "data.drop_last": True,
    "data.name": "roneneldan/TinyStories", "data.val_split": None, "data.val_fraction": 0.1,
    "scheduler": "constant", "scheduler.warmup_steps": 0, "trainer.clip_norm": None,  # none is published
}  # fmt: skip
GPT2_124M: Published = {
    **shape(12, 12, 768, 1024), **batches(12, 40), "tokenizer": "GPT2", "scheduler": "cosine",
    "peak_rate": 6e-4, "last_rate": 6e-5, "scheduler.warmup_steps": 2000, "trainer.max_steps": 600_000,
    "model.dropout": 0.0, "model.bias": False, "model.exact_gelu": True, "optimizer.weight_decay": 0.1,
    "trainer.clip_norm": 1.0, "data.val_fraction": 5e-4,
}  # fmt: skip
FINETUNE: Published = {
    **batches(1, 32), "tokenizer": "GPT2", "scheduler": "constant", "init_from": "hf:gpt2-xl",
    "peak_rate": 3e-5, "scheduler.warmup_steps": 0, "trainer.max_steps": 20, "trainer.val_every_steps": 5,
}  # fmt: skip
CHARACTERS: Published = {
    "tokenizer": "Char", "scheduler": "cosine", "peak_rate": 1e-3, "last_rate": 1e-4,
    "scheduler.warmup_steps": 100, "model.bias": False, "model.exact_gelu": True,
}  # fmt: skip
PUBLISHED: list[tuple[str, Published]] = [
    ("shakespeare_target_loss device=cuda", {**TARGET_LOSS, **shape(8, 8, 512, 512), **batches(8, 4)}),
    ("shakespeare_target_loss device=mps", {**TARGET_LOSS, **shape(6, 6, 384, 128), **batches(4, 4)}),
    ("shakespeare_target_loss device=cpu", {**TARGET_LOSS, **shape(6, 6, 384, 256), **batches(4, 4)}),
    ("shakespeare_gpt2_small", GPT2_SMALL),
    ("shakespeare_gpt2_small_amp", GPT2_SMALL_AMP),
    ("bpe_from_scratch", {**BPE, **shape(12, 12, 768, 1024), "feed_forward": 3072}),
    ("bpe_from_scratch size=small", {**BPE, **shape(6, 8, 512, 1024), "feed_forward": 2048}),
    ("bpe_from_scratch size=large", {**BPE, **shape(24, 16, 1024, 1024), "feed_forward": 4096}),
    ("bpe_from_scratch scheduler=linear", {"scheduler": "linear"}),
    ("tinystories_124m", {**TINYSTORIES, **shape(12, 12, 768, 256), "data.stride": 256}),
    ("tinystories_124m data.stride=128", {"data.stride": 128}),
    ("tinystories_124m size=small", {**TINYSTORIES, **shape(6, 6, 384, 128)}),
    ("tinystories_124m size=large", {**TINYSTORIES, **shape(24, 16, 1024, 512)}),
    ("gpt2_124m", GPT2_124M),
    ("finetune_shakespeare", FINETUNE),
    (
        "nanogpt_shakespeare_char",
        {**CHARACTERS, **shape(6, 6, 384, 256), **batches(64, 1), "trainer.max_steps": 5000},
    ),
    (
        "nanogpt_shakespeare_char_cpu",
        {
            **CHARACTERS,
            **shape(4, 4, 128, 64),
            **batches(12, 1),
            "trainer.max_steps": 2000,
            "trainer.val_batches": 20,
        },
    ),
]


def schedule_of(cfg: DictConfig) -> Callable[[int], float]:
    return with_length(build(cfg, "scheduler"), cfg.trainer.max_steps)


def measured(cfg: DictConfig, key: str) -> Any:
    """What a configuration makes of a key, or of what follows from several."""
    net: Any = None
    if key in ("vocabulary", "feed_forward", "block"):
        with torch.device("meta"):
            net = build_net(cfg, GPT2_VOCABULARY)
    match key:
        case "accumulation":
            return split_batch(cfg.data.batch_size, cfg.device.micro_batch_size, 1)[1]
        case "tokenizer" | "scheduler":
            return cfg[key]._target_.rsplit(".", 1)[1]
        case "first_rate":
            return cfg.optimizer.lr * schedule_of(cfg)(0)
        case "peak_rate":
            return cfg.optimizer.lr * schedule_of(cfg)(cfg.scheduler.warmup_steps)
        case "last_rate":
            return cfg.optimizer.lr * schedule_of(cfg)(cfg.trainer.max_steps)
        case "vocabulary":
            return net.transformer.wte.num_embeddings
        case "feed_forward":
            return net.transformer.h[0].mlp.c_fc.out_features
        case "block":
            return sum(p.numel() for p in net.transformer.h[0].parameters())
    return OmegaConf.select(cfg, key, throw_on_missing=True)


@pytest.mark.parametrize(("overrides", "published"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_preset_has_the_published_settings(overrides: str, published: Published) -> None:
    cfg = composed(*f"experiment={overrides}".split(), f"model.vocab_size={GPT2_VOCABULARY}")
    found = {key: measured(cfg, key) for key in published}
    assert found == pytest.approx(published)
    assert cfg.optimizer._target_ == "gpt_lightning.training.optimizers.adamw"  # which all of them had


@pytest.mark.parametrize(
    ("experiment", "vocabulary", "loss", "tolerance"),
    [
        ("shakespeare_target_loss device=cuda", GPT2_VOCABULARY, 10.9322, 0.1),
        ("shakespeare_gpt2_small", GPT2_VOCABULARY, 10.5, 0.6),  # published as "about 10.5"
        ("shakespeare_gpt2_small_amp", GPT2_VOCABULARY, 10.9677, 0.1),
        # nothing is published: a logit has a standard deviation of 0.02 * sqrt(n_embd)
        ("bpe_from_scratch", 32_000, math.log(32_000) + 768 * 0.02**2 / 2, 0.1),
        ("tinystories_124m", GPT2_VOCABULARY, math.log(50_257) + 768 * 0.02**2 / 2, 0.1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_first_loss_is_the_published_one(
    experiment: str, vocabulary: int, loss: float, tolerance: float
) -> None:
    """One block is as good as all: the last norm makes the loss depend on width and vocabulary alone."""
    torch.manual_seed(1)
    cfg = composed(*f"experiment={experiment}".split(), "model.n_layer=1", "model.dropout=0.0")
    idx, targets = torch.randint(vocabulary, (2, 4, 128))
    with torch.no_grad():
        assert float(build_net(cfg, vocabulary)(idx, targets)) == pytest.approx(loss, abs=tolerance)


@pytest.fixture(params=["cuda", "mps", "cpu"])
def detected(request: pytest.FixtureRequest) -> Iterator[str]:
    """A machine with this device, as far as the configuration can tell."""
    OmegaConf.register_new_resolver("detect_device", lambda: request.param, replace=True)
    yield request.param
    OmegaConf.register_new_resolver("detect_device", detect_device, replace=True)


def test_size_of_the_target_loss_follows_the_device_unless_it_is_chosen(detected: str) -> None:
    sizes = {"cuda": (8, 512, 512), "mps": (6, 384, 128), "cpu": (6, 384, 256)}
    for choice, expected in (([], detected), (["device=cuda"], "cuda"), (["device=cpu"], "cpu")):
        cfg = composed("experiment=shakespeare_target_loss", *choice)
        assert cfg.device.accelerator == expected
        assert (cfg.model.n_layer, cfg.model.n_embd, cfg.model.block_size) == sizes[expected]
        assert cfg.data.batch_size == 4 * cfg.device.micro_batch_size == (32 if expected == "cuda" else 16)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_preset_says_what_it_reproduces_needs_and_promises(experiment: str) -> None:
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    words = [found[1] for line in head if (found := re.match(r"# ([A-Z]\w+): \S", line))]
    reproduces = [] if experiment == "finetune_gpt2" else ["Reproduces"]  # which nobody published
    assert words == [*reproduces, "Needs", "Published"]


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
    if experiment == "scaling":
        return ["data.stories=200"]
    if experiment == "gpt2_124m":  # two files in the hub's layout, with enough for a batch
        texts = [small_text.read_text(encoding="utf-8")[:500_000]] * 3
        return [f"data.name={dataset(folder / 'hub', [texts, texts])}", "data.val_fraction=0.2"]
    return [f"data.path={small_text}"]


@pytest.fixture
def gpt2_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[DictConfig], None]:
    """Make GPT-2's tokenizer available without a download, where a configuration needs it."""

    def provide(cfg: DictConfig) -> None:
        if not cfg.tokenizer._target_.endswith("GPT2"):
            return
        cached = os.environ.get("TIKTOKEN_CACHE_DIR") or str(SHARED / "tiktoken_cache")
        if not Path(cached).is_dir():
            pytest.skip("needs ../shared/tiktoken_cache or TIKTOKEN_CACHE_DIR")
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", cached)

    return provide


def shown(command: str) -> set[str]:
    """The overrides after experiment= of the commands in the tables of docs/reproductions.md."""
    beginning = f"python -m gpt_lightning.{command} experiment="
    return {c.removeprefix(beginning) for c in commands("reproductions") if c.startswith(beginning)}


@pytest.mark.parametrize("overrides", sorted({*EXPERIMENTS, *shown("train")}))
def test_preset_trains_a_step(
    overrides: str,
    call: Callable[..., Any],
    small_text: Path,
    tmp_path: Path,
    gpt2_tokenizer: Callable[[DictConfig], None],
) -> None:
    experiment, *given = overrides.split()
    given = [text for text in given if not text.startswith("init_from=hf:")]  # a folder stands for it
    cfg = composed(f"experiment={experiment}")
    gpt2_tokenizer(cfg)
    shrink = [o for o in SHRINK if not (experiment.startswith("finetune") and o.startswith("model."))]
    if cfg.tokenizer.get("vocab_size"):
        shrink = [*shrink, "tokenizer.vocab_size=300"]
    if cfg.data.sequence_length:
        shrink = [*shrink, "data.sequence_length=8"]
    data = data_for(experiment, tmp_path, small_text)
    call("train", f"experiment={experiment}", *given, *shrink, *data, f"hydra.run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 1
    assert summary["val_loss"] > 0


TINY_SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"


@pytest.mark.parametrize("overrides", sorted({*EXPERIMENTS, *shown("plan")}))
def test_preset_can_be_planned_as_it_is(
    overrides: str,
    call: Callable[..., Any],
    tmp_path: Path,
    gpt2_tokenizer: Callable[[DictConfig], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing in it contradicts itself or needs more text than there is: a preset is run as it stands."""
    # whose speed takes seconds to measure, and is in test_speed.py
    monkeypatch.setattr("gpt_lightning.training.speed.measure_speed", lambda *_, **__: None)
    arguments = f"experiment={overrides}".split()
    gpt2_tokenizer(composed(*arguments))
    text = TINY_SHAKESPEARE if TINY_SHAKESPEARE.exists() else ROOT / "input.txt"
    call("plan", *arguments, *data_for(overrides.split()[0], tmp_path, text))
    out = capsys.readouterr().out
    assert re.search(r"^ +learning rate  [▁-█]{48}  ", out, re.M)
    if overrides.endswith("device=cuda") and text == TINY_SHAKESPEARE:
        assert "(656 windows)" in out  # 82 batches of 8 × 512 tokens, as published
        counts = re.findall(r"(?:training|validation) tokens  ([\d,]+)", out)
        assert sum(int(count.replace(",", "")) for count in counts) == 338_025


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


@pytest.mark.parametrize("number", range(12))
def test_random_run_of_the_stress_program_can_be_built(number: int, tmp_path: Path) -> None:
    material = Material.make(tmp_path)
    given = draw_configuration(random.Random(number), material).arguments
    folder = ("--config-dir", str(material.choices))
    cfg = composed(f"hydra.searchpath=[file://{folder[1]}]", *(text for text in given if text not in folder))
    validate(cfg)
    assert build_net(cfg, 256).config.block_size == cfg.model.block_size
