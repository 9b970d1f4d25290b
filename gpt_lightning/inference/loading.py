"""Reads a trained model: weights, configuration and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import tiktoken
import torch

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.cpu_kernels import DTYPES, pack
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop.folder import ModelCard, read_folder
from gpt_lightning.interop.gpt2 import download
from gpt_lightning.model.gpt import GPT
from gpt_lightning.model.lora import LoRAConfig, merge_adapters
from gpt_lightning.model.weights import build_with_weights, read_config
from gpt_lightning.rundir.checkpoint import find_checkpoint, read_checkpoint

log = logging.getLogger(__name__)

GPT_TARGET = "gpt_lightning.model.gpt.build_gpt"


def load(
    path: str | Path, device: str | None = None, dtype: str | None = None, *, cuda_graph: bool = False
) -> TextGenerator:
    """A trained model for generating text; it cannot be trained or saved.

        model = load("outputs/gpt/2026-01-31_12-00-00/checkpoints/best.ckpt")
        print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8))

    Args:
        path: A checkpoint, a run directory, or a folder that `gpt_lightning.export` wrote.
        device: Such as "cpu", "cuda" or "mps"; None takes the fastest available one.
        dtype: "float32", "bfloat16" or, on a CPU, "int8" for the weights; None is float32.
        cuda_graph: As in `TextGenerator`.

    Raises:
        OSError: If there is nothing to load at `path`.
        ValueError: If it is damaged or not a model of gpt_lightning, or if device or dtype do not exist.
    """
    where = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} does not exist; use {', '.join(DTYPES)}")
    model = read_model(path)
    model.cuda_graph = cuda_graph
    model.net.to(where)
    if where.type == "cpu" or dtype == "int8":
        pack(model.net, dtype or "float32")
    elif dtype == "bfloat16":
        model.net.to(torch.bfloat16)
    return model


def read_model(path: str | Path, *, merge: bool = True) -> TextGenerator:
    """A model as it was trained, in float32 on the CPU; arguments and errors as `load` and `load_net`."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        checkpoint = read_checkpoint(path)
        net = load_net(checkpoint, merge=merge, dropout=0.0)
        return TextGenerator(net, tokenizers.from_state(checkpoint["tokenizer"]), describe(net, checkpoint))
    net, tokenizer, card = read_folder(folder, dropout=0.0)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json; give a folder that gpt_lightning.export wrote")
    return TextGenerator(net.eval(), tokenizer, {"tokenizer": tokenizer.name, **_shape(net), **card})


def start_from(source: str, **asked: Any) -> tuple[GPT, tiktoken.Encoding | None]:
    """A network to train further, and the tokenizer that its weights were trained with.

    Args:
        source: A checkpoint or run directory, a folder with a config.json, or `hf:` and a name on the hub.
        asked: Fields of GPTConfig that the user asked for, as in `apply_overrides`.

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
    card: ModelCard
    tokenizer: tiktoken.Encoding | None
    if source.startswith("hf:") or (folder / "config.json").is_file():
        net, tokenizer, card = read_folder(folder, **asked)
    else:
        checkpoint = read_checkpoint(source)
        net = load_net(checkpoint, source=source, **asked)
        tokenizer = tokenizers.from_state(checkpoint["tokenizer"])
        card, source = describe(net, checkpoint), str(find_checkpoint(source))
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


def describe(net: GPT, checkpoint: Mapping[str, Any]) -> ModelCard:
    """The card of a checkpoint's model."""
    config, progress = checkpoint["hyper_parameters"], _mapping(checkpoint.get("progress"))
    metrics, data = _mapping(progress.get("metrics")), _mapping(config.get("data"))
    source = data.get("name") or data.get("path") or _mapping(data.get("corpus")).get("_target_")
    return {
        "name": config.get("name"),
        "data": Path(str(source)).name if source else None,  # without the folder, which is another machine's
        "tokenizer": checkpoint["tokenizer"]["name"],
        "init_from": config.get("init_from"),
        **_shape(net),
        "step": progress.get("step"),
        "train_loss": progress.get("train_loss"),
        "val_loss": metrics.get("val/loss"),
        "best_val_loss": progress.get("best_val_loss"),
        "perplexity": metrics.get("val/perplexity"),
        "bits_per_byte": metrics.get("val/bits_per_byte"),
    }


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shape(net: GPT) -> ModelCard:
    return cast(ModelCard, {"parameters": net.num_parameters(), **asdict(net.config)})


def load_net(
    checkpoint: Mapping[str, Any], *, merge: bool = True, source: str = "the checkpoint", **asked: Any
) -> GPT:
    """The network of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: As from `read_checkpoint`.
        merge: Whether adapters are merged into the weights, which gives a plain GPT.
        source: Where the checkpoint is from, for messages.
        asked: Fields of GPTConfig, as in `apply_overrides`.

    Raises:
        ValueError: If the weights do not fit, disagree with a field, or are of a class other than GPT,
            which would run code that the checkpoint names.
    """
    config = checkpoint["hyper_parameters"]
    options = dict(config["model"])
    target = options.pop("_target_", GPT_TARGET)
    if target != GPT_TARGET:
        raise ValueError(f"the checkpoint's model is a {target}; build it yourself and load its state_dict")
    lora = _mapping(config.get("lora"))
    adapters = LoRAConfig(**lora) if lora.get("r") else None
    weights = {k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items() if k.startswith("net.")}
    net = build_with_weights(read_config(options, source), weights, asked, source=source, lora=adapters)
    return (merge_adapters(net) if adapters and merge else net).eval()
