"""A run on two hosts that loses either of them: network namespaces that share the file system."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.comparison import differences
from support.ranks import free_port, torchrun
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.rundir.summary import read_summary

ADDRESSES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}  # of networks that nothing else is connected to
TIMEOUT = 10  # trainer.timeout_seconds
# a host name of its own, which is looked up in a file of its own and leads to 127.0.1.1, as on Debian
ENTER = 'mount --bind "$0" /etc/hosts && hostname "$1" && shift && exec "$@"'


@dataclass
class Host:
    """A network namespace with a host name."""

    name: str
    folder: Path
    started: list[subprocess.Popen[bytes]]

    @property
    def namespace(self) -> str:
        return f"gpt{os.getpid()}{self.name}"

    @property
    def out(self) -> Path:
        return self.folder / f"{self.name}.txt"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the command of docs/scaling.md; its output is that of the last start."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=alpha:29500", "-m", "gpt_lightning.train"]
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", ENTER]
        hosts = str(self.folder / f"{self.name} hosts")
        with self.out.open("wb") as out:
            whole = [*enter, hosts, self.name, *command, *arguments]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}
            self.started.append(
                subprocess.Popen(whole, cwd=self.folder, stdout=out, stderr=out, env=environment)
            )
        return self.started[-1]

    def link(self, state: str) -> None:
        ip("-n", self.namespace, "link", "set", "eth0", state)

    def kill(self) -> None:
        """Every process of the host, the agent of torchrun and the rank, at once."""
        for pid in ip("netns", "pids", self.namespace).split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait(60)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, Host]]:
    """Two hosts that reach each other and nothing else."""
    needed = ("ip", "unshare", "mount", "hostname")
    if os.name != "posix" or os.geteuid() != 0 or not all(map(shutil.which, needed)):
        pytest.skip(f"network namespaces need Linux, root and {', '.join(needed)}")
    made = {name: Host(name, tmp_path, []) for name in ADDRESSES}
    for name in made:
        known = {"localhost": "127.0.0.1", **ADDRESSES, name: "127.0.1.1"}
        lines = "".join(f"{address} {host}\n" for host, address in known.items())
        (tmp_path / f"{name} hosts").write_text(lines)
    try:
        try:
            for host in made.values():
                ip("netns", "add", host.namespace)
            alpha, beta = (host.namespace for host in made.values())
            ip(*f"-n {alpha} link add eth0 type veth peer name eth0 netns {beta}".split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no permission to make network namespaces: {error.stderr}")
        for name, host in made.items():
            ip(*f"-n {host.namespace} addr add {ADDRESSES[name]}/24 dev eth0".split())
            ip(*f"-n {host.namespace} link set lo up".split())
            host.link("up")
        yield made
    finally:
        for host in made.values():
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                ip("netns", "del", host.namespace)


def start(hosts: dict[str, Host], *arguments: str) -> list[subprocess.Popen[bytes]]:
    return [host.start(*arguments) for host in hosts.values()]


def wait_for_checkpoint(run: Path, step: int, processes: list[subprocess.Popen[bytes]]) -> None:
    """Return soon after the checkpoint of a step, or of a later one, is there."""
    end = time.monotonic() + 120
    while read_summary(run).get("steps", 0) < step:
        assert time.monotonic() < end
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.02)


@pytest.mark.slow
def test_run_that_loses_either_host_says_so_and_ends_as_if_it_had_not(
    hosts: dict[str, Host], zygote: Zygote, small_text: Path, tmp_path: Path
) -> None:
    options = [*TINY, "trainer.max_steps=200", "trainer.val_every_steps=50", "trainer.save_every_steps=8"]
    options += [f"data.path={small_text}", "trainer=ddp", "device.devices=1", "trainer.num_nodes=2"]
    options += [f"trainer.timeout_seconds={TIMEOUT}", "logger=none"]
    alpha, beta = hosts.values()
    run, reference = tmp_path / "run", tmp_path / "undisturbed" / "run"
    remedy = f"go on with resume={run}"

    processes = start(hosts, *options, f"hydra.run.dir={run}")
    wait_for_checkpoint(run, 32, processes)
    alpha.kill()
    assert processes[1].wait(120) == 1
    line = f"error: another process of the run ended or cannot be reached; {remedy}"
    assert line in beta.out.read_text().splitlines()

    processes = start(hosts, f"resume={run}")
    wait_for_checkpoint(run, 80, processes)
    beta.link("down")  # as if it had no power: nobody is told that its connections are closed
    beta.kill()
    assert processes[0].wait(120) == 1
    line = f"error: another process of the run did not answer within trainer.timeout_seconds=; {remedy}"
    assert line in alpha.out.read_text().splitlines()
    assert read_summary(run)["steps"] < 200

    beta.link("up")
    for process in start(hosts, f"resume={run}"):
        assert process.wait(120) == 0, alpha.out.read_text()
    (step,) = re.findall(r"resuming from .* at step (\d+)", alpha.out.read_text())
    assert int(step) >= 80
    port, own = free_port(), {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # the same on a single host
    undisturbed = [*options, f"hydra.run.dir={reference}"]
    for process in [zygote.start("train", *undisturbed, **torchrun(rank, port) | own) for rank in (1, 0)]:
        assert process.wait() == 0, process.out.read_text()
    assert differences(run, reference) == []
