"""A process that has everything imported and forks a run per request: a start costs a second, not six.

The runs are real processes: they are killed, signalled and waited for like any other.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import importlib.util
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any


class Process:
    """A run that a zygote started; its output is in `out`."""

    def __init__(self, zygote: Zygote, pid: int, out: Path):
        self.zygote, self.pid, self.out = zygote, pid, out

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """The exit code, minus the signal's number if one ended it; None while it runs."""
        return self.zygote.ask(poll=self.pid)["code"]

    def wait(self, timeout: float = 120) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.out.read_text())
            time.sleep(0.02)
        return code

    def wait_for(self, condition: Callable[[], object], timeout: float = 120) -> None:
        """Return as soon as the condition holds; fail if the run ends before."""
        end = time.monotonic() + timeout
        while not condition():
            if self.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the run ended too early:\n{self.out.read_text()}")
            time.sleep(0.005)

    def end_when(self, condition: Callable[[], object], number: int = signal.SIGKILL) -> int:
        """Send a signal as soon as the condition holds; the exit code."""
        self.wait_for(condition)
        self.kill(number)
        return self.wait()


class Zygote:
    """The client's side. Use as a context manager; `folder` is for output."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0

    def __enter__(self) -> Zygote:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # one thread: a fork copies no other
        command = [sys.executable, __file__]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.close()
        self.server.wait(60)
        self.server.stdout.close()

    def ask(self, **request: Any) -> Any:
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        name: str,
        *arguments: str,
        cwd: Path | None = None,
        slow: dict[str, float] | None = None,
        file_limit: int | None = None,
        errors: Path | None = None,
        spares: int = 0,
        **environment: str,
    ) -> Process:
        """Start an entry point.

        Args:
            name: Of the entry point; then its command line.
            cwd: Working directory; an empty one if not given.
            slow: Functions that take some seconds more in this process, as `module:function`.
            file_limit: Bytes that a file of the process may have.
            errors: File of its standard error; with its output if not given.
            spares: Processes with everything imported that become the first ones it starts of this package:
                the process that forks the jobs of a sweep, or further ranks.
            environment: Added to the variables of this process.
        """
        out = self.folder / f"{self.started}.txt"
        self.started += 1
        out.touch()
        answer = self.ask(
            name=name,
            argv=arguments,
            env=environment,
            cwd=str(cwd or self.folder),
            out=str(out),
            errors=str(errors or out),
            spares=spares,
            slow=slow or {},
            file_limit=file_limit,
        )
        return Process(self, answer["pid"], out)

    def run(self, name: str, *arguments: str, **options: Any) -> tuple[int, str]:
        """Exit code and output of an entry point."""
        process = self.start(name, *arguments, **options)
        return process.wait(), process.out.read_text()


def _slow_down(place: str, seconds: float) -> None:
    module, names = place.split(":")
    *owners, last = names.split(".")
    owner = importlib.import_module(module)
    for name in owners:
        owner = getattr(owner, name)
    function = getattr(owner, last)

    @functools.wraps(function)
    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, last, slowly)


class _Spares:
    """Processes that were forked before a command began, and become the Python processes that it starts."""

    def __init__(self, count: int):
        self.waiting = [self._fork() for _ in range(count)]
        self.spawn, self.execute = util.spawnv_passfds, subprocess.Popen._execute_child  # type: ignore[attr-defined]
        util.spawnv_passfds = self._forkserver
        subprocess.Popen._execute_child = lambda *args: self._popen(*args)  # type: ignore[attr-defined]

    def _fork(self) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # Ctrl-C is for all of the process group
        pid = os.fork()
        if pid == 0:
            ours.close()
            for _, others in getattr(self, "waiting", ()):
                others.close()
            _become(theirs)
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid, ours

    def _use(self, fds: dict[int, int], env: Any, cwd: Any, **what: Any) -> int:
        """Turn the first one into a process whose descriptors, by their numbers, are those of this one."""
        pid, connection = self.waiting.pop(0)
        mask = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
        what |= {"fds": list(fds), "mask": mask, "env": dict(os.environ if env is None else env)}
        what |= {"cwd": str(cwd or Path.cwd()), "path": sys.path}
        with connection:
            socket.send_fds(connection, [b"."], list(fds.values()))
            connection.sendall(json.dumps(what).encode())
        return pid

    def _forkserver(self, path: Any, args: Any, passfds: Any) -> Any:
        if not self.waiting or "multiprocessing.forkserver" not in args[-1]:
            return self.spawn(path, args, passfds)
        return self._use({fd: fd for fd in (0, 1, 2, *passfds)}, None, None, code=args[-1])

    def _popen(self, process: Any, args: Any, *rest: Any) -> None:
        cwd, env, pipes, session = rest[4], rest[5], rest[9:15], rest[20]
        own = list(args[:2]) == [sys.executable, "-m"] and args[2].startswith("gpt_lightning.")
        if not (self.waiting and own):
            self.execute(process, args, *rest)
            return
        ends = (pipes[0], pipes[3], pipes[5])
        fds = {number: number if end == -1 else end for number, end in enumerate(ends)}
        process.pid = self._use(fds, env, cwd, module=args[2], argv=list(args[3:]), session=session)
        process._child_created = True
        process._close_pipe_fds(*pipes)


def _become(connection: socket.socket) -> None:
    """Wait for a request in a process that was forked, and be what it asks for."""
    _, fds, _, _ = socket.recv_fds(connection, 1, 16)
    if not fds:  # the command has ended, or needs no more processes
        os._exit(0)
    with connection, connection.makefile("rb") as stream:
        request = json.loads(stream.read())
    held = [fcntl.fcntl(fd, fcntl.F_DUPFD, 512) for fd in fds]
    for fd, source, number in zip(fds, held, request["fds"], strict=True):
        if fd not in request["fds"]:
            os.close(fd)
        os.dup2(source, number)
    for fd in held:
        os.close(fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # which forgets those that came for the process before
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["mask"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:] = request["path"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    del sys.modules["gpt_lightning.train"]  # which an interpreter would not have imported
    if "code" in request:
        sys.argv = ["-c"]
        exec(request["code"], sys.modules["__main__"].__dict__)
    else:
        if request["session"]:
            os.setsid()
        sys.argv = ["", *request["argv"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    sys.exit()


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(request["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    out, errors = (os.open(request[name], flags) for name in ("out", "errors"))
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (errors, 2)):
        os.dup2(source, target)
    os.environ.update(request["env"])
    if request["spares"]:
        _Spares(request["spares"])
    for place, seconds in request["slow"].items():
        _slow_down(place, seconds)
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    module = f"gpt_lightning.{request['name']}"
    sys.argv = [importlib.import_module(module).__file__ or "", *request["argv"]]
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(module)  # further ranks start with -m
    importlib.import_module(module).main()


def _serve() -> None:
    import lightning.pytorch as pl
    import matplotlib.backends.backend_agg
    import matplotlib.figure
    import torch.utils.tensorboard

    import gpt_lightning.config.build
    import gpt_lightning.training.fit  # noqa: F401
    from gpt_lightning import train

    assert pl
    assert matplotlib
    assert torch
    assert train
    gc.freeze()  # no child's garbage collector looks at, and thereby copies, what was imported
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if (pid := request.get("poll")) is not None:
            with contextlib.suppress(ChildProcessError):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": codes.get(pid)}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
                return
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
