"""Windows of tokens for training and validation, in an order that can be continued anywhere.

B sequences of a micro-batch, T block_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpt_lightning.data.corpus import Split
from gpt_lightning.data.token_store import TokenStore

IGNORE = -100  # target of a padded position, F.cross_entropy's default

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) int64


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Micro-batch size and accumulation that make up a batch exactly.

    Args:
        batch_size: Sequences per optimizer step over all devices.
        micro_batch_size: At most this many sequences per device per forward; None is no limit.
        world_size: Devices.

    Returns:
        Sequences per device per forward, and forwards per optimizer step.

    Raises:
        ValueError: If the devices cannot share the batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(
            f"data.batch_size={batch_size} cannot be shared by {world_size} devices; "
            f"use a multiple of {world_size}"
        )
    share = batch_size // world_size
    limit = min(micro_batch_size or share, share)
    micro = next(size for size in range(limit, 0, -1) if share % size == 0)
    return micro, share // micro


def permute(index: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where `index` goes in a pseudo-random permutation of range(n), without storing it.

    A Feistel network permutes the next power of four; values that land outside range(n) walk on until
    they land inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        index: Any shape, int64, values in range(n).
        n: Size of the permutation.
        seed: Choice of the permutation, together with
        epoch: how often the data was seen.
    """
    half = np.uint64(max(1, -(-max(n - 1, 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)  # the multiplier of splitmix64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        value[outside] = (left << half) | right
        outside = value >= n
    return value.astype(np.int64)


class _Batches(Dataset[Batch]):
    """Batches cut from one split of a store."""

    def __init__(self, store: TokenStore, split: Split):
        self.store, self.split = store, split

    @cached_property
    def tokens(self) -> np.ndarray:
        return self.store.tokens(self.split)

    def __getstate__(self) -> dict[str, Any]:
        # a worker process maps the file itself; to pickle a memory map would copy the corpus
        return {key: value for key, value in self.__dict__.items() if key != "tokens"}


class TrainBatches(_Batches):
    """Micro-batch number b of a whole run, as a pure function of b.

    One epoch is `windows // batch_size` optimizer steps (one more, filled up from the epoch's beginning,
    if `drop_last` is false); the epochs follow one another without a seam.

    Args:
        store: The tokens; its training split is read.
        block_size: Tokens of a window, T.
        batch_size: Sequences per optimizer step over all devices.
        micro_batch_size: Sequences per device per forward, B, as from `split_batch`.
        steps: Optimizer steps of the run.
        seed: Chooses the order.
        stride: Tokens between the beginnings of two windows; None is block_size.
        shuffle: Whether windows come in a new random order each epoch or one after the other.
        drop_last: Whether the windows that do not fill a batch are left out of an epoch.
        random_offset: Whether each epoch's first window begins at another of the first `stride` tokens, so
            that epochs cut the text differently; costs at most one window.
        rank: This process among
        world_size: all of them.

    Raises:
        ValueError: If the split has too few tokens for a window or a batch.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        block_size: int,
        batch_size: int,
        micro_batch_size: int,
        steps: int,
        seed: int,
        stride: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        random_offset: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(store, "train")
        self.block_size, self.batch_size, self.micro = block_size, batch_size, micro_batch_size
        self.seed, self.stride, self.shuffle = seed, stride or block_size, shuffle
        self.rank, self.world_size, self.steps = rank, world_size, steps
        self.random_offset = random_offset
        self.windows, self.steps_per_epoch = epoch_size(
            store,
            block_size=block_size,
            batch_size=batch_size,
            stride=stride,
            drop_last=drop_last,
            random_offset=random_offset,
        )
        self.accumulation = batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def starts(self, b: int) -> np.ndarray:
        """First token of each window of micro-batch b, (B,) int64."""
        step, part = divmod(b, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        first = step * self.batch_size + (part * self.world_size + self.rank) * self.micro
        index = np.arange(first, first + self.micro) % self.windows
        if self.shuffle:
            index = permute(index, self.windows, seed=self.seed, epoch=epoch)
        offset = 0
        if self.random_offset:
            offset = int(np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1)[0]) % self.stride
        return offset + index * self.stride

    def __getitem__(self, b: int) -> Batch:
        window = self.tokens[self.starts(b)[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
        return torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(window[:, 1:].copy())


def epoch_size(
    store: TokenStore,
    *,
    block_size: int,
    batch_size: int,
    stride: int | None = None,
    drop_last: bool = True,
    random_offset: bool = False,
) -> tuple[int, int]:
    """Windows and optimizer steps of one epoch over the training split; arguments as in `TrainBatches`.

    Raises:
        ValueError: If there are too few tokens for a window, or for a batch where `drop_last` is set.
    """
    stride, tokens = stride or block_size, len(store.tokens("train"))
    last_start = tokens - block_size - 1 - (stride - 1 if random_offset else 0)
    if last_start < 0:
        raise ValueError(
            f"the training split has {tokens} tokens, fewer than one window of {block_size} and its target; "
            "use more text or a smaller model.block_size"
        )
    windows = last_start // stride + 1
    if drop_last and windows < batch_size:
        raise ValueError(
            f"the training split has {windows} windows of {block_size} tokens, fewer than data.batch_size="
            f"{batch_size}; lower it, or model.block_size, or set data.drop_last=false"
        )
    return windows, windows // batch_size if drop_last else -(-windows // batch_size)


class EvalBatches(_Batches):
    """Every token of a split but the first as a target exactly once, windows end to end.

    The last window is filled up with targets that do not count, and so are the micro-batches of the
    ranks that would run out first.
    """

    def __init__(
        self,
        store: TokenStore,
        split: Split = "val",
        *,
        block_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        super().__init__(store, split)
        self.block_size, self.micro = block_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        if len(self.tokens) < 2:
            raise ValueError(
                f"the {split} split has {len(self.tokens)} tokens; two are the least to measure a loss; "
                "use more text or raise data.val_fraction"
            )

    def __len__(self) -> int:
        windows = -(-(len(self.tokens) - 1) // self.block_size)
        return -(-windows // (self.micro * self.world_size))

    def __getitem__(self, b: int) -> Batch:
        first = (b * self.world_size + self.rank) * self.micro
        starts = np.arange(first, first + self.micro) * self.block_size
        position = starts[:, None] + np.arange(self.block_size)
        last = len(self.tokens) - 1
        x = self.tokens[np.minimum(position, last)].astype(np.int64)
        y = self.tokens[np.minimum(position + 1, last)].astype(np.int64)
        y[position + 1 > last] = IGNORE
        return torch.from_numpy(x), torch.from_numpy(y)


class PositionedLoader:
    """Iterates over a dataset of ready batches from a position that is saved and restored.

    The position counts sequences over all ranks, so it also holds for another micro-batch size or number
    of devices, and it counts what was handed out, not what worker processes fetched ahead.

    Args:
        dataset: Its items are batches.
        sequences: Sequences in one item over all ranks.
        resumable: Whether iterating goes on from the position; otherwise it begins at the first item.
        num_workers: Processes that read ahead; 0 reads in this one.
        pin_memory: Whether batches are put into page-locked memory, for CUDA.
    """

    def __init__(
        self,
        dataset: Dataset[Batch],
        *,
        sequences: int,
        resumable: bool,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.dataset, self.sequences, self.resumable = dataset, sequences, resumable
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.position = 0  # items handed out

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
            generator=torch.Generator(),  # a private one: a new iterator must not draw from the global
        )
        for batch in loader:
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
        micro_batch_size: At most this many sequences per device per forward; None is no limit.
        max_steps: Optimizer steps of the run.
        seed, stride, shuffle, drop_last, random_offset: As in `TrainBatches`.
        num_workers, pin_memory: As in `PositionedLoader`.

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
        seed: int,
        stride: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        random_offset: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        super().__init__()
        EvalBatches(store, block_size=block_size, micro_batch_size=1)  # too little text is an error here
        self.store, self.block_size, self.batch_size = store, block_size, batch_size
        self.micro_batch_size, self.max_steps = micro_batch_size, max_steps
        self.order: dict[str, Any] = {
            "seed": seed,
            "stride": stride,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "random_offset": random_offset,
        }
        self.loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step over all devices."""
        return self.batch_size * self.block_size

    def _place(self) -> dict[str, Any]:
        """This process among all, and its share of a batch."""
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
            **place,
            **self.order,
        )
        return self._loader(dataset, place, resumable=True)

    def val_dataloader(self) -> PositionedLoader:
        place = self._place()
        dataset = EvalBatches(self.store, block_size=self.block_size, **place)
        return self._loader(dataset, place, resumable=False)

    def _loader(self, dataset: Dataset[Batch], place: dict[str, Any], *, resumable: bool) -> PositionedLoader:
        sequences = place["micro_batch_size"] * place["world_size"]
        return PositionedLoader(dataset, sequences=sequences, resumable=resumable, **self.loading)
