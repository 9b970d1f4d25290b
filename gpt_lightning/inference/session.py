"""Interactive generation: an input line is a prompt or a command that changes a setting."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import TextGenerator

HELP = """\
A line is a prompt, and the model continues it; an empty line begins a new document.
  /NAME VALUE   changes a setting: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                num_samples, seed, or stop; VALUE null removes a filter
  /settings     lists all settings
  /help         prints this help
Ctrl-C stops an answer, Ctrl-D quits. The seed grows with every answer, so that the next one differs."""


@dataclass
class Session:
    """A model with settings that change between prompts.

    Args:
        model: Continues the prompts.
        settings: The settings at the beginning; the seed grows with every sample.
    """

    model: TextGenerator
    settings: SamplingSettings

    def respond(self, line: str) -> Iterator[str]:
        """The answer to a line of input, in pieces as they are generated.

        Raises:
            ValueError: If a command or its value does not exist, or the prompt cannot be encoded.
        """
        if line.startswith("/"):
            yield self.command(*line[1:].split(maxsplit=1))
            return
        settings = self.settings
        self.settings = replace(settings, seed=settings.seed + settings.num_samples)
        for number, piece in self.model.in_order([line], settings):
            yield piece.text
            if piece.finish and number < settings.num_samples - 1:
                yield "\n---\n"

    def command(self, name: str = "help", value: str | None = None) -> str:
        """Execute `/name value` and return its output.

        Raises:
            ValueError: If there is no such setting, or the value is invalid; nothing is changed then.
        """
        if name == "help":
            return HELP
        settings = asdict(self.settings)
        if name == "settings":
            return "\n".join(f"{key} = {json.dumps(found)}" for key, found in settings.items())
        if name not in settings:
            raise ValueError(f"no setting /{name}; /help lists them")
        if value is not None:
            parsed: Any = value  # a text unless it is a number, null or quoted text in JSON
            with contextlib.suppress(ValueError):
                parsed = json.loads(value)
            if name == "stop":
                parsed = None if value == "null" else str(parsed)
            self.settings = replace(self.settings, **{name: parsed})
        return f"{name} = {json.dumps(getattr(self.settings, name))}"
