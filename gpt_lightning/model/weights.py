"""A network with given weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpt_lightning.model.gpt import GPT, CausalLM, GPTConfig, ModelConfig
from gpt_lightning.model.lora import LoRAConfig, add_adapters
from gpt_lightning.model.qwen3 import Qwen3, Qwen3Config, RotaryConfig, StarCoder2, StarCoder2Config

# The networks of this package, by the _target_ that a checkpoint has; of no others a class is imported.
CONFIGS: dict[str, type[ModelConfig]] = {
    "gpt_lightning.model.gpt.build_gpt": GPTConfig,
    "gpt_lightning.model.qwen3.build_qwen3": Qwen3Config,
    "gpt_lightning.model.qwen3.build_starcoder2": StarCoder2Config,
}
NETWORKS: dict[type[ModelConfig], Callable[[Any], CausalLM]] = {
    GPTConfig: GPT,
    Qwen3Config: Qwen3,
    StarCoder2Config: StarCoder2,
}


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


def target_of(config: ModelConfig) -> str:
    """The _target_ that stands for a configuration's class."""
    return next(target for target, kind in CONFIGS.items() if kind is type(config))


def read_config(options: Mapping[str, Any], source: object) -> ModelConfig:
    """The configuration of stored fields, of which `_target_` says the class; without it, GPTConfig.

    Raises:
        ValueError: If the class or a field is unknown to this version, or a value is out of range.
    """
    options = dict(options)
    kind = CONFIGS.get(target := options.pop("_target_", target_of(GPTConfig(vocab_size=1))))
    if kind is None:
        raise ValueError(
            f"its model is a {target}, which a file cannot make this program import: name it with "
            "--config-dir and model=, or pass it to gpt_lightning.load as model="
        )
    if unknown := options.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"the model in {source} has {min(map(str, unknown))}, unknown to this version")
    if "vocab_size" not in options:
        raise ValueError(f"the model in {source} has no vocab_size")
    return kind(**options)


def apply_overrides(config: ModelConfig, asked: Mapping[str, Any], source: object) -> ModelConfig:
    """The configuration of trained weights with the fields that a user asked for.

    Args:
        config: The configuration of the weights.
        asked: Fields of a configuration. `dropout` and `vocab_multiple` are free, `block_size` may be smaller
            than the source's (the first positions are kept), others must agree; None asks for nothing.
        source: Where the weights are from, for messages.

    Raises:
        ValueError: If a field disagrees; names the key, the value and the source's value.
    """
    asked = {key: value for key, value in asked.items() if value is not None}
    known = config.values()
    for key, value in asked.items():
        if key not in known:
            raise ValueError(f"model.{key} is no option of the weights in {source}; leave the key out")
        smaller_block = key == "block_size" and type(value) is int and value < config.block_size
        if key not in ("dropout", "vocab_multiple") and value != known[key] and not smaller_block:
            raise ValueError(
                f"model.{key}={value!r} but the weights in {source} have {known[key]!r}; leave the key out"
            )
    return replace(config, **asked)


@torch.no_grad()
def build_with_weights(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    *,
    source: object,
    lora: LoRAConfig | None = None,
) -> CausalLM:
    """A network in float32 with the given weights.

    Args:
        config: The configuration of the weights.
        weights: By parameter name; a tied head may be left out.
        asked: As in `apply_overrides`.
        source: Where the weights are from, for messages.
        lora: The adapters that the weights include; None for none.

    Raises:
        ValueError: If a field that was asked for disagrees, or the weights do not fit the configuration.
    """
    _check_weights(config, weights, source, lora)
    with EmptyInit():
        net = NETWORKS[type(config)](apply_overrides(config, asked, source))
    if lora:
        add_adapters(net, lora)
    for name, parameter in net.named_parameters():
        rows = min(len(parameter), len(weights[name]))  # they differ where the padding or the block does
        parameter[:rows] = weights[name][:rows]
        parameter[rows:] = 0.0
        if not parameter.isfinite().all():
            raise ValueError(f"{source}: weight {name!r} has values that are not finite; use an earlier one")
    return net


def _check_weights(
    config: ModelConfig, weights: Mapping[str, Any], source: object, lora: LoRAConfig | None
) -> None:
    """Compares weights with a configuration before anything of the size that it says is built.

    Raises:
        ValueError: If they do not fit, or say more than the file holds.
    """
    held: dict[int, int] = {}  # bytes of each storage
    for name, weight in weights.items():
        plain = isinstance(weight, Tensor) and weight.layout == torch.strided and weight.device.type == "cpu"
        if not plain or not weight.is_floating_point():
            raise ValueError(f"{source}: weight {name!r} is no plain tensor of floating-point numbers")
        held[weight.untyped_storage().data_ptr()] = weight.untyped_storage().nbytes()
    if sum(weight.nbytes for weight in weights.values()) > 2 * sum(held.values()):  # 2: a tied head
        raise ValueError(f"{source} has weights that repeat what it holds; save them as plain tensors")
    left = set(weights) - ({"lm_head.weight"} if config.tie_weights else set())
    for name, expected in _shapes(config, lora, source):
        if name not in weights:
            raise ValueError(f"{source} has no weight {name!r}, which its configuration asks for")
        if weights[name].shape != expected:
            raise ValueError(
                f"{source}: weight {name!r} has shape {tuple(weights[name].shape)} where its configuration "
                f"asks for {tuple(expected)}; take both from the same model"
            )
        left.discard(name)
    if left:
        raise ValueError(f"{source} has weights that the model does not, such as {min(left)!r}")


def _shapes(config: ModelConfig, lora: LoRAConfig | None, source: object) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of a model's parameters, from one layer without memory: a file can say any number."""
    small: dict[str, Any] = {"n_layer": 1} | ({"block_size": 1} if isinstance(config, RotaryConfig) else {})
    try:
        with torch.device("meta"), EmptyInit():
            net = NETWORKS[type(config)](replace(config, **small))
            if lora:
                add_adapters(net, lora)
    except (OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(f"{source} has a configuration of impossible size; use another one") from error
    for name, parameter in net.named_parameters():
        in_block = re.fullmatch(r"(.+\.(?:h|layers)\.)0(\..+)", name)
        for layer in range(config.n_layer if in_block else 1):
            yield f"{in_block[1]}{layer}{in_block[2]}" if in_block else name, parameter.shape
