"""Plots of training loss, validation loss and learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt_lightning.data.files import atomic_write
from gpt_lightning.rundir.metrics import Row


def plot_curves(rows: Sequence[Row], path: str | Path, *, floor: float | None = None) -> None:
    """Plot the losses and the learning rate of a metrics.csv.

    Args:
        rows: As `read_metrics` returns them; losses in nats per token.
        path: The image; its suffix selects the format.
        floor: Corpus entropy in nats per token, drawn as a line.

    Raises:
        ValueError: If no row has a loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def column(key: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        return [step for step, _ in points], [value for _, value in points]

    if not column("train/loss")[0] and not column("val/loss")[0]:
        raise ValueError(f"no losses to draw in {path}")
    figure = Figure(figsize=(8, 4.5))
    FigureCanvasAgg(figure)
    losses = figure.add_axes((0.09, 0.11, 0.82, 0.8))
    losses.plot(*column("train/loss"), linewidth=1, alpha=0.7, label="training loss")
    losses.plot(*column("val/loss"), marker="o", markersize=4, label="validation loss")
    if floor is not None:
        losses.axhline(floor, linestyle="--", color="grey", label="corpus entropy")
    losses.set_xlabel("optimizer steps")
    losses.set_ylabel("nats per token")
    losses.grid(alpha=0.3)
    rate = losses.twinx()
    rate.plot(*column("train/lr"), color="tab:green", linewidth=1, alpha=0.5, label="learning rate")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.legend(loc="upper center", ncols=4, frameon=False)
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=120)
