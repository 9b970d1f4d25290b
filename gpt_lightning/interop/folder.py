"""Folders with a model, as `gpt_lightning.export` or transformers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast, get_type_hints

import tiktoken

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.files import json_object, reading
from gpt_lightning.interop.gpt2 import load_gpt2, read_safetensors
from gpt_lightning.interop.qwen3 import KINDS, load_rotary
from gpt_lightning.interop.tokenizer import load_tokenizer
from gpt_lightning.model.gpt import CausalLM
from gpt_lightning.model.weights import build_with_weights, read_config

CARD_FILE = "card.json"  # in every exported folder
# config.json of a folder with bare weights; distinguishes it from folders of other programs
WEIGHTS_FORMAT = {"format": "gpt_lightning", "version": 1}
GPT2_VOCABULARY = 50257  # a GPT-2 folder of this size without a tokenizer has GPT-2's


class ModelCard(TypedDict, total=False):
    """What is known about a model; losses in nats per token, None where the run did not measure them.

    The fields of the model's configuration are in it as well.
    """

    name: str | None
    data: str | None
    tokenizer: str
    init_from: str | None
    chat: bool  # true if it was trained on data=chat
    parameters: int
    step: int | None
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    perplexity: float | None
    bits_per_byte: float | None


def read_folder(folder: Path, **asked: Any) -> tuple[CausalLM, tiktoken.Encoding | None, ModelCard]:
    """The network, the tokenizer (None if there is none) and the card of a folder with a config.json.

    Args:
        folder: In Hugging Face's layout, or with bare weights.
        asked: Fields of the configuration, as in `apply_overrides`.

    Raises:
        OSError: If a file is missing.
        ValueError: If a file is damaged or not for this package, or disagrees with a field.
    """
    path, card = folder / "config.json", folder / CARD_FILE
    with reading(card, "is damaged", "export the model again"):
        known = known_values(json_object(card) if card.is_file() else {})
    with reading(path, "is damaged", "export the model again"):
        config = json_object(path)
        ours = read_config(config["model"], path) if config.items() >= WEIGHTS_FORMAT.items() else None
    if ours:
        weights = read_safetensors(folder / "model.safetensors")
        net = build_with_weights(ours, weights, asked, source=folder)
        return net, tokenizers.load(folder / "tokenizer.json"), known
    net = (load_rotary if config.get("model_type") in KINDS else load_gpt2)(folder, **asked)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None and net.config.vocab_size == GPT2_VOCABULARY:
        tokenizer = tokenizers.GPT2().build(lambda split: iter(()))
    return net, tokenizer, known


def known_values(card: dict[str, Any]) -> ModelCard:
    """What is known of a card that comes from others: its keys that have a value of their type."""
    types = get_type_hints(ModelCard)
    return cast(ModelCard, {k: v for k, v in card.items() if k in types and isinstance(v, types[k])})
