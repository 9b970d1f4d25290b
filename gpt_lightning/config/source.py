"""The value of checkpoint= and the corpus of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.build import without_recommendations
from gpt_lightning.config.command_line import as_given, key_of
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build, is_defined_in, targets
from gpt_lightning.config.recorded import read_recorded
from gpt_lightning.config.rules import check, text
from gpt_lightning.data.files import reading
from gpt_lightning.rundir.directory import HYDRA, find_run

if TYPE_CHECKING:
    from gpt_lightning.data.corpus.base import Corpus


def checkpoint_source(cfg: DictConfig) -> Path:
    """The path that checkpoint= names; `latest` and `NAME/latest` are runs with a checkpoint.

    Raises:
        ConfigError: If the key is missing.
        FileNotFoundError: If there is no such run.
    """
    if cfg.checkpoint in (None, ""):
        raise ConfigError(
            "checkpoint= is missing; give a checkpoint, a run directory, an exported folder or latest"
        )
    check(cfg, {"paths.outputs": text})
    return find_run(str(cfg.checkpoint), cfg.paths.outputs, with_checkpoint=True)


def network_of(cfg: DictConfig) -> Callable[..., Any] | None:
    """Builds the network of the user's own that model= names, with the arguments that a checkpoint gives.

    Raises:
        ConfigError: If an argument is given as well, or there is no such class.
    """
    if "_target_" not in (cfg.get("model") or {}):
        return None
    given = [text for text in as_given(HydraConfig.get().overrides.task) if key_of(text).startswith("model.")]
    if given:
        raise ConfigError(f"{given[0]}: a trained model has the values of its checkpoint; leave this out")
    classes = {key: v for key, v in without_recommendations(cfg).items() if key == "_target_" or targets(v)}
    node = OmegaConf.create({"model": classes})  # all other arguments are in the checkpoint
    network: Callable[..., Any] = build(node, "model", _partial_=True)
    return network


def _found_from(node: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of a corpus, whose relative paths are below the folder where its run was started."""

    def place(value: Any) -> Any:
        if isinstance(value, list):
            return [place(part) for part in value]
        return str(folder / Path(value).expanduser()) if isinstance(value, str) else value

    return {key: place(value) if key in ("path", "val_path") else value for key, value in node.items()}


def corpus_of_run(source: Path) -> Corpus | None:
    """The corpus that the run of a checkpoint was trained on, built from the checkpoint's configuration.

    Checkpoints may come from others, so only corpora of this package are built; None for any other
    class and for exported folders, which hold no configuration.
    """
    if (source / "config.json").is_file():
        return None
    from gpt_lightning.rundir.checkpoint import read_checkpoint

    data = read_checkpoint(source, verify=False)["hyper_parameters"].get("data")
    node = data.get("corpus") if isinstance(data, dict) else None
    if not isinstance(node, dict):
        return None
    with reading(source, "has a configuration that no run has written"):
        names = targets(node)
        for run in (source, *source.parents[:2]):  # the run directory, or a checkpoint in it
            if (run / HYDRA / "hydra.yaml").is_file():
                node = _found_from(node, Path(read_recorded(run, "hydra.yaml").hydra.runtime.cwd))
    if not all(is_defined_in(name, r"gpt_lightning\.data") for name in names):
        return None
    corpus: Corpus = build(OmegaConf.create({"data": {"corpus": node}}), "data.corpus")
    return corpus
