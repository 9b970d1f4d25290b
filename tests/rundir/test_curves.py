"""The picture of a run, against limits and means worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gpt_lightning.rundir.curves import draw_curves, plot_curves
from gpt_lightning.rundir.metrics import Row

# of 100 steps: a steep beginning, then losses between 1.5 and 1.0, the best not at the end
ROWS: list[Row] = [
    {"step": 1.0, "train/loss": 8.0, "train/lr": 0.0},
    {"step": 5.0, "train/loss": 3.0, "train/lr": 0.01},
    {"step": 10.0, "train/loss": 1.5, "train/lr": 0.009, "val/loss": 1.4},
    {"step": 50.0, "train/loss": 1.2, "train/lr": 0.004, "val/loss": 1.1},
    {"step": 75.0, "train/loss": math.nan, "train/lr": 0.002},
    {"step": 100.0, "train/loss": 1.0, "train/lr": 0.0, "val/loss": 1.3},
]


def test_losses_after_the_first_tenth_fill_the_panel_and_the_rest_is_named() -> None:
    figure = draw_curves(ROWS, floor=0.9, title="gpt, lr=0.01")
    losses, rates = figure.axes
    assert losses.get_ylim() == pytest.approx((0.9 - 0.048, 1.5 + 0.048))  # 8% of 0.6 on either side
    texts = [text.get_text() for text in losses.texts]
    assert texts == ["corpus entropy 0.9000", "1.3000", "cut off: up to 8.00 at step 1"]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert drawn["training loss"] == [[1, 8], [5, 3], [10, 1.5], [50, 1.2], [100, 1]]
    assert drawn["lowest: 1.1000, step 50"] == [[50, 1.1]]
    assert [0.9, 0.9] in [list(line.get_ydata()) for line in losses.lines]
    assert rates.lines[0].get_ydata().tolist() == [0, 0.01, 0.009, 0.004, 0.002, 0]
    assert figure.get_suptitle() == "gpt, lr=0.01"
    assert (losses.get_ylabel(), rates.get_xlabel()) == ("loss, nats per token", "optimizer steps")
    marked = {line.get_label(): line for line in draw_curves(ROWS, best_step=10).axes[0].lines}
    assert marked["best.ckpt: 1.4000, step 10"].get_xydata().tolist() == [[10, 1.4]]


def test_many_points_are_smoothed_and_the_picture_says_over_how_many() -> None:
    rows = [{"step": float(step), "train/loss": float(step % 2)} for step in range(120)]
    drawn = {line.get_label(): line.get_ydata() for line in draw_curves(rows).axes[0].lines}
    mean = drawn["training, mean of 5 points"]
    # of 0 1 0 1 0 1 …: the ends are themselves, then means of three, then of five
    assert mean[:4].tolist() == pytest.approx([0, 1 / 3, 2 / 5, 3 / 5])
    assert mean[-2:].tolist() == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.pdf", b"%PDF"), ("c.svg", b"<?xml")])
def test_ending_selects_the_format(name: str, start: bytes, tmp_path: Path) -> None:
    plot_curves(ROWS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_metrics_without_a_finite_loss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finite loss"):
        plot_curves([{"step": 1.0, "val/loss": math.nan}], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())
