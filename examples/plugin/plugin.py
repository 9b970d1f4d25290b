"""A model, an optimizer, a schedule, a corpus, a tokenizer, a callback and a logger of your own.

B sequences, T block_size, N window, C n_embd, V vocab_size.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_lightning.training.loggers import log_metrics


class MLP(nn.Module):
    """Predicts a token from the embeddings of the `window` tokens before it (Bengio et al., 2003).

    A model is called as `model(idx, targets, reduction=…)` and returns the loss in nats: the mean, or one
    loss per token for `reduction="none"`. Targets of -100 do not count. `model(idx)` returns the logits.

    Args:
        vocab_size: Token ids.
        block_size: Tokens of a training sequence.
        window: Tokens that a prediction depends on.
        n_embd: Width of an embedding.
        n_hidden: Width of the hidden layer.
    """

    def __init__(self, vocab_size: int, block_size: int, window: int, n_embd: int, n_hidden: int):
        super().__init__()
        self.window = window
        self.embedding = nn.Embedding(vocab_size, n_embd)
        self.layers = nn.Sequential(
            nn.Linear(window * n_embd, n_hidden), nn.ReLU(), nn.Linear(n_hidden, vocab_size)
        )

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        x = self.embedding(idx)  # (B, T, C)
        x = F.pad(x, (0, 0, self.window - 1, 0))  # (B, N - 1 + T, C)
        x = x.unfold(1, self.window, 1).flatten(2)  # (B, T, C * N)
        logits = self.layers(x)  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view(idx.shape) if reduction == "none" else loss


class Lion(torch.optim.Optimizer):
    """Steps of one size in the direction of the sign of the momentum (Chen et al., 2023).

    Args:
        params: Parameters or groups of them; the framework sets weight_decay=0 for biases and gains.
        lr: Peak learning rate, which the schedule multiplies.
        beta1: Weight of the momentum in the step.
        beta2: Weight of the momentum in its own update.
        weight_decay: Share of the learning rate by which weights shrink in a step.
    """

    def __init__(self, params: Any, *, lr: float, beta1: float, beta2: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, beta1, beta2 = group["lr"], group["beta1"], group["beta2"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(torch.sign(beta1 * momentum + (1 - beta1) * p.grad), alpha=-lr)
                momentum.lerp_(p.grad, 1 - beta2)
        return loss


def inverse_sqrt(step: int, *, warmup_steps: int) -> float:
    """Factor of the learning rate: a linear warm-up, then 1 / sqrt(step) (Vaswani et al., 2017)."""
    return min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))


class Additions:
    """Documents such as "7+12=19": the sums of two numbers below `limit`, in an arbitrary fixed order.

    Args:
        limit: The numbers are from 0 to limit - 1.
        val_fraction: Share of the documents that is kept for validation.
    """

    separated = True  # each document ends with <|endoftext|>

    def __init__(self, limit: int, val_fraction: float):
        self.limit, self.val_fraction = limit, val_fraction

    def digest(self) -> str:
        """Identifies the text: if it changes, the corpus is tokenized again."""
        code = Path(__file__).read_bytes()
        return hashlib.sha256(code + f"{self.limit} {self.val_fraction}".encode()).hexdigest()

    def documents(self, split: str) -> Iterator[str]:
        numbers = range(self.limit)
        pairs = sorted(((a, b) for a in numbers for b in numbers), key=lambda pair: hash_of(*pair))
        n_val = int(len(pairs) * self.val_fraction)
        for a, b in pairs[:n_val] if split == "val" else pairs[n_val:]:
            yield f"{a}+{b}={a + b}"

    def floor_bits(self, document: str) -> float | None:
        """Bits of a document under its true distribution, or None if that is unknown.

        Here, two numbers are drawn independently, and the sum follows from them.
        """
        return 2 * math.log2(self.limit)


def hash_of(a: int, b: int) -> bytes:
    return hashlib.sha256(f"{a} {b}".encode()).digest()


class Alphabet:
    """One token for each of `characters`, in their order; <|endoftext|> has the last id.

    A text with other characters is refused.
    """

    trained = False  # True for one that `build` makes from the corpus, to keep it in the cache

    def __init__(self, characters: str):
        self.characters = characters

    def key(self) -> str:
        """Identity in the name of the cached file of a trained tokenizer; differs with the arguments."""
        return f"alphabet-{self.characters}"

    def build(self, documents: Any) -> tiktoken.Encoding:
        """The encoding, which every checkpoint keeps; `documents("train")` would read the corpus."""
        ids = {character.encode(): i for i, character in enumerate(dict.fromkeys(self.characters))}
        special = {"<|endoftext|>": len(ids)}
        return tiktoken.Encoding("alphabet", pat_str="(?s:.)", mergeable_ranks=ids, special_tokens=special)


class Accuracy(Callback):
    """Logs val/accuracy: the share of the validation tokens that have the highest logit."""

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=pl_module.device)  # tokens: right, all

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        idx, targets = batch  # (B, T) each
        counted = targets != -100
        right = counted & (pl_module.net(idx).argmax(-1) == targets)
        self.counts += torch.stack([right.sum(), counted.sum()])

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        right, tokens = trainer.strategy.reduce(self.counts, reduce_op="sum").tolist()  # of all processes
        log_metrics(trainer, {"val/accuracy": right / tokens}, trainer.global_step)


class JSONLines(Logger):
    """Appends a line such as {"step": 8, "train/loss": 2.5} to a file for each call of `log_metrics`.

    A resumed run repeats the steps after its checkpoint: of a step's values of a metric, the last counts.

    Args:
        path: The file.
    """

    name = version = ""  # required by Lightning

    def __init__(self, path: str):
        super().__init__()
        self.path = Path(path)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """They are in .hydra/config.yaml."""
