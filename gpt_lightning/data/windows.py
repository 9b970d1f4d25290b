"""Windows of tokens for training and validation, as pure functions of their index.

B sequences of a micro-batch, T block_size.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpt_lightning.data.corpus.base import Split
from gpt_lightning.data.token_store import TokenStore

IGNORE = -100  # target of a padded position, F.cross_entropy's default
AT_ONCE = 4096  # windows whose order is computed at once
# inputs and targets, both (B, T) int64; if only responses are learned, also the targets that count in the
# optimizer step, per micro-batch: ()
Batch = tuple[Tensor, ...]


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """Split a batch into micro-batches of equal size.

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
    """Apply a pseudo-random permutation of range(n) to `index` without storing it.

    A Feistel network permutes the next power of four; it is applied again to values outside range(n)
    until they are inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).

    Args:
        index: Any shape, int64, values in range(n).
        n: Size of the permutation.
        seed, epoch: Select the permutation.
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


def find_responses(
    tokens: np.ndarray, marker: tuple[int, ...], end: int, documents: int
) -> tuple[np.ndarray, np.ndarray]:
    """First token of each response, (documents,), and the end-of-text tokens, (documents + 1,).

    Raises:
        ValueError: If there is not one marker in every document.
    """
    ends = np.flatnonzero(tokens == end)
    begins = np.flatnonzero(tokens[: 1 - len(marker) or None] == marker[0])
    for offset, token in enumerate(marker):
        begins = begins[tokens[begins + offset] == token]
    begins += len(marker)
    whole = len(begins) == len(ends) - 1 == documents
    if not whole or not ((ends[:-1] < begins) & (begins <= ends[1:])).all():
        raise ValueError(
            f"{len(begins)} responses are found in {documents} documents: the tokenizer joins the marker "
            "before a response with other text; choose tokenizer=gpt2, bpe or byte"
        )
    return begins, ends


def scoring_windows(
    tokens: np.ndarray, *, block_size: int, stride: int, end: int | None = None, most: int | None = None
) -> np.ndarray:
    """Windows that together predict every token but the first once, in the order of the text.

    A window begins with the last block_size - stride tokens of the one before it. With `end`, it begins with
    the document that the one before cut, where that document began less than block_size tokens earlier, so
    that documents of at most block_size tokens are whole. That takes at most twice as many windows.

    Args:
        tokens: Ids, (N,).
        block_size, stride: Tokens of a window and of its advance; 1 <= stride <= block_size.
        end: The end-of-text token before each document; None takes no notice of documents.
        most: Windows to make at most, the first ones.

    Returns:
        First token, length, and number of positions predicted in earlier windows, (windows, 3) int64.
    """
    last = max(0, len(tokens) - 1)
    if end is None:  # at once, for a split of any length
        count = min(last, 1 + max(0, -(-(last - block_size) // stride)), last if most is None else most)
        begins = np.arange(count, dtype=np.int64) * stride
        reached = np.minimum(last, begins + block_size)
        return np.stack([begins, reached - begins, np.append(0, reached)[:count] - begins], axis=1)
    ends = np.flatnonzero(tokens[: len(tokens) if most is None else most * block_size] == end)
    windows: list[tuple[int, int, int]] = []
    done = 0  # tokens up to here are predicted; the last token predicts nothing
    while done < last and (most is None or len(windows) < most):
        begin = max(0, done + stride - block_size)
        document = np.searchsorted(ends, done, side="right")
        if document and done - ends[document - 1] < block_size:
            begin = int(ends[document - 1])
        reach = min(last, begin + block_size)
        windows.append((begin, reach - begin, done - begin))
        done = reach
    return np.array(windows, dtype=np.int64).reshape(-1, 3)


@dataclass(eq=False)
class _Batches(Dataset[Batch]):
    """Batches from one split of a store."""

    store: TokenStore
    split: Split

    @cached_property
    def tokens(self) -> np.ndarray:
        return self.store.tokens(self.split)

    @cached_property
    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        """As `find_responses`, of a store that has a marker."""
        store, documents = self.store, self.store.meta.splits[self.split].documents
        return find_responses(self.tokens, store.marker, store.tokenizer.eot_token, documents)

    def counts(self, position: np.ndarray) -> np.ndarray:
        """Whether the tokens at positions, of any shape, are of a response, its end included."""
        begins, ends = self.responses
        return position <= ends[np.searchsorted(begins, position, side="right")]

    def __getstate__(self) -> dict[str, Any]:
        # pickling a memory map would copy the corpus; workers map the file themselves
        return {key: value for key, value in self.__dict__.items() if key not in ("tokens", "_known")}


def response_tokens(store: TokenStore, split: Split) -> np.ndarray | None:
    """Which tokens of a split, (N,) bool, are of a response; None where all count in the loss."""
    if not store.marker:
        return None
    batches = _Batches(store, split)
    return batches.counts(np.arange(len(batches.tokens)))


@dataclass(eq=False)
class TrainBatches(_Batches):
    """All micro-batches of a run; number b is a pure function of b.

    An epoch has `windows // batch_size` optimizer steps; without `drop_last` an incomplete last batch is
    filled with the first windows of the epoch. The next epoch follows directly.

    Args:
        store: The tokens; its training split is read.
        block_size: Tokens of a window, T.
        batch_size: Sequences per optimizer step over all devices.
        micro_batch_size: Sequences per device per forward, B, as from `split_batch`.
        steps: Optimizer steps of the run.
        seed: Selects the order.
        stride: Tokens between the starts of two windows; None is block_size.
        shuffle: Whether each epoch has a new random order; otherwise windows are in the order of the text.
        shuffle_buffer: Windows that are shuffled among each other, in a run of one epoch; None for all.
        drop_last: Whether an epoch leaves out the windows that do not fill a batch.
        random_offset: Whether each epoch starts at a random one of the first `stride` tokens, so that the
            window boundaries differ; costs at most one window.
        align_documents: Whether a window that would begin inside a document begins at the document's
            beginning instead, where that is less than block_size tokens before.
        rank, world_size: This process and the number of processes.

    Raises:
        ValueError: If the split has too few tokens for a window or a batch.
    """

    _known = ((-1, -1), np.zeros(0, dtype=np.int64))  # epoch and first index of windows, and their order

    split: Split = field(default="train", init=False)
    _: KW_ONLY
    block_size: int
    batch_size: int
    micro_batch_size: int
    steps: int
    seed: int
    stride: int | None = None
    shuffle: bool = True
    shuffle_buffer: int | None = None
    drop_last: bool = True
    random_offset: bool = False
    align_documents: bool = False
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        keys = ("block_size", "batch_size", "stride", "drop_last", "random_offset")
        self.windows, self.steps_per_epoch = epoch_size(self.store, **{k: getattr(self, k) for k in keys})
        self.accumulation = self.batch_size // (self.micro_batch_size * self.world_size)

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def starts(self, b: int) -> np.ndarray:
        """First token of each window of micro-batch b, (B,) int64."""
        step, part = divmod(b, self.accumulation)
        first = (part * self.world_size + self.rank) * self.micro_batch_size
        return self._starts(step, first, first + self.micro_batch_size)

    def _starts(self, step: int, first: int, end: int) -> np.ndarray:
        """First token of each of these windows of an optimizer step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        index = (step * self.batch_size + np.arange(first, end)) % self.windows
        if self.shuffle:
            index = self._permuted(index, epoch)
        stride, offset = self.stride or self.block_size, 0
        if self.random_offset:
            offset = int(np.random.SeedSequence([self.seed, epoch, 1]).generate_state(1)[0]) % stride
        begin = offset + index * stride
        if not self.align_documents:
            return begin
        before = np.maximum(begin[:, None] - np.arange(self.block_size), 0)  # nearest first
        is_end = self.tokens[before] == self.store.tokenizer.eot_token
        aligned = before[np.arange(len(begin)), is_end.argmax(1)]
        return np.where(is_end.any(1), aligned, begin)

    def _permuted(self, index: np.ndarray, epoch: int) -> np.ndarray:
        """As `permute`, which takes hardly longer for AT_ONCE windows than for those of a batch."""
        if self.shuffle_buffer is not None:
            parts, places = np.divmod(index, self.shuffle_buffer)
            for part in np.unique(parts):
                of = parts == part
                places[of] = permute(places[of], self.shuffle_buffer, seed=self.seed, epoch=int(part))
            return parts * self.shuffle_buffer + places
        how = {"seed": self.seed, "epoch": epoch}
        begin = int(index[0]) // AT_ONCE * AT_ONCE
        if int(index.min()) < begin or int(index.max()) >= begin + AT_ONCE:
            return permute(index, self.windows, **how)
        if self._known[0] != (epoch, begin):
            several = np.arange(begin, min(begin + AT_ONCE, self.windows))
            self._known = ((epoch, begin), permute(several, self.windows, **how))
        return self._known[1][index - begin]

    def __getitem__(self, b: int) -> Batch:
        place = self.starts(b)[:, None] + np.arange(self.block_size + 1)
        window = self.tokens[place].astype(np.int64)
        x, y = torch.from_numpy(window[:, :-1].copy()), torch.from_numpy(window[:, 1:].copy())
        if not self.store.marker:
            return x, y
        y[torch.from_numpy(~self.counts(place[:, 1:]))] = IGNORE
        step = self._starts(b // self.accumulation, 0, self.batch_size)  # of all micro-batches and ranks
        count = self.counts(step[:, None] + np.arange(1, self.block_size + 1)).sum()
        return x, y, torch.tensor(max(count, 1) * self.micro_batch_size / self.batch_size)


def epoch_size(
    store: TokenStore,
    *,
    block_size: int,
    batch_size: int,
    stride: int | None = None,
    drop_last: bool = True,
    random_offset: bool = False,
) -> tuple[int, int]:
    """Number of windows and of optimizer steps in an epoch; arguments as in `TrainBatches`.

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


def tokens_read(
    windows: int, *, block_size: int, stride: int | None = None, random_offset: bool = False, **_: Any
) -> int:
    """Tokens that have so many windows; other arguments as in `TrainBatches`."""
    stride = stride or block_size
    return (windows - 1) * stride + block_size + 1 + (stride - 1 if random_offset else 0)


@dataclass(eq=False)
class EvalBatches(_Batches):
    """Windows in which every token of a split except the first is a target exactly once.

    They follow one another end to end, or as `scoring_windows` aligns them to documents. The rest of a window
    that is too short has ignored targets, and so have the windows that are added to give all ranks as many.

    Args:
        align_documents: Whether windows begin with documents.
        most: Windows to read, the first ones; None reads all. The others are those of `TrainBatches`.
    """

    split: Split = "val"
    _: KW_ONLY
    block_size: int
    micro_batch_size: int
    align_documents: bool = False
    most: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise ValueError(
                f"the {self.split} split has {len(self.tokens)} tokens; two are the least to measure a loss; "
                "use more text or raise data.val_fraction"
            )
        if self.store.marker and not self.counts(np.arange(1, self.targets + 1)).any():
            raise ValueError(
                f"the validation reads {self.targets} tokens, none of them of a response; "
                "raise trainer.val_batches"
            )

    @cached_property
    def windows(self) -> np.ndarray:
        """As from `scoring_windows`."""
        end = self.store.tokenizer.eot_token if self.align_documents else None
        size = self.block_size
        return scoring_windows(self.tokens, block_size=size, stride=size, end=end, most=self.most)

    @cached_property
    def targets(self) -> int:
        """Tokens that are targets."""
        return int(self.windows[-1, :2].sum())

    def __len__(self) -> int:
        return -(-len(self.windows) // (self.micro_batch_size * self.world_size))

    def __getitem__(self, b: int) -> Batch:
        first = (b * self.world_size + self.rank) * self.micro_batch_size
        index = np.arange(first, first + self.micro_batch_size)
        begin, length, seen = self.windows[np.minimum(index, len(self.windows) - 1)].T[:, :, None]
        offset, last = np.arange(self.block_size), self.targets
        place = begin + offset
        x = self.tokens[np.minimum(place, last)].astype(np.int64)
        y = self.tokens[np.minimum(place + 1, last)].astype(np.int64)
        y[(offset < seen) | (offset >= length) | (index >= len(self.windows))[:, None]] = IGNORE
        if self.store.marker:
            y[~self.counts(np.minimum(place + 1, last))] = IGNORE
        return torch.from_numpy(x), torch.from_numpy(y)
