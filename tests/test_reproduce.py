"""benchmarks/reproduce.py puts the figures of a run beside the published ones."""

from __future__ import annotations

import csv
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support.runs import ROOT

from gpt_lightning.config.resolvers import CONF

NAME = "nanogpt_shakespeare_char_cpu"
SMALL = ["model.n_layer=1", "model.n_head=1", "model.n_embd=8", "model.block_size=8", "data.batch_size=2"]
SMALL += [
    "device=cpu",
    "trainer.max_steps=2",
    "scheduler.warmup_steps=1",
    "logger=none",
    "callbacks.samples=null",
]
SMALL += ["trainer.val_batches=1"]


@pytest.fixture(scope="module")
def reproduce() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("reproduce")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text("# Page\n\n## Runs\n\n<!-- end of the runs -->\n\n## Features\n")
    return path


@pytest.fixture
def run(reproduce: ModuleType, page: Path, small_text: Path) -> Callable[..., str]:
    """Call the script, which leaves its runs beside the page; returns what the page then says."""

    def call(*arguments: str) -> str:
        places = [f"--page={page}", f"--runs={page.parent}", f"data.path={small_text}"]
        reproduce.main([*arguments, *places])
        return page.read_text()

    return call


def left(folder: Path, losses: list[float], status: str) -> None:
    """What a run of 100 ms per step leaves."""
    folder.mkdir()
    rows = [f"{step},{loss},100" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.csv").write_text("\n".join(["step,train/loss,speed/ms_per_step", *rows, ""]))
    summary = {"status": status, "steps": len(losses), "device": "cpu", "threads": 1, "precision": "32-true"}
    (folder / "summary.json").write_text(
        json.dumps({**summary, "tokens_per_second": 7, "best_val_loss": 1.5})
    )


def test_figures_are_read_at_the_published_step(
    reproduce: ModuleType, run: Callable[..., str], page: Path, small_text: Path
) -> None:
    left(page.parent / f"{NAME}_data.batch_size=2", [9.0, 8.0, 7.0], "interrupted")
    figures = [reproduce.loss_at(1, "8.5"), reproduce.loss_at(3, "6"), reproduce.target(7.5, "reached")]
    figures += [reproduce.over_run("lowest", "6", 3, reproduce.lowest), reproduce.best_validation("1")]
    plan = reproduce.gpt_lightning.plan(f"experiment={NAME}", "data.batch_size=2", f"data.path={small_text}")
    text = reproduce.section("x", plan, page.parent / f"{NAME}_data.batch_size=2", figures)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    assert rows[2:] == [
        ["training loss at step 1", "8.5", "8.0000", "2", "256", "0"],  # two steps of 2 × 64 tokens
        ["training loss at step 3", "6", "not run", "", "", ""],
        ["training loss of at most 7.5", "reached", "7.0000", "3", "384", "0"],
        ["lowest", "6", "7.0000", "3", "384", "0"],
        ["best validation loss", "1", "not run", "", "", ""],  # it has not ended
    ]
    assert "3 of 2,000 steps of 128 tokens on cpu, 1 thread(s), 32-true" in text
    assert "Training loss of the last step: 7.0000." in text


def test_section_is_replaced_and_another_one_added(run: Callable[..., str], page: Path) -> None:
    assert "| best validation loss | 1.88 | not run |" in run(NAME, "--write")
    left(page.parent / NAME, [3.0] * 2000, "finished")
    text = run(NAME, "--write")
    assert text.count(f"`python benchmarks/reproduce.py {NAME}`") == 1
    assert "| best validation loss | 1.88 | 1.5000 | 2,000 | 1,536,000 | 200 |" in text  # 12 × 64 tokens each
    both = run(NAME, "--write", "seed=2")
    assert both.startswith(text.partition("<!--")[0])
    assert both.endswith("<!-- end of the runs -->\n\n## Features\n")
    assert f"`python benchmarks/reproduce.py {NAME} seed=2`" in both


@pytest.mark.slow
def test_run_is_trained_once(run: Callable[..., str], page: Path) -> None:
    text = run(NAME, *SMALL)
    assert "2 of 2 steps of 16 tokens on cpu" in text
    assert "| best validation loss | 1.88 |" in text
    (metrics,) = page.parent.glob("*/metrics.csv")
    before = metrics.stat().st_mtime_ns
    assert run(NAME, *SMALL) == text
    assert metrics.stat().st_mtime_ns == before


@pytest.mark.slow
def test_run_that_its_minutes_end_is_continued_by_the_same_command(
    run: Callable[..., str], page: Path
) -> None:
    longer = [text.replace("max_steps=2", "max_steps=1000000") for text in SMALL]
    losses: list[list[str]] = []
    for _ in range(2):
        text = run(NAME, *longer, "--minutes=0.1")
        assert text.count(f"`python benchmarks/reproduce.py {NAME}") == 1
        (steps,) = re.findall(r"^([\d,]+) of 1,000,000 steps of 16 tokens", text, re.M)
        (metrics,) = page.parent.glob("*/metrics.csv")
        with metrics.open() as file:
            losses.append([row["train/loss"] for row in csv.DictReader(file)])
        assert len(losses[-1]) == int(steps.replace(",", ""))
    first, second = losses
    assert 0 < len(first) < len(second)
    assert second[: len(first)] == first


def test_presets_with_figures_exist(reproduce: ModuleType) -> None:
    assert {key.split()[0] for key in reproduce.FIGURES} <= {p.stem for p in (CONF / "experiment").iterdir()}
