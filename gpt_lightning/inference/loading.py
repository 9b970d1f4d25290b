"""A trained model from a checkpoint alone: weights, shape and tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.cpu_kernels import DTYPES, pack
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.interop import tokenizer as huggingface_tokenizer
from gpt_lightning.interop.export import CARD, WEIGHTS_FORMAT
from gpt_lightning.interop.gpt2 import load_gpt2, read_safetensors
from gpt_lightning.model.empty import EmptyInit
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lora import LoRAConfig, add_adapters, merge_adapters
from gpt_lightning.rundir.checkpoint import read_checkpoint

GPT2_VOCABULARY = 50257  # a GPT-2 folder of this size without a tokenizer has GPT-2's
GPT_TARGET = "gpt_lightning.model.gpt.build_gpt"


def load(path: str | Path, device: str | None = None, dtype: str | None = None) -> TextGenerator:
    """A trained model, ready to generate text, but no longer to be trained or saved.

        model = load("outputs/gpt/2026-01-31_12-00-00/checkpoints/best.ckpt")
        print(model.generate("Once upon a time", max_new_tokens=100, temperature=0.8))

    Args:
        path: A checkpoint, a run directory, or a folder that `gpt_lightning.export` wrote.
        device: Such as "cpu", "cuda" or "mps"; None takes the fastest that is there.
        dtype: "float32", "bfloat16" or, on a CPU, "int8" for the weights; None is float32.

    Raises:
        OSError: If there is nothing to load at `path`.
        ValueError: If it is damaged or not a model of gpt_lightning, or if device or dtype do not exist.
    """
    where = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} does not exist; use {', '.join(DTYPES)}")
    model = read_model(path)
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
        return TextGenerator(net, load_tokenizer(checkpoint), describe(net, checkpoint))
    net, tokenizer, info = read_folder(folder, dropout=0.0)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer.json; give a folder that gpt_lightning.export wrote")
    return TextGenerator(net.eval(), tokenizer, {"tokenizer": tokenizer.name, **_shape(net), **info})


def read_folder(folder: Path, **overrides: Any) -> tuple[GPT, tiktoken.Encoding | None, dict[str, Any]]:
    """The network, the tokenizer (None if it is not there) and the card of an exported folder.

    Args:
        folder: In Hugging Face's layout, or of bare weights; with a config.json.
        overrides: Values of GPTConfig, as in `load_gpt2`.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged or not for this package, or contradicts an override.
    """
    config = _read_json(folder / "config.json")
    info = _read_json(folder / CARD) if (folder / CARD).is_file() else {}
    if config.items() >= WEIGHTS_FORMAT.items():
        known = {field.name for field in fields(GPTConfig)}
        if not isinstance(config.get("model"), dict) or not config["model"].keys() <= known:
            raise ValueError(f"{folder / 'config.json'} is not of this version; export the model again")
        with EmptyInit():
            net = GPT(GPTConfig(**{**config["model"], **overrides}))
        weights = read_safetensors(folder / "model.safetensors")
        if net.config.tie_weights and "transformer.wte.weight" in weights:
            weights["lm_head.weight"] = weights["transformer.wte.weight"]
        load_weights(net, weights)
        return net, tokenizers.load(folder / "tokenizer.json"), info
    net = load_gpt2(folder, **overrides)
    tokenizer = huggingface_tokenizer.load_tokenizer(folder)
    if tokenizer is None and net.config.vocab_size == GPT2_VOCABULARY:
        tokenizer = tokenizers.GPT2().build(lambda split: iter(()))
    return net, tokenizer, info


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); export the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged; export the model again")
    return content


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


def describe(net: GPT, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a card of a checkpoint's model says, in plain values; None where the run did not measure it."""
    config, progress = checkpoint["hyper_parameters"], _mapping(checkpoint.get("progress"))
    metrics, data = _mapping(progress.get("metrics")), _mapping(config.get("data"))
    source = data.get("name") or data.get("path") or _mapping(data.get("corpus")).get("_target_")
    return {
        "name": config.get("name"),
        "data": Path(str(source)).name if source else None,  # a path of another machine says no more
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


def _shape(net: GPT) -> dict[str, Any]:
    return {"parameters": net.num_parameters(), **asdict(net.config)}


def model_options(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of GPTConfig that a checkpoint was trained with.

    Raises:
        ValueError: If its model is not this package's GPT: its class would have to be named, and run.
    """
    options = dict(checkpoint["hyper_parameters"]["model"])
    target = options.pop("_target_", GPT_TARGET)
    if target != GPT_TARGET:
        raise ValueError(f"the checkpoint's model is a {target}; build it yourself and load its state_dict")
    unknown = options.keys() - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise ValueError(f"the checkpoint's model has {min(unknown)}, which this version does not know")
    return options


def load_weights(net: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a network of the same shape.

    Raises:
        ValueError: If the shapes differ; names the first parameter that does.
    """
    for name, parameter in net.state_dict().items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != tuple(parameter.shape):
            raise ValueError(
                f"the weights do not fit the model: {name} is {found or 'missing'} there and "
                f"{tuple(parameter.shape)} here; use the model that was trained"
            )
    extra = weights.keys() - net.state_dict().keys()
    if extra:
        raise ValueError(f"the weights do not fit the model: there is also {min(extra)}")
    net.load_state_dict(weights)


def load_net(checkpoint: Mapping[str, Any], *, merge: bool = True, **overrides: Any) -> GPT:
    """The network of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: As from `read_checkpoint`.
        merge: Whether adapters become part of the weights, which makes a plain GPT.
        overrides: Fields of GPTConfig that do not change the weights' shapes, such as dropout.

    Raises:
        ValueError: If the weights do not fit.
    """
    with EmptyInit():
        net = GPT(GPTConfig(**{**model_options(checkpoint), **overrides}))
    lora = _mapping(checkpoint["hyper_parameters"].get("lora"))
    if lora.get("r"):
        add_adapters(net, LoRAConfig(**lora))
    prefix = "net."
    weights = {k[len(prefix) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    load_weights(net, weights)
    return (merge_adapters(net) if lora.get("r") and merge else net).eval()


def load_tokenizer(checkpoint: Mapping[str, Any]) -> tiktoken.Encoding:
    """The tokenizer of a checkpoint."""
    return tokenizers.from_state(checkpoint["tokenizer"])
