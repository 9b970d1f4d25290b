"""Runs a preset and writes what it reached beside the published figures into docs/reproductions.md.

    python benchmarks/reproduce.py NAME [--minutes N] [--runs DIR] [--write] [override …]

NAME is a file of conf/experiment; overrides go to `gpt_lightning.plan` and `gpt_lightning.train`, such as
data.path=FILE for a copy of the text. The run is in its own directory below DIR: the same command continues
it where it stopped, for N minutes at most, and only writes the figures if it is finished. With --write
nothing is trained, and the page says "not run" for what is not there. A section of the page belongs to one
NAME and its overrides, other than those that say where files are, and is replaced as a whole.

The trainers that published the figures count from 0 and print the loss of a step before its update: their
step 500 is the 501st of our metrics.csv. Seconds are those of the training steps, without validation.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gpt_lightning
from gpt_lightning.plan import Plan
from gpt_lightning.rundir.metrics import Row, read_metrics
from gpt_lightning.rundir.summary import RunSummary, read_summary

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reproductions.md"
END = "<!-- end of the runs -->"  # where a new section goes
NOT_RUN = "not run"


class Reached(NamedTuple):
    """What a run has for a figure, and after how many optimizer steps; none for what needs no training."""

    value: str
    steps: int | None = None


@dataclass(frozen=True)
class Figure:
    """A published figure and how ours is read from a plan, the rows of metrics.csv and the summary."""

    name: str
    published: str
    ours: Callable[[Plan, list[Row], RunSummary], Reached | None]


def planned(name: str, published: int, ours: Callable[[Plan], int]) -> Figure:
    return Figure(name, f"{published:,}", lambda plan, rows, summary: Reached(f"{ours(plan):,}"))


def parameters(published: int) -> Figure:
    return planned("parameters", published, lambda plan: plan.parameters)


def loss_at(step: int, published: str) -> Figure:
    """The training loss of a step, counted from 0."""

    def ours(plan: Plan, rows: list[Row], summary: RunSummary) -> Reached | None:
        losses = [row["train/loss"] for row in rows if row["step"] == step + 1]
        return Reached(f"{losses[0]:.4f}", step + 1) if losses else None

    return Figure(f"training loss at step {step:,}", published, ours)


def over_run(
    name: str, published: str, steps: int, value: Callable[[list[Row]], tuple[float, float]]
) -> Figure:
    """A figure of all training losses of a run of so many steps: its value and the step that has it."""

    def ours(plan: Plan, rows: list[Row], summary: RunSummary) -> Reached | None:
        if not rows or rows[-1]["step"] < steps:
            return None
        loss, step = value(rows)
        return Reached(f"{loss:.4f}", int(step))

    return Figure(name, published, ours)


def lowest(rows: list[Row]) -> tuple[float, float]:
    return min((row["train/loss"], row["step"]) for row in rows)


def mean_of_last_100(rows: list[Row]) -> tuple[float, float]:
    return statistics.mean(row["train/loss"] for row in rows[-100:]), rows[-1]["step"]


def last(rows: list[Row]) -> tuple[float, float]:
    return rows[-1]["train/loss"], rows[-1]["step"]


def target(loss: float, published: str) -> Figure:
    """The first step whose training loss is at most the target."""

    def ours(plan: Plan, rows: list[Row], summary: RunSummary) -> Reached | None:
        found = [row for row in rows if row["train/loss"] <= loss]
        if found:
            return Reached(f"{found[0]['train/loss']:.4f}", int(found[0]["step"]))
        return Reached("not reached", summary["steps"]) if summary.get("status") == "finished" else None

    return Figure(f"training loss of at most {loss}", published, ours)


def best_validation(published: str) -> Figure:
    def ours(plan: Plan, rows: list[Row], summary: RunSummary) -> Reached | None:
        best = summary.get("best_val_loss")
        return Reached(f"{best:.4f}", summary["steps"]) if best and summary["status"] == "finished" else None

    return Figure("best validation loss", published, ours)


def tokens_per_second(published: str) -> Figure:
    def ours(plan: Plan, rows: list[Row], summary: RunSummary) -> Reached | None:
        speed = summary.get("tokens_per_second")
        return Reached(f"{speed:,.0f}") if speed else None

    return Figure("tokens per second", published, ours)


TINY_SHAKESPEARE = planned("tokens of the text", 338_025, lambda plan: plan.train_tokens + plan.val_tokens)
CHECKED = [loss_at(0, "none"), best_validation("none")]  # of a recipe without figures
FIGURES: dict[str, list[Figure]] = {
    "shakespeare_target_loss": [loss_at(0, "none"), target(0.099999, "reached")],
    "shakespeare_target_loss device=cuda": [
        parameters(51_237_888),
        TINY_SHAKESPEARE,
        planned("batches of 8 × 512 tokens per epoch", 82, lambda plan: plan.windows_per_epoch // 8),
        *(loss_at(step, loss) for step, loss in [(0, "10.9322"), (500, "4.1621"), (1000, "2.0675")]),
        loss_at(1500, "0.3920"),
        target(0.099999, "0.0996 at step 1,832"),
    ],
    "shakespeare_gpt2_small": [
        Figure("parameters", "about 124 million", lambda plan, *_: Reached(f"{plan.parameters:,}")),
        loss_at(0, "about 10.5"),
        over_run("best training loss", "0.1716 at step 4,517", 5000, lowest),
        over_run("mean of the last 100 steps", "0.3894", 5000, mean_of_last_100),
        over_run("final training loss", "0.3453", 5000, last),
    ],
    "shakespeare_gpt2_small_amp": [
        parameters(124_475_904),
        *(loss_at(step, loss) for step, loss in [(0, "10.9677"), (10, "8.6117"), (100, "3.7358")]),
        *(loss_at(step, loss) for step, loss in [(200, "0.1825"), (250, "0.0052")]),
        tokens_per_second("about 6,800"),
    ],
    "nanogpt_shakespeare_char": [best_validation("1.4697")],
    "nanogpt_shakespeare_char_cpu": [best_validation("1.88")],
}


def figures_of(name: str, overrides: list[str]) -> list[Figure]:
    """The figures of the preset, or of the preset on that device."""
    return next((FIGURES[key] for text in overrides if (key := f"{name} {text}") in FIGURES), None) or (
        FIGURES.get(name, CHECKED)
    )


def says_where(override: str) -> bool:
    """Whether an override only says where files are."""
    return override.startswith(("data.path=", "data.name=", "paths."))


def train(folder: Path, arguments: list[str], minutes: float | None) -> None:
    """Begin or continue the run in its directory; one that its time limit ended counts as well."""
    if read_summary(folder).get("status") == "finished":
        return
    begun = (folder / ".hydra").is_dir()
    given = [f"resume={folder}"] if begun else [*arguments, f"hydra.run.dir={folder}"]
    hours, rest = divmod(round((minutes or 0) * 60), 3600)
    given.append(f"time_limit={hours:02}:{rest // 60:02}:{rest % 60:02}" if minutes else "time_limit=null")
    done = subprocess.run([sys.executable, "-m", "gpt_lightning.train", *given])
    if read_summary(folder).get("status") not in ("finished", "interrupted"):
        sys.exit(f"the run in {folder} failed with exit code {done.returncode}")


def section(title: str, plan: Plan, folder: Path, figures: list[Figure]) -> str:
    """The part of the page on one run."""
    summary, rows = read_summary(folder), []
    if (folder / "metrics.csv").is_file():
        rows = [row for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]
    lines = [f"### {title.split()[0]}", "", f"`python benchmarks/reproduce.py {title}`", ""]
    if rows:
        steps, device = int(rows[-1]["step"]), f"{summary['device']}, {summary['threads']} thread(s)"
        speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
        lines += [
            f"{steps:,} of {plan.max_steps:,} steps of {plan.tokens_per_step:,} tokens on {device}, "
            f"{summary['precision']}, {plan.parameters:,} parameters, {speed}. "
            f"Training loss of the last step: {rows[-1]['train/loss']:.4f}.",
            "",
        ]
    lines += ["| figure | published | ours | steps | tokens | seconds |", "| --- |" + " ---: |" * 5]
    for figure in figures:
        reached = figure.ours(plan, rows, summary) or Reached(NOT_RUN)
        cells = [figure.name, figure.published, reached.value, "", "", ""]
        if reached.steps is not None:
            seconds = sum(row["speed/ms_per_step"] for row in rows if row["step"] <= reached.steps) / 1000
            cells[3:] = [f"{reached.steps:,}", f"{reached.steps * plan.tokens_per_step:,}", f"{seconds:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def write(page: Path, title: str, text: str) -> None:
    """Put a section in place of the one with the same title, or behind all others."""
    old = page.read_text(encoding="utf-8")
    heading = re.escape(f"### {title.split()[0]}\n\n`python benchmarks/reproduce.py {title}`\n")
    there = re.compile(rf"^{heading}.*?(?=^###? |{re.escape(END)})", re.M | re.S)
    new, count = there.subn(lambda _: text, old)
    page.write_text(new if count else old.replace(END, text + END), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--runs", type=Path, default=Path("outputs/reproductions"))
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    settings = [f"experiment={given.name}", *given.overrides]
    title = shlex.join([given.name, *(text for text in given.overrides if not says_where(text))])
    folder = given.runs.resolve() / re.sub(r"[^\w.=,-]+", "_", title)
    plan = gpt_lightning.plan(*settings)
    if not given.write:
        train(folder, [*settings, "trainer.log_every_steps=1"], given.minutes)
    text = section(title, plan, folder, figures_of(given.name, given.overrides))
    write(given.page, title, text)
    print(text)


if __name__ == "__main__":
    main()
