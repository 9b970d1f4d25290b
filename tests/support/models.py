"""Small models with known behaviour, and checkpoints of them as a run writes them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiktoken
import torch

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.inference.text import TextGenerator
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.model.weights import NETWORKS

BYTES = tokenizers.Byte().build(lambda split: iter(()))
SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16}


def random_net(
    encoding: tiktoken.Encoding = BYTES, *, seed: int = 0, kind: type = GPTConfig, **options: Any
) -> Any:
    """A model whose weights are large enough to show in its logits."""
    torch.manual_seed(seed)
    net = NETWORKS[kind](kind(**{"vocab_size": encoding.n_vocab, **SHAPE, **options}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def reciting(text: str | bytes, *, end: bool = True) -> TextGenerator:
    """A model of bytes that says `text` after <|endoftext|>, most likely token by token, then ends.

    What it says depends on the position alone: each has a dimension of its own in the token's place.
    """
    data = text.encode() if isinstance(text, str) else text
    ids = [*data, *([BYTES.eot_token] if end else [])]
    shape = {"block_size": len(ids), "n_embd": len(ids), "n_layer": 1, "n_head": 1, "tie_weights": False}
    net = random_net(**shape)
    with torch.no_grad():
        for parameter in (net.transformer.wte.weight, net.lm_head.weight, *net.transformer.h.parameters()):
            parameter.zero_()
        net.transformer.wpe.weight.copy_(torch.eye(len(ids)))
        net.transformer.ln_f.weight.fill_(1.0)
        net.transformer.ln_f.bias.zero_()
        for position, token in enumerate(ids):
            net.lm_head.weight[token, position] = 1.0
    return TextGenerator(net, BYTES)


def save_checkpoint(
    path: Path,
    net: GPT,
    encoding: tiktoken.Encoding = BYTES,
    *,
    target: str = "gpt_lightning.model.gpt.build_gpt",
) -> Path:
    """What a run leaves of a model, without what only a resumed run needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {"val/loss": 2.5, "val/perplexity": 12.18, "val/bits_per_byte": 1.5}
    model = {"_target_": target, **asdict(net.config)}
    checkpoint = {
        "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
        "hyper_parameters": {"name": "test", "model": model, "data": {"path": "/a/folder/tales.txt"}},
        "tokenizer": tokenizers.to_state(encoding),
        "progress": {"step": 7, "train_loss": 2.25, "best_val_loss": 2.5, "lr": 1e-3, "metrics": metrics},
    }
    torch.save(checkpoint, path)
    return path


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)
