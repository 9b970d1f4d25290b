"""A picture of training loss, validation loss and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from gpt_lightning.data.files import atomic_write
from gpt_lightning.rundir.metrics import Row

Points = list[tuple[float, float]]  # steps with a finite value
HIDDEN = 0.1  # first part of the run, whose losses may lie above the picture
SMOOTHED = 60  # points of the training loss; of more, the mean over neighbours is drawn as well
TITLE = 80  # characters


def plot_curves(rows: Sequence[Row], path: str | Path, **options: Any) -> None:
    """Write the picture of `draw_curves`, with its options, as .png, .pdf or .svg by the suffix of `path`.

    Raises:
        ValueError: If no row has a finite loss, or the format is unknown.
    """
    figure = draw_curves(rows, **options)
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)


def draw_curves(
    rows: Sequence[Row], *, floor: float | None = None, title: str = "", best_step: int | None = None
) -> Any:
    """A figure of matplotlib with the losses and, in a panel of its own, the learning rate.

    The vertical axis shows the losses after the first tenth of the run; what is above is cut off.

    Args:
        rows: As `read_metrics` returns them; losses in nats per token.
        floor: Corpus entropy in nats per token, drawn as a line.
        title: Name of the run.
        best_step: Step of the best checkpoint, which a star marks; without one, the lowest validation loss.

    Raises:
        ValueError: If no row has a finite loss.
    """
    from matplotlib.figure import Figure

    train, val, rate = (_column(rows, key) for key in ("train/loss", "val/loss", "train/lr"))
    if not train and not val:
        raise ValueError("the metrics have no finite loss to draw")
    figure = Figure(figsize=(8, 5))
    box = {"height_ratios": (4, 1), "hspace": 0.08, "left": 0.11, "right": 0.93, "top": 0.86, "bottom": 0.1}
    losses, rates = figure.subplots(2, 1, sharex=True, gridspec_kw=box)
    smooth = _draw_losses(losses, train, val, floor, best_step)
    _limit(losses, [*(smooth or train), *val], train, floor)
    rates.plot(*_xy(rate), color="tab:green", linewidth=1.2)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.yaxis.set_major_formatter("{x:g}")
    rates.set_xlabel("optimizer steps")
    rates.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.margins(x=0.02)
    figure.align_ylabels()
    title = title if len(title) <= TITLE else title[: TITLE - 1] + "…"
    figure.suptitle(title, fontsize=11, y=0.985, parse_math=False)
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.955), ncols=4, frameon=False, fontsize="small")
    return figure


def _draw_losses(axes: Any, train: Points, val: Points, floor: float | None, best_step: int | None) -> Points:
    """Draw what the upper panel has; the smoothed training loss, if there is one."""
    half = len(train) // SMOOTHED
    smooth = smoothed(train, half) if half else []
    style = {"color": "tab:blue", "linewidth": 1.0}
    axes.plot(*_xy(train), **style, alpha=0.35 if smooth else 1.0, label="training loss")
    if smooth:
        axes.plot(*_xy(smooth), **style, label=f"training, mean of {2 * half + 1} points")
    if floor is not None:
        axes.axhline(floor, linestyle="--", linewidth=1.2, color="grey")
        above = {"xytext": (0.01, 3), "textcoords": ("axes fraction", "offset points"), "color": "dimgrey"}
        axes.annotate(f"corpus entropy {floor:.4f}", (0, floor), **above, fontsize="small")
    if val:
        chosen = [point for point in val if point[0] == best_step]
        name = "best.ckpt" if chosen else "lowest"
        best = min(chosen or val, key=lambda point: point[1])
        axes.plot(*_xy(val), color="tab:orange", marker="o", markersize=3.5, label="validation loss")
        axes.plot(
            *best, "*", color="tab:red", markersize=12, label=f"{name}: {best[1]:.4f}, step {best[0]:,.0f}"
        )
        where = {"xytext": (1.005, val[-1][1]), "textcoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(f"{val[-1][1]:.4f}", val[-1], **where, color="tab:orange", fontsize="small")
    axes.set_ylabel("loss, nats per token")
    return smooth


def _limit(axes: Any, shown: Points, train: Points, floor: float | None) -> None:
    """Limit the vertical axis to the losses after the first tenth, and say what is above it."""
    first = HIDDEN * max(step for step, _ in shown)
    values = [loss for step, loss in shown if step >= first]
    low, high = min([*values, floor] if floor is not None else values), max(values)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    above = max(train, key=lambda point: point[1], default=(0.0, -math.inf))
    if above[1] > high + margin:
        text = f"cut off: up to {above[1]:.2f} at step {above[0]:,.0f}"
        axes.annotate(text, (0.985, 0.96), xycoords="axes fraction", ha="right", va="top", fontsize="small")


def smoothed(points: Points, half: int) -> Points:
    """Means over `half` neighbours on either side, over fewer near the ends, so that no end is shifted."""
    sums = list(accumulate((value for _, value in points), initial=0.0))
    means = []
    for i, (step, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        means.append((step, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return means


def _column(rows: Sequence[Row], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _xy(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
