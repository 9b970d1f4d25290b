"""Turns errors into one line for the user, with the key, the value and the remedy."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError


class ConfigError(ValueError):
    """A wrong value in the configuration; the text is the one line that the user reads."""


class Refusal(BaseException):
    """Carries an error through code that would swallow it."""

    def __init__(self, error: Exception):
        self.error = error


# what helps where the operating system refuses
REMEDIES = {
    errno.ENOSPC: "make room on the disk; a run then goes on with resume=",
    errno.EDQUOT: "make room on the disk; a run then goes on with resume=",
    errno.EACCES: "give the right to it, or name another place",
    errno.EPERM: "give the right to it, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENOENT: "it is needed and not there; was it deleted?",
    errno.ENOTDIR: "name a place below a folder",
    errno.EEXIST: "name a place below a folder",
    errno.EISDIR: "name a file",
}
EXTRAS = {"datasets": "hf", "transformers": "hf", "huggingface_hub": "hf", "pyarrow": "hf"}
EXTRAS |= {"sacrebleu": "eval"} | dict.fromkeys(("fastapi", "gradio", "uvicorn"), "demo")
EXTRAS |= {name: name for name in ("wandb", "mlflow", "optuna")}
SYNONYMS = {  # what other trainers call a key
    "learning_rate": "lr",
    "min_lr": "min_lr_ratio",
    "decay_lr": "scheduler",
    "lr_decay_iters": "scheduler.max_steps",
    "eval_interval": "val_every_steps",
    "eval_iters": "val_batches",
    "log_interval": "log_every_steps",
    "start": "prompt",
    "epochs": "max_epochs",
    "steps": "max_steps",
    "max_iters": "max_steps",
    "warmup": "warmup_steps",
    "gradient_clip_val": "clip_norm",
    "grad_clip": "clip_norm",
    "dtype": "precision",
    "accumulate_grad_batches": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
}


def is_user_error(error: BaseException) -> bool:
    """Whether the user can correct the error, so that one line without a traceback is enough."""
    kinds: tuple[type[BaseException], ...] = (ValueError, OSError, ModuleNotFoundError)
    kinds += (OmegaConfBaseException, HydraException, YAMLError)
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # only if the run came that far
    if lightning is not None:
        kinds += (lightning.MisconfigurationException,)
    return isinstance(error, kinds) or lacks_memory(error)


def lacks_memory(error: BaseException) -> bool:
    """Whether torch could not get the memory that it asked for."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and re.search("out of memory|can't allocate memory", str(error)) is not None
    )


def one_line(error: BaseException, keys: Iterable[str] = ()) -> str:
    """The text of an error for the user; `keys` are those of the configuration, for suggestions."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        extra = EXTRAS.get(package)
        remedy = f"pip install 'gpt-lightning[{extra}]'" if extra else f"pip install {package}"
        return f"the package {package} is not installed; {remedy}"
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        close = suggestion(cause.full_key, keys)
        remedy = f"did you mean {close}?" if close else "--cfg job shows all keys"
        return f"there is no key {cause.full_key}; {remedy}"
    text = str(error).strip()
    if isinstance(cause, OSError) and text.startswith("Unable to configure handler"):  # the log of a run
        return one_line(cause)
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}= must be given"
    if found := re.search(
        r"Could not find '(\S+)/(\S+)'\s+Available options in '\S+':((\s+[^\s:]+)+)\s+Config", text
    ):
        group, name, options = found[1], found[2], found[3].split()
        near = difflib.get_close_matches(name, options, 1)
        remedy = f"did you mean {near[0]}? " if near else ""
        return f"{group}={name} is no choice; {remedy}there are {', '.join(options)}"
    if text.startswith("Error merging override"):
        reason = one_line(cause) if cause else "it does not fit"
        return f"{text}: {reason}; --cfg job shows what belongs there"
    if lacks_memory(error):
        return f"out of memory ({text.splitlines()[0] if text else 'Python'}); use a smaller model"
    if text.startswith("Caught ") and "Traceback" in text:  # a loader's worker sends its whole traceback
        text = text.splitlines()[-1]
    if isinstance(error, OSError) and error.errno in REMEDIES and text.startswith("[Errno"):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    return re.sub(r"\s*\n\s*", " ", text) or type(error).__name__


def suggestion(key: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant: in the same group if possible, else one with this last part."""
    group, _, name = key.rpartition(".")
    name = SYNONYMS.get(name, name)
    everything = sorted(keys, key=lambda one: not one.startswith("trainer."))  # before scheduler.max_steps
    if "." in name and name in everything:
        return name
    same_group = [one for one in everything if one.rpartition(".")[0] == group]
    for candidates, similarity in (
        (same_group, 0.75),
        (everything, 1.0),
        (same_group, 0.6),
        (everything, 0.8),
    ):
        names = [one.rpartition(".")[2] for one in candidates]
        if close := difflib.get_close_matches(name, names, 1, similarity):
            return candidates[names.index(close[0])]
    return None


def _head(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def check_output(path: str | None, beginning: bytes, *inputs: str | None) -> None:
    """Refuse an output= that cannot be written or that would replace something, before there is a result.

    Args:
        path: The value of output=.
        beginning: How files begin that the command writes; another one is not replaced.
        inputs: Files that the command reads.

    Raises:
        ConfigError: If it is a folder, an input, or holds what the command did not write.
        OSError: If a file cannot be made there.
    """
    if path is None:
        return
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"output={path} is a folder; name a file in it")
    if file.exists() and any(Path(name).expanduser().samefile(file) for name in inputs if name):
        raise ConfigError(f"output={path} is what this command reads; name another file")
    if file.exists() and not (file.is_file() and _head(file, len(beginning)) in (b"", beginning)):
        raise ConfigError(f"output={path} holds what this command did not write; name another file")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    problem = errno.ENOTDIR if not above.is_dir() else 0 if os.access(above, os.W_OK) else errno.EACCES
    if problem:
        raise OSError(problem, os.strerror(problem), str(above))
