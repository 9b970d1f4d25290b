"""A store that is read while a process in the background writes it."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import growing
from gpt_lightning.data.growing import GrowingStore, begin
from gpt_lightning.data.token_store import prepare
from gpt_lightning.data.tokenizer import Byte
from gpt_lightning.data.windows import EvalBatches, TrainBatches

GROUPS = 2 * (os.cpu_count() or 1) + 6  # more than are encoded at once
LINE = "a line of a story, with the number {:8d}\n"  # 43 characters
LINES = 13_000  # in a group


@dataclass(frozen=True)
class Waiting:
    """Documents of which the last one comes when a file is there."""

    go: str
    separated = True

    def digest(self) -> str:
        return "waiting"

    def documents(self, split: str) -> Iterator[str]:
        if split == "val":
            yield "a short text for the validation"
            return
        for number in range(GROUPS):
            yield LINE.format(number) * LINES
        while not Path(self.go).exists():
            time.sleep(0.01)
        yield "the last one"

    def floor_bits(self, document: str) -> float | None:
        return None


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Waiting]:
    yield Waiting(str(tmp_path / "go"))
    for process in growing._writers:
        with process:  # closes its input
            process.kill()
    growing._writers.clear()


def whole(corpus: Waiting, tmp_path: Path) -> np.ndarray:
    """The tokens that `prepare` gives."""
    Path(corpus.go).touch()
    tokens = np.array(prepare(corpus, Byte(), tmp_path / "whole").tokens("train"))
    Path(corpus.go).unlink()
    return tokens


def opened(corpus: Waiting, tmp_path: Path, length: int, val: int = 20) -> GrowingStore:
    return begin(corpus, Byte(), tmp_path / "cache").reading({"train": length, "val": val})


def test_first_tokens_are_read_while_later_ones_are_not_there(corpus: Waiting, tmp_path: Path) -> None:
    expected = whole(corpus, tmp_path)
    store = opened(corpus, tmp_path, len(expected))
    tokens = pickle.loads(pickle.dumps(store)).tokens("train")  # as a worker of the loader has it
    assert np.array_equal(tokens[:100_000], expected[:100_000])
    assert np.array_equal(tokens[np.array([[5, 3], [70_000, 0]])], expected[[[5, 3], [70_000, 0]]])
    assert not store.folder.exists()  # the corpus still waits
    assert bytes(store.tokens("val")[1:].astype(np.uint8)) == b"a short text for th"
    Path(corpus.go).touch()
    assert bytes(tokens[-13:-1].astype(np.uint8)) == b"the last one"
    assert np.array_equal(tokens[:], expected)
    assert store.folder.is_dir()
    again = opened(corpus, tmp_path, len(expected), val=10_000)
    assert len(growing._writers) == 1  # all is there
    assert len(again.tokens("val")) == 2 + len("a short text for the validation")


def test_process_that_waits_does_the_work_of_a_writer_that_was_killed(
    corpus: Waiting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole(corpus, tmp_path)
    tokens = opened(corpus, tmp_path, len(expected)).tokens("train")
    assert np.array_equal(tokens[:1000], expected[:1000])
    (writer,) = growing._writers
    writer.kill()
    writer.wait()
    monkeypatch.setattr(growing, "SILENCE", 0.2)
    Path(corpus.go).touch()
    assert np.array_equal(tokens[:], expected)


def test_writer_ends_with_the_process_that_started_it(corpus: Waiting, tmp_path: Path) -> None:
    opened(corpus, tmp_path, 1000)
    (writer,) = growing._writers
    assert writer.poll() is None
    assert writer.stdin is not None
    writer.stdin.close()  # as the end of this process would
    assert writer.wait(timeout=60) == 1


def test_run_that_needs_more_text_than_there_is_gets_a_line(corpus: Waiting, tmp_path: Path) -> None:
    Path(corpus.go).touch()
    count = len(whole(corpus, tmp_path))
    Path(corpus.go).touch()
    tokens = opened(corpus, tmp_path, count + 1).tokens("train")
    line = f"the training text has {count:,} tokens, and the run reads {count + 1:,}; lower trainer.max_steps"
    with pytest.raises(ValueError, match=line):
        tokens[count]


def test_each_buffer_is_shuffled_by_itself(corpus: Waiting, tmp_path: Path) -> None:
    store = opened(corpus, tmp_path, 12 * 10 + 1)
    batches = TrainBatches(
        store, block_size=10, batch_size=3, micro_batch_size=3, steps=4, seed=1, shuffle_buffer=4
    )
    windows = np.concatenate([batches.starts(b) for b in range(4)]) // 10
    assert sorted(windows) == list(range(12))
    parts = [windows[begin : begin + 4].tolist() for begin in (0, 4, 8)]
    assert [sorted(part) for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len({tuple(number % 4 for number in part) for part in parts}) > 1
    longer = opened(corpus, tmp_path, 16 * 10 + 1)  # an extended run goes on in the same order
    more = TrainBatches(
        longer, block_size=10, batch_size=3, micro_batch_size=3, steps=5, seed=1, shuffle_buffer=4
    )
    assert all((more.starts(b) == batches.starts(b)).all() for b in range(4))
    validation = EvalBatches(store, block_size=5, micro_batch_size=2, most=2)
    assert bytes(validation[0][0].flatten().tolist()[1:]) == b"a short t"
