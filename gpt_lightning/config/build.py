"""From the configuration to objects: each is built once, cheapest first, and cfg is never changed."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import re
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.errors import ConfigError, one_line
from gpt_lightning.config.resolvers import detect_device
from gpt_lightning.config.rules import TRAINER_KEYS, check_arguments

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import tiktoken
    from torch import nn

    from gpt_lightning.data.corpus.base import Corpus
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.token_store import TokenStore
    from gpt_lightning.data.tokenizer import Tokenizer
    from gpt_lightning.training.module import LanguageModel
    from gpt_lightning.training.optimizers import OptimizerFactory

log = logging.getLogger(__name__)

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}  # what Lightning's loggers need
MAX_FINETUNE_LR = 1e-3  # a learning rate above which trained weights soon lose what they knew
TRAINING = ("optimizers.", "muon.", "schedules.")
BUILDERS = ("gpt_lightning.model.", *(f"gpt_lightning.training.{name}" for name in TRAINING))
NO_CALLBACKS = ("nonfinite",)  # keys of `callbacks` that are values for other callbacks


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration in dicts, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


# -- nodes with a _target_ ----------------------------------------------------------------------------


def build(cfg: DictConfig, key: str, /, **kwargs: Any) -> Any:
    """Instantiate a node of the configuration; errors of the class itself come out as they are.

    Args:
        cfg: The configuration.
        key: Of the node.
        kwargs: Arguments that take the place of the node's.

    Raises:
        ConfigError, ValueError: If there is no such class, or it does not take these arguments.
    """
    inspect_node(cfg, key, without=kwargs)
    try:
        # plain containers: a class may keep its arguments, and what reaches a checkpoint must be plain
        return hydra.utils.instantiate(OmegaConf.select(cfg, key), _convert_="all", **kwargs)
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError):
            raise ConfigError(f"{key} cannot be made of its values: {one_line(cause or error)}") from error
        raise cause from error


def inspect_node(cfg: DictConfig, key: str, *, without: Any = ()) -> None:
    """Import the class that a node names, and check that it takes what it is given."""
    node = OmegaConf.select(cfg, key)
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
    check_arguments(target, cfg, key, without=without)
    for name, child in node.items():
        if OmegaConf.is_dict(child) and "_target_" in child:
            inspect_node(cfg, f"{key}.{name}")


def targets(node: Any) -> set[str]:
    """Every class and function that a node names, at any depth."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        found = set().union(*map(targets, node.values()))
        return found | ({str(node["_target_"])} if "_target_" in node else set())
    return set().union(*map(targets, node)) if isinstance(node, list) else set()


def is_defined_in(target: str, packages: str) -> bool:
    """Whether a _target_ is a class that packages (a pattern) define, rather than import.

    Of functions, those that build a model, an optimizer or a schedule count too: others act when called.
    """
    inside = re.compile(rf"({packages})\.")
    try:
        found = hydra.utils.get_object(target) if inside.match(target) else None
    except Exception:  # hydra raises errors of several types
        return False
    where = f"{getattr(found, '__module__', '')}."
    builds = isinstance(found, types.FunctionType) and where.startswith(BUILDERS)
    return (isinstance(found, type) or builds) and bool(inside.match(where))


def build_with(cfg: DictConfig, key: str, members: tuple[str, ...], **kwargs: Any) -> Any:
    """As `build`; refuses an object without these members, which is of another kind."""
    found = build(cfg, key, **kwargs)
    for name in members:
        if inspect.getattr_static(found, name, None) is None:  # does not call a property
            raise ConfigError(f"{key} is a {type(found).__name__}, which has no {name}; correct its _target_")
    return found


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Errors of a call of a partly configured function, in terms of the key of its arguments."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"{key} cannot be made of its values: {one_line(error)}") from error


# -- what needs no data -------------------------------------------------------------------------------


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
            package = PACKAGES.get(node._target_.rpartition(".")[2])
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
    known = partial(schedule, max_steps=max_steps) if wants_length(schedule) else schedule
    with naming_key("scheduler"):
        known(0)
    return cast(Callable[[int], float], known)


def build_callbacks(cfg: DictConfig) -> list[Any]:
    """The callbacks that are not null."""
    names = [str(key) for key, node in cfg.callbacks.items() if node is not None and key not in NO_CALLBACKS]
    for name in names:
        if not OmegaConf.is_dict(node := cfg.callbacks[name]):
            raise ConfigError(
                f"callbacks.{name}={node} must have a _target_, the name of a class, or be null"
            )
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
    """Lightning's Trainer as the configuration has it."""
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


# -- what a run starts from ---------------------------------------------------------------------------


def starting_point(
    cfg: DictConfig, checkpoint: Path | None = None
) -> tuple[nn.Module, tiktoken.Encoding | None] | tuple[None, None]:
    """The network and the tokenizer of `init_from`, or None and None.

    A run that goes on has them in its own checkpoint; what it began from may be gone.
    """
    if cfg.init_from is None:
        return None, None
    from gpt_lightning.inference.loading import start_from

    rate = cfg.optimizer.get("lr")
    if checkpoint is None and isinstance(rate, (int, float)) and rate > MAX_FINETUNE_LR and not cfg.lora.r:
        log.warning(
            "optimizer.lr=%g is a rate for training from nothing and makes a model forget; 1e-4 suits most",
            rate,
        )
    return start_from(str(checkpoint or cfg.init_from), **({} if checkpoint else asked_of_model(cfg)))


def asked_of_model(cfg: DictConfig) -> dict[str, Any]:
    """The model's arguments that were asked for: all if a size was chosen, else those that differ from it."""
    job, options = HydraConfig.get(), {k: v for k, v in model_options(cfg).items() if v is not None}
    keys = [text.split("=")[0].lstrip("+") for text in job.overrides.task]
    default = cast(Any, hydra.compose(job.job.config_name, return_hydra_config=True))
    if "model" in keys or job.runtime.choices["model"] != default.hydra.runtime.choices.model:
        return options
    unchanged = model_options(default)
    return {k: v for k, v in options.items() if f"model.{k}" in keys or unchanged.get(k) != v}


# -- what needs the data ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The tokens of a run, and what depends on them.

    Args:
        store: The tokens.
        vocab_size: Ids of the model.
        max_steps: Optimizer steps of the run.
        windows: How tokens are cut into windows and batches: arguments of `epoch_size`.
        windows_per_epoch, steps_per_epoch: Of the training split.
    """

    store: TokenStore
    vocab_size: int
    max_steps: int
    windows: dict[str, Any]
    windows_per_epoch: int
    steps_per_epoch: int


def prepare_data(
    cfg: DictConfig, parts: Parts, net: Any = None, encoding: tiktoken.Encoding | None = None
) -> Prepared:
    """The tokens that the configuration asks for; a network and a tokenizer that are there already decide.

    Raises:
        ConfigError, ValueError: If the vocabulary does not fit or there is too little text.
    """
    from gpt_lightning.data.token_store import prepare
    from gpt_lightning.data.tokenizer import FixedTokenizer
    from gpt_lightning.data.windows import epoch_size

    cut = windows(cfg, net)
    store = prepare(parts.corpus, FixedTokenizer(encoding) if encoding else parts.tokenizer, cfg.paths.cache)
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
    count, steps_per_epoch = epoch_size(store, **cut)  # too little text is an error here
    return Prepared(
        store=store,
        vocab_size=vocab_size,
        max_steps=run_length(
            cfg,
            steps_per_epoch,
            cut["batch_size"] * cut["block_size"],
            lambda: count_parameters(cfg, vocab_size, net),
        ),
        windows=cut,
        windows_per_epoch=count,
        steps_per_epoch=steps_per_epoch,
    )


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


def precision_of(cfg: DictConfig, net: nn.Module, checkpoint: Path | None = None) -> str:
    """The precision that device.precision=auto stands for; a resumed run keeps that of its checkpoint."""
    from gpt_lightning.rundir.checkpoint import read_checkpoint
    from gpt_lightning.training.precision import choose_precision, multiplies_bfloat16

    if cfg.device.precision != "auto":
        return str(cfg.device.precision)
    if checkpoint is not None:
        recorded = read_checkpoint(checkpoint, verify=False)["hyper_parameters"]["device"]["precision"]
        if recorded != "auto":
            return str(recorded)
    accelerator = detect_device() if cfg.device.accelerator == "auto" else cfg.device.accelerator
    parameters = sum(p.numel() for p in net.parameters())
    return choose_precision(accelerator, parameters, has_bfloat16=multiplies_bfloat16(accelerator))


def build_data(cfg: DictConfig, prepared: Prepared) -> TextDataModule:
    """Windows of the store's tokens in the configured batches."""
    from gpt_lightning.data.datamodule import TextDataModule

    return TextDataModule(
        prepared.store,
        **prepared.windows,
        micro_batch_size=cfg.device.micro_batch_size,
        max_steps=prepared.max_steps,
        val_batches=cfg.trainer.val_batches,
        seed=cfg.seed,
        shuffle=cfg.data.shuffle,
        num_workers=cfg.data.num_workers,
        pin_memory=cfg.device.pin_memory,
    )


def memory_needs(
    cfg: DictConfig, prepared: Prepared, net: nn.Module, micro_batch_size: int
) -> dict[str, float]:
    """Bytes that a run needs on a device, as `memory_estimate`."""
    from gpt_lightning.training.memory import memory_estimate

    config = getattr(net, "config", None)  # a model of the user's own may have none
    return memory_estimate(
        parameters=sum(p.numel() for p in net.parameters()),
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
        tokens=micro_batch_size * prepared.windows["block_size"],
        n_embd=getattr(config, "n_embd", 0),
        n_layer=getattr(config, "n_layer", 0),
        vocab_size=prepared.vocab_size,
        precision=precision_of(cfg, net),
        shards=device_count(cfg) if cfg.trainer.strategy == "fsdp" else 1,
        recomputed=cfg.trainer.activation_checkpointing,
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
    """The network, new unless given, in its LightningModule, whose checkpoints have the chosen precision.

    Args:
        cfg, parts, prepared: Of the run.
        net: Of `init_from`.
        checkpoint: That a resumed run goes on from.
    """
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
