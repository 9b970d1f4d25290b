"""A GPT with given weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.lora import LoRAConfig, add_adapters

TOKEN_TABLES = ("wte.weight", "lm_head.weight")


class EmptyInit(TorchFunctionMode):
    """Context in which new modules keep uninitialized memory, because their weights are loaded next.

    Drawing the 1.5 billion random numbers of GPT-2 XL would take minutes.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def read_config(options: Mapping[str, Any], source: object) -> GPTConfig:
    """The GPTConfig of stored fields.

    Raises:
        ValueError: If there is a field that this version does not know, or a value is out of range.
    """
    if unknown := options.keys() - {field.name for field in fields(GPTConfig)}:
        raise ValueError(f"the model in {source} has {min(unknown)}, which this version does not know")
    return GPTConfig(**options)


def apply_overrides(config: GPTConfig, asked: Mapping[str, Any], source: object) -> GPTConfig:
    """The configuration of trained weights with the fields that a user asked for.

    Args:
        config: The configuration of the weights.
        asked: Fields of GPTConfig. `dropout` and `vocab_multiple` are free, `block_size` may be smaller
            than the source's (the first positions are kept), others must agree; None asks for nothing.
        source: Where the weights are from, for messages.

    Raises:
        ValueError: If a field disagrees; names the key, the value and the source's value.
    """
    asked = {key: value for key, value in asked.items() if value is not None}
    known = asdict(config) | {
        "n_inner": config.n_inner or 4 * config.n_embd,
        "qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
    }
    for key, value in asked.items():
        smaller_block = key == "block_size" and type(value) is int and value < config.block_size
        if key not in ("dropout", "vocab_multiple") and value != known[key] and not smaller_block:
            raise ValueError(
                f"model.{key}={value!r} but the weights in {source} have {known[key]!r}; leave the key out"
            )
    return replace(config, **asked)


@torch.no_grad()
def build_with_weights(
    config: GPTConfig,
    weights: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    *,
    source: object,
    lora: LoRAConfig | None = None,
) -> GPT:
    """A GPT in float32 with the given weights.

    Args:
        config: The configuration of the weights.
        weights: By parameter name; a tied head may be left out.
        asked: As in `apply_overrides`.
        source: Where the weights are from, for messages.
        lora: The adapters that the weights include; None for none.

    Raises:
        ValueError: If a field that was asked for disagrees, or the weights do not fit the configuration.
    """
    with EmptyInit():
        net = GPT(apply_overrides(config, asked, source))
    if lora:
        add_adapters(net, lora)
    left = set(weights) - ({"lm_head.weight"} if config.tie_weights else set())
    for name, parameter in net.named_parameters():
        if name not in weights:
            raise ValueError(f"{source} has no weight {name!r}, which its configuration asks for")
        rows = len(parameter)  # those of the source differ where the padding or the block does
        if name.endswith(TOKEN_TABLES):
            rows = config.padded_vocab_size
        elif name.endswith("wpe.weight"):
            rows = config.block_size
        expected = (rows, *parameter.shape[1:])
        if weights[name].shape != expected:
            raise ValueError(
                f"{source}: weight {name!r} has shape {tuple(weights[name].shape)} where its configuration "
                f"asks for {expected}; take both from the same model"
            )
        rows = min(rows, len(parameter))
        parameter[:rows] = weights[name][:rows]
        parameter[rows:] = 0.0
        left.discard(name)
    if left:
        raise ValueError(f"{source} has weights that the model does not, such as {min(left)!r}")
    return net
