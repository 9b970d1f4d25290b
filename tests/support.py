"""Names that several test files import."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
