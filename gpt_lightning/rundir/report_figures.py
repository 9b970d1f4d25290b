"""The pictures of a report: functions that give headings and figures, none if there is nothing to show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

from gpt_lightning.rundir.report import Result, by_seed, deviation, differing, measure
from gpt_lightning.rundir.scaling import ScalingLaw, optimal_parameters

Figures = Iterator[tuple[str, Any]]  # headings, and figures of matplotlib
LONG = 8  # characters that the number of a search has more of
COLOURED = 10  # runs, or lines, with a colour and a name of their own
LOSS = "validation loss, nats per token"
LOSSES = {"loss": LOSS, "bits": "validation loss, bits per byte"}


def loss_curves(results: Sequence[Result]) -> Figures:
    """Validation losses against steps, tokens and training time."""
    from matplotlib.ticker import EngFormatter

    runs = [result for result in results if result.validations]
    if not runs:
        return
    figure, kind = new_figure(width=13), measure(results)
    panels = figure.subplots(1, 3, sharey=True)
    labels = {"step": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training"}
    for axes, (field, text) in zip(panels, labels.items(), strict=True):
        for number, result in reversed(list(enumerate(runs))):  # the best on top
            points = [(getattr(v, field), getattr(v, kind)) for v in result.validations if getattr(v, field)]
            colour = f"C{number}" if number < COLOURED else "lightgrey"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=2.5, linewidth=1.2, color=colour)
        decorate(axes, text, LOSSES[kind] if field == "step" else "")
        axes.xaxis.set_major_formatter("{x:,.0f}" if field == "step" else EngFormatter())
        axes.locator_params(axis="x", nbins=5)
    panels[0].set_ylim(*_loss_limits(runs, kind))
    names = [without_formula(label(result, results)) for result in runs[:COLOURED]]
    lines = [panels[0].plot([], [], color=f"C{number}")[0] for number in range(len(names))]
    if len(runs) > COLOURED:
        lines, names = [*lines, panels[0].plot([], [], color="lightgrey")[0]], [*names, "other runs"]
    columns = min(4, max(1, 200 // (max(map(len, names)) + 8)))  # the width has room for 200 characters
    figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    yield "Validation loss", figure


def _loss_limits(runs: Sequence[Result], kind: str) -> tuple[float, float]:
    """Of what follows the first quarter of each run, whose losses are far above the others."""
    losses = [[loss for v in run.validations if math.isfinite(loss := getattr(v, kind))] for run in runs]
    later = [loss for one in losses for loss in one[len(one) // 4 :]] or [1.0]
    margin = 0.05 * (max(later) - min(later)) or 0.1
    return min(later) - margin, max(later) + margin


def losses_by_key(results: Sequence[Result]) -> Figures:
    """The best loss against each key that differs, with the mean and the standard deviation over seeds.

    A line joins runs that differ in that key alone.
    """
    keys, groups = by_seed(results)
    for place, key in enumerate(keys):
        lines: dict[tuple[str, ...], list[tuple[str, list[float]]]] = {}
        for group, losses in groups.items():
            rest = group[:place] + group[place + 1 :]
            lines.setdefault(rest, []).append((group[place], losses))
        values = [group[place] for group in groups]
        if len(set(values)) < 2:
            continue
        figure = new_figure()
        axes, (at, _) = figure.add_subplot(), _scale(values)
        for number, (rest, points) in enumerate(sorted(lines.items())):
            points.sort(key=lambda point: at[point[0]])
            others = zip([*keys[:place], *keys[place + 1 :]], rest, strict=True)
            axes.errorbar(
                [at[value] for value, _ in points],
                [statistics.mean(losses) for _, losses in points],
                yerr=[deviation(losses) or 0.0 for _, losses in points],
                marker="o",
                capsize=4,
                color=f"C{number}" if number < COLOURED else "lightgrey",
                label=without_formula(", ".join(f"{_short(k)}={_brief(v)}" for k, v in others)) or None,
            )
        _label_axis(axes, values)
        decorate(axes, key, f"best {LOSSES[measure(results)]}")
        if 1 < len(lines) <= COLOURED:
            axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        yield f"Best validation loss and {key}", figure


def parallel_coordinates(results: Sequence[Result]) -> Figures:
    """One line per run over all keys that differ and the best loss, which colours it."""
    from matplotlib import colormaps

    best = attrgetter(measure(results))
    keys, runs = differing(results), [result for result in results if best(result) is not None]
    columns = {key: [result.overrides.get(key, "") for result in runs] for key in keys}
    columns = {key: values for key, values in columns.items() if len(set(values)) > 1}
    if len(columns) < 2 or len(runs) < 3:
        return
    columns["best validation loss"] = [f"{best(run):.4f}" for run in runs]
    figure = new_figure(width=11)
    axes = figure.add_subplot()
    heights = [_heights(values) for values in columns.values()]
    for number in reversed(range(len(runs))):  # the best on top
        line = [scale[values[number]] for values, scale in zip(columns.values(), heights, strict=True)]
        axes.plot(line, color=colormaps["viridis"](0.95 * line[-1]), alpha=0.8)
    for x, scale in enumerate(heights):
        axes.axvline(x, color="black", linewidth=0.8)
        few = len(scale) <= COLOURED and x < len(heights) - 1
        for value in _apart(scale, 0.04 if few else 1.0):
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
            axes.annotate(without_formula(_brief(value)), (x, scale[value]), **where, bbox=box)
    axes.set_xticks(range(len(columns)), [without_formula(key) for key in columns])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    yield "All runs at once: each line is a run, dark where the loss is low", figure


def _heights(values: Sequence[str]) -> dict[str, float]:
    """Where values lie on a vertical axis from 0 to 1."""
    scale, kind = _scale(values)
    if kind == "log":
        scale = {value: math.log10(x) for value, x in scale.items()}
    low, high = min(scale.values()), max(scale.values())
    return {value: (y - low) / (high - low or 1.0) for value, y in scale.items()}


FIGURES = (loss_curves, losses_by_key, parallel_coordinates)


def scaling_law(law: ScalingLaw) -> Any:
    """The fitted losses over compute, a curve for each size, beside the measured ones, and the errors."""
    import numpy as np
    from matplotlib import colormaps

    figure = new_figure(width=13)
    losses, errors = figure.subplots(1, 2, width_ratios=(2, 1))
    sizes = np.unique(law.points[:, 0])
    for number, size in enumerate(sizes):
        colour = colormaps["viridis"](number / max(1, len(sizes) - 1) * 0.9)
        own = law.points[:, 0] == size
        _, tokens, measured = law.points[own].T
        line = np.geomspace(tokens.min() / 1.5, tokens.max() * 1.5)
        losses.plot(6 * size * line, law.loss(size, line), color=colour, linewidth=1)
        losses.plot(6 * size * tokens, measured, "o", color=colour, label=f"N = {size:,.0f}")
        errors.plot(tokens, 100 * law.errors()[own], "o", color=colour)
    compute = 6 * law.points[:, 0] * law.points[:, 1]
    flops = np.geomspace(compute.min(), compute.max())
    best = np.array([optimal_parameters(law.values, float(c)) for c in flops])
    losses.plot(flops, law.loss(best, flops / 6 / best), "k--", linewidth=1, label="optimal N")
    losses.axhline(float(np.exp(law.values[2])), color="grey", linewidth=1, label="E")
    if law.floor is not None:
        losses.axhline(law.floor, color="grey", linestyle=":", label="corpus entropy")
    losses.set_xscale("log")
    errors.set_xscale("log")
    decorate(losses, "compute C = 6 N D, FLOPs", LOSS)
    decorate(errors, "tokens D", "measured loss above the fitted one, %")
    errors.axhline(0, color="grey", linewidth=1)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize="small")
    return figure


# -- parts of figures ---------------------------------------------------------------------------------


def new_figure(width: float = 9, height: float = 4.5) -> Any:
    """An empty figure that is drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def decorate(axes: Any, x: str, y: str) -> None:
    """Names of the axes, and a grid."""
    axes.set_xlabel(without_formula(x))
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def without_formula(text: str) -> str:
    """A text in which matplotlib reads no formula."""
    return text.replace("$", r"\$")


def label(result: Result, results: Sequence[Result]) -> str:
    """A run by what it overrides and others do not, or by its directory if they all do the same."""
    parts = [f"{_short(key)}={_brief(result.overrides.get(key, ''))}" for key in differing(results)]
    return ", ".join(parts) or result.folder.name


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _brief(value: str) -> str:
    """A value as pictures name it: the numbers of a search have three digits."""
    with suppress(ValueError):
        if "." in value and len(value) > LONG:
            return f"{float(value):.3g}"
    return value or "default"


def _scale(values: Sequence[str]) -> tuple[dict[str, float], str]:
    """Where values lie on an axis, and its kind: linear, log, or texts, one after another."""
    try:
        at = {value: float(value) for value in values}
    except ValueError:
        return {value: float(place) for place, value in enumerate(sorted(set(values)))}, "texts"
    low, high = min(at.values()), max(at.values())
    return at, "log" if low > 0 and high >= 10 * low else "linear"


def _label_axis(axes: Any, values: Sequence[str]) -> None:
    """A horizontal axis with the values themselves where they do not overlap; many numbers have a scale."""
    at, kind = _scale(values)
    if kind == "log":
        axes.set_xscale("log")
    if len(at) <= COLOURED or kind == "texts":
        shown = _apart(_heights(values), 0.08)
        axes.set_xticks([at[value] for value in shown], [without_formula(_brief(value)) for value in shown])
        axes.minorticks_off()


def _apart(heights: dict[str, float], least: float) -> list[str]:
    """The values that are not too close to others for their names to be read."""
    found: list[str] = []
    for value in sorted(heights, key=lambda value: heights[value]):
        if not found or heights[value] - heights[found[-1]] >= least:
            found.append(value)
    return found
