"""TensorBoard over the runs below folders, named by their directories and their overrides."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from tensorboard import program

from gpt_lightning.rundir.directory import leads_out

REFRESH_SECONDS = 2


def serve(runs: Callable[[], Mapping[str, Path]], port: int) -> NoReturn:
    """Show runs, and those that begin meanwhile, until Ctrl-C or SIGTERM.

    TensorBoard names a run by the path of its event files, which would end in `/tensorboard`: it is given a
    temporary folder with a link to them for each run.

    Args:
        runs: The folders of event files by the names to show.
        port: Of this machine alone; 0 takes any free one.

    Raises:
        OSError: If the port is taken, or the file system has no links.
    """
    logging.disable(logging.INFO)  # a line for each request
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which removes the folder
    with tempfile.TemporaryDirectory(prefix="tensorboard-") as folder:
        board = program.TensorBoard()
        board.configure(logdir=folder, host="127.0.0.1", port=port, reload_interval=REFRESH_SECONDS)
        link(runs(), Path(folder))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # how it loads files
                address = board.launch()
        except program.TensorBoardServerException as error:
            raise OSError(f"{error.msg}; choose another port, or 0 for any free one") from error
        print(f"TensorBoard: {address}#custom_scalars (Ctrl-C ends it)", flush=True)  # losses first
        while True:
            time.sleep(REFRESH_SECONDS)
            link(runs(), Path(folder))


def link(runs: Mapping[str, Path], folder: Path) -> None:
    """Add a link for each run that has none; arguments as in `serve`."""
    for name, events in runs.items():
        path = folder / name
        if leads_out(path.parent, folder):  # a run inside another one, whose link this would follow
            path = folder / name.replace("/", "_")
        if not path.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(events, target_is_directory=True)
