"""The processes of one run: which is the first, how the others join it, and how many there must be."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from gpt_lightning.config.command_line import go_to, value_of, verbatim
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.parts import device_count

OTHER_RANK = "hydra.output_subdir=null"  # in the command line of a process that the first rank started
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # not 0 in all processes of a run but one


def is_first_rank() -> bool:
    """Whether this process is the first of those that train a run, by the variables of the environment."""
    return all(os.environ.get(rank, "0") == "0" for rank in RANKS)


def arguments_of_other_rank(arguments: list[str]) -> list[str]:
    """The command line of a process that is not the first one of its run: it joins the run of the first one.

    Lightning starts such a process with the command line of the first one. One that torchrun or srun started
    waits for it, so that all agree on the run directory and on what is resumed.

    Raises:
        SystemExit: If there is nothing to do.
    """
    if OTHER_RANK not in arguments:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported; see `QUIET`
        from gpt_lightning.training.processes import TIMEOUT, await_start, starter

        _check_srun()
        if (place := starter()) is None:
            return arguments
        limit = value_of(arguments, "trainer.timeout_seconds") or ""
        start = await_start(place, float(limit) if limit.isdecimal() else TIMEOUT)
        if start is None:
            raise SystemExit(0)
        go_to(start["cwd"])
        arguments = start["arguments"]
    return [*arguments, "hydra/job_logging=rank"]


def tell_other_ranks(folder: Path | None, timeout: float) -> None:
    """Let the processes that torchrun or srun started join the run in a folder; None ends them."""
    if is_first_rank() and os.environ.keys() & {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"}:
        from gpt_lightning.training.processes import tell_start

        place = verbatim("hydra.run.dir")([f"hydra.run.dir={folder}"])
        arguments = [*sys.argv[1:], *place, OTHER_RANK]
        start = {"arguments": arguments, "cwd": str(Path.cwd())}
        tell_start(None if folder is None else start, timeout)


def check_processes(cfg: DictConfig) -> None:
    """Refuse a number of started processes that is not the one that the configuration asks for.

    Raises:
        ConfigError: With the values that fit.
    """
    _check_srun()
    asked, environment = device_count(cfg), os.environ
    what = f"device.devices={cfg.device.devices} trainer.num_nodes={cfg.trainer.num_nodes}"
    variable = "WORLD_SIZE" if "WORLD_SIZE" in environment or not _srun_used() else "SLURM_NTASKS"
    size = environment.get(variable)
    if size is None or not size.isdecimal():
        if cfg.trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={cfg.trainer.num_nodes}: nothing has started processes on other "
                "machines; start the command with torchrun or srun on each of them"
            )
    elif int(size) != asked:
        local = environment.get("LOCAL_WORLD_SIZE", "")
        nodes = environment.get("SLURM_NNODES", "1") if variable == "SLURM_NTASKS" else ""
        each = int(local) if local.isdecimal() else int(size) // int(nodes or 1)
        raise ConfigError(
            f"{what} is {asked} process{'es' * (asked > 1)}, but {variable}={size} in the environment: "
            f"set device.devices={each} trainer.num_nodes={int(size) // each}, or start as many"
        )


def _srun_used() -> bool:
    """Whether srun started this process, by the rule of Lightning."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _check_srun() -> None:
    """Refuse tasks that SLURM may spread over the machines as it likes, which Lightning does not support."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if _srun_used() and tasks != "1" and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(f"SLURM_NTASKS={tasks}: give srun --ntasks-per-node= instead of --ntasks=")


def refuse_several_sweeps() -> None:
    """Refuse a sweep that torchrun or srun starts several times; a script of SLURM starts it once.

    Raises:
        ConfigError: With the variable that says so.
    """
    in_step = _srun_used() and "SLURM_STEP_ID" in os.environ
    for variable, used in {"WORLD_SIZE": True, "SLURM_NTASKS": in_step}.items():
        if used and (size := os.environ.get(variable, "1")) != "1":
            raise ConfigError(
                f"{variable}={size} in the environment: each of these processes would start the whole sweep; "
                "start it once, without torchrun or srun, and its jobs with sweep.jobs= and device.devices="
            )
