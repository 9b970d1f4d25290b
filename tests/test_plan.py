"""What `plan` says of a run, against what a pocket calculator says."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from support.models import random_net, save_checkpoint

import gpt_lightning
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.data.files import read_json
from gpt_lightning.plan import notes_on, preview, sampled

Plan = Callable[..., dict[str, list[str]]]
SMALL = [
    "model=gpt", "data=text", "tokenizer=byte", "model.n_layer=2", "model.n_head=2", "model.n_embd=32",
    "model.block_size=16", "data.batch_size=8", "data.random_offset=false", "device=cpu",
    "device.micro_batch_size=4",
    "optimizer.lr=1e-2", "scheduler.warmup_steps=2", "trainer.max_steps=10", "trainer.val_every_steps=5",
    "trainer.save_every_steps=5",
]  # fmt: skip


@pytest.fixture
def plan(
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Plan:
    """The lines of a plan for 1,000 letters by what they are about; it is made in tmp_path/here."""
    (tmp_path / "letters.txt").write_text("x" * 1000)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*overrides: str) -> dict[str, list[str]]:
        call("plan", *SMALL, f"data.path={tmp_path / 'letters.txt'}", *overrides)
        lines: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            found = re.fullmatch(r" *(\S.*?)  (\S.*)", line)
            assert found, line
            lines.setdefault(found[1], []).append(found[2])
        return lines

    return run


# 257 ids padded to 320 rows of 32 numbers; two blocks of 12 * 32² + 13 * 32; the last LayerNorm; 16 positions
MATRICES = 320 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64
PARAMETERS = MATRICES + 16 * 32
FLOPS = 6 * MATRICES + 12 * 2 * 32 * 16  # N is what is multiplied: all but the table of positions


def test_plan_by_hand(plan: Plan, tmp_path: Path) -> None:
    assert (PARAMETERS, FLOPS, FLOPS * 1280) == (36_224, 226_560, 289_996_800)
    lines = plan()
    assert not list((tmp_path / "here").iterdir())  # no run directory
    memory, time = lines.pop("memory estimate"), lines.pop("time")
    curve = lines.pop("learning rate")[0].split("  ")
    assert lines == {
        "parameters": ["36,224"],
        "training tokens": ["900 (0.02 per parameter)"],
        "validation tokens": ["100"],
        "vocabulary": ["257 ids"],
        "tokens per step": ["128 = 4 sequences × 2 accumulated × 1 device(s) × 16 tokens"],
        # the last target is token 899: window 55 begins at 880 and ends at 896, a 57th would not fit
        "steps per epoch": ["7 (56 windows)"],
        "run": ["10 steps, 1,280 tokens (0.04 per parameter), 1.43 epochs"],
        "compute": ["2.27e+05 FLOPs per token, 2.9e+08 in all"],
        "note": ["there are fewer training tokens than parameters; watch the validation loss, use dropout"],
    }
    # a third of the peak, the peak, and 7/8 of half a cosine down to nothing: (1 + cos(157.5°)) / 2 = 0.03806
    assert curve[1] == "3.3e-03 → 1.0e-02 → 3.8e-04"
    assert len(curve[0]) == 48
    assert "█" in curve[0][10:20]  # steps 2 and 3 of 10
    assert len(memory) == 1
    assert re.fullmatch(r"about 0:0\d here", *time)


def test_time_on_a_gpu_that_is_not_here_follows_from_its_rate(plan: Plan) -> None:
    # 10 steps of 64 tokens per device, and 2 validations of 100 with a third of the FLOPs per token
    seconds = FLOPS * (640 + 200 / 3) / (0.4 * 1e6)
    options = ["device=cuda", "device.devices=2", "device.precision=32-true", "device.compile=false"]
    assert round(seconds) == 400
    (time,) = plan(*options, "gpu=0.000001")["time"]
    assert time == "about 6:40 at 40% of 1e-06 TFLOP/s per device"
    (time,) = plan(*options, "gpu=A100")["time"]
    assert time == "about 0:00 at 40% of 312 TFLOP/s per device"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            "device.micro_batch_size=3 data.random_offset=true",
            {
                "tokens per step": "128 = 2 sequences × 4 accumulated × 1 device(s)",
                "steps per epoch": "6 (55 windows)",  # up to 15 tokens are skipped
            },
        ),
        (
            "device.micro_batch_size=99 device.devices=2 trainer.num_nodes=2 data.sequence_length=8",
            {
                "tokens per step": "64 = 2 sequences × 1 accumulated × 4 device(s) × 8 tokens",
                "steps per epoch": "14 (112 windows)",
                "compute": "2.2e+05 FLOPs per token, 1.41e+08 in all",  # half of 12 * 2 * 32 * 16 less
            },
        ),
        # at 0, 4, … 880; 221 = 27 * 8 + 5
        ("data.stride=4 data.drop_last=false", {"steps per epoch": "28 (221 windows)"}),
        (
            "data.val_fraction=0.5 model.tie_weights=false trainer.max_steps=null trainer.max_epochs=3",
            {
                "parameters": "46,464",  # 320 * 32 more
                "training tokens": "500 (0.01 per parameter)",
                "validation tokens": "500",
                "steps per epoch": "3 (31 windows)",
                "run": "9 steps, 1,152 tokens (0.02 per parameter), 3.00 epochs",
            },
        ),
        (
            "trainer.max_steps=20 trainer.max_epochs=3 model.vocab_multiple=1 scheduler=constant",
            {
                "parameters": "34,208",  # 63 * 32 fewer
                "run": "20 steps, 2,560 tokens (0.07 per parameter), 2.86 epochs",
                "learning rate": "3.3e-03 → 1.0e-02 → 1.0e-02",
            },
        ),
        # 0.1 * 36,224 tokens are 28.3 steps of 128
        (
            "trainer.max_steps=null trainer.tokens_per_parameter=0.1",
            {"run": "28 steps, 3,584 tokens (0.10 per parameter)"},
        ),
        # 6 * 36,224 * 128 FLOPs are a step: 10.06 steps, and 100 of which max_steps allows 20
        ("trainer.max_steps=null trainer.max_flops=2.8e8", {"run": "10 steps, 1,280 tokens"}),
        ("trainer.max_steps=20 trainer.max_flops=2.8e9", {"run": "20 steps, 2,560 tokens"}),
        (
            "trainer.max_steps=null trainer.max_flops=1 scheduler.warmup_steps=0",
            {"run": "1 steps, 128 tokens"},
        ),
    ],
)
def test_plan_follows_the_overrides(plan: Plan, overrides: str, expected: dict[str, str]) -> None:
    lines = plan(*overrides.split())
    assert all(text in lines[name][0] for name, text in expected.items()), lines


def test_adapters_are_counted_apart(plan: Plan, tmp_path: Path) -> None:
    weights = save_checkpoint(tmp_path / "base" / "best.ckpt", random_net())
    shape = [f"model.{key}" for key in ("n_layer=2", "n_head=2", "n_embd=16", "block_size=32")]
    lines = plan(f"init_from={weights}", *shape, "lora.r=2")
    base = (320 + 32) * 16 + 2 * (12 * 16 * 16 + 13 * 16) + 32
    adapters = 2 * (2 * 16 + 2 * 48)  # A and B beside each block's c_attn
    assert lines["parameters"] == [f"{base + adapters:,}, {adapters:,} of them trained"]


def test_plan_leaves_nothing_behind(plan: Plan, tmp_path: Path) -> None:
    plan(f"hydra.run.dir={tmp_path / 'run'}")  # as it is given to train
    assert not list(tmp_path.glob("run/*"))
    assert not list((tmp_path / "here").iterdir())


def test_plan_of_a_run_has_the_choices_and_values_of_the_run(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lines.txt").write_text("abcdefg\n" * 200)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, "data=lines", "data.path=lines.txt", "scheduler=constant", "paths.outputs=out"]
    call("train", *options, "logger=none", "callbacks.samples=null")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = gpt_lightning.plan("resume=latest", f"paths.outputs={tmp_path / 'out'}")
    summary = read_json(next(tmp_path.glob("out/**/summary.json")))
    assert (found.parameters, found.max_steps) == (summary["parameters"], summary["steps"])
    assert found.train_tokens == 180 * 8 + 1  # a line and the end of text after it, and one at the beginning
    assert found.learning_rates[-1] == found.peak_learning_rate == 1e-2
    changed = gpt_lightning.plan(f"repeat={next(tmp_path.glob('out/gpt/*'))}", "trainer.max_steps=20")
    assert (changed.max_steps, changed.train_tokens) == (20, found.train_tokens)


def test_preview_names_a_peak_between_its_bars() -> None:
    rates = sampled(lambda step: float(step == 500), 1000)
    assert preview(rates, 1e-2).endswith("0.0e+00 → 1.0e-02 → 0.0e+00")


def test_preview_draws_every_height() -> None:
    line, rates = preview([0.5 * factor for factor in sampled(lambda step: step / 47, 48)], 0.5).split("  ")
    heights = [round(7 * i / 47) for i in range(48)]
    assert line == "".join("▁▂▃▄▅▆▇█"[height] for height in heights)
    assert rates == "0.0e+00 → 5.0e-01 → 5.0e-01"
    assert preview(sampled(lambda step: 1.0, 1), 1.0) == "█" * 48 + "  1.0e+00 → 1.0e+00 → 1.0e+00"


@functools.cache
def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("plan", overrides=["device=cpu", "trainer.max_steps=1000", *overrides])


@pytest.mark.parametrize(
    ("overrides", "figures", "notes"),
    [
        ([], {}, []),
        ([], {"epochs": 100}, []),
        ([], {"epochs": 100.5}, ["the training data 100 times"]),
        ([], {"epochs": 1234.0}, ["the training data 1,234 times"]),
        ([], {"tokens": 999, "epochs": 1.01}, ["fewer training tokens than parameters"]),
        ([], {"tokens": 999, "epochs": 1.0}, []),  # no token is read twice
        ([], {"tokens": 1000, "epochs": 1.01}, []),
        (["trainer.val_every_steps=1001"], {}, ["the only validation is the last"]),
        (["trainer.save_every_steps=1001"], {}, ["a crash would lose everything"]),
        (
            ["trainer.val_every_steps=1001", "trainer.save_every_steps=1001"],
            {"tokens": 1, "epochs": 200},
            ["200 times", "fewer", "validation", "crash"],
        ),
    ],
)
def test_each_note_where_it_belongs_and_nowhere_else(
    overrides: list[str], figures: dict[str, float], notes: list[str]
) -> None:
    given: dict[str, Any] = {"tokens": 1000, "parameters": 1000, "epochs": 0.5, "max_steps": 1000, **figures}
    found = notes_on(composed(*overrides), **given)
    assert len(found) == len(notes)
    assert all(note in line for note, line in zip(notes, found, strict=True))
