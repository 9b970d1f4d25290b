"""Builds the parts of a run that need no data, such as optimizer and corpus: once, cheapest first."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command_line import as_given, key_of
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build, build_with, check_arguments, inspect_node, naming_key, plain
from gpt_lightning.config.rules import TRAINER_KEYS

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import tiktoken
    from torch import nn

    from gpt_lightning.data.corpus.base import Corpus
    from gpt_lightning.data.tokenizer import Tokenizer
    from gpt_lightning.training.optimizers import OptimizerFactory

log = logging.getLogger(__name__)

LOGGER_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # what Lightning's loggers need
MAX_FINETUNE_LR = 1e-3  # above it, fine-tuning usually destroys what the weights have learned
NO_CALLBACKS = ("nonfinite",)  # keys of `callbacks` that are values for other callbacks


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything of a run that can be built before its data is looked at."""

    corpus: Corpus
    tokenizer: Tokenizer
    optimizer: OptimizerFactory
    schedule: Callable[[int], float]  # without its length where that depends on the data
    callbacks: list[Any]


def build_parts(cfg: DictConfig) -> Parts:
    """Everything that needs no data, so that a wrong value is found before anything costs.

    Raises:
        ConfigError, ValueError, ModuleNotFoundError: The first thing that is wrong.
    """
    from gpt_lightning.data.remembered import remember_in
    from gpt_lightning.model.gpt import GPT, GPTConfig
    from gpt_lightning.training.optimizers import by_role, parameter_groups

    check_model(cfg)
    optimizer = build(cfg, "optimizer")
    with naming_key("optimizer"):
        smallest = GPT(GPTConfig(vocab_size=1, block_size=1, n_layer=1, n_head=1, n_embd=1, vocab_multiple=1))
        optimizer(parameter_groups(smallest, by_role=by_role(optimizer)))
    schedule = build(cfg, "scheduler")
    if cfg.trainer.max_steps is not None or not wants_length(schedule):
        with_length(schedule, cfg.trainer.max_steps)
    callbacks = build_callbacks(cfg)
    for name, node in cfg.logger.items():
        if node is not None:
            inspect_node(cfg, f"logger.{name}")
            package = LOGGER_PACKAGES.get(node._target_.rpartition(".")[2])
            if package and importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
    tokenizer = build_with(cfg, "tokenizer", ("trained", "key", "build"))
    corpus = build_with(cfg, "data.corpus", ("separated", "digest", "documents"))
    if isinstance(cfg.paths.cache, str):  # anything else is refused where the tokens are prepared
        remember_in(Path(cfg.paths.cache) / "remembered")
    return Parts(
        corpus=corpus, tokenizer=tokenizer, optimizer=optimizer, schedule=schedule, callbacks=callbacks
    )


def check_model(cfg: DictConfig) -> None:
    """Check the model's arguments without allocating it; a class of the user's own is only looked at."""
    from gpt_lightning.model.lora import LoRAConfig
    from gpt_lightning.model.weights import CONFIGS

    if cfg.model.get("vocab_size", 0) is None:  # the tokenizer tells later
        cfg = cast(DictConfig, OmegaConf.merge(cfg, {"model": {"vocab_size": 1}}))
    inspect_node(cfg, "model", without=("recommended",))
    if kind := CONFIGS.get(cfg.model._target_):
        check_arguments(kind, cfg, "model", without=("recommended",))
        kind(**model_options(cfg))
    if cfg.lora.r:
        LoRAConfig(**plain(cfg.lora))


def model_options(cfg: Any) -> dict[str, Any]:
    """Arguments of the model: what it recommends to other groups is none of them."""
    return {key: v for key, v in plain(cfg.model).items() if key[0] != "_" and key != "recommended"}


def wants_length(schedule: Any) -> bool:
    """Whether a schedule depends on the number of optimizer steps and is to get that of the run."""
    keywords = getattr(schedule, "keywords", {})
    return "max_steps" in keywords and keywords["max_steps"] is None


def with_length(schedule: Any, max_steps: int | None) -> Callable[[int], float]:
    """The schedule of a run of so many optimizer steps; a warm-up that does not fit is an error here."""
    if isinstance(schedule, partial):  # a plain one: Hydra's own checks each call for longer than it lasts
        schedule = partial(schedule.func, *schedule.args, **schedule.keywords)
    known = partial(schedule, max_steps=max_steps) if wants_length(schedule) else schedule
    with naming_key("scheduler"):
        known(0)
    return cast(Callable[[int], float], known)


def build_callbacks(cfg: DictConfig) -> list[Any]:
    """The callbacks that are not null."""
    names = [str(key) for key, node in cfg.callbacks.items() if node is not None and key not in NO_CALLBACKS]
    return [build_with(cfg, f"callbacks.{name}", ("on_train_start",)) for name in names]


def build_loggers(cfg: DictConfig, resume_step: int | None) -> list[Any]:
    """metrics.csv, and what the configuration adds."""
    from gpt_lightning.training.loggers import MetricsCSV

    loggers: list[Any] = [MetricsCSV(Path(cfg.paths.run) / "metrics.csv", resume_step=resume_step)]
    for key, node in cfg.logger.items():
        if node is None:
            continue
        target = str(node.get("_target_", "")).rpartition(".")[2]
        more: dict[str, Any] = {}
        if target == "TensorBoardLogger":  # also of a new run, so that TensorBoard notices the next start
            more = {"purge_step": 0 if resume_step is None else resume_step + 1}
        if target == "WandbLogger":  # a resumed run is the same run there
            name = hashlib.blake2b(str(Path(cfg.paths.run).resolve()).encode(), digest_size=8).hexdigest()
            more = {"version": name, "resume": "allow"}
        loggers.append(build_with(cfg, f"logger.{key}", ("log_metrics",), **more))
    return loggers


def device_count(cfg: DictConfig) -> int:
    """How many devices share a batch, over all machines."""
    devices, accelerator = cfg.device.devices, cfg.device.accelerator
    if devices == "auto":
        import torch

        on_cuda = accelerator == "cuda" or (accelerator == "auto" and torch.cuda.is_available())
        devices = max(1, torch.cuda.device_count()) if on_cuda else 1
    elif not isinstance(devices, int):
        devices = len(devices)
    return int(devices * cfg.trainer.num_nodes)


def build_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any]) -> pl.Trainer:
    """Lightning's Trainer with the arguments of the configuration."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import Checkpoint

    from gpt_lightning.data.windows import split_batch
    from gpt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO
    from gpt_lightning.training.strategies import strategy

    if cfg.device.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device.accelerator=cuda: torch finds no NVIDIA GPU here; use device=cpu")
    settings = cfg.trainer
    named = settings.strategy
    ours: dict[str, Any] = {
        "accelerator": cfg.device.accelerator,
        "devices": cfg.device.devices,
        "num_nodes": settings.num_nodes,
        "strategy": strategy(named, devices=device_count(cfg), timeout=settings.timeout_seconds)
        if isinstance(named, str)
        else build(cfg, "trainer.strategy"),
        "precision": "32-true" if cfg.device.precision == "auto" else cfg.device.precision,
        "max_steps": settings.max_steps or -1,  # the data tells how many an epoch has
        "max_epochs": -1,  # the loader runs through the epochs by itself
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,  # this package's callbacks decide when to log
        "deterministic": settings.deterministic,
        "logger": loggers,
        "callbacks": callbacks,
        "plugins": [AtomicCheckpointIO()],
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": Path(cfg.paths.run),
    }
    check_arguments(pl.Trainer, cfg, "trainer.lightning", without=TRAINER_KEYS)
    trainer = pl.Trainer(**ours, **plain(settings.lightning))
    split_batch(cfg.data.batch_size, None, trainer.world_size)
    return trainer


def starting_point(
    cfg: DictConfig, checkpoint: Path | None = None
) -> tuple[nn.Module, tiktoken.Encoding | None] | tuple[None, None]:
    """The network and the tokenizer of `init_from`, or None and None.

    A run that goes on has them in its own checkpoint; what it began from may be gone.
    """
    if cfg.init_from is None:
        return None, None
    asked = [text for text in as_given(HydraConfig.get().overrides.task) if text.startswith("tokenizer=")]
    from gpt_lightning.inference.loading import start_from

    rate = cfg.optimizer.get("lr")
    if checkpoint is None and isinstance(rate, (int, float)) and rate > MAX_FINETUNE_LR and not cfg.lora.r:
        log.warning(
            "optimizer.lr=%g is a rate for training from nothing and makes a model forget; 1e-4 suits most",
            rate,
        )
    try:
        net, encoding = start_from(
            str(checkpoint or cfg.init_from), **({} if checkpoint else asked_of_model(cfg))
        )
    except ValueError as error:
        given = {key_of(text): text for text in as_given(HydraConfig.get().overrides.task)}
        choice = given.get("model") or given.get("experiment")
        if choice is None or re.split("[= ]", str(error))[0] in given:
            raise
        raise ConfigError(str(error).replace("leave the key out", f"leave {choice} out")) from error
    if asked and encoding is not None and checkpoint is None:
        log.warning("%s is not used: the weights of init_from= have a tokenizer", asked[-1])
    return net, encoding


def asked_of_model(cfg: DictConfig) -> dict[str, Any]:
    """The model's arguments that were asked for: all if a size was chosen, else those that differ from it."""
    job, options = HydraConfig.get(), {k: v for k, v in model_options(cfg).items() if v is not None}
    keys = [text.split("=")[0].lstrip("+") for text in as_given(job.overrides.task)]
    default = cast(Any, hydra.compose(job.job.config_name, return_hydra_config=True))
    if "model" in keys or job.runtime.choices["model"] != default.hydra.runtime.choices.model:
        return options
    unchanged = model_options(default)
    return {k: v for k, v in options.items() if f"model.{k}" in keys or unchanged.get(k) != v}
