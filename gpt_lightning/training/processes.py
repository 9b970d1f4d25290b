"""How the processes of a run find each other, whether Lightning, torchrun or SLURM started them."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch.distributed import DistError, Store, TCPStore

log = logging.getLogger(__name__)

TIMEOUT = 100.0  # seconds to wait for other processes where trainer.timeout_seconds is not known yet
SILENCE = 5.0  # seconds until a process says that it waits
START = "gpt_lightning/start"  # keys of the store
ARRIVED = "gpt_lightning/arrived"
_stores: list[Store] = []  # the first process serves them to the others as long as it lives


def starter() -> ClusterEnvironment | None:
    """What started several processes for this run: torchrun or srun; None if a single one was started."""
    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect() and (found := kind()).world_size() > 1:
            return found
    return None


def open_store(place: ClusterEnvironment, timeout: float) -> Store:
    """The key-value store of all processes; the first one serves it unless torchrun does.

    Raises:
        TimeoutError: If nobody serves it.
    """
    host, port, rank = place.main_address, place.main_port, place.global_rank()
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _wait_until(lambda: _listens(host, port), lambda: f"rank 0 at {host}:{port}", timeout)
    store = TCPStore(
        host,
        port,
        place.world_size(),
        is_master=serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,  # torch then uses the same server for its own store
    )
    _stores.append(store)
    return store


def meet(place: ClusterEnvironment, timeout: float) -> None:
    """Wait until every process is here.

    Raises:
        TimeoutError: If one is missing; says how many.
    """
    store, size = open_store(place, timeout), place.world_size()
    store.add(ARRIVED, 1)
    _wait_until(
        lambda: store.add(ARRIVED, 0) >= size,
        lambda: f"{size - store.add(ARRIVED, 0)} of {size} processes",
        timeout,
    )


def tell_start(start: dict[str, Any] | None, timeout: float) -> None:
    """Tell the other processes, if torchrun or srun started them, what `await_start` returns to them.

    Called by the first one; with None, there is nothing to do, and they are awaited.
    """
    if (place := starter()) is None or place.global_rank() > 0:
        return
    open_store(place, timeout).set(START, json.dumps(start))
    if start is None:
        meet(place, timeout)


def await_start(place: ClusterEnvironment, timeout: float) -> dict[str, Any] | None:
    """What the first process tells with `tell_start`.

    Raises:
        TimeoutError, ConnectionError: If it tells nothing or ends before.
    """
    try:
        store = open_store(place, timeout)
        _wait_until(lambda: store.check([START]), lambda: "rank 0", timeout)
        start: dict[str, Any] | None = json.loads(store.get(START))
        if start is None:
            meet(place, timeout)
        return start
    except DistError as error:
        raise ConnectionError("rank 0 ended before the training began; it says why") from error


def _wait_until(condition: Callable[[], bool], missing: Callable[[], str], timeout: float) -> None:
    begun, told = time.monotonic(), False
    while not condition():
        waited = time.monotonic() - begun
        if waited > timeout:
            raise TimeoutError(
                f"waited {timeout:.0f} s for {missing()}; were all of them started, and do they reach each "
                "other? trainer.timeout_seconds= waits longer"
            )
        if waited > SILENCE and not told:
            log.warning("waiting for %s", missing())
            told = True
        time.sleep(0.1)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=2).close()
        return True
    except OSError:
        return False
