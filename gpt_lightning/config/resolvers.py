"""Where conf/ is, and the resolvers that its YAML files use."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import runpy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.recorded import flat, is_harmless

PACKAGE = Path(__file__).resolve().parents[1]
# a checkout has conf/ and input.txt beside the package, a wheel carries them inside it
ROOT = PACKAGE.parent if (PACKAGE.parent / "conf" / "train.yaml").exists() else PACKAGE
CONF = ROOT / "conf"


def detect_device() -> str:
    """`cuda`, `mps` or `cpu`, without importing torch where possible: that takes longer than all of Hydra."""
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    built = runpy.run_path(str(version)) if version and version.exists() else {}
    if built.get("hip"):  # AMD's GPUs, which torch calls cuda, are found by torch alone
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
    """Folder for files that can be computed again, by the XDG base directory specification."""
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_lightning")


def recommended(key: str, default: Any, *, _root_: DictConfig) -> Any:
    """What the chosen model recommends for a key of another group, or the default.

    `optimizer.lr: ${recommended:lr,1e-3}` leaves the choice with whoever sets optimizer.lr: a model's size
    recommends a value, it never overwrites one.
    """
    value = OmegaConf.select(_root_, f"model.recommended.{key}")
    return default if value is None else value


def default_optimizer(*, _root_: DictConfig) -> str:
    """`muon` on a CPU for the models that benchmarks/RESULTS.md measures with it, else `adamw`."""
    device = _root_.get("device") or detect_device()  # the root has the choices that are known by then
    return "muon" if _root_.get("model") in ("rotary_tiny", "modern_tiny") and device == "cpu" else "adamw"


def sweep_digest(*also: str, _root_: DictConfig) -> str:
    """Identifies what the jobs of a sweep have in common: the same sweep finds its directory again.

    Keys below `hydra` and `sweep` count only if they are among `also`.
    """
    values = flat(_root_).items()
    common = {k: v for k, v in values if not k.startswith(("hydra.", "sweep.")) and not is_harmless(k)}
    for key in also:
        node = OmegaConf.select(_root_, key)
        common[key] = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    return hashlib.blake2b(json.dumps(common, sort_keys=True).encode(), digest_size=4).hexdigest()


OmegaConf.register_new_resolver("detect_device", detect_device, replace=True)
OmegaConf.register_new_resolver("default_optimizer", default_optimizer, replace=True)
OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)
OmegaConf.register_new_resolver("bundled", lambda name: str(ROOT / name), replace=True)
OmegaConf.register_new_resolver("recommended", recommended, replace=True)
OmegaConf.register_new_resolver("sweep_digest", sweep_digest, replace=True)
