"""Makes a function of a configuration a command, for the shell and for Python."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from gpt_lightning.config.command_line import check_flags, check_users, readable, split_arguments
from gpt_lightning.config.composed import composed
from gpt_lightning.config.errors import ConfigError, Refusal, is_user_error, one_line
from gpt_lightning.config.help import choices_of, config_dirs, help_text
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.run_directory import SWEEPS
from gpt_lightning.rundir.summary import LEDGER

FULL_ERROR = "HYDRA_FULL_ERROR"


class CallableModule(types.ModuleType):
    """A module of a command that can be called: `gpt_lightning.train("model=tiny")`.

    The command line needs a module of the name, and Python users expect a function of the same name.
    """

    def __call__(self, *overrides: str) -> Any:
        return self.main.from_python(*overrides)


class Command:
    """A task that takes the composed configuration, run by Hydra.

    Args:
        task: Called once for each job; its result is returned to Python, and shown in the shell.
        config_name: File in conf/ to compose.
        arguments: Rewrites the command line before Hydra reads it.
        show: Prints the result in the shell.
    """

    def __init__(
        self,
        task: Callable[[DictConfig], Any],
        config_name: str,
        *,
        arguments: Callable[[list[str]], list[str]] | None = None,
        show: Callable[[Any], None] | None = None,
    ):
        sys.modules[task.__module__].__class__ = CallableModule
        self.task, self.config_name, self.show = task, config_name, show
        self.arguments = arguments or (lambda given: given)
        self.result: Any = None
        self.failure: Exception | None = None
        self.here = Path()  # where the command was started
        self.full_error: str | None = None  # what the user asked for
        self.in_python = False
        functools.update_wrapper(self, task)
        self.command = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(
            self.job
        )

    def job(self, cfg: DictConfig) -> Any:
        """One job, called by Hydra."""
        set_environment(FULL_ERROR, self.full_error)
        try:
            if missing := OmegaConf.missing_keys(cfg):
                raise MissingMandatoryValue(f"Missing mandatory value: {min(missing)}")
            self.result = self.task(cfg)
            if self.show is not None and not self.in_python:
                self.show(self.result)
            return getattr(self.result, "objective", None)  # for sweepers that optimize
        except Exception as error:
            log_to_files(error)
            if is_user_error(error):
                self.withdraw()
            if HydraConfig.get().mode != RunMode.RUN:
                raise  # hydra/launcher=basic goes on with the other jobs
            self.failure = error  # raised after Hydra has ended, which would add a line of its own
            return None
        except KeyboardInterrupt:  # before the training, which handles signals itself
            self.withdraw()
            raise
        finally:
            os.environ[FULL_ERROR] = "1"

    def withdraw(self) -> None:
        """Remove what Hydra wrote for a run that does not begin."""
        job = HydraConfig.get()
        if job.mode == RunMode.RUN:
            remove_traces(Path(job.runtime.output_dir), job.output_subdir, job.job.name, self.here)
            remove_empty(self.here / job.run.dir, self.here)  # as it was given: a/../b has made a as well

    def __call__(self) -> None:
        """The command in a shell: reads sys.argv, ends with an exit code."""
        logging.raiseExceptions = False  # a log on a full disk is not worth a traceback per line
        here = str(Path.cwd())
        if not {"", here} & set(sys.path):  # `python -m` adds it; the user's own classes are there
            sys.path.append(here)
        try:
            self.run(sys.argv[1:])
            sys.stdout.flush()
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # all is done, and Python cleans up
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of somebody who presses Ctrl-C many times
            raise SystemExit(130) from None  # the exit code of a shell
        except Exception as error:
            self.fail(wrong_choice(error) or error)

    def run(self, given: list[str]) -> None:
        """Compose and call, with errors as exceptions."""
        check_flags(given)
        found, flags, overrides = split_arguments(given)
        if found.help:
            print(help_text(self.config_name, overrides))
            return
        check_users(overrides)
        self.here = Path.cwd()
        sys.argv[1:] = readable(self.arguments([*flags, *overrides]))
        self.full_error = os.environ.get(FULL_ERROR)
        try:
            os.environ[FULL_ERROR] = "1"  # otherwise Hydra prints errors by itself, in several lines
            self.command()
            if self.failure is not None:
                raise self.failure
        except Refusal as refusal:
            raise refusal.error from None
        except Exception:
            withdraw_sweeps(self.here)
            raise
        finally:
            self.failure = None
            set_environment(FULL_ERROR, self.full_error)

    def from_python(self, *overrides: str) -> Any:
        """The command as a function: overrides as in the shell, errors as exceptions, returns its result.

        Raises:
            ConfigError: With the one line that the shell shows.
        """
        if any(text.startswith("-m") or text.startswith("--multirun") for text in overrides):
            raise ConfigError("a sweep is started from a shell; call this once for each run")
        with isolated(self.task.__globals__["__file__"]):
            self.in_python = True
            try:
                self.run(list(overrides))
            except SystemExit as stop:
                raise KeyboardInterrupt from stop
            except Exception as error:
                error = wrong_choice(error) or error
                if is_user_error(error):
                    raise ConfigError(one_line(error, self.keys())) from error
                raise
            finally:
                self.in_python = False
            result, self.result = self.result, None
            return result

    def fail(self, error: Exception) -> NoReturn:
        """End with one line for what a user can mend, with the traceback for everything else."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt):  # OmegaConf fails if it is interrupted in an assignment
                raise SystemExit(130) from None
            cause = cause.__context__
        if not is_user_error(error) or self.full_error:
            raise error
        print(f"error: {one_line(error, self.keys())}", file=sys.stderr)
        raise SystemExit(1) from None

    def keys(self) -> Iterator[str]:
        """All keys of what was chosen, for suggestions; composed only when they are asked for."""
        chosen = [
            text for text in sys.argv[1:] if text.partition("=")[2] in choices_of(text.partition("=")[0])
        ]
        flags = [f"--config-name={self.config_name}", *(f"--config-dir={own}" for own in config_dirs()[1:])]
        with isolated(sys.argv[0]):
            everything: Any = OmegaConf.to_container(composed([*flags, *chosen]))
        level = [("", {key: node for key, node in everything.items() if key != "hydra"})]
        while level:  # keys of few parts first
            pairs = [(f"{prefix}{key}", value) for prefix, node in level for key, value in node.items()]
            yield from (key for key, _ in pairs)
            level = [(f"{key}.", value) for key, value in pairs if isinstance(value, dict)]


def command(config_name: str, **options: Any) -> Callable[[Callable[[DictConfig], Any]], Command]:
    """Decorates a task; options as of `Command`. Its module becomes callable from Python."""
    return lambda task: Command(task, config_name, **options)


@contextmanager
def imports() -> Iterator[None]:
    """For the first imports of torch and Lightning: without garbage collection, as their objects stay.

    That is a quarter of the time of a very short run, by benchmarks/RESULTS.md.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


@contextmanager
def isolated(program: str) -> Iterator[None]:
    """A Hydra program inside another program: what is global to a process comes back afterwards."""
    root, argv, folder = logging.getLogger(), sys.argv, Path.cwd()
    handlers, level = list(root.handlers), root.level
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    variables = dict(os.environ)  # the ranks of a run are none of the next one
    outer, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    sys.argv = [program]
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(folder)
        for name in variables.keys() | os.environ.keys():
            if os.environ.get(name) != variables.get(name):
                set_environment(name, variables.get(name))
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = outer, config
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            handler.close()
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number, action in signals.items():
                signal.signal(number, action)


def set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def wrong_choice(error: Exception) -> ConfigError | None:
    """The group that was given a value where a choice must be, which Hydra does not name."""
    if not isinstance(error, TypeError) and "Config group override must be" not in str(error):
        return None
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        choices = choices_of(key)
        if choices and (value in ("null", "true", "false", "inf", "nan") or not any(map(str.isalpha, value))):
            return ConfigError(f"{argument} is no choice; use {', '.join(choices)}, or one of your own")
    return None


def remove_traces(folder: Path, subfolder: str | None, name: str, here: Path) -> None:
    """Remove the files that Hydra wrote for a run that was refused before it began to train.

    A resumed run has no subfolder for Hydra: its files stay.
    """
    if folder == here or (folder / "summary.json").exists() or (folder / "checkpoints").exists():
        return
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    if subfolder is not None:
        shutil.rmtree(folder / subfolder, ignore_errors=True)
        (folder / f"{name}.log").unlink(missing_ok=True)


def remove_empty(folder: Path, here: Path) -> None:
    """Remove a folder and those above it, below `here`, that are empty."""
    for place in [folder, *(parent for parent in folder.parents if here in parent.parents)]:
        with suppress(OSError):  # not empty
            if place != here:
                place.rmdir()


def withdraw_sweeps(here: Path) -> None:
    """Remove what Hydra wrote, below `here`, for a sweep that was refused before its first job."""
    while SWEEPS:
        folder = SWEEPS.pop()
        if not (folder / LEDGER).exists():
            (folder / "multirun.yaml").unlink(missing_ok=True)
            remove_empty(folder, here)


def log_to_files(error: Exception) -> None:
    """Write the traceback to the log of the run directory."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            details = (type(error), error, error.__traceback__)
            name = __name__
            handler.emit(logging.LogRecord(name, logging.ERROR, __file__, 0, "%s", (error,), details))
