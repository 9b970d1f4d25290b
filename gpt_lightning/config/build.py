"""From the configuration to objects; what `train` and `plan` share."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gpt_lightning.config.arguments import check_arguments
from gpt_lightning.config.command import ConfigError, build, explicit, inspect_node, one_line, plain

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import tiktoken

    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.token_store import TokenStore
    from gpt_lightning.training.module import LanguageModel


log = logging.getLogger(__name__)

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # what Lightning's loggers need
GENTLE = 1e-3  # a learning rate above which trained weights soon say nothing of what they knew
SETTINGS = ("nonfinite",)  # keys of `callbacks` that are no callback


def rehearse(cfg: DictConfig, *, trainer: bool) -> None:
    """Build what needs no data once, with next to no weights: a wrong value ends a run before it costs.

    Loggers may start services, and a model of the user's own may be large, so these are only looked at.

    Args:
        cfg: The configuration; it is not changed.
        trainer: Whether to build the Trainer too, which wants the run's devices here.
    """
    import torch

    from gpt_lightning.data.windows import split_batch
    from gpt_lightning.inference.loading import GPT_TARGET
    from gpt_lightning.model.gpt import GPTConfig
    from gpt_lightning.model.lora import LoRAConfig
    from gpt_lightning.training.optimizers import decay_groups

    cfg = copy.deepcopy(cfg)
    cfg.trainer.max_steps = cfg.trainer.max_steps or sys.maxsize  # the data tells how many an epoch has,
    with open_dict(cfg):
        cfg.model.vocab_size = cfg.model.get("vocab_size") or 1  # and the tokenizer this
    inspect_node(cfg.model, "model")
    if cfg.model._target_ == GPT_TARGET:
        check_arguments(GPTConfig, cfg.model)
        GPTConfig(**{key: value for key, value in cfg.model.items() if not key.startswith("_")})
    if cfg.lora.r:
        LoRAConfig(**plain(cfg.lora))
    with blamed_on("optimizer"):
        build(cfg.optimizer)(decay_groups(torch.nn.Linear(1, 1)))
    build_schedule(cfg)
    callbacks = build_callbacks(cfg)
    for name, node in cfg.logger.items():
        if node is None:
            continue
        inspect_node(node, f"logger.{name}")
        package = PACKAGES.get(node._target_.rpartition(".")[2])
        if package and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    if trainer:
        split_batch(cfg.data.batch_size, None, build_trainer(cfg, callbacks, loggers=[]).world_size)


@contextmanager
def blamed_on(key: str) -> Iterator[None]:
    """What the call of a partly configured function raises for its arguments, in terms of their key."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key} cannot be made of its values: {one_line(error)}") from error


def prepare_data(cfg: DictConfig, encoding: tiktoken.Encoding | None = None) -> TokenStore:
    """The tokens that the configuration asks for; fills in what depends on them.

    After it, model.vocab_size and trainer.max_steps are numbers. A given tokenizer replaces the configured.
    """
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import FixedTokenizer
    from gpt_lightning.data.windows import epoch_size

    cut = windows(cfg)
    tokenizer = FixedTokenizer(encoding) if encoding else build(cfg.tokenizer)
    store = prepare(build(cfg.data.corpus, "data.corpus"), tokenizer, cfg.paths.cache)
    with open_dict(cfg):
        if cfg.model.get("vocab_size") is None:
            cfg.model.vocab_size = store.n_vocab
        elif cfg.model.vocab_size < store.n_vocab:
            raise ConfigError(
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
                f"{store.n_vocab} ids; use model.vocab_size=null"
            )
        _, steps = epoch_size(store, **cut)  # too little text is an error here
        if cfg.trainer.max_epochs is not None:
            in_epochs = cfg.trainer.max_epochs * steps
            cfg.trainer.max_steps = min(in_epochs, cfg.trainer.max_steps or in_epochs)
    return store


def windows(cfg: DictConfig) -> dict[str, Any]:
    """How tokens are cut into windows and batches."""
    keys = ("batch_size", "stride", "drop_last", "random_offset")
    block_size = cfg.data.sequence_length or cfg.model.block_size
    if block_size > cfg.model.block_size:
        raise ConfigError(
            f"data.sequence_length={block_size} exceeds model.block_size={cfg.model.block_size}"
        )
    return {"block_size": block_size, **{key: cfg.data[key] for key in keys}}


def build_schedule(cfg: DictConfig) -> Any:
    """The factor of the learning rate at each step; a warm-up that does not fit is an error here."""
    schedule = build(cfg.scheduler)
    with blamed_on("scheduler"):
        schedule(0)
    return schedule


def build_callbacks(cfg: DictConfig) -> list[Any]:
    """The callbacks that are not null."""
    nodes = {key: node for key, node in cfg.callbacks.items() if node is not None and key not in SETTINGS}
    for key, node in nodes.items():
        if not OmegaConf.is_dict(node):
            raise ConfigError(f"callbacks.{key}={node} must have a _target_, the name of a class, or be null")
    return [build(node) for node in nodes.values()]


def build_loggers(cfg: DictConfig, resume_step: int | None) -> list[Any]:
    """metrics.csv, and what the configuration adds."""
    from gpt_lightning.training.loggers import MetricsCSV

    loggers: list[Any] = [MetricsCSV(Path(cfg.paths.run) / "metrics.csv", resume_step=resume_step)]
    for key, node in cfg.logger.items():
        if node is None:
            continue
        target = str(node.get("_target_", "")).rpartition(".")[2]
        more: dict[str, Any] = {}
        if target == "TensorBoardLogger" and resume_step is not None:
            more = {"purge_step": resume_step + 1}
        if target == "WandbLogger":  # a resumed run is the same run there
            name = hashlib.blake2b(str(Path(cfg.paths.run).resolve()).encode(), digest_size=8).hexdigest()
            more = {"version": name, "resume": "allow"}
        loggers.append(build(node, f"logger.{key}", **more))
    return loggers


def build_trainer(cfg: DictConfig, callbacks: list[Any], loggers: list[Any]) -> pl.Trainer:
    """Lightning's Trainer as the configuration has it."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import Checkpoint

    from gpt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO

    if cfg.device.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device.accelerator=cuda: torch finds no NVIDIA GPU here; use device=cpu")
    settings = cfg.trainer
    ours: dict[str, Any] = {
        "accelerator": cfg.device.accelerator,
        "devices": cfg.device.devices,
        "num_nodes": settings.num_nodes,
        "strategy": settings.strategy
        if isinstance(settings.strategy, str)
        else build(settings.strategy, "trainer.strategy"),
        "precision": cfg.device.precision,
        "max_steps": settings.max_steps,
        "max_epochs": -1,  # the loader runs through the epochs by itself
        "limit_val_batches": settings.val_batches or 1.0,
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
    check_arguments(pl.Trainer, settings.lightning, without=ours)
    return pl.Trainer(**ours, **plain(settings.lightning))


def starting_point(cfg: DictConfig, checkpoint: Path | None = None) -> tuple[Any, Any]:
    """The network and the tokenizer of `init_from`, or None and None; they then decide the model's shape.

    A run that goes on has them in its own checkpoint; what it began from may be gone.
    """
    if cfg.init_from is None:
        return None, None
    from gpt_lightning.inference.loading import start_from

    rate = cfg.optimizer.get("lr")
    if checkpoint is None and isinstance(rate, (int, float)) and rate > GENTLE and not cfg.lora.r:
        log.warning(
            "optimizer.lr=%g is a rate for training from nothing and makes a model forget; 1e-4 suits most",
            rate,
        )
    net, encoding = start_from(str(checkpoint or cfg.init_from), **explicit(cfg, "model"))
    cfg.model.update(asdict(net.config))
    return net, encoding


def build_data(cfg: DictConfig, store: TokenStore) -> TextDataModule:
    """Windows of the store's tokens in the configured batches."""
    from gpt_lightning.data.datamodule import TextDataModule

    return TextDataModule(
        store,
        **windows(cfg),
        micro_batch_size=cfg.device.micro_batch_size,
        max_steps=cfg.trainer.max_steps,
        seed=cfg.seed,
        shuffle=cfg.data.shuffle,
        num_workers=cfg.data.num_workers,
        pin_memory=cfg.device.pin_memory,
    )


def build_net(cfg: DictConfig, net: Any = None) -> Any:
    """The network, new unless given, with the adapters that the configuration asks for."""
    from gpt_lightning.model.lora import LoRAConfig, add_adapters

    net = net or build(cfg.model)
    return add_adapters(net, LoRAConfig(**plain(cfg.lora))) if cfg.lora.r else net


def build_module(cfg: DictConfig, store: TokenStore, net: Any = None) -> LanguageModel:
    """The network, new unless given, in its LightningModule."""
    from gpt_lightning.training.module import LanguageModel

    net = build_net(cfg, net)
    if cfg.device.compile:
        net.compile()  # in place: the names of the parameters stay
    return LanguageModel(
        net,
        optimizer=build(cfg.optimizer),
        schedule=build_schedule(cfg),
        tokenizer=store.tokenizer,
        config=plain(cfg),
        clip_norm=cfg.trainer.clip_norm,
    )
