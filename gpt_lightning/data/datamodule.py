"""Data loading for Lightning, with a position that is saved and restored."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from gpt_lightning.data.signals import ENDING, signals_wait
from gpt_lightning.data.token_store import TokenStore
from gpt_lightning.data.windows import Batch, EvalBatches, TrainBatches, split_batch

# A validation keeps no activations, so its forwards may be larger than those of the training, up to:
VAL_TOKENS = 4096
VAL_LOGITS = 2**23  # 32 MiB


def _leave_process_group(worker: int) -> None:
    """Keep signals to the whole process group, such as Ctrl-C, from ending a worker before the run."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
        while came := signal.sigpending() & ENDING:  # since the worker started
            signal.sigwait(came)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@dataclass(eq=False)
class PositionedLoader:
    """Iterates over a dataset of batches from a position that is saved and restored.

    The saved position counts sequences over all ranks, so it is valid for another micro-batch size or number
    of devices. Batches that workers prefetched but training did not receive are not counted.

    Args:
        dataset: Its items are batches.
        sequences: Sequences in one item over all ranks.
        resumable: Whether iteration starts at the position; otherwise at the first item.
        num_workers: Worker processes; 0 reads in this process.
        pin_memory: Whether to use page-locked memory, for CUDA.
    """

    dataset: Dataset[Batch]
    _: KW_ONLY
    sequences: int
    resumable: bool
    num_workers: int = 0
    pin_memory: bool = False
    position: int = field(default=0, init=False)  # items returned

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        if not self.resumable:
            self.position = 0
        loader = DataLoader(
            self.dataset,
            sampler=range(self.position, len(self)),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_process_group,
            generator=torch.Generator(),  # an iterator must not draw from the global one
        )
        with signals_wait():
            batches = iter(loader)  # starts the workers
        for batch in batches:
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"sequences": self.position * self.sequences}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["sequences"] // self.sequences


class TextDataModule(pl.LightningDataModule):
    """Training and validation batches of a token store.

    Args:
        store: Prepared tokens.
        block_size: Tokens of a window.
        batch_size: Sequences per optimizer step over all devices.
        micro_batch_size: Maximum of sequences per device per forward; None is no limit.
        max_steps: Optimizer steps of the run.
        align_documents: Whether windows begin with documents, as in `TrainBatches` and `EvalBatches`.
        val_batches: Micro-batches of a validation, as a single process has them; None reads the whole split.
        num_workers, pin_memory: As in `PositionedLoader`.
        order: The other arguments of `TrainBatches`: seed, stride, shuffle, drop_last, random_offset.

    Raises:
        ValueError: If there is too little validation text to measure a loss.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        block_size: int,
        batch_size: int,
        micro_batch_size: int | None,
        max_steps: int,
        align_documents: bool = False,
        val_batches: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        **order: Any,
    ):
        super().__init__()
        EvalBatches(store, block_size=block_size, micro_batch_size=1)  # raises if there is too little text
        self.store, self.block_size, self.batch_size = store, block_size, batch_size
        self.micro_batch_size, self.max_steps, self.order = micro_batch_size, max_steps, order
        self.val_batches, self.align_documents = val_batches, align_documents
        self.loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all devices."""
        return self.batch_size * self.block_size

    def _place(self) -> dict[str, Any]:
        """Rank, number of processes, and micro-batch size."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        micro, _ = split_batch(self.batch_size, self.micro_batch_size, world_size)
        return {"rank": rank, "world_size": world_size, "micro_batch_size": micro}

    def train_dataloader(self) -> PositionedLoader:
        place = self._place()
        dataset = TrainBatches(
            self.store,
            block_size=self.block_size,
            batch_size=self.batch_size,
            steps=self.max_steps,
            align_documents=self.align_documents,
            **place,
            **self.order,
        )
        return self._loader(dataset, place, resumable=True)

    def val_dataloader(self) -> PositionedLoader:
        place = self._place()
        alone, _ = split_batch(self.batch_size, self.micro_batch_size, 1)  # so that all read the same text
        most = self.val_batches * alone if self.val_batches else None
        cut: dict[str, Any] = {
            "block_size": self.block_size,
            "align_documents": self.align_documents,
            "most": most,
        }
        windows = len(EvalBatches(self.store, micro_batch_size=1, **cut))
        tokens = min(VAL_TOKENS, VAL_LOGITS // self.store.n_vocab)
        wide = min(tokens // self.block_size, -(-windows // place["world_size"]))
        place["micro_batch_size"] = max(place["micro_batch_size"], wide)
        dataset = EvalBatches(self.store, **cut, **place)
        return self._loader(dataset, place, resumable=False)

    def _loader(self, dataset: Dataset[Batch], place: dict[str, Any], *, resumable: bool) -> PositionedLoader:
        sequences = place["micro_batch_size"] * place["world_size"]
        return PositionedLoader(dataset, sequences=sequences, resumable=resumable, **self.loading)
