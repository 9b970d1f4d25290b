"""One model for many clients at once: they wait for their turn, up to a limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpt_lightning.inference.text import BATCH, MAX_SEED, Piece, TextGenerator


class Busy(Exception):
    """As many requests as may wait are waiting, or the server stops."""


class Engine:
    """A model behind a queue; one request is computed at a time, away from the event loop.

    Args:
        model: The model.
        max_prompt_chars: Longest prompt of a request in characters, all its texts together.
        max_new_tokens: Most tokens after a prompt.
        queue: Requests that may wait while one is computed.

    Raises:
        ValueError: If a limit is out of range.
    """

    def __init__(self, model: TextGenerator, *, max_prompt_chars: int, max_new_tokens: int, queue: int):
        limits = {"max_prompt_chars": max_prompt_chars, "max_new_tokens": max_new_tokens, "queue": queue}
        for key, value in limits.items():
            least = int(key != "queue")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{key}={value!r} must be a whole number of at least {least}")
        self.model, self.queue = model, queue
        self.max_prompt_chars, self.max_new_tokens = max_prompt_chars, max_new_tokens
        self.inside = 0  # requests that wait or are computed
        self.stopped = False  # set it, and all of them end
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, "model")  # one, so no text is closed while it is computed

    async def pieces(self, prompts: Sequence[str], **settings: Any) -> AsyncGenerator[list[Piece], None]:
        """As `TextGenerator.pieces`; closing the iterator ends the computation.

        Raises:
            ValueError: If a setting or a prompt cannot be used, before anything is computed.
            Busy: If the queue is full; or later, if the server stops.
        """
        length, tokens, seed = sum(map(len, prompts)), settings["max_new_tokens"], settings["seed"]
        if not 1 <= len(prompts) <= BATCH:
            raise ValueError(f"{len(prompts)} texts are asked for at once; ask for 1 to {BATCH}")
        if length > self.max_prompt_chars:
            raise ValueError(f"prompt has {length} characters; at most {self.max_prompt_chars} are accepted")
        if isinstance(tokens, int) and tokens > self.max_new_tokens:
            raise ValueError(f"max_new_tokens={tokens} is too many; use at most {self.max_new_tokens}")
        if isinstance(seed, int) and seed > MAX_SEED:
            raise ValueError(f"seed={seed} is too large; use at most {MAX_SEED}")
        steps = self.model.pieces(prompts, **settings)
        if self.inside > self.queue:
            raise Busy(f"{self.inside} requests are being answered or waiting; try again in a moment")
        self.inside += 1
        made: asyncio.Queue[list[Piece] | Exception | None] = asyncio.Queue()
        task = asyncio.create_task(self._compute(steps, made))
        try:
            while (new := await made.get()) is not None:
                if isinstance(new, Exception):
                    raise new
                yield new
        finally:
            task.cancel()

    async def _compute(
        self, steps: Iterator[list[Piece]], made: asyncio.Queue[list[Piece] | Exception | None]
    ) -> None:
        """All steps of a request, however slowly its client takes them: the next one is not kept waiting."""
        try:
            async with self._turn:
                loop = asyncio.get_running_loop()
                while (new := await loop.run_in_executor(self._worker, next, steps, None)) is not None:
                    made.put_nowait(new)
                    if self.stopped:
                        raise Busy("the server is stopping")
            made.put_nowait(None)
        except Exception as error:  # for whoever reads
            made.put_nowait(error)
        finally:
            self.inside -= 1
            self._worker.submit(steps.close)  # type: ignore[attr-defined]  # a generator; frees its cache
