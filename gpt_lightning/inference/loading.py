"""Reads a trained model: weights, configuration and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import tiktoken
import torch
from torch import nn

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.files import reading
from gpt_lightning.inference.cpu_kernels import DTYPES, pack
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop.folder import ModelCard, known_values, read_folder
from gpt_lightning.interop.gpt2 import download
from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.lora import LoRAConfig, merge_adapters
from gpt_lightning.model.own import OwnNetwork, as_causal_lm
from gpt_lightning.model.weights import CONFIGS, build_with_weights, read_config
from gpt_lightning.rundir.checkpoint import find_checkpoint, read_checkpoint
from gpt_lightning.rundir.directory import find_run

log = logging.getLogger(__name__)
CHAT = "gpt_lightning.data.corpus.chat.Chat"  # the corpus that makes a model answer
Network = Callable[..., nn.Module]  # what builds a network of the user's own


def load(
    path: str | Path,
    device: str | None = None,
    dtype: str | None = None,
    *,
    cuda_graph: bool = False,
    model: Network | None = None,
) -> TextGenerator:
    """A trained model for generating text; it cannot be trained or saved.

        model = load("outputs/gpt/2026-01-31_12-00-00/checkpoints/best.ckpt")
        print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8))

    Args:
        path: A checkpoint, a run directory, a folder that `gpt_lightning.export` wrote, or `latest` or
            `NAME/latest` for the newest run with a checkpoint below outputs/ or outputs/NAME/.
        device: Such as "cpu", "cuda" or "mps"; None takes the fastest available one.
        dtype: "float32", "bfloat16" or, on a CPU, "int8" for the weights; None is float32.
        cuda_graph: As in `TextGenerator`.
        model: The class of a model of your own, or a function that builds it, of a checkpoint; it gets the
            arguments that the training had. Loading never imports a class that a checkpoint names.

    Raises:
        OSError: If there is nothing to load at `path`.
        ValueError: If it is damaged or not a model of gpt_lightning, or if device or dtype do not exist.
    """
    where = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} does not exist; use {', '.join(DTYPES)}")
    path = find_run(path, with_checkpoint=True)
    found = read_model(path, model=model)
    found.cuda_graph, is_own = cuda_graph, isinstance(found.net, OwnNetwork)
    found.net.to(where)
    if dtype == "int8" and is_own:
        raise ValueError(f"dtype=int8: {path} has a model of your own; use dtype=bfloat16 or float32")
    if (where.type == "cpu" and not is_own) or dtype == "int8":
        pack(found.net, dtype or "float32")
    elif dtype == "bfloat16":
        found.net.to(torch.bfloat16)
    return found


def read_model(path: str | Path, *, merge: bool = True, model: Network | None = None) -> TextGenerator:
    """A model as it was trained, in float32 on the CPU; arguments and errors as `load`."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        net, tokenizer, card = _read_checkpoint(path, merge=merge, model=model, dropout=0.0)
    elif model is not None:
        raise ValueError(f"{folder} has no model of your own; leave model= out")
    else:
        net, found, card = read_folder(folder, dropout=0.0)
        if found is None:
            raise ValueError(f"{folder} has no tokenizer.json; give a folder that gpt_lightning.export wrote")
        tokenizer = found
        _check_ids(net, tokenizer, folder)
    return TextGenerator(net.eval(), tokenizer, {"tokenizer": tokenizer.name, **card, **_shape(net)})


def start_from(source: str, **asked: Any) -> tuple[CausalLM, tiktoken.Encoding | None]:
    """A network to train further, and the tokenizer that its weights were trained with.

    Args:
        source: A checkpoint or run directory, a folder with a config.json, or `hf:` and a name on the hub.
        asked: Fields of the configuration that the user asked for, as in `apply_overrides`.

    Returns:
        The network in training mode, and the tokenizer, None where the source has none.

    Raises:
        OSError: If the source does not exist or cannot be reached.
        ValueError: If it is damaged or disagrees with a field.
    """
    folder = Path(source).expanduser()
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        folder = Path(name) if Path(name).is_dir() else download(name)
    if source.startswith("hf:") or (folder / "config.json").is_file():
        net, tokenizer, card = read_folder(folder, **asked)
    else:
        source = str(find_checkpoint(source))
        net, tokenizer, card = _read_checkpoint(source, **asked)
    step, loss = card.get("step"), card.get("val_loss")
    log.info(
        "init_from=%s: weights of %s parameters%s%s, tokenizer %s",
        source,
        f"{net.num_parameters():,}",
        "" if step is None else f" from step {step:,}",
        "" if loss is None else f" with validation loss {loss:.4f}",
        tokenizer.name if tokenizer else "of the configuration",
    )
    return net.train(), tokenizer


def _device(name: str | None) -> torch.device:
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None or name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if here[kind]))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device={name!r} does not exist; use auto, cpu, cuda or mps") from None
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if not here.get(device.type) or (device.index or 0) >= count:
        found = ", ".join(kind for kind, there in here.items() if there)
        raise ValueError(f"device={name} is not on this machine; use {found}")
    return device


def model_card(net: CausalLM, checkpoint: Mapping[str, Any]) -> ModelCard:
    """The card of a checkpoint's model."""
    config, progress = checkpoint["hyper_parameters"], _mapping(checkpoint.get("progress"))
    metrics, data = _mapping(progress.get("metrics")), _mapping(config.get("data"))
    source = data.get("name") or data.get("path") or _mapping(data.get("corpus")).get("_target_")
    return known_values(
        {
            "name": config.get("name"),
            # without the folder, which is another machine's
            "data": Path(source).name if isinstance(source, str) else None,
            "tokenizer": checkpoint["tokenizer"]["name"],
            "init_from": config.get("init_from"),
            "chat": _mapping(data.get("corpus")).get("_target_") == CHAT or None,
            **_shape(net),
            "step": progress.get("step"),
            "train_loss": progress.get("train_loss"),
            "val_loss": metrics.get("val/loss"),
            "best_val_loss": progress.get("best_val_loss"),
            "perplexity": metrics.get("val/perplexity"),
            "bits_per_byte": metrics.get("val/bits_per_byte"),
        }
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shape(net: CausalLM) -> ModelCard:
    return cast(ModelCard, {"parameters": net.num_parameters(), **asdict(net.config)})


def _check_ids(net: CausalLM, tokenizer: tiktoken.Encoding, source: object) -> None:
    if tokenizer.n_vocab > (size := net.config.vocab_size):
        raise ValueError(f"{source}: the tokenizer has {tokenizer.n_vocab} ids and the model only {size}")


def _read_checkpoint(
    path: str | Path, *, merge: bool = True, model: Network | None = None, **asked: Any
) -> tuple[CausalLM, tiktoken.Encoding, ModelCard]:
    """The network of a checkpoint with its weights, in evaluation mode, its tokenizer and card.

    Adapters are merged into the weights unless `merge` is false.

    Raises:
        ValueError: If the weights do not fit, disagree with a field, or are of a class of others,
            which would run code that the checkpoint names.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["hyper_parameters"]
    with reading(path, "is damaged or not a model of gpt_lightning"):
        lora = _mapping(config.get("lora"))
        adapters = LoRAConfig(**lora) if lora.get("r") else None
        weights = {k[4:]: v for k, v in checkpoint["state_dict"].items() if str(k).startswith("net.")}
        tokenizer = tokenizers.from_state(checkpoint["tokenizer"])
        if model is None:
            shape = read_config(config["model"], path)
    if model is not None:
        net = _build_own(model, _mapping(config.get("model")), weights, path, tokenizer.n_vocab)
    else:
        net = build_with_weights(shape, weights, asked, source=path, lora=adapters)
        net = merge_adapters(net) if adapters and merge else net
    _check_ids(net, tokenizer, path)
    return net.eval(), tokenizer, model_card(net, checkpoint)


def _build_own(
    model: Network, options: Mapping[str, Any], weights: Mapping[str, Any], source: object, n_vocab: int
) -> CausalLM:
    """The network that `model` builds of stored arguments, with its weights; stored classes are left out."""
    if (target := options.get("_target_")) in CONFIGS:
        raise ValueError(f"{source} has no model of your own, but a {target}; leave model= out")
    options = {k: v for k, v in options.items() if k != "_target_" and not _names_class(v)}
    try:
        net = model(**options)
        net.load_state_dict(weights)
        block_size = int(getattr(net, "block_size", None) or options["block_size"])
    except (KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: its model, {target}, is not what model= builds ({reason})") from error
    if not all(bool(weight.isfinite().all()) for weight in net.parameters()):
        raise ValueError(f"{source} has weights that are not finite; use an earlier checkpoint")
    return as_causal_lm(net, vocab_size=options.get("vocab_size") or n_vocab, block_size=block_size)


def _names_class(value: Any) -> bool:
    """Whether a stored value says what to import, at any depth."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_names_class, value.values()))
    return isinstance(value, list) and any(map(_names_class, value))
