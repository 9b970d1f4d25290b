"""Builds the parts of a run that depend on its tokens: data, network and module. cfg is never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build, plain
from gpt_lightning.config.parts import Parts, device_count, with_length
from gpt_lightning.config.resolvers import detect_device

if TYPE_CHECKING:
    from pathlib import Path

    import tiktoken
    from torch import nn

    from gpt_lightning.data.corpus.base import Split
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.token_store import TokenStore
    from gpt_lightning.training.module import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The tokens of a run, and what depends on them."""

    store: TokenStore
    vocab_size: int  # ids of the model
    max_steps: int  # optimizer steps of the run
    windows: dict[str, Any]  # how tokens are cut into windows and batches: arguments of `epoch_size`
    windows_per_epoch: int  # of the training split
    steps_per_epoch: int


def prepare_data(
    cfg: DictConfig, parts: Parts, net: Any = None, encoding: tiktoken.Encoding | None = None
) -> Prepared:
    """The tokens that the configuration asks for; an existing network and tokenizer take precedence.

    Raises:
        ConfigError, ValueError: If the vocabulary does not fit or there is too little text.
    """
    from gpt_lightning.data.growing import GrowingStore, begin
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import FixedTokenizer
    from gpt_lightning.data.windows import epoch_size

    cut, open_store = windows(cfg, net), prepare if cfg.data.shuffle_buffer is None else begin
    tokenizer = FixedTokenizer(encoding) if encoding else parts.tokenizer
    store = open_store(parts.corpus, tokenizer, cfg.paths.cache)
    config = getattr(net, "config", None)
    vocab_size = config.vocab_size if config else cfg.model.get("vocab_size") or store.n_vocab
    if vocab_size < store.n_vocab:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the tokenizer's {store.n_vocab} ids; "
            "use model.vocab_size=null"
        )
    for callback in parts.callbacks:
        if check_tokenizer := getattr(callback, "check_tokenizer", None):
            check_tokenizer(store.tokenizer)

    def length(steps_per_epoch: int) -> int:
        tokens_per_step = cut["batch_size"] * cut["block_size"]
        return run_length(
            cfg, steps_per_epoch, tokens_per_step, lambda: count_parameters(cfg, vocab_size, net)
        )

    if isinstance(store, GrowingStore):
        store = store.reading(tokens_of_run(cfg, cut, length(0)))
    count, steps_per_epoch = epoch_size(store, **cut)  # too little text is an error here
    return Prepared(
        store=store,
        vocab_size=vocab_size,
        max_steps=length(steps_per_epoch),
        windows=cut,
        windows_per_epoch=count,
        steps_per_epoch=steps_per_epoch,
    )


def tokens_of_run(cfg: DictConfig, cut: dict[str, Any], max_steps: int) -> dict[Split, int]:
    """Tokens of each split that a run reads with data.shuffle_buffer: once, and whole buffers."""
    from gpt_lightning.data.windows import split_batch, tokens_read

    buffers = -(-max_steps * cut["batch_size"] // cfg.data.shuffle_buffer)
    sequences, _ = split_batch(cut["batch_size"], cfg.device.micro_batch_size, 1)
    return {
        "train": tokens_read(buffers * cfg.data.shuffle_buffer, **cut),
        "val": cfg.trainer.val_batches * sequences * cut["block_size"] + 1,
    }


def run_length(
    cfg: DictConfig, steps_per_epoch: int, tokens_per_step: int, parameters: Callable[[], int]
) -> int:
    """Optimizer steps of a run: the least that one of its limits allows, and at least one."""
    settings, limits = cfg.trainer, [cfg.trainer.max_steps]
    if settings.max_epochs is not None:
        limits.append(settings.max_epochs * steps_per_epoch)
    if settings.tokens_per_parameter is not None:
        limits.append(settings.tokens_per_parameter * parameters() / tokens_per_step)
    if settings.max_flops is not None:
        limits.append(settings.max_flops / (6 * parameters() * tokens_per_step))
    return max(1, round(min(limit for limit in limits if limit is not None)))


def count_parameters(cfg: DictConfig, vocab_size: int, net: Any = None) -> int:
    """Parameters of the network, tied ones once; a new one is built without memory."""
    import torch

    with torch.device("meta"):
        net = build_net(cfg, vocab_size) if net is None else net
    return sum(p.numel() for p in net.parameters())


def windows(cfg: DictConfig, net: Any = None) -> dict[str, Any]:
    """How tokens are cut into windows and batches."""
    keys = ("batch_size", "stride", "drop_last", "random_offset")
    config = getattr(net, "config", None)
    longest = config.block_size if config else cfg.model.block_size
    block_size = cfg.data.sequence_length or longest
    if block_size > longest:
        raise ConfigError(f"data.sequence_length={block_size} exceeds model.block_size={longest}")
    return {"block_size": block_size, **{key: cfg.data[key] for key in keys}}


def accelerator_of(cfg: DictConfig) -> str:
    """What the run computes on: cpu, cuda or mps."""
    return detect_device() if cfg.device.accelerator == "auto" else str(cfg.device.accelerator)


def precision_of(cfg: DictConfig, net: nn.Module, checkpoint: Path | None = None) -> str:
    """The precision that device.precision=auto stands for; a resumed run keeps that of its checkpoint."""
    from gpt_lightning.rundir.checkpoint import read_checkpoint
    from gpt_lightning.training.precision import choose_precision, has_amx, multiplies_bfloat16

    if cfg.device.precision != "auto":
        return str(cfg.device.precision)
    if checkpoint is not None:
        recorded = read_checkpoint(checkpoint, verify=False)["hyper_parameters"]["device"]["precision"]
        if recorded != "auto":
            return str(recorded)
    accelerator = accelerator_of(cfg)
    parameters = sum(p.numel() for p in net.parameters())
    has_bfloat16 = multiplies_bfloat16(accelerator)
    return choose_precision(accelerator, parameters, has_bfloat16=has_bfloat16, amx=has_amx())


def build_data(cfg: DictConfig, prepared: Prepared) -> TextDataModule:
    """Windows of the store's tokens in the configured batches."""
    from gpt_lightning.data.datamodule import TextDataModule

    return TextDataModule(
        prepared.store,
        **prepared.windows,
        micro_batch_size=cfg.device.micro_batch_size,
        max_steps=prepared.max_steps,
        align_documents=cfg.data.align_documents,
        val_batches=cfg.trainer.val_batches,
        seed=cfg.seed,
        shuffle=cfg.data.shuffle,
        shuffle_buffer=cfg.data.shuffle_buffer,
        num_workers=cfg.data.num_workers,
        pin_memory=cfg.device.pin_memory,
    )


def memory_needs(cfg: DictConfig, net: nn.Module, *, tokens: int, vocab_size: int) -> dict[str, float]:
    """Bytes that a run needs on a device for forwards of so many tokens, as `memory_estimate`."""
    from gpt_lightning.training.memory import memory_estimate

    config = getattr(net, "config", None)  # a model of the user's own may have none
    return memory_estimate(
        parameters=sum(p.numel() for p in net.parameters()),
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        tokens=tokens,
        n_embd=getattr(config, "n_embd", 0),
        n_layer=getattr(config, "n_layer", 0),
        vocab_size=vocab_size,
        precision=precision_of(cfg, net),
        shards=device_count(cfg) if cfg.trainer.strategy == "fsdp" else 1,
        recomputed=cfg.trainer.activation_checkpointing,
        chunked=accelerator_of(cfg) == "cpu" and not cfg.device.compile and config is not None,
        cpu=accelerator_of(cfg) == "cpu",
        network=type(config).__name__,
    )


def build_net(cfg: DictConfig, vocab_size: int, net: Any = None) -> Any:
    """The network, new unless given, with the adapters that the configuration asks for."""
    from gpt_lightning.model.lora import LoRAConfig, add_adapters

    if net is None:
        options = OmegaConf.create({"model": without_recommendations(cfg)})
        net = build(options, "model", **({"vocab_size": vocab_size} if "vocab_size" in cfg.model else {}))
    return add_adapters(net, LoRAConfig(**plain(cfg.lora))) if cfg.lora.r else net


def without_recommendations(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in plain(cfg.model).items() if key != "recommended"}


def build_module(
    cfg: DictConfig, parts: Parts, prepared: Prepared, net: Any = None, checkpoint: Path | None = None
) -> LanguageModel:
    """The network, new unless given, in its LightningModule, whose checkpoints have the chosen precision."""
    from gpt_lightning.training.module import LanguageModel
    from gpt_lightning.training.strategies import blocks, recompute

    net = build_net(cfg, prepared.vocab_size, net)
    if cfg.trainer.activation_checkpointing:
        for block in blocks(net):
            recompute(block)
    if cfg.device.compile:
        for part in blocks(net) if cfg.trainer.strategy == "fsdp" else [net]:  # what is sharded as a whole
            part.compile()  # in place: the names of the parameters stay
    return LanguageModel(
        net,
        optimizer=parts.optimizer,
        schedule=with_length(parts.schedule, prepared.max_steps),
        tokenizer=prepared.store.tokenizer,
        config=final_config(cfg, prepared, net, precision_of(cfg, net, checkpoint)),
        corpus_digest=prepared.store.meta.corpus_digest,
        clip_norm=cfg.trainer.clip_norm,
    )


def final_config(cfg: DictConfig, prepared: Prepared, net: Any, precision: str) -> dict[str, Any]:
    """What a checkpoint keeps: the resolved configuration with the numbers that the data decided."""
    from gpt_lightning.model.weights import target_of

    config = plain(cfg)
    config["model"] = without_recommendations(cfg)
    if "vocab_size" in config["model"]:
        config["model"]["vocab_size"] = prepared.vocab_size
    if cfg.init_from is not None and hasattr(net, "config"):
        config["model"] = {"_target_": target_of(net.config), **asdict(net.config)}
    config["trainer"]["max_steps"], config["device"]["precision"] = prepared.max_steps, precision
    return config
