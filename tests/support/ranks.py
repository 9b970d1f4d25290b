"""Processes of one run with the environment that torchrun and srun give them."""

from __future__ import annotations

import socket
from typing import Any

from support.zygote import Process, Zygote


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(rank: int, port: int, size: int = 2) -> dict[str, str]:
    """What torchrun sets, with a store that rank 0 serves, as it does without the one of torchrun."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_PORT": port,
    }
    names = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_ADDR": "127.0.0.1"}
    return {**names, **{key: str(value) for key, value in values.items()}}


def srun(rank: int, port: int, size: int = 2) -> dict[str, str]:
    values = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": size, "NNODES": 1, "JOB_ID": port}
    values |= {"NTASKS_PER_NODE": size, "STEP_ID": 0}
    slurm = {f"SLURM_{key}": str(value) for key, value in values.items()}
    return {**slurm, "SLURM_JOB_NAME": "train", "MASTER_PORT": str(port), "SLURM_NODELIST": "127.0.0.1"}


STARTERS = {"torchrun": torchrun, "srun": srun}


def start(
    zygote: Zygote, options: list[str], starter: str = "torchrun", size: int = 2, **more: Any
) -> list[Process]:
    """The processes of a run in the order of their ranks; the last one is started first."""
    port = free_port()
    started = [
        zygote.start("train", *options, **STARTERS[starter](rank, port, size), **more)
        for rank in reversed(range(size))
    ]
    return started[::-1]
