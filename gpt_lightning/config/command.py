"""Where the configuration is, how it becomes objects, and how a user's mistake ends."""

from __future__ import annotations

import ctypes
import difflib
import errno
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import hydra._internal.utils
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from gpt_lightning.config.arguments import check_arguments

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).resolve().parents[1]
# a checkout has conf/ and input.txt beside the package, a wheel carries them inside it
ROOT = PACKAGE.parent if (PACKAGE.parent / "conf" / "train.yaml").exists() else PACKAGE
CONF = ROOT / "conf"


def detect_device() -> str:
    """`cuda`, `mps` or `cpu`, without torch where possible: importing it takes longer than all of Hydra."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    built = runpy.run_path(str(version)) if version and version.exists() else {}
    if built.get("hip"):  # AMD's GPUs, which torch calls cuda; only it knows how to find them
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if built.get("cuda"):
        try:
            driver = ctypes.CDLL("libcuda.so.1")
            count = ctypes.c_int(0)
            if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value:
                return "cuda"
        except OSError:
            pass  # no driver
    return "mps" if platform.system() == "Darwin" and platform.machine() == "arm64" else "cpu"


def user_cache() -> str:
    """Folder for what can be computed again, as the XDG base directory specification has it."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_lightning")


PLACES = ("paths.outputs", "hydra.run.dir", "hydra.sweep.dir")  # where a run goes

OmegaConf.register_new_resolver("detect_device", detect_device, replace=True)
OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)
OmegaConf.register_new_resolver("bundled", lambda name: str(ROOT / name), replace=True)


class ConfigError(ValueError):
    """A wrong value in the configuration; the text is the one line that the user reads."""


def explicit(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The values below `group` that the command line sets one by one, as in model.dropout=0.1."""
    keys = (override.split("=", 1)[0].lstrip("+") for override in HydraConfig.get().overrides.task)
    names = [key.removeprefix(f"{group}.") for key in keys if key.startswith(f"{group}.")]
    return {name: cfg[group][name] for name in names if name in cfg[group]}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in dicts, lists and scalars."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return cast(dict[str, Any], container)


def full_key(node: Any) -> str:
    """Where a node is in the configuration."""
    return str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""


def inspect_node(node: Any, key: str = "") -> None:
    """Import the class that a node of the configuration names, and see that it takes what it is given.

    Raises:
        ConfigError, ValueError: If there is no class, or it does not; names the key that the user set.
    """
    key = key or full_key(node)
    if not OmegaConf.is_dict(node):
        raise ConfigError(f"{key}={node} must be keys with values, of which _target_ names a class")
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key}._target_={node.get('_target_')} must be the name of a class")
    try:
        target = hydra.utils.get_object(node._target_)
    except Exception as error:  # whatever goes wrong in the user's own module
        raise ConfigError(f"{key}: {one_line(error)}; correct {key}._target_={node._target_}") from error
    if not callable(target):
        raise ConfigError(f"{key}._target_={node._target_} is no class and no function")
    check_arguments(target, node)
    for name, child in node.items():
        if OmegaConf.is_dict(child) and "_target_" in child:
            inspect_node(child, f"{key}.{name}")


def build(node: Any, key: str = "", /, **kwargs: Any) -> Any:
    """Instantiate a node of the configuration; errors of the class itself come out as they are.

    Args:
        node: With a _target_.
        key: Its name, where it may be no node at all, but a value of the user's.
        kwargs: Further arguments.
    """
    inspect_node(node, key)
    try:
        return hydra.utils.instantiate(node, **kwargs)
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError):
            text = one_line(cause or error)
            raise ConfigError(f"{full_key(node)} cannot be made of its values: {text}") from error
        raise cause from error


def _user_errors() -> tuple[type[BaseException], ...]:
    errors: tuple[type[BaseException], ...] = (
        ValueError,
        OSError,
        ModuleNotFoundError,
        OmegaConfBaseException,
        HydraException,
    )
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # only if the run came that far
    if lightning is not None:
        errors += (lightning.MisconfigurationException,)
    return errors


def lacks_memory(error: BaseException) -> bool:
    """Whether torch could not get the memory that it asked for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("out of memory|can't allocate memory", str(error)) is not None
    )


# what helps where the system refuses
REMEDIES = {
    errno.ENOSPC: "make room on the disk, then go on with resume=",
    errno.EDQUOT: "make room on the disk, then go on with resume=",
    errno.EACCES: "give the right to it, or name another place",
    errno.EPERM: "give the right to it, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENOENT: "it is needed and not there; was it deleted?",
    errno.ENOTDIR: "name a place below a folder",
    errno.EEXIST: "name a place below a folder",
    errno.EISDIR: "name a file",
}


def one_line(error: BaseException) -> str:
    """What a user reads of an error that is theirs to mend."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = {"datasets": "hf", "transformers": "hf", "huggingface_hub": "hf"}
        extra |= {"sacrebleu": "eval", **dict.fromkeys(("fastapi", "gradio", "uvicorn"), "demo")}
        package = error.name.split(".")[0]
        name = extra.get(package, package if package in ("wandb", "mlflow") else None)
        remedy = f"pip install 'gpt-lightning[{name}]'" if name else f"pip install {package}"
        return f"the package {package} is not installed; {remedy}"
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        close = difflib.get_close_matches(str(cause.key), map(str, cause.parent_node or ()), 1)
        return f"there is no key {cause.full_key}; " + (
            f"did you mean {close[0]}?" if close else "--cfg job shows all keys"
        )
    text = str(error).strip()
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}= must be given"
    if text.startswith("Error merging override"):
        return (
            f"{text}: {one_line(cause) if cause else 'it does not fit'}; --cfg job shows what belongs there"
        )
    if lacks_memory(error):
        return f"out of memory ({text.splitlines()[0] if text else 'Python'}); use a smaller model"
    if text.startswith("Caught ") and "Traceback" in text:  # a loader's worker sends all of its traceback
        text = text.splitlines()[-1]
    if isinstance(error, OSError) and error.errno in REMEDIES and text.startswith("[Errno"):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    return re.sub(r"\s*\n\s*", " ", text) or type(error).__name__


def check_output(path: str | None) -> None:
    """Refuse an output= that cannot be written, before there is something to write.

    Raises:
        ConfigError: If it is a folder.
        OSError: If a file cannot be made there.
    """
    if path is None:
        return
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"output={path} is a folder; name a file in it")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    problem = errno.ENOTDIR if not above.is_dir() else 0 if os.access(above, os.W_OK) else errno.EACCES
    if problem:
        raise OSError(problem, os.strerror(problem), str(above))


def entry_point(
    config_name: str, *, arguments: Callable[[list[str]], list[str]] | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Make a function of a configuration a command: Hydra in front, one line for a user's mistake behind.

    Args:
        config_name: File in conf/ to compose.
        arguments: Rewrites the command line before Hydra reads it.
    """

    failed: list[str] = []  # jobs of a sweep whose errors were told

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(task)
        def guarded(cfg: DictConfig) -> Any:
            try:
                if missing := OmegaConf.missing_keys(cfg):
                    raise MissingMandatoryValue(f"Missing mandatory value: {min(missing)}")
                return task(cfg)
            except Exception as error:
                _to_log_files(error)
                job = HydraConfig.get()
                if job.mode != RunMode.MULTIRUN:
                    _fail(error)  # here, because outside, Hydra adds a line of its own
                if _tells(error):
                    print(f"error: {one_line(error)}; job {job.job.num} of the sweep fails", file=sys.stderr)
                    failed.append(str(job.job.num))
                raise  # the launcher goes on with the other jobs

        command = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)

        @functools.wraps(task)
        def main() -> Any:
            failed.clear()
            logging.raiseExceptions = False  # a log on a full disk is not worth a traceback per line
            hydra._internal.utils.run_and_report = lambda func: func()  # which prints several lines
            try:
                if arguments is not None:
                    sys.argv[1:] = arguments(sys.argv[1:])
                sys.argv[1:] = readable(sys.argv[1:])
                return command()
            except KeyboardInterrupt:
                raise SystemExit(130) from None  # as a shell has it
            except Exception as error:
                if failed and _tells(error):
                    jobs = f"job{'s' * (len(failed) > 1)} {', '.join(failed)}"
                    error = ConfigError(f"{jobs} of the sweep failed; the reasons are above")
                _fail(_wrong_choice(error) or error)

        return main

    return decorate


def _wrong_choice(error: Exception) -> ConfigError | None:
    """The group that was given a value where a choice must be, which Hydra does not name."""
    if not isinstance(error, TypeError) and "Config group override must be" not in str(error):
        return None
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        choices = sorted(path.stem for path in (CONF / key).glob("*.yaml") if path.stem[0] != "_")
        if choices and re.fullmatch(r"null|true|false|inf|nan|[^a-zA-Z]*", value):
            return ConfigError(f"{argument} is no choice; use {', '.join(choices)}, or one of your own")
    return None


def verbatim(*keys: str) -> Callable[[list[str]], list[str]]:
    """For `entry_point`: the values of these keys are text as it stands, not Hydra's language of values.

    Only null, and what is one text in single quotes already, is left to it.
    """

    def quote(argument: str) -> str:
        key, _, value = argument.partition("=")
        if key not in keys or value == "null" or re.fullmatch(r"'(\\.|[^'\\])*'", value, re.DOTALL):
            return argument
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # not an interpolation
        return f"{key}={_quoted(value)}"

    return lambda arguments: [quote(argument) for argument in arguments]


def _quoted(text: str) -> str:
    # within Hydra's quotes, backslashes count only before a quote
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (m[2] and r"\'"), text)
    return f"'{escaped}'"


def readable(arguments: list[str]) -> list[str]:
    """The command line with quotes around plain text that Hydra's language of values lacks, such as ~/é.txt.

    What begins as a list, keys or a quoted text, and in a sweep what may be several values, stays as it is.
    """
    parser = OverridesParser.create()
    sweeps = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments))

    def reads(argument: str) -> bool:
        try:
            parser.parse_override(argument)
        except HydraException:
            return False
        return True

    def quote(argument: str) -> str:
        key, _, value = argument.partition("=")
        several = sweeps and "," in value
        if not value or key.startswith("-") or value[0] in "[{'\"" or several or reads(argument):
            return argument
        if key in PLACES and value.startswith("~/"):  # Hydra makes these folders
            value = str(Path(value).expanduser())
        quoted = f"{key}={_quoted(value)}"
        return quoted if reads(quoted) else argument

    return [quote(argument) for argument in arguments]


def unquoted(value: str) -> str:
    """What Hydra takes for the text of a value, for code that needs it before Hydra."""
    try:
        text = OverridesParser.create().parse_override(f"key={value}").value()
    except HydraException:  # Hydra will say so
        return value
    return text if isinstance(text, str) else value


def _tells(error: Exception) -> bool:
    """Whether one line says it all: of what a user can mend, unless the traceback is asked for."""
    users = isinstance(error, _user_errors()) or lacks_memory(error)
    return users and not os.environ.get("HYDRA_FULL_ERROR")


def _fail(error: Exception) -> NoReturn:
    """End with one line for what a user can mend, with the traceback for everything else."""
    if not _tells(error):
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    raise SystemExit(1) from None


def _to_log_files(error: Exception) -> None:
    """The traceback is for whoever looks into the run directory."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            record = log.makeRecord(
                log.name,
                logging.ERROR,
                __file__,
                0,
                "%s",
                (error,),
                (type(error), error, error.__traceback__),
            )
            handler.emit(record)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    packages = ("gpt-lightning", "torch", "lightning", "hydra-core", "omegaconf", "tiktoken", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Commit of the checkout that the package runs from, with a + where files differ from it."""
    if ROOT == PACKAGE:
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
