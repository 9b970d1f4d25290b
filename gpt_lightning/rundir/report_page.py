"""The page of a report: one HTML file with sortable tables and pictures, which loads nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from gpt_lightning.rundir.report import Result, differing, notes, over_seeds, table

HEAD = """<!doctype html><!-- gpt_lightning report -->
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #8886; text-align: left; white-space: nowrap }}
th {{ cursor: pointer }}
img {{ max-width: 100%; background: white; cursor: zoom-in }}
img.large {{ max-width: none; cursor: zoom-out }}
pre {{ overflow-x: auto; background: #8882; padding: .7rem }}
</style></head><body><h1>{title}</h1>
"""
# a click on a heading sorts by it, a click on a picture shows it at its full size
SCRIPT = """<script>
const number = text => parseFloat(text.replaceAll(",", ""));
document.querySelectorAll("th").forEach(th => th.onclick = () => {
  const body = th.closest("table").tBodies[0], i = th.cellIndex;
  const up = th.dataset.up = th.dataset.up ? "" : "1";
  const cell = row => row.cells[i].textContent;
  const compare = (a, b) => {
    const x = number(cell(a)), y = number(cell(b));
    return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || cell(a).localeCompare(cell(b)) : x - y;
  };
  [...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)).forEach(row => body.append(row));
});
document.querySelectorAll("img").forEach(img => img.onclick = () => img.classList.toggle("large"));
</script></body></html>
"""


def as_html(results: Sequence[Result], title: str) -> str:
    """The whole page."""
    parts = [HEAD.format(title=html.escape(title))]
    parts += [f"<p>{html.escape(note)}</p>" for note in notes(results)]
    parts += [
        "<h2>Runs</h2>",
        _table(*table(results)),
        "<h2>Means over seeds</h2>",
        _table(*over_seeds(results)),
    ]
    parts += [f"<h2>{heading}</h2>{_picture(figure)}" for heading, figure in _figures(results)]
    best = results[0]
    parts += [
        "<h2>Best run</h2>",
        f"<pre>python -m gpt_lightning.train repeat={html.escape(str(best.folder))}</pre>",
    ]
    if (best.folder / "samples.md").is_file():
        sample = (best.folder / "samples.md").read_text(encoding="utf-8", errors="replace")
        parts.append(f"<pre>{html.escape('## Step' + sample.rpartition('## Step')[2])}</pre>")
    return "\n".join([*parts, SCRIPT])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(figure: Any) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _figures(results: Sequence[Result]) -> list[tuple[str, Any]]:
    """Validation losses over tokens, and the best loss against each key that differs."""
    figures = []
    axes, figure = _axes("tokens")
    for result in results[:20]:
        if result.losses:
            axes.plot(*zip(*result.losses, strict=True), marker="o", markersize=3, label=result.folder.name)
    axes.legend(fontsize="small", ncols=2, frameon=False)
    figures.append(("Validation loss of the best 20 runs", figure))
    for key in differing(results):
        points = [
            (result.overrides.get(key, "default"), loss)
            for result in results
            if (loss := result.summary.get("best_val_loss")) is not None
        ]
        if not points or key == "seed":
            continue
        axes, figure = _axes(key)
        try:
            values: list[Any] = [float(value) for value, _ in points]
            if min(values) > 0 and max(values) >= 10 * min(values):
                axes.set_xscale("log")
        except ValueError:
            values = [value for value, _ in points]
        axes.scatter(values, [loss for _, loss in points], alpha=0.7)
        figures.append((f"Best validation loss and {html.escape(key)}", figure))
    return figures


def _axes(label: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    return axes, figure
