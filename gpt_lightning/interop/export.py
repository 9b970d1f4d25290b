"""Writes a model to a folder for other programs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import tiktoken

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.base import file_sha256
from gpt_lightning.data.corpus.chat import TEMPLATE
from gpt_lightning.data.files import json_object, sealed, unsealed, write_json
from gpt_lightning.interop.folder import CARD_FILE, WEIGHTS_FORMAT, ModelCard
from gpt_lightning.interop.gpt2 import save_gpt2, write_safetensors
from gpt_lightning.interop.qwen3 import save_rotary
from gpt_lightning.interop.tokenizer import save_tokenizer
from gpt_lightning.model.gpt import GPT, CausalLM
from gpt_lightning.model.lora import LoRALinear
from gpt_lightning.model.qwen3 import Rotary
from gpt_lightning.model.weights import target_of

README = "README.md"


class Model(Protocol):
    """Anything with these attributes, such as `gpt_lightning.TextGenerator`."""

    net: CausalLM
    tokenizer: tiktoken.Encoding
    info: ModelCard


def write_huggingface(model: Model, folder: Path) -> None:
    """config.json, model.safetensors and tokenizer files for transformers' AutoModelForCausalLM.

    Raises:
        ValueError: If the model has ids that the tokenizer lacks.
    """
    spare = model.net.config.vocab_size - model.tokenizer.n_vocab
    if spare:
        raise ValueError(
            f"model.vocab_size={model.net.config.vocab_size} has {spare} ids that the tokenizer lacks, so "
            "transformers could produce what it cannot decode; export format=weights instead"
        )
    save: Callable[..., None] = save_rotary if isinstance(model.net, Rotary) else save_gpt2
    save(model.net, folder, end_of_text=model.tokenizer.eot_token)
    template = TEMPLATE if model.info.get("chat") else None
    save_tokenizer(model.tokenizer, folder, block_size=model.net.config.block_size, chat_template=template)
    (folder / README).write_text(readme(model), encoding="utf-8")


def write_weights(model: Model, folder: Path) -> None:
    """The parameters, the fields of the configuration and the tokenizer, for `gpt_lightning.load`."""
    config = {"_target_": target_of(model.net.config), **asdict(model.net.config)}
    write_json(folder / "config.json", {**WEIGHTS_FORMAT, "model": config})
    weights = {name: parameter.detach().contiguous() for name, parameter in model.net.named_parameters()}
    write_safetensors(weights, folder / "model.safetensors")  # a tied head is the token table, once
    tokenizers.save(model.tokenizer, folder / "tokenizer.json")


def write_peft(model: Model, folder: Path) -> None:
    """Only the adapters, for peft's PeftModel.from_pretrained(BASE, folder).

    Raises:
        ValueError: If the model has no adapters.
    """
    layers = {name: layer for name, layer in model.net.named_modules() if isinstance(layer, LoRALinear)}
    if not layers:
        raise ValueError("format=peft writes adapters, but the model has none; use another format")
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.info.get("init_from") or "").removeprefix("hf:"),
        "r": first.lora_A.out_features,
        "lora_alpha": first.scaling * first.lora_A.out_features,
        "lora_dropout": first.lora_dropout.p,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "fan_in_fan_out": isinstance(model.net, GPT),  # transformers' GPT-2 keeps its weights transposed
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    weights = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).weight.detach()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    write_safetensors(weights, folder / "adapter_model.safetensors")


FORMATS: dict[str, Callable[[Model, Path], None]] = {
    "huggingface": write_huggingface,
    "weights": write_weights,
    "peft": write_peft,
}


def export(model: Model, output: str | Path, *, format: str, overwrite: bool = False) -> Path:
    """Write a model to a folder: a new or empty one, or that of an earlier export.

    Args:
        model: As from `gpt_lightning.inference.loading.read_model`.
        output: The folder.
        format: A key of FORMATS.
        overwrite: Whether to replace the files of an earlier export. Files that it did not write, or that
            were changed since, stay as they are.

    Returns:
        The folder.

    Raises:
        OSError: If the folder cannot be written, or has a file in the place of one of the export's.
        ValueError: If the format does not exist or cannot express the model.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} does not exist; use {', '.join(FORMATS)}")
    folder = Path(output).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output={output} is a file; give the name of a folder")
    mine = _exported(folder)
    if mine is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"output={output} is a folder with other files; give another one")
    if mine is not None and not overwrite:
        raise FileExistsError(f"output={output} holds an export; add overwrite=true to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".export.", dir=folder if folder.exists() else folder.parent))
    try:
        new = partial / "new"
        new.mkdir()  # with the usual permissions; mkdtemp's are narrower
        FORMATS[format](model, new)
        old = mine or set()
        names = {line.split("  ", 1)[1] for line in old}
        for file in new.iterdir():
            if file.name in names or not os.path.lexists(folder / file.name):
                continue
            if file.name != README:
                raise FileExistsError(
                    f"{folder / file.name} was not written by an export, or was changed since; move it away, "
                    "or give another output="
                )
            file.unlink()  # a user's own one stays
        _move(new, folder, old, model.info)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sums(folder: Path) -> set[str]:
    """A line with the SHA-256 and the name of each file, as sha256sum prints it."""
    return {f"{file_sha256(file)}  {file.name}" for file in folder.iterdir() if file.is_file()}


def _exported(folder: Path) -> set[str] | None:
    """`_sums` of what an export wrote to a folder and nobody changed since; None if there is no export."""
    try:
        card = json_object(folder / CARD_FILE)
        return _sums(folder).intersection(unsealed(card)["files"]) if "sha256" in card else None
    except (KeyError, OSError, RecursionError, TypeError, ValueError):
        return None


def _move(new: Path, folder: Path, old: set[str], info: ModelCard) -> None:
    """Put the files of `new` in the place of the old ones.

    An interruption leaves files that all are in the card, so that they can be replaced, and no config.json,
    without which no program takes them for a model.
    """
    sums = _sums(new)
    if folder.exists():
        write_json(folder / CARD_FILE, sealed({**info, "files": sorted(old | sums)}))
        for line in old:
            (folder / line.split("  ", 1)[1]).unlink()
    write_json(new / CARD_FILE, sealed({**info, "files": sorted(sums)}))
    if not folder.exists():
        new.rename(folder)
        return
    for file in sorted(new.iterdir(), key=lambda file: (file.name == CARD_FILE, file.name == "config.json")):
        file.replace(folder / file.name)


def readme(model: Model) -> str:
    """The model card for the hub, as Markdown."""
    info = {key: value for key, value in model.info.items() if value is not None}
    rows = "\n".join(f"| {key} | {value} |" for key, value in info.items())
    architecture = "GPT-2" if isinstance(model.net, GPT) else type(model.net).__name__
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {info.get("name", "model")}

A language model with {architecture}'s architecture, trained with gpt_lightning. Losses are in nats per token.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=100, do_sample=True)[0]))
```
"""
