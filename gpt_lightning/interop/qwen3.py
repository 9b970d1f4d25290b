"""Reads and writes Qwen3, Llama and StarCoder2 in Hugging Face's layout, with the names of `model.qwen3`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpt_lightning.data.files import json_object, reading, write_json
from gpt_lightning.interop.gpt2 import EXACT_GELU, check_computation, read_weights, write_safetensors
from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.qwen3 import EPS, Qwen3Config, Rotary, RotaryConfig, StarCoder2Config
from gpt_lightning.model.weights import build_with_weights

# Classes of `transformers` by model_type
KINDS = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "starcoder2": "Starcoder2ForCausalLM"}
# Settings of config.json that change the computation, with the values that are implemented, the default first
GATED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "rms_norm_eps": (EPS,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
}
STARCODER2: dict[str, tuple[object, ...]] = {
    "hidden_act": ("gelu_pytorch_tanh", EXACT_GELU),
    "norm_epsilon": (1e-5,),
    "use_bias": (True,),
    "sliding_window": (None,),
    "rope_scaling": (None,),
}


def load_rotary(folder: Path, **asked: Any) -> CausalLM:
    """A Qwen3 or StarCoder2 in float32 with the weights of a folder.

    Raises:
        OSError: If the folder is incomplete.
        ValueError: If it has an option that is not supported, or disagrees with a field that was asked for.
    """
    config = _read_config(folder / "config.json")
    padding = {"vocab_multiple": RotaryConfig.vocab_multiple}
    return build_with_weights(config, read_weights(folder), padding | asked, source=folder)


def save_rotary(net: Rotary, folder: Path, *, end_of_text: int | None = None) -> None:
    """Write config.json and model.safetensors without padding of the vocabulary, for `transformers`.

    Args:
        net: The model; a Qwen3 without QK-norm is a Llama.
        folder: For the files.
        end_of_text: Id with which `transformers` begins and ends texts.
    """
    config = net.config
    kind = ("qwen3" if config.qk_norm else "llama") if config.gated else "starcoder2"
    own = {key: values[0] for key, values in (GATED if config.gated else STARCODER2).items()}
    if config.gated:
        own["head_dim"] = config.head_width
    else:
        own |= dict.fromkeys(("residual_dropout", "embedding_dropout"), config.dropout)
    if config.exact_gelu:
        own["hidden_act"] = EXACT_GELU
    weights = {name: parameter.detach().float().cpu() for name, parameter in net.named_parameters()}
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][: config.vocab_size].contiguous()
    write_safetensors(weights, folder / "model.safetensors")
    settings = {
        "architectures": [KINDS[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner_width,
        "rope_theta": config.rope_theta,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_weights,
        **own,
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    write_json(folder / "config.json", settings)


def _read_config(path: Path) -> RotaryConfig:
    what = "is not the configuration of a Qwen3, Llama or StarCoder2 that is supported"
    with reading(path, what, "load another model"):
        source = json_object(path)
        rope = source.get("rope_parameters") or {"rope_theta": source.get("rope_theta", 10000.0)}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={rope['rope_type']!r} is not supported, only 'default'")
        kind = source["model_type"]
        check_computation(source, STARCODER2 if kind == "starcoder2" else GATED)
        build: Callable[..., RotaryConfig] = partial(
            StarCoder2Config, exact_gelu=source.get("hidden_act") == EXACT_GELU
        )
        if kind != "starcoder2":
            build = partial(Qwen3Config, head_dim=source.get("head_dim"), qk_norm=kind == "qwen3")
        return build(
            vocab_size=source["vocab_size"],
            block_size=source["max_position_embeddings"],
            n_layer=source["num_hidden_layers"],
            n_head=source["num_attention_heads"],
            n_kv_head=source.get("num_key_value_heads"),
            n_embd=source["hidden_size"],
            n_inner=source["intermediate_size"],
            rope_theta=float(rope["rope_theta"]),
            dropout=source.get("attention_dropout", 0.0),
            tie_weights=source.get("tie_word_embeddings", kind == "starcoder2"),
            vocab_multiple=1,
        )
