"""Names that several test files import."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"  # data for tests that a checkout alone does not have

TINY = [  # the least that trains
    "data=text",
    "tokenizer=byte",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "data.batch_size=8",
    "trainer.max_steps=8",
    "trainer.val_every_steps=4",
    "trainer.val_batches=4",
    "trainer.save_every_steps=4",
    "trainer.log_every_steps=1",
    "scheduler.warmup_steps=2",
    "device=cpu",
    "callbacks.samples.max_new_tokens=16",
]

# a plugin with a model of one's own: a token from the one before it
BIGRAM = """
from torch import nn

class Bigram(nn.Module):
    def __init__(self, vocab_size, block_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx, targets=None, *, reduction="mean"):
        logits = self.table(idx)
        if targets is None:
            return logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view(idx.shape) if reduction == "none" else loss
"""
