"""What runs found: `python -m gpt_lightning.report runs=DIR`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command import command
from gpt_lightning.config.errors import ConfigError

if TYPE_CHECKING:
    from gpt_lightning.rundir.report import Result

WATCH_SECONDS = 5
BEGINNINGS = {
    ".csv": "rank,run,status",
    ".md": "| rank | run",
    ".html": "<!doctype html><!-- gpt_lightning report",
}


def show(results: list[Result] | None) -> None:
    """The ranked table, the means over seeds, and what must be known to compare."""
    from gpt_lightning.rundir.report import as_text, notes, over_seeds, table

    if results is None:  # it was shown while it was watched
        return
    print(as_text(*table(results)))
    columns, rows = over_seeds(results)
    if rows and any("seed" in result.overrides for result in results):
        print(f"\n{as_text(columns, rows)}")
    for note in notes(results):
        print(f"note: {note}")


@command("report", show=show)
def main(cfg: DictConfig) -> list[Result] | None:
    """Compares the runs below one or several folders, best first.

    Raises:
        ConfigError, FileNotFoundError: If there is no run, or output= is not a file of a report.
    """
    from gpt_lightning.rundir.report import read_results

    if cfg.runs is None:
        raise ConfigError("runs= is missing; give a sweep, a folder of runs, or a list of them")
    places = [str(place) for place in (cfg.runs if OmegaConf.is_list(cfg.runs) else [cfg.runs])]
    if not isinstance(cfg.watch, bool):
        raise ConfigError(f"watch={cfg.watch!r} must be true or false")
    check_file(cfg.output)
    title = ", ".join(Path(place).name for place in places)
    while True:
        results = read_results(places)
        if cfg.output is not None:
            write(results, Path(cfg.output).expanduser(), title=title)
        if not cfg.watch:
            return results
        print("\x1b[2J\x1b[H", end="")  # clears the terminal
        show(results)
        if all(result.status in ("finished", "failed") for result in results):
            return None
        time.sleep(WATCH_SECONDS)


def check_file(path: str | None) -> None:
    """Refuse an output= that is no file of a report and would be lost.

    Raises:
        ConfigError: With the endings that there are.
    """
    if path is None:
        return
    file = Path(str(path)).expanduser()
    if file.suffix not in BEGINNINGS:
        raise ConfigError(f"output={path} must end in {', '.join(BEGINNINGS)}")
    if file.is_dir():
        raise ConfigError(f"output={path} is a folder; name a file in it")
    if file.exists() and not file.read_bytes().startswith(BEGINNINGS[file.suffix].encode()):
        raise ConfigError(f"output={path} holds what this command did not write; name another file")


def write(results: list[Result], path: Path, title: str) -> None:
    """Write the report in the format of the file's ending."""
    from gpt_lightning.data.files import atomic_write
    from gpt_lightning.rundir.report import as_csv, as_markdown
    from gpt_lightning.rundir.report_page import as_html

    if path.suffix == ".html":
        text = as_html(results, title)
    else:
        text = as_csv(results) if path.suffix == ".csv" else as_markdown(results)
    with atomic_write(path, text=True) as file:
        file.write(text)


if __name__ == "__main__":
    main()
