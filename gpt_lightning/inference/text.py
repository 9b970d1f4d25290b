"""Text generation: prompts in, pieces of text out as tokens are generated."""

from __future__ import annotations

import codecs
import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import tiktoken

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.base import END_OF_TEXT
from gpt_lightning.data.corpus.chat import render
from gpt_lightning.inference.decoding import stream
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.interop.folder import ModelCard
from gpt_lightning.model.gpt import CausalLM

BATCH = 16  # sequences generated at once; the cache of more would not fit small machines


@dataclass(frozen=True)
class Piece:
    """The addition of one token to a text.

    Args:
        text: New characters; empty while a character or a stop string is incomplete.
        tokens: Tokens generated for this text so far.
        finish: None before the last piece, then the reason of the end: "stop" is a stop string or the end
            of the document, "length" is max_new_tokens.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


@dataclass
class TextGenerator:
    """A model that continues text, as `gpt_lightning.load` returns it.

    Prompts are continued as they are; an empty one begins a new document, and <|endoftext|> in one is the
    token between documents.

    Args:
        net: The model.
        tokenizer: Its tokenizer.
        info: What is known about the model.
        cuda_graph: Whether to record the step of one token as a CUDA graph, on CUDA devices. Experimental.
    """

    net: CausalLM
    tokenizer: tiktoken.Encoding
    info: ModelCard = field(default_factory=ModelCard)
    cuda_graph: bool = False

    @overload
    def generate(self, prompt: str = "", *, num_samples: None = None, **settings: Any) -> str: ...

    @overload
    def generate(
        self, prompt: list[str], *, num_samples: int | None = None, **settings: Any
    ) -> list[str]: ...

    @overload
    def generate(self, prompt: str = "", *, num_samples: int, **settings: Any) -> list[str]: ...

    def generate(
        self, prompt: str | list[str] = "", *, num_samples: int | None = None, **settings: Any
    ) -> str | list[str]:
        """The continuation of a prompt, without the prompt.

        Args:
            prompt: A text, or several, which are answered together.
            num_samples: Continuations of each prompt; None is one.
            settings: Fields of `SamplingSettings`.

        Returns:
            A text for a single prompt without num_samples, otherwise a list, samples of a prompt together.

        Raises:
            ValueError: If a setting is out of range, or a prompt has a character that the vocabulary lacks.
        """
        single = isinstance(prompt, str) and num_samples is None
        samples = 1 if num_samples is None else num_samples
        chosen = SamplingSettings.of({"num_samples": samples, **settings})
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [""] * (len(prompts) * samples)
        for row, piece in self.in_order(prompts, chosen):
            texts[row] += piece.text
        return texts[0] if single else texts

    def chat(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> str:
        """The answer of a model that was trained on data=chat.

        Args:
            messages: The conversation so far, objects with `role` (system, user or assistant) and `content`.
            settings: Fields of `SamplingSettings`.

        Raises:
            ValueError: As `generate`.
        """
        return self.generate(render(messages), **settings)

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """The continuation of a prompt piece by piece, in whole characters; joined, the text of `generate`.

        Raises:
            ValueError: As `generate`.
        """
        for (piece,) in self.pieces([prompt], SamplingSettings.of(settings)):
            if piece.text:
                yield piece.text

    def in_order(self, prompts: Sequence[str], settings: SamplingSettings) -> Iterator[tuple[int, Piece]]:
        """The samples of all prompts one after the other, though they are generated in batches.

        Yields:
            Number of the sample and its next piece; the last piece of a sample has `finish`.

        Raises:
            ValueError: As `generate`.
        """
        each = [prompt for prompt in prompts for _ in range(settings.num_samples)]
        for start in range(0, len(each), BATCH):
            batch = each[start : start + BATCH]
            waiting: list[deque[Piece]] = [deque() for _ in batch]
            current = 0
            one_each = replace(settings, seed=settings.seed + start, num_samples=1)
            for pieces in self.pieces(batch, one_each):
                for queue, piece in zip(waiting, pieces, strict=True):
                    queue.append(piece)
                while current < len(batch) and waiting[current]:
                    piece = waiting[current].popleft()
                    yield start + current, piece
                    current += piece.finish is not None

    def pieces(self, prompts: Sequence[str], settings: SamplingSettings) -> Iterator[list[Piece]]:
        """The samples of all prompts side by side, one piece of each per token.

        After the last piece of a sample, the one with `finish`, its pieces are empty.

        Raises:
            ValueError: As `generate`; before the first piece.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        return self._pieces([list(row) for row in ids for _ in range(settings.num_samples)], settings)

    def _pieces(self, ids: list[list[int]], settings: SamplingSettings) -> Iterator[list[Piece]]:
        texts = [_Text(self.tokenizer, settings.stops, settings.max_new_tokens) for _ in ids]
        end = self.tokenizer.eot_token
        graph = self.cuda_graph and self.net.device.type == "cuda"
        for new in stream(self.net, ids, settings, stop_ids=(end,), static_shapes=graph):
            yield [text.add(token) for text, token in zip(texts, new, strict=True)]
            if all(text.finish for text in texts):
                return
        if not all(text.finish for text in texts):  # all remaining ones ended with <|endoftext|>
            yield [text.add(None) for text in texts]

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one.

        Raises:
            ValueError: If the vocabulary lacks a character of it.
        """
        end = self.tokenizer.eot_token
        ids: list[int] = []
        for number, part in enumerate(prompt.split(END_OF_TEXT)):
            ids += [end] if number else []
            ids += tokenizers.encode_array(self.tokenizer, part).tolist() if part else []
        return ids or [end]


class _Text:
    """Decodes the tokens of one sequence incrementally."""

    def __init__(self, tokenizer: tiktoken.Encoding, stops: tuple[str, ...], max_tokens: int):
        self.tokenizer, self.stops, self.max_tokens = tokenizer, stops, max_tokens
        self.finish: Literal["stop", "length"] | None = None
        # holds back incomplete characters
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # possible beginning of a stop string
        self._tokens = 0

    def add(self, token: int | None) -> Piece:
        """The next piece; None is the end of the sequence."""
        if self.finish:
            return Piece("", self._tokens)
        if token is None:
            self.finish = "stop"
        else:
            self._tokens += 1
            if self._tokens == self.max_tokens:
                self.finish = "length"
        data = b""
        if token is not None:
            with contextlib.suppress(KeyError):  # the model may have ids that no token has
                data = self.tokenizer.decode_single_token_bytes(token)
        text = self._held + self._decoder.decode(data, final=self.finish is not None)
        cut = min((found for stop in self.stops if (found := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self.finish = "stop"
        elif self.finish:
            cut = len(text)
        else:
            cut = len(text) - self._possible_stop(text)
        self._held = text[cut:]
        return Piece(text[:cut], self._tokens, self.finish)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.stops)), 0)
