"""One model for many clients: requests are answered in order, with a limit on how many may wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from gpt_lightning.inference.inspection import Inspection, attention, inspect
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import BATCH, Piece, TextGenerator

STOPS, STOP_LENGTH = 4, 100  # texts that may end an answer, and characters of each: all are sought per token


class Busy(Exception):
    """The queue is full, or the server is stopping."""


class Engine:
    """A model behind a queue; one request is computed at a time, in a thread beside the event loop.

    Args:
        model: The model.
        max_prompt_chars: Longest prompt of a request in characters, all its texts together.
        max_new_tokens: Most tokens after a prompt.
        queue: Requests that may wait while one is computed.
    """

    def __init__(self, model: TextGenerator, *, max_prompt_chars: int, max_new_tokens: int, queue: int):
        self.model, self.queue = model, queue
        self.max_prompt_chars, self.max_new_tokens = max_prompt_chars, max_new_tokens
        self.inside = 0  # requests that are waiting or being computed
        self.stopped = False  # true ends all of them
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, "model")  # one thread: no iterator is closed while it runs

    async def pieces(
        self, prompts: Sequence[str], settings: SamplingSettings
    ) -> AsyncGenerator[list[Piece], None]:
        """As `TextGenerator.pieces`; closing the iterator ends the computation.

        Raises:
            ValueError: If a limit is exceeded or a prompt cannot be encoded, before anything is computed.
            Busy: If the queue is full, or the server stops.
        """
        texts, length = len(prompts) * settings.num_samples, sum(map(len, prompts)) * settings.num_samples
        if not 1 <= texts <= BATCH:
            raise ValueError(f"{texts} texts are asked for at once; ask for 1 to {BATCH}")
        if length > self.max_prompt_chars:
            raise ValueError(f"prompt has {length} characters; at most {self.max_prompt_chars} are accepted")
        if settings.max_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"max_new_tokens={settings.max_new_tokens} is too many; use at most {self.max_new_tokens}"
            )
        if len(settings.stops) > STOPS or max(map(len, settings.stops), default=0) > STOP_LENGTH:
            raise ValueError(f"stop has too many or too long texts; use {STOPS} of {STOP_LENGTH} characters")
        steps = self.model.pieces(prompts, settings)
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

    async def inspect(
        self, ids: list[int], *, layer: int, head: int
    ) -> tuple[Inspection, torch.Tensor | None]:
        """What `inspection.inspect` and `inspection.attention` find in a text, in its turn."""

        def look() -> tuple[Inspection, torch.Tensor | None]:
            return inspect(self.model, ids), attention(self.model, ids, layer=layer, head=head)

        async with self._turn:
            return await asyncio.get_running_loop().run_in_executor(self._worker, look)

    async def _compute(
        self, steps: Iterator[list[Piece]], made: asyncio.Queue[list[Piece] | Exception | None]
    ) -> None:
        """Compute all steps of a request; a client that reads slowly does not delay the next request."""
        try:
            async with self._turn:
                loop = asyncio.get_running_loop()
                while (new := await loop.run_in_executor(self._worker, next, steps, None)) is not None:
                    made.put_nowait(new)
                    if self.stopped:
                        raise Busy("the server is stopping")
            made.put_nowait(None)
        except Exception as error:  # raised where the pieces are read
            made.put_nowait(error)
        finally:
            self.inside -= 1
            self._worker.submit(steps.close)  # type: ignore[attr-defined]  # a generator; frees the KV cache
