"""What runs found: `python -m gpt_lightning.report runs=DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command import command
from gpt_lightning.config.errors import ConfigError, check_output
from gpt_lightning.config.rules import check, number, one_of

if TYPE_CHECKING:
    from gpt_lightning.rundir.report import Result
    from gpt_lightning.rundir.scaling import ScalingLaw

RULES = {
    "watch": one_of(True, False),
    "fit": one_of("scaling", None),
    "budget": number(float, above=0, optional=True),
    "tensorboard": number(int, least=0, most=65535, optional=True),
}
WATCH_SECONDS = 5
BEGINNINGS = {
    ".csv": b"rank,run,status",
    ".md": b"| rank | run",
    ".html": b"<!doctype html><!-- gpt_lightning report",
}


class Report(NamedTuple):
    """What a report has: the runs, best first, and the law that was fitted to them, if one was asked for."""

    results: list[Result]
    law: ScalingLaw | None = None
    budget: float | None = None  # FLOPs


def show(report: Report | None) -> None:
    """The tables of the runs and, if one was fitted, of the law."""
    from gpt_lightning.rundir.report import as_text, overview
    from gpt_lightning.rundir.scaling import law_notes, law_table

    if report is None:  # it was shown while it was watched
        return
    print(overview(report.results))
    if report.law is not None:
        print(f"\n{as_text(*law_table(report.law, report.budget))}\n")
        print("\n".join(f"note: {note}" for note in law_notes(report.law)))


@command("report", show=show)
def main(cfg: DictConfig) -> Report | None:
    """Compares the runs below one or several folders, best first.

    Raises:
        ConfigError, FileNotFoundError: If there is no run, or output= is not a file of a report.
        ValueError: If the runs cannot bear the fit.
    """
    from gpt_lightning.rundir.report import read_results
    from gpt_lightning.rundir.scaling import fit_runs

    if cfg.runs is None:
        raise ConfigError("runs= is missing; give a sweep, a folder of runs, or a list of them")
    places = [str(place) for place in (cfg.runs if OmegaConf.is_list(cfg.runs) else [cfg.runs])]
    check(cfg, RULES)
    if cfg.tensorboard is not None:
        show_tensorboard(cfg, places)
    if cfg.budget is not None and cfg.fit is None:
        raise ConfigError(f"budget={cfg.budget} belongs to fit=scaling; add it")
    if cfg.watch and cfg.fit is not None:
        raise ConfigError(f"fit={cfg.fit} and watch=true exclude each other; fit when the runs are finished")
    if cfg.output is not None:
        if (ending := Path(str(cfg.output)).suffix) not in BEGINNINGS:
            raise ConfigError(f"output={cfg.output} must end in {', '.join(BEGINNINGS)}")
        check_output(str(cfg.output), BEGINNINGS[ending])
    title = ", ".join(Path(place).name for place in places)
    while True:
        results = read_results(places)
        law = fit_runs(results) if cfg.fit is not None else None
        report = Report(results, law, cfg.budget)
        if cfg.output is not None:
            write(report, Path(cfg.output).expanduser(), title=title)
        if not cfg.watch:
            return report
        print("\x1b[2J\x1b[H" if sys.stdout.isatty() else "", end="")  # clears the terminal
        show(report)
        if all(result.status in ("finished", "failed", "pruned") for result in results):
            return None
        time.sleep(WATCH_SECONDS)


def show_tensorboard(cfg: DictConfig, places: list[str]) -> NoReturn:
    """TensorBoard of the runs, until Ctrl-C.

    Raises:
        ConfigError: If another key asks for something else.
        OSError: If there is no run, or the port is taken.
    """
    from gpt_lightning.serving.dashboard import serve

    for key, unset in {"output": None, "fit": None, "watch": False}.items():
        if cfg[key] != unset:
            raise ConfigError(f"{key}= and tensorboard= exclude each other; leave one out")
    serve(lambda: event_folders(places), cfg.tensorboard)


def event_folders(places: list[str]) -> dict[str, Path]:
    """The event files of the runs below folders, by the run's path there and what it overrides.

    Raises:
        FileNotFoundError: If no run has any.
    """
    from gpt_lightning.rundir.directory import runs_below
    from gpt_lightning.rundir.summary import LEDGER, read_summary
    from gpt_lightning.sweeping.jobs import name_of

    found = {}
    for place in map(Path, places):
        for run in runs_below(place):
            if not (run / "tensorboard").is_dir():
                continue
            top = place.expanduser().resolve()
            name = str(run.relative_to(top)) if run != top else run.name
            overrides = read_summary(run).get("overrides", [])
            if overrides and not (run.parent / LEDGER).exists():  # a job's directory has their names
                name += f" {name_of(overrides)}"
            found[name if len(places) == 1 else f"{top.name}/{name}"] = run / "tensorboard"
    if not found:
        raise FileNotFoundError(f"no run in {', '.join(places)} has event files of TensorBoard")
    return found


def write(report: Report, path: Path, title: str) -> None:
    """Write the report in the format of the file's ending."""
    from gpt_lightning.data.files import atomic_write
    from gpt_lightning.rundir.report import as_csv, as_markdown
    from gpt_lightning.rundir.report_page import as_html
    from gpt_lightning.rundir.scaling import law_table

    law = None if report.law is None else law_table(report.law, report.budget)
    if path.suffix == ".html":
        text = as_html(report.results, title, report.law, report.budget)
    else:
        text = as_csv(report.results) if path.suffix == ".csv" else as_markdown(report.results, law)
    with atomic_write(path, text=True) as file:
        file.write(text)


if __name__ == "__main__":
    main()
