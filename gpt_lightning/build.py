"""From the configuration to objects; what `train` and `plan` share."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gpt_lightning.config import ConfigError, build, explicit, plain

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import tiktoken

    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.token_store import TokenStore
    from gpt_lightning.training.module import LanguageModel


def prepare_data(cfg: DictConfig, encoding: tiktoken.Encoding | None = None) -> TokenStore:
    """The tokens that the configuration asks for; fills in what depends on them.

    After it, model.vocab_size and trainer.max_steps are numbers. A given tokenizer replaces the configured.
    """
    from gpt_lightning.data.datamodule import epoch_size
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import Given

    tokenizer = Given(encoding) if encoding else build(cfg.tokenizer)
    store = prepare(build(cfg.data.corpus), tokenizer, Path(cfg.paths.cache))
    with open_dict(cfg):
        if cfg.model.get("vocab_size") is None:
            cfg.model.vocab_size = store.n_vocab
        elif cfg.model.vocab_size < store.n_vocab:
            raise ConfigError(
                f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's "
                f"{store.n_vocab} ids; use model.vocab_size=null"
            )
        if cfg.trainer.max_epochs is not None:
            _, steps = epoch_size(store, **windows(cfg))
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


def build_trainer(cfg: DictConfig, resume_step: int | None) -> pl.Trainer:
    """Lightning's Trainer with the callbacks and loggers of the configuration."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint

    from gpt_lightning.training.checkpoints import AtomicCheckpointIO
    from gpt_lightning.training.loggers import MetricsCSV

    settings, folder = cfg.trainer, Path(cfg.paths.run)
    callbacks = [build(node) for node in cfg.callbacks.values() if OmegaConf.is_dict(node)]
    loggers: list[Any] = [MetricsCSV(folder / "metrics.csv", resume_step=resume_step)]
    for node in (cfg.logger or {}).values():
        tensorboard = str(node.get("_target_", "")).endswith("TensorBoardLogger")
        purge = {"purge_step": resume_step + 1} if tensorboard and resume_step is not None else {}
        loggers.append(build(node, **purge))
    ours: dict[str, Any] = {
        "accelerator": cfg.device.accelerator,
        "devices": cfg.device.devices,
        "num_nodes": settings.num_nodes,
        "strategy": settings.strategy if isinstance(settings.strategy, str) else build(settings.strategy),
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
        "default_root_dir": folder,
    }
    others = plain(settings.lightning)
    if strange := others.keys() - (inspect.signature(pl.Trainer).parameters.keys() - ours.keys()):
        raise ConfigError(
            f"trainer.lightning.{min(strange)} is no argument of Lightning's Trainer, or has another key here"
        )
    return pl.Trainer(**ours, **others)


def starting_point(cfg: DictConfig) -> tuple[Any, Any]:
    """The network and the tokenizer of `init_from`, or None and None; they then decide the model's shape."""
    if cfg.init_from is None:
        return None, None
    from gpt_lightning.training.start import start_from

    net, encoding = start_from(str(cfg.init_from), **explicit(cfg, "model"))
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


def build_module(cfg: DictConfig, store: TokenStore, net: Any = None) -> LanguageModel:
    """The network, new unless given, in its LightningModule."""
    from gpt_lightning.training.module import LanguageModel

    net = net or build(cfg.model)
    if cfg.device.compile:
        net.compile()  # in place: the names of the parameters stay
    return LanguageModel(
        net,
        optimizer=build(cfg.optimizer),
        schedule=build(cfg.scheduler),
        tokenizer=store.tokenizer,
        config=plain(cfg),
        clip_norm=cfg.trainer.clip_norm,
    )
