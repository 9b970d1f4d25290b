"""A token store that a process in the background writes while it is read: training need not wait for it.

The tokens come in the order of the text. Where the process is killed, another one writes the same tokens
again, so that what a run reads depends on the corpus alone.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from gpt_lightning.data.corpus.base import Corpus, Split
from gpt_lightning.data.corpus.token_bins import TokenBins
from gpt_lightning.data.remembered import remember_in
from gpt_lightning.data.token_store import SPLITS, SplitMeta, StoreBuilder, TokenStore, prepare
from gpt_lightning.data.tokenizer import FixedTokenizer, Tokenizer

log = logging.getLogger(__name__)

_writers: list[subprocess.Popen[bytes]] = []  # which end when this process does
POLL = 0.1  # seconds between two looks at a file
SILENCE = 30.0  # seconds without a new token after which a process asks whether any other one still writes


@dataclass(frozen=True, kw_only=True)
class GrowingStore(TokenStore):
    """A store of which a run reads the first tokens, when they are there.

    Args:
        lengths: How many tokens of each split are read.
        complete: Writes the store, or waits for the process that does.
    """

    lengths: dict[Split, int]
    complete: Callable[[], TokenStore]

    def tokens(self, split: Split) -> Any:
        return GrowingTokens(self, split)

    def reading(self, lengths: dict[Split, int]) -> GrowingStore:
        """The store for a run that reads so many tokens of the splits; waits for those of the validation."""
        store = replace(self, lengths=lengths)
        lengths["val"] = len(store.tokens("val")[:])  # fewer if there are no more
        splits: dict[Split, SplitMeta] = {s: SplitMeta(lengths[s], 0, 0, None, "") for s in SPLITS}
        return replace(store, lengths=lengths, meta=replace(self.meta, splits=splits))


class GrowingTokens:
    """The first tokens of a split as an array, which waits for those that are not written yet."""

    def __init__(self, store: GrowingStore, split: Split):
        self.store, self.split, self.size = store, split, store.lengths[split]
        self._mapped = np.zeros(0, dtype=store.meta.dtype)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> np.ndarray:
        if isinstance(index, slice):
            index = slice(*index.indices(self.size))
            needed = index.stop
        else:
            needed = int(np.max(index)) + 1
        if needed > len(self._mapped):
            self._wait(needed)
        return self._mapped[index]

    def _wait(self, needed: int) -> None:
        """Map the file when it has so many tokens.

        Raises:
            ValueError: If the text is over before; a validation then has fewer.
        """
        changed, before, told = time.monotonic(), -1, False
        while True:
            whole = self.store.folder.exists()  # before the look at the file, which has its last tokens then
            self._map()
            if len(self._mapped) >= needed or (whole and self.split == "val"):
                return
            if whole:
                raise ValueError(
                    f"the training text has {len(self._mapped):,} tokens, and the run reads {self.size:,}; "
                    "lower trainer.max_steps, or set data.shuffle_buffer=null, which reads them several times"
                )
            if not told:
                log.info("waiting until %s tokens of the %s split are there", f"{needed:,}", self.split)
                told = True
            if len(self._mapped) != before:
                changed, before = time.monotonic(), len(self._mapped)
            elif time.monotonic() - changed > SILENCE:
                self._ask()
            time.sleep(POLL)

    def _map(self) -> None:
        folder = self.store.folder
        partial_folder = folder.with_name(f"{folder.name}.tmp")
        names = (folder / self.split, partial_folder / self.split)
        for path in [*(name.with_suffix(".bin") for name in names), names[1].with_suffix(".bin.tmp")]:
            with suppress(OSError, ValueError):  # it is not there, or empty
                size = path.stat().st_size // self._mapped.itemsize
                self._mapped = np.memmap(path, dtype=self._mapped.dtype, mode="r", shape=(size,))
                return

    def _ask(self) -> None:
        """Do the work if no process does, with the error that ended it as the result, if one did."""
        if any(writer.poll() is None for writer in _writers):
            return
        with suppress(filelock.Timeout, OSError, NotImplementedError):
            with filelock.FileLock(f"{self.store.folder}.lock", timeout=0):
                pass
            self.store.complete()


def begin(corpus: Corpus, tokenizer: Tokenizer, cache: str | Path) -> GrowingStore:
    """Start to write the store of a corpus in the background, unless it is there.

    Args:
        corpus, tokenizer, cache: As of `prepare`.

    Raises:
        ValueError, OSError: As `prepare`.
    """
    if isinstance(corpus, TokenBins):
        raise ValueError(f"data.path={corpus.path} is tokenized already; leave out data.shuffle_buffer")
    builder = StoreBuilder(corpus, tokenizer, cache, threads=1)
    if getattr(corpus, "response_marker", ""):
        raise ValueError("data.shuffle_buffer does not go with responses, which alone are learned")
    complete = partial(prepare, corpus, FixedTokenizer(builder.encoding), cache)
    if builder.folder.exists():
        complete()  # verifies it
    elif all(os.environ.get(rank, "0") == "0" for rank in ("LOCAL_RANK", "SLURM_LOCALID")):
        _write_in_background(complete, Path(cache).expanduser() / "remembered")
    return GrowingStore(builder.folder, builder.encoding, builder.meta({}), lengths={}, complete=complete)


def _write_in_background(complete: Callable[[], TokenStore], memory: Path) -> None:
    quiet = subprocess.DEVNULL  # an error is found again by the process that waits
    command = [sys.executable, "-m", __name__]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
    )
    _writers.append(process)
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        pickle.dump([*sys.path], process.stdin)
        pickle.dump((complete, memory), process.stdin)
        process.stdin.flush()  # and it stays open


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    sys.path[:] = pickle.load(sys.stdin.buffer)
    write, folder = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)
    remember_in(folder)
    write()
