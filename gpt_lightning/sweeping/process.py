"""A job of a sweep in a process of its own, forked from one that has imported what a run needs."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gpt_lightning.data.signals import ENDING, signals_wait

PRELOADED = {  # what the jobs of a command import
    "train": [
        "lightning.pytorch",
        "gpt_lightning.config.build",
        "gpt_lightning.training.fit",
        "gpt_lightning.inference.run",
        "torch.utils.tensorboard",
    ],
    "prepare": ["gpt_lightning.config.nodes", "gpt_lightning.data.shards"],
}
# Variables that a job must not take for its own: the rank of a process, and what the command sets for itself
OWN = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
OWN |= {"HYDRA_FULL_ERROR", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"}
PREFIXES = ("MASTER_", "PL_", "TORCHELASTIC_", "SLURM_NTASKS")


class Pool:
    """Starts jobs as `python -m gpt_lightning.COMMAND ARGUMENTS` would, without the seconds of imports."""

    def __init__(self, command: str) -> None:
        self.module = f"gpt_lightning.{command}"
        kind = "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"  # Windows
        self._context: Any = mp.get_context(kind)
        if kind == "forkserver":
            self._context.set_forkserver_preload(PRELOADED[command])
            resource_tracker.ensure_running()  # which lets through the signals that wait when it starts
        self._lock = threading.Lock()  # starting a process looks at the exit codes of the others

    def run(
        self,
        arguments: Sequence[str],
        *,
        variables: Mapping[str, str],
        show: Callable[[str], None],
        started: Callable[[BaseProcess], None],
    ) -> tuple[int, float, str]:
        """Run a job to its end.

        Args:
            arguments: Its command line.
            variables: Of its environment, besides this one's; those of ranks are left out.
            show: Called with each line of its output.
            started: Called with the process when it runs.

        Returns:
            The exit code, negative for a signal; seconds; the last line of its output.
        """
        reader, writer = self._context.Pipe(duplex=False)
        environment = {**job_environment(os.environ), **variables}
        process = self._context.Process(
            target=job, args=(self.module, list(arguments), environment, str(Path.cwd()), writer)
        )
        begun, last = time.monotonic(), ""
        with self._lock, signals_wait():  # a terminal's Ctrl-C would end the process that forks the jobs
            process.start()
        started(process)
        writer.close()
        with os.fdopen(os.dup(reader.fileno()), encoding="utf-8", errors="replace") as stream:
            reader.close()
            for line in stream:
                last = line.strip() or last
                show(line.rstrip("\n"))
        with self._lock:
            process.join()
        return int(process.exitcode), time.monotonic() - begun, last


def job_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process without those that are its own."""
    return {k: v for k, v in variables.items() if k not in OWN and not k.startswith(PREFIXES)}


def job(
    module: str, arguments: list[str], variables: dict[str, str], folder: str, output: Connection
) -> None:
    """Runs in the process of the job."""
    gc.freeze()  # what it was forked with lives as long as it does
    if hasattr(os, "setsid"):
        os.setsid()  # signals of the terminal go to the sweep, which passes them on
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    threading.Thread(target=end_with_sweep, daemon=True).start()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if threads := variables.get("OMP_NUM_THREADS"):  # read by libraries that are loaded already
        import torch

        torch.set_num_threads(int(threads))
    sys.argv = [module, *arguments]  # runpy puts the file in place of the name
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # while it imports
        raise SystemExit(130) from None


def end_with_sweep() -> None:
    """Ask this process to end when that of the sweep has ended, however it did."""
    sweep = mp.parent_process()
    assert sweep is not None
    wait([sweep.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
