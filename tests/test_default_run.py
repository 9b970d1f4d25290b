"""The first run of a newcomer, made smaller: it learns, and it does not beat what cannot be beaten."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.comparison import charts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.slow
def test_small_run_on_the_stories_learns_and_stays_above_the_floor(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    call(
        "train", "model.n_embd=64", "model.block_size=128", "data.batch_size=4", "trainer.max_steps=150",
        "trainer.val_every_steps=50", "scheduler.warmup_steps=20", "optimizer.lr=1e-2", "device=cpu",
        "callbacks=diagnostics", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    floor = summary["floor_bits_per_byte"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    reached = [float(row["val/bits_per_byte"]) for row in rows if row["val/bits_per_byte"]]
    assert len(reached) == 3
    assert min(reached) > floor  # below it, the model would have seen the validation stories
    assert reached[0] > reached[1] > reached[2]
    # ids drawn at random would cost about 2.5 bits per byte, eight times the floor
    assert reached[2] < 2.5 * floor
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    bounds = events.Scalars("val/floor_bits_per_byte")
    assert [(event.step, event.value) for event in bounds] == [
        (step, pytest.approx(floor)) for step in (50, 100, 150)
    ]
    shown = charts(events)
    assert shown["training and validation loss, nats per token"] == ["train/loss$", "val/loss$"]
    tags = events.Tags()["scalars"]
    for title, patterns in shown.items():
        for pattern in patterns:
            assert any(re.match(pattern, tag) for tag in tags), title
    layers = {f"model.layers.{number}" for number in range(2)}
    for kind in ("update_ratio", "activation_std"):
        assert layers < {tag.removeprefix(f"{kind}/") for tag in tags if tag.startswith(f"{kind}/")}


def test_floor_of_the_split_is_between_zero_and_the_gzip_of_the_text() -> None:
    import gzip

    from gpt_lightning.config.resolvers import ROOT
    from gpt_lightning.data.corpus.files import TextFiles
    from gpt_lightning.data.tales import Tales

    corpus = TextFiles(str(ROOT / "input.txt"), floor=Tales())
    documents = list(corpus.documents("val"))
    bits = [corpus.floor_bits(document) for document in documents]
    assert all(value is not None and value > 0 for value in bits)
    text = "\n".join(documents).encode()
    # a real compressor is an upper bound of the entropy
    assert sum(value for value in bits if value is not None) < 8 * len(gzip.compress(text, 9))
