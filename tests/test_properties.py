"""What holds for any arguments: windows, positions, permutations, schedules, saved models."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import BYTES, random_net

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.datamodule import PositionedLoader
from gpt_lightning.data.windows import (
    IGNORE,
    EvalBatches,
    TrainBatches,
    permute,
    scoring_windows,
    split_batch,
)
from gpt_lightning.inference.loading import start_from
from gpt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO
from gpt_lightning.training.schedules import constant, cosine, linear, wsd


@dataclass
class Store:
    """Token number i is i, so that a window tells where it was cut."""

    train: int = 2
    val: int = 2
    marker: tuple[int, ...] = ()

    def tokens(self, split: str) -> np.ndarray:
        return np.arange(getattr(self, split), dtype=np.uint16)


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A training split and a way to cut it into windows and share them: any that is allowed."""
    world, share = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    micro, _ = split_batch(world * share, draw(st.none() | st.integers(1, 7)), world)
    block, drop_last = draw(st.integers(1, 9)), draw(st.booleans())
    offset = draw(st.booleans())
    least = world * share if drop_last else 1  # windows
    tokens = least * block + (block if offset else 1) + draw(st.integers(0, 60))
    return {
        "tokens": tokens,
        "world_size": world,
        "block_size": block,
        "batch_size": world * share,
        "micro_batch_size": micro,
        "shuffle": draw(st.booleans()),
        "drop_last": drop_last,
        "random_offset": offset,
        "seed": draw(st.integers(0, 2**40)),
        "steps": draw(st.integers(1, 30)),
    }


def ranks(layout: dict[str, Any]) -> list[TrainBatches]:
    options = {key: value for key, value in layout.items() if key != "tokens"}
    return [TrainBatches(Store(layout["tokens"]), rank=r, **options) for r in range(layout["world_size"])]  # type: ignore[arg-type]


def starts(parts: list[TrainBatches], steps: range) -> list[list[int]]:
    """Where the windows of each of these optimizer steps begin, over all ranks and micro-batches."""
    n = parts[0].accumulation
    return [
        [s for b in range(step * n, (step + 1) * n) for part in parts for s in part.starts(b).tolist()]
        for step in steps
    ]


@given(layout=layouts(), epoch=st.integers(0, 3))
def test_every_token_is_a_target_once_per_epoch_but_the_remainder(layout: dict[str, Any], epoch: int) -> None:
    """Left out are the first token, which nothing predicts, less than a window at the ends, and with
    `drop_last` the windows that do not fill a batch. Without it the last batch repeats some."""
    parts = ranks(layout)
    block, batch, n = layout["block_size"], layout["batch_size"], layout["tokens"]
    steps, windows = parts[0].steps_per_epoch, parts[0].windows
    found = starts(parts, range(epoch * steps, (epoch + 1) * steps))
    assert all(len(step) == batch for step in found)
    times = Counter(start for step in found for start in step)
    offsets = {start % block for start in times}
    assert len(offsets) == 1
    # the longest row of windows end to end; an offset may cost one
    assert windows == (n - 1) // block - (
        1 if layout["random_offset"] and (n - 1) % block != block - 1 else 0
    )
    if layout["drop_last"]:
        assert set(times.values()) == {1}
        assert len(times) == windows - windows % batch
    else:
        assert len(times) == windows
        assert max(times.values()) - min(times.values()) <= 1
        assert times.total() == -(-windows // batch) * batch
    if len(times) == windows:
        offset = offsets.pop()
        assert offset < (block if layout["random_offset"] else 1)
        targets = sorted(start + 1 + i for start in times for i in range(block))
        assert targets == list(range(offset + 1, offset + windows * block + 1))
        assert n - 1 - len(targets) < block * (2 if layout["random_offset"] else 1)


@given(layout=layouts(), data=st.data())
def test_micro_batch_is_a_function_of_seed_place_and_rank_alone(
    layout: dict[str, Any], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, layout["world_size"] - 1))
    one, other = ranks(layout)[rank], ranks({**layout, "steps": layout["steps"] + 7})[rank]
    for b in data.draw(st.lists(st.integers(0, len(one) - 1), max_size=8)):  # in any order, also again
        x, y = one[b]
        again = other[b]
        assert torch.equal(x, again[0])
        assert torch.equal(y, again[1])
        assert torch.equal(x + 1, y)  # targets are the next tokens
        assert x[:, 0].tolist() == one.starts(b).tolist()


@given(layout=layouts(), data=st.data())
def test_step_has_the_same_windows_however_it_is_shared(layout: dict[str, Any], data: st.DataObject) -> None:
    world = data.draw(st.sampled_from([w for w in (1, 2, 3, 4) if layout["batch_size"] % w == 0]))
    micro, _ = split_batch(layout["batch_size"], data.draw(st.integers(1, 7)), world)
    other = {**layout, "world_size": world, "micro_batch_size": micro}
    steps = range(layout["steps"])
    a, b = starts(ranks(layout), steps), starts(ranks(other), steps)
    assert [sorted(step) for step in a] == [sorted(step) for step in b]


@given(layout=layouts(), data=st.data())
def test_loader_goes_on_from_where_it_stopped(layout: dict[str, Any], data: st.DataObject) -> None:
    """Stopped anywhere with the same sharing; between two steps also with another."""
    dataset = ranks(layout)[0]
    sequences = layout["micro_batch_size"] * layout["world_size"]
    stop = data.draw(st.integers(0, len(dataset)))
    first = PositionedLoader(dataset, sequences=sequences, resumable=True)
    iterator = iter(first)
    head = [next(iterator)[0] for _ in range(stop)]
    second = PositionedLoader(ranks(layout)[0], sequences=sequences, resumable=True)
    second.load_state_dict(first.state_dict())
    rest = [x for x, _ in second]
    expected = [dataset[b][0] for b in range(len(dataset))]
    assert all(torch.equal(a, b) for a, b in zip(expected, head + rest, strict=True))
    if stop % dataset.accumulation:
        return
    micro, _ = split_batch(layout["batch_size"], data.draw(st.integers(1, 7)), 1)
    alone = ranks({**layout, "world_size": 1, "micro_batch_size": micro})[0]
    third = PositionedLoader(alone, sequences=micro, resumable=True)
    third.load_state_dict(first.state_dict())
    got = [start for x, _ in third for start in x[:, 0].tolist()]
    steps = starts(ranks(layout), range(stop // dataset.accumulation, layout["steps"]))
    size = layout["batch_size"]
    assert [sorted(got[i : i + size]) for i in range(0, len(got), size)] == [sorted(step) for step in steps]


@given(
    tokens=st.integers(2, 80),
    block=st.integers(1, 9),
    micro=st.integers(1, 5),
    world=st.integers(1, 4),
)
def test_validation_has_every_token_but_the_first_as_a_target_once(
    tokens: int, block: int, micro: int, world: int
) -> None:
    parts = [
        EvalBatches(Store(val=tokens), block_size=block, micro_batch_size=micro, rank=rank, world_size=world)  # type: ignore[arg-type]
        for rank in range(world)
    ]
    (length,) = {len(part) for part in parts}  # the ranks stay in step
    assert (length - 1) * block * micro * world < tokens - 1 <= length * block * micro * world
    found: Counter[int] = Counter()
    for part in parts:
        for x, y in (part[b] for b in range(len(part))):
            assert x.shape == y.shape == (micro, block)
            counted = y != IGNORE
            assert torch.equal(x[counted] + 1, y[counted])
            found.update(y[counted].tolist())
    assert found == Counter(range(1, tokens))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    block=st.integers(1, 9),
    data=st.data(),
)
def test_scoring_windows_have_short_documents_from_their_beginning(
    lengths: list[int], block: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, block))
    tokens = np.array([0 if i == 0 else 1 for n in lengths for i in range(n)] + [0])  # 0 ends a document
    windows = scoring_windows(tokens, block_size=block, stride=stride, end=0).tolist()
    assert all(1 <= length <= block and seen < length for _, length, seen in windows)
    targets = [t for begin, length, seen in windows for t in range(begin + seen + 1, begin + length + 1)]
    assert targets == list(range(1, len(tokens)))
    assert len(windows) <= 2 * -(-(len(tokens) - 1) // stride)
    begins = dict(zip(targets, (b for b, length, seen in windows for _ in range(length - seen)), strict=True))
    document = 0
    for n in lengths:
        for target in range(document + 1, document + n + 1):
            context = target - begins[target]
            assert begins[target] <= document or (n > block and context > block - stride)
        document += n
    whole = scoring_windows(tokens, block_size=block, stride=stride, end=0, most=3).tolist()
    assert whole == windows[:3]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**33))
def test_permute_reaches_every_index_once(n: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@given(n=st.integers(2**20, 2**61), seed=st.integers(0, 2**32), data=st.data())
def test_permute_of_a_range_too_long_to_store_gives_different_indices_different_places(
    n: int, seed: int, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True))
    order = permute(np.array(index), n, seed=seed, epoch=0)
    assert len(set(order.tolist())) == len(index)
    assert order.min() >= 0
    assert order.max() < n
    alone = [int(permute(np.array([i]), n, seed=seed, epoch=0)[0]) for i in index[:3]]
    assert order[:3].tolist() == alone  # each goes its way whatever is asked for beside it


# -- schedules ---------------------------------------------------------------------------------------

shares = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """A schedule and any arguments that it allows."""
    schedule = draw(st.sampled_from([constant, cosine, linear, wsd]))
    max_steps = draw(st.integers(1, 300) | st.integers(1, 10**7))
    warmup = draw(st.integers(0, max_steps - 1))
    options = {"max_steps": max_steps, "warmup_steps": warmup}
    options["warmup_start_ratio"] = draw(st.none() | shares)
    if schedule is not constant:
        options["min_lr_ratio"] = draw(shares)
    if schedule is wsd:
        options["decay_ratio"] = draw(shares)
    return schedule, options


def decay_steps(schedule: Any, options: dict[str, Any]) -> int:
    """Optimizer steps between the peak and the end; 0 where the rate does not fall."""
    after = options["max_steps"] - options["warmup_steps"]
    if schedule is wsd:
        return min(after, round(options["decay_ratio"] * options["max_steps"]))
    return 0 if schedule is constant else after


@given(drawn=schedules(), data=st.data())
def test_rate_rises_to_its_peak_and_falls_to_its_end_without_a_jump(
    drawn: tuple[Any, dict[str, Any]], data: st.DataObject
) -> None:
    schedule, options = drawn
    factor = partial(schedule, **options)
    warmup, end, low = options["warmup_steps"], options["max_steps"], options.get("min_lr_ratio", 1.0)
    falls = decay_steps(schedule, options)
    corners = {0, warmup, end - falls, end}
    near = st.sampled_from(sorted(corners)).flatmap(lambda c: st.integers(max(0, c - 3), c + 3))
    drawn_steps = data.draw(st.lists(near | st.integers(0, end + 5), max_size=12))
    steps = sorted({step + i for step in corners | set(drawn_steps) for i in (0, 1)})
    values = {step: factor(step) for step in steps}
    tiny = 1e-12
    assert all(-tiny <= value <= 1 + tiny for value in values.values())
    assert values[warmup] == 1.0
    assert values[end] == pytest.approx(low if falls else 1.0, abs=tiny)
    assert values[end + 1] == values[end]  # it stays there
    for a, b in pairwise(steps):
        if b <= warmup:
            assert values[a] <= values[b] + tiny
        else:
            assert values[a] >= values[b] - tiny or a < warmup
        if b == a + 1:  # half a cosine is at most pi / 2 times as steep as the straight line
            rise = 1 / warmup if b <= warmup else 0.0
            fall = (1 - low) * math.pi / 2 / falls if falls else 0.0
            assert -fall - tiny <= values[b] - values[a] <= rise + tiny
    start = options["warmup_start_ratio"]
    if warmup:
        assert values[0] == pytest.approx(1 / (warmup + 1) if start is None else start, abs=tiny)


outside = (
    st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1, exclude_min=True) | st.just(math.nan)
)


@given(drawn=schedules(), data=st.data())
def test_schedule_refuses_what_is_outside_its_range(
    drawn: tuple[Any, dict[str, Any]], data: st.DataObject
) -> None:
    schedule, options = drawn
    wrong: dict[str, Any] = {
        "max_steps": st.integers(max_value=0),
        "warmup_steps": st.integers(max_value=-1) | st.integers(min_value=options["max_steps"]),
        **{key: outside for key in options if key.endswith("ratio")},
    }
    key = data.draw(st.sampled_from(sorted(wrong)))
    value = data.draw(wrong[key])
    with pytest.raises(ValueError, match="^" + re.escape(f"scheduler.{key}={value}")) as caught:
        schedule(data.draw(st.integers(0, 100)), **{**options, key: value})
    assert "\n" not in str(caught.value)


# -- saved models ------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Any small GPTConfig."""
    heads = draw(st.integers(1, 3))
    return {
        "vocab_size": draw(st.integers(BYTES.n_vocab, 300)),
        "block_size": draw(st.integers(1, 12)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_embd": heads * draw(st.integers(1, 6)),
        "n_inner": draw(st.none() | st.integers(1, 20)),
        "dropout": draw(st.floats(0, 1, exclude_max=True)),
        "bias": draw(st.booleans()),
        "qkv_bias": draw(st.none() | st.booleans()),
        "tie_weights": draw(st.booleans()),
        "vocab_multiple": draw(st.integers(1, 70)),
        "exact_gelu": draw(st.booleans()),
    }


@settings(max_examples=40)
@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_any_model_comes_back_from_its_checkpoint_bit_by_bit(
    shape: dict[str, Any], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    net = random_net(seed=seed, **shape)
    model = {"_target_": "gpt_lightning.model.gpt.build_gpt", **asdict(net.config)}
    checkpoint = {
        "state_dict": {f"net.{name}": value for name, value in net.state_dict().items()},
        "hyper_parameters": {"model": model},
        "tokenizer": tokenizers.to_state(BYTES),
    }
    path = tmp_path_factory.getbasetemp() / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert torch.load(path, weights_only=True)["hyper_parameters"] == checkpoint["hyper_parameters"]
    again, _ = start_from(str(path))
    assert again.config == net.config
    a, b = net.state_dict(), again.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name
    assert (again.transformer.wte.weight is again.lm_head.weight) == shape["tie_weights"]
