"""Text from a model: prompts in, pieces of text out, as tokens come."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import tiktoken

from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.corpus.base import END_OF_TEXT
from gpt_lightning.inference.decoding import stream
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.interop.folder import ModelCard
from gpt_lightning.model.gpt import GPT

BATCH = 16  # sequences generated at once; more makes a cache that small machines cannot hold
MAX_SEED = 1 << 62  # torch takes 64 bits, and every text adds one


@dataclass(frozen=True)
class Piece:
    """What one token added to a text.

    Args:
        text: New characters; may be empty, while a character or a stop string is incomplete.
        tokens: Tokens generated for this text so far.
        finish: Why the text ended with this piece, None while it goes on: "stop" is a stop string or the
            end of the document, "length" is max_new_tokens.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


@dataclass
class TextGenerator:
    """A model that continues text, as `gpt_lightning.load` returns it.

    Every method takes as `settings` the fields of `SamplingSettings`: max_new_tokens, temperature, top_k,
    top_p, min_p, repetition_penalty. Prompts are continued as they are; an empty one begins a new
    document, and <|endoftext|> in one is the token between documents.

    Args:
        net: The model.
        tokenizer: Its tokenizer.
        info: What is known about the model.
    """

    net: GPT
    tokenizer: tiktoken.Encoding
    info: ModelCard = field(default_factory=ModelCard)

    @overload
    def generate(
        self, prompt: str = "", *, seed: int = 0, stop: str | Sequence[str] = (), **settings: Any
    ) -> str: ...

    @overload
    def generate(
        self, prompt: list[str], *, seed: int = 0, stop: str | Sequence[str] = (), **settings: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompt: str | list[str] = "",
        *,
        num_samples: int,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **settings: Any,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: str | list[str] = "",
        *,
        num_samples: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        **settings: Any,
    ) -> str | list[str]:
        """The continuation of a prompt, without the prompt.

        Args:
            prompt: A text, or several, which are answered together.
            num_samples: Continuations of each prompt; None is one.
            seed: The same seed gives the same text; sample i of prompt j draws from its own random
                numbers, seeded with seed + j * num_samples + i.
            stop: A text ends before any of these.
            settings: Fields of `SamplingSettings`.

        Returns:
            A text for a single prompt without num_samples, otherwise a list, samples of a prompt together.

        Raises:
            ValueError: If a setting is out of range, or a prompt has a character that the vocabulary lacks.
        """
        if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
            raise ValueError(f"num_samples={num_samples!r} must be a whole number of at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [""] * (len(prompts) * (num_samples or 1))
        each = [text for text in prompts for _ in range(num_samples or 1)]
        for row, piece in self.in_order(each, seed=seed, stop=stop, **settings):
            texts[row] += piece.text
        return texts[0] if isinstance(prompt, str) and num_samples is None else texts

    def stream(
        self, prompt: str = "", *, seed: int = 0, stop: str | Sequence[str] = (), **settings: Any
    ) -> Iterator[str]:
        """The continuation of a prompt piece by piece, whole characters only; joined, what `generate` gives.

        Raises:
            ValueError: As `generate`.
        """
        for (piece,) in self.pieces([prompt], seed=seed, stop=stop, **settings):
            if piece.text:
                yield piece.text

    def in_order(
        self, prompts: Sequence[str], *, seed: int = 0, stop: str | Sequence[str] = (), **settings: Any
    ) -> Iterator[tuple[int, Piece]]:
        """The continuations one after the other, as a reader wants them, though they are made side by side.

        Yields:
            Number of the prompt and its next piece; `finish` in the piece is the end of its text.

        Raises:
            ValueError: As `generate`.
        """
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            waiting: list[deque[Piece]] = [deque() for _ in batch]
            current = 0
            for pieces in self.pieces(batch, seed=seed + start, stop=stop, **settings):
                for queue, piece in zip(waiting, pieces, strict=True):
                    queue.append(piece)
                while current < len(batch) and waiting[current]:
                    piece = waiting[current].popleft()
                    yield start + current, piece
                    current += piece.finish is not None

    def pieces(
        self, prompts: Sequence[str], *, seed: int = 0, stop: str | Sequence[str] = (), **settings: Any
    ) -> Iterator[list[Piece]]:
        """The continuations of several prompts side by side, one piece of each per token.

        After a text's last piece, the one with `finish`, its pieces are empty.

        Raises:
            ValueError: As `generate`; before the first piece.
        """
        chosen = _settings(settings)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < MAX_SEED:
            raise ValueError(f"seed={seed!r} must be a whole number from 0 to {MAX_SEED - 1}")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise ValueError(f"stop={stop!r} must be texts of at least one character")
        ids = [self.encode(prompt) for prompt in prompts]
        return self._pieces(ids, chosen, seed, stops)

    def _pieces(
        self, ids: list[list[int]], settings: SamplingSettings, seed: int, stops: tuple[str, ...]
    ) -> Iterator[list[Piece]]:
        texts = [_Text(self.tokenizer, stops, settings.max_new_tokens) for _ in ids]
        end = tokenizers.end_of_text(self.tokenizer)
        gpu = self.net.transformer.wte.weight.device.type == "cuda"
        for new in stream(self.net, ids, settings, seed=seed, stop_ids=(end,), static_shapes=gpu):
            yield [text.add(token) for text, token in zip(texts, new, strict=True)]
            if all(text.finish for text in texts):
                return
        if not all(text.finish for text in texts):  # the last ones ended, so the stream gave nothing for them
            yield [text.add(None) for text in texts]

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one.

        Raises:
            ValueError: If the vocabulary lacks a character of it.
        """
        end = tokenizers.end_of_text(self.tokenizer)
        ids: list[int] = []
        for number, part in enumerate(prompt.split(END_OF_TEXT)):
            ids += [end] if number else []
            ids += tokenizers.encode_array(self.tokenizer, part).tolist() if part else []
        return ids or [end]


class _Text:
    """The text of one sequence as its tokens come."""

    def __init__(self, tokenizer: tiktoken.Encoding, stops: tuple[str, ...], max_tokens: int):
        self.tokenizer, self.stops, self.max_tokens = tokenizer, stops, max_tokens
        self.finish: Literal["stop", "length"] | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # keeps half characters back
        self._held = ""  # may be the beginning of a stop string
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
        known = token is not None and token < self.tokenizer.n_vocab  # a model may have ids to spare
        data = self.tokenizer.decode_single_token_bytes(token) if known else b""  # type: ignore[arg-type]
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
        """Length of the longest end of the text with which a stop string begins."""
        longest = max(map(len, self.stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self.stops)), 0)


def _settings(values: dict[str, Any]) -> SamplingSettings:
    unknown = values.keys() - SamplingSettings.__dataclass_fields__.keys()
    if unknown:
        known = ", ".join(SamplingSettings.__dataclass_fields__)
        raise ValueError(f"unknown setting {min(unknown)!r}; use {known}, num_samples, seed or stop")
    return SamplingSettings(**values)
