"""Windows and their order, compared with values counted by hand."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from gpt_lightning.data import windows
from gpt_lightning.data.datamodule import PositionedLoader, TextDataModule
from gpt_lightning.data.windows import IGNORE, EvalBatches, TrainBatches, epoch_size, permute, split_batch


@dataclass
class Eot:
    eot_token: int


@dataclass
class Store:
    """Token number i is i, so that the tokens of a window show its position; those of `ends` are 199."""

    train: int = 101
    val: int = 23
    ends: tuple[int, ...] = ()
    tokenizer: Eot = field(default_factory=lambda: Eot(199))
    floor: None = field(default=None)
    n_vocab: int = 200
    marker: tuple[int, ...] = ()

    def tokens(self, split: str) -> np.ndarray:
        tokens = np.arange(getattr(self, split), dtype=np.uint16)
        tokens[list(self.ends)] = 199
        return tokens


def batches(store: Any = None, **options: Any) -> TrainBatches:
    options = {"block_size": 10, "batch_size": 4, "micro_batch_size": 2, "steps": 5, "seed": 1, **options}
    return TrainBatches(store or Store(), **options)


@pytest.mark.parametrize(
    ("batch", "limit", "world", "expected"),
    [
        (32, 8, 1, (8, 4)),
        (32, 8, 2, (8, 2)),
        (12, 5, 1, (4, 3)),
        (7, 4, 1, (1, 7)),
        (8, None, 1, (8, 1)),
        (8, 99, 4, (2, 1)),
    ],
)
def test_batch_is_split_exactly(batch: int, limit: int | None, world: int, expected: tuple[int, int]) -> None:
    assert split_batch(batch, limit, world) == expected
    assert all(type(number) is int for number in split_batch(batch, limit, world))


def test_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.batch_size=10 .* 4 devices"):
        split_batch(10, None, 4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_permutation_reaches_every_index_once(n: int) -> None:
    order = permute(np.arange(n), n, seed=3, epoch=2)
    assert sorted(order.tolist()) == list(range(n))


def test_permutation_differs_by_seed_and_epoch_and_mixes() -> None:
    n = 10_000
    orders = [permute(np.arange(n), n, seed=s, epoch=e) for s, e in ((1, 0), (1, 1), (2, 0))]
    for i, order in enumerate(orders):
        # Spearman's correlation of a random permutation has standard deviation 1 / sqrt(n - 1) = 0.01
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        for other in orders[:i]:
            assert (order == other).mean() < 0.01


def test_order_is_that_of_earlier_releases() -> None:
    """A run of an earlier release is resumed in the order in which it began."""
    assert permute(np.arange(12), 12, seed=1337, epoch=0).tolist() == [11, 1, 8, 3, 0, 4, 2, 6, 7, 9, 10, 5]
    assert permute(np.arange(12), 12, seed=1337, epoch=1).tolist() == [2, 8, 1, 11, 6, 4, 0, 3, 5, 9, 10, 7]
    small = {3: [2, 0, 1], 4: [2, 0, 3, 1], 5: [0, 2, 1, 3, 4]}
    small[20] = [4, 13, 12, 9, 11, 18, 5, 10, 6, 14, 3, 7, 1, 0, 19, 8, 17, 15, 16, 2]
    for n, order in small.items():
        assert permute(np.arange(n), n, seed=1, epoch=0).tolist() == order
    far = permute(np.array([0, 1, 2**40]), 2**41 + 1, seed=5, epoch=3)
    assert far.tolist() == [1554895883334, 972908106303, 1003321754622]
    data = batches(random_offset=True, shuffle=False, steps=8, seed=1337)
    assert [int(data.starts(4 * epoch)[0]) for epoch in range(4)] == [3, 8, 9, 3]


def test_every_token_is_a_target_once_per_epoch() -> None:
    data = batches(batch_size=5, micro_batch_size=5)  # 10 windows: two steps an epoch
    targets = Counter(int(t) for b in range(2) for t in data[b][1].flatten())
    assert targets == Counter(range(1, 101))
    again = Counter(int(t) for b in range(2, 4) for t in data[b][1].flatten())
    assert again == targets
    assert not torch.equal(data[0][0], data[2][0])  # in another order


def test_targets_are_the_inputs_one_token_later() -> None:
    x, y = batches()[3]
    assert x.shape == y.shape == (2, 10)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y)


def test_sequential_windows_come_in_order_and_wrap_around() -> None:
    data = batches(shuffle=False)
    firsts = [data[b][0][:, 0].tolist() for b in range(6)]
    assert firsts == [
        [0, 10],
        [20, 30],
        [40, 50],
        [60, 70],
        [0, 10],
        [20, 30],
    ]  # drop_last leaves 80 and 90 out


def test_without_drop_last_the_last_batch_is_filled_from_the_beginning() -> None:
    data = batches(shuffle=False, drop_last=False)
    assert data.steps_per_epoch == 3
    assert [data[b][0][:, 0].tolist() for b in (4, 5)] == [[80, 90], [0, 10]]


def test_stride_makes_windows_overlap() -> None:
    data = batches(stride=3, shuffle=False)
    assert data.windows == 31  # starts 0, 3, … 90
    assert data[0][0][:, 0].tolist() == [0, 3]


def test_random_offset_differs_between_epochs() -> None:
    data = batches(random_offset=True, shuffle=False, steps=40)
    assert data.windows == 9
    offsets = {int(data[b][0][0, 0]) for b in range(0, 80, 4)}  # two steps an epoch
    assert len(offsets) > 3
    assert offsets <= set(range(10))


@pytest.mark.parametrize(("micro", "world"), [(4, 1), (2, 1), (1, 1), (2, 2), (1, 4)])
def test_a_step_has_the_same_windows_however_it_is_split(micro: int, world: int) -> None:
    whole = batches(micro_batch_size=4)
    for step in range(5):
        parts = [batches(micro_batch_size=micro, rank=rank, world_size=world) for rank in range(world)]
        got = [
            start
            for part in parts
            for b in range(step * part.accumulation, (step + 1) * part.accumulation)
            for start in part.starts(b).tolist()
        ]
        assert sorted(got) == sorted(whole.starts(step).tolist())


@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_windows_come_in_the_order_of_the_permutation(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "AT_ONCE", at_once)
    data = batches(drop_last=False, steps=9)
    for b in range(len(data)):
        step, part = divmod(b, data.accumulation)
        epoch, step = divmod(step, data.steps_per_epoch)
        first = step * data.batch_size + part * data.micro_batch_size
        index = np.arange(first, first + data.micro_batch_size) % data.windows
        order = permute(index, data.windows, seed=data.seed, epoch=epoch)
        assert data.starts(b).tolist() == (order * 10).tolist()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the loader's processes fork
def test_loader_continues_where_its_state_was_taken(workers: int) -> None:
    def loader() -> PositionedLoader:
        return PositionedLoader(batches(), sequences=2, resumable=True, num_workers=workers)

    whole = [x for x, _ in loader()]
    assert len(whole) == len(loader()) == 10
    first = loader()
    iterator = iter(first)
    head = [next(iterator)[0] for _ in range(3)]
    state = first.state_dict()
    assert state == {"sequences": 6}  # what was handed out, not what a worker has read ahead
    second = loader()
    second.load_state_dict(state)
    rest = [x for x, _ in second]
    assert all(torch.equal(a, b) for a, b in zip(whole, head + rest, strict=True))


class Groups(Dataset):
    def __getitem__(self, index: int) -> int:
        return os.getpgrp()

    def __len__(self) -> int:
        return 2


@pytest.mark.skipif(not hasattr(os, "getpgrp"), reason="Windows has no process groups")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the loader's processes fork
def test_signal_to_the_process_group_does_not_reach_the_workers() -> None:
    groups = list(PositionedLoader(Groups(), sequences=1, resumable=True, num_workers=1))
    assert os.getpgrp() not in groups


@pytest.mark.skipif(not hasattr(os, "getpgrp"), reason="Windows has no process groups")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the loader's processes fork
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_process_group_does_not_reach_a_worker_that_starts(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, started = torch.manual_seed, multiprocessing.get_context("fork").Event()

    def slowly(value: int) -> Any:  # called before the worker leaves the group
        started.set()
        time.sleep(0.5)
        return seed(value)

    def send() -> None:
        assert started.wait(20)
        os.kill(multiprocessing.active_children()[0].pid or 0, number)

    monkeypatch.setattr(torch, "manual_seed", slowly)
    thread = threading.Thread(target=send)
    thread.start()
    assert len(list(PositionedLoader(Groups(), sequences=1, resumable=True, num_workers=1))) == 2
    thread.join()


def test_position_holds_for_another_micro_batch_size() -> None:
    loader = PositionedLoader(batches(micro_batch_size=1), sequences=1, resumable=True)
    loader.load_state_dict({"sequences": 8})
    wide = PositionedLoader(batches(micro_batch_size=4), sequences=4, resumable=True)
    wide.load_state_dict({"sequences": 8})
    narrow = torch.cat([x for x, _ in loader])
    assert torch.equal(narrow, torch.cat([x for x, _ in wide]))


def test_loader_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(PositionedLoader(batches(), sequences=2, resumable=True))
    assert torch.equal(before, torch.get_rng_state())


def test_validation_counts_every_token_but_the_first_once() -> None:
    for world in (1, 2, 3):
        parts = [
            EvalBatches(Store(), block_size=10, micro_batch_size=2, rank=rank, world_size=world)
            for rank in range(world)
        ]
        assert len({len(part) for part in parts}) == 1  # the ranks stay in step
        targets = Counter(
            int(t) for part in parts for b in range(len(part)) for t in part[b][1].flatten() if t != IGNORE
        )
        assert targets == Counter(range(1, 23))


def test_aligned_windows_begin_with_documents_that_are_near() -> None:
    # windows would begin at 0, 10, …, 90: at 10 the document's beginning is 3 tokens before, at 40 it is 10
    store, options = (
        Store(ends=(0, 7, 30, 48, 52)),
        {"shuffle": False, "micro_batch_size": 1, "batch_size": 1},
    )
    data = batches(store, align_documents=True, steps=10, **options)
    assert [int(data.starts(b)[0]) for b in range(10)] == [0, 7, 20, 30, 40, 48, 52, 70, 80, 90]
    x, y = data[1]
    assert x.tolist() == [[199, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert y.tolist() == [[8, 9, 10, 11, 12, 13, 14, 15, 16, 17]]
    assert batches(store, **options).starts(1).tolist() == [10]


def test_aligned_validation_begins_again_with_the_document_that_a_window_cut() -> None:
    store = Store(ends=(0, 7, 12), val=40)
    data = EvalBatches(store, block_size=10, micro_batch_size=1, align_documents=True)
    found = [
        (int(x[0, 1]) - 1, [int(t) for t in y[0] if t != IGNORE]) for x, y in (data[b] for b in range(5))
    ]
    assert found == [
        (0, [1, 2, 3, 4, 5, 6, 199, 8, 9, 10]),
        (7, [11, 199, 13, 14, 15, 16, 17]),  # the document that begins at 7 was cut behind 10
        (12, [18, 19, 20, 21, 22]),
        (22, [*range(23, 33)]),  # its document began 10 tokens before
        (32, [*range(33, 40)]),
    ]
    assert len(data) == 5
    first = EvalBatches(store, block_size=10, micro_batch_size=1, align_documents=True, most=2)
    assert (len(first), first.targets) == (2, 17)


def test_every_validation_starts_at_the_first_batch() -> None:
    dataset = EvalBatches(Store(), block_size=10, micro_batch_size=1)
    loader = PositionedLoader(dataset, sequences=1, resumable=False)
    next(iter(loader))
    assert torch.equal(next(iter(loader))[0], dataset[0][0])


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 tokens, .*; use more text or a smaller model.block_size$"):
        epoch_size(Store(train=10), block_size=10, batch_size=1)
    with pytest.raises(ValueError, match=r"10 windows of 10 tokens, fewer than data.batch_size=11"):
        epoch_size(Store(), block_size=10, batch_size=11)
    assert epoch_size(Store(train=11), block_size=10, batch_size=1) == (1, 1)
    for tokens, count in ((109, 9), (110, 10)):  # the last offset is 9
        found = epoch_size(Store(train=tokens), block_size=10, batch_size=1, random_offset=True)
        assert found == (count, count)
    with pytest.raises(ValueError, match="two are the least") as caught:
        EvalBatches(Store(val=1), block_size=10, micro_batch_size=1)
    assert str(caught.value) == (
        "the val split has 1 tokens; two are the least to measure a loss; use more text or raise "
        "data.val_fraction"
    )
    for tokens, count in ((2, 1), (21, 2), (22, 3)):  # the first token is no target
        assert len(EvalBatches(Store(val=tokens), block_size=10, micro_batch_size=1)) == count


def test_datamodule_gives_one_process_all_batches() -> None:
    data = TextDataModule(Store(), block_size=10, batch_size=4, micro_batch_size=3, max_steps=2, seed=1)
    assert [x.shape for x, _ in data.train_dataloader()] == [(2, 10)] * 4
    assert data.tokens_per_step == 40
    assert sum(int((y != IGNORE).sum()) for _, y in data.val_dataloader()) == 22


@pytest.mark.parametrize(
    ("n_vocab", "val", "shapes"),
    [
        (200, 10_001, [(409, 10)] * 3),  # 4,096 tokens at once
        (2**16, 1_001, [(12, 10)] * 9),  # 128 tokens, 2**23 logits
        (2**23, 101, [(2, 10)] * 5),  # never less than in training
        (200, 23, [(3, 10)]),  # no more windows than there are
    ],
)
def test_validation_takes_as_many_windows_at_once_as_its_logits_allow(
    n_vocab: int, val: int, shapes: list[tuple[int, int]]
) -> None:
    store = Store(val=val, n_vocab=n_vocab)
    data = TextDataModule(store, block_size=10, batch_size=4, micro_batch_size=3, max_steps=2, seed=1)
    batches = list(data.val_dataloader())
    assert [tuple(x.shape) for x, _ in batches] == shapes
    targets = torch.cat([y.flatten() for _, y in batches])
    assert torch.equal(targets[targets != IGNORE], torch.arange(1, val))


def test_pickled_dataset_holds_no_tokens() -> None:
    data = batches(Store(train=60_000))
    first = data[0][0]
    pickled = pickle.dumps(data)
    assert len(pickled) < 2_000  # without the tokens
    assert torch.equal(pickle.loads(pickled)[0][0], first)
