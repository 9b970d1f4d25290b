"""Reads and writes GPT-2 weights in the Hugging Face layout.

A folder holds config.json and model.safetensors (or the shards that its index names). Its linear
layers are "Conv1D": stored (in, out), the transpose of nn.Linear's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt_lightning.data.files import json_object, reading, write_json
from gpt_lightning.model.gpt import GPT, CausalLM, GPTConfig
from gpt_lightning.model.weights import build_with_weights

EXACT_GELU = "gelu"  # in config.json
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Settings of config.json that change the computation, with the values that GPT implements; the first one is
# the default.
COMPUTATION: dict[str, tuple[object, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh", EXACT_GELU),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def load_gpt2(source: str | Path, **asked: Any) -> CausalLM:
    """A GPT in float32 with the weights of a Hugging Face GPT-2.

    Args:
        source: A folder, or a name on the hub such as "gpt2" or "gpt2-medium".
        asked: Fields of GPTConfig, as in `apply_overrides`.

    Raises:
        OSError: If the folder is incomplete or the hub cannot be reached.
        ValueError: If the source is not a GPT-2, or disagrees with a field.
    """
    folder = Path(source) if Path(source).is_dir() else download(str(source))
    config = _read_config(folder)
    padding = {"vocab_multiple": GPTConfig.vocab_multiple}
    return build_with_weights(config, _names_of_gpt(read_weights(folder)), padding | asked, source=folder)


def save_gpt2(net: GPT, folder: str | Path, *, end_of_text: int | None = None) -> None:
    """Write config.json and model.safetensors without padding of the vocabulary, for `transformers`.

    Args:
        net: The model. Missing biases become zeros, which computes the same.
        folder: For the files.
        end_of_text: Id with which `transformers` begins and ends texts.
    """
    config = net.config
    weights: dict[str, Tensor] = {}
    for name, parameter in net.named_parameters():
        weight = parameter.detach().float().cpu()
        if name.endswith(("wte.weight", "lm_head.weight")):
            weight = weight[: config.vocab_size]
        weights[name] = (weight.t() if name.endswith(CONV1D) else weight).contiguous()
    for name, weight in list(weights.items()):  # a bias beside each gain and matrix of the blocks and ln_f
        if name.endswith(".weight") and (".h." in name or ".ln_f." in name):
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(weight.shape[-1]))
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "tie_word_embeddings": config.tie_weights,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        **{key: values[0] for key, values in COMPUTATION.items()},
        **({"activation_function": EXACT_GELU} if config.exact_gelu else {}),
        "initializer_range": 0.02,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": "float32",
    }
    write_json(Path(folder) / "config.json", settings)
    write_safetensors(weights, Path(folder) / "model.safetensors")


def write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    """Write named tensors to a file."""
    path.touch()
    mode = path.stat().st_mode  # of the user's files; safetensors makes one for its owner alone
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; pickled weights (.bin) are not read, save the model as safetensors"
        )
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError derives from Exception alone
        raise ValueError(f"{path} is damaged ({error}); download it again") from error


def download(name: str) -> Path:
    """The folder of a model's files from the hub or its cache; OSError if the hub does not provide them."""
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "tokenizer.json"]
        files += ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
        return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:  # no network, no such model, not a valid name
        raise OSError(
            f"init_from=hf:{name}: it is no folder, and the Hugging Face hub did not provide it "
            f"({type(error).__name__}); check the name and the network, or give a local folder"
        ) from error


def _read_config(folder: Path) -> GPTConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json and weights")
    with reading(path, "is not the configuration of a GPT-2 that is supported", "load another model"):
        source = json_object(path)
        if source.get("model_type") != "gpt2":
            raise ValueError(f"model_type={source.get('model_type')!r} is not 'gpt2'")
        check_computation(source, COMPUTATION)
        return GPTConfig(
            **{key: source[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
            block_size=source.get("n_positions", 1024),
            n_inner=source.get("n_inner") or 4 * source["n_embd"],
            tie_weights=source.get("tie_word_embeddings", True),
            dropout=source.get("resid_pdrop", 0.1),
            exact_gelu=source.get("activation_function") == EXACT_GELU,
            vocab_multiple=1,
        )


def check_computation(source: dict[str, Any], known: dict[str, tuple[object, ...]]) -> None:
    """Refuse a config.json with settings that the network does not implement; known has the default first."""
    for key, values in known.items():
        if source.get(key, values[0]) not in values:
            raise ValueError(f"{key}={source[key]!r} is not supported, only {' or '.join(map(repr, values))}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the files that its index names."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        with reading(index, "is not an index of weights"):  # never of files outside the folder
            files = {Path(file).name for file in json_object(index)["weight_map"].values()}
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        weights |= read_safetensors(folder / file)
    return weights


def _names_of_gpt(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by GPT's names, linear layers as nn.Linear has them."""
    weights = {
        # old files have no prefix
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": weight
        for name, weight in weights.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # causal masks in old files
    }
    return {n: w.t() if n.endswith(CONV1D) and w.dim() == 2 else w for n, w in weights.items()}
