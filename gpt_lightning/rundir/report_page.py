"""The page of a report: one HTML file with sortable tables and pictures, which loads nothing."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Sequence
from typing import Any

from gpt_lightning.rundir.report import Result, measure, notes, over_seeds, table
from gpt_lightning.rundir.report_figures import FIGURES, LOSSES, label, scaling_law
from gpt_lightning.rundir.report_study import study_figures
from gpt_lightning.rundir.scaling import ScalingLaw, law_notes, law_table

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


def as_html(
    results: Sequence[Result], title: str, law: ScalingLaw | None = None, budget: float | None = None
) -> str:
    """The whole page; with a law, its table and picture, and the best size for a budget in FLOPs."""
    parts, best, kind = [HEAD.format(title=html.escape(title))], results[0], measure(results)
    if (lowest := getattr(best, kind)) is not None:
        named = html.escape(label(best, results))
        parts.append(f"<p>Best {LOSSES[kind]}: {lowest:.4f} ({named})</p>")
    parts += [f"<p>{html.escape(note)}</p>" for note in notes(results)]
    parts += ["<h2>Runs</h2>", _table(*table(results))]
    if any("seed" in result.overrides for result in results):
        parts += ["<h2>Means over seeds</h2>", _table(*over_seeds(results))]
    if law is not None:
        parts += ["<h2>Scaling law</h2>", *(f"<p>{html.escape(note)}</p>" for note in law_notes(law))]
        parts += [_table(*law_table(law, budget)), _drawn(scaling_law(law), "Losses and the law")]
    for draw in (*FIGURES, study_figures):
        for heading, figure in draw(results):
            parts += [f"<h2>{html.escape(heading)}</h2>", _drawn(figure, heading)]
    if lowest is not None:
        parts += _best(best)
    return "\n".join([*parts, SCRIPT])


def _best(best: Result) -> list[str]:
    """How the best run is repeated, its curves and its last sample."""
    command = f"python -m gpt_lightning.train {shlex.quote(f'repeat={best.folder}')}"
    parts = ["<h2>Best run</h2>", f"<pre>{html.escape(command)}</pre>"]
    if (best.folder / "curves.png").is_file():
        parts.append(_picture((best.folder / "curves.png").read_bytes(), "Curves of the best run"))
    if (best.folder / "samples.md").is_file():
        sample = (best.folder / "samples.md").read_text(encoding="utf-8", errors="replace")
        parts.append(f"<pre>{html.escape('## Step' + sample.rpartition('## Step')[2])}</pre>")
    return parts


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _drawn(figure: Any, text: str) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return _picture(out.getvalue(), text)


def _picture(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
