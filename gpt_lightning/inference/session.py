"""What a prompt line does: texts are continued, and lines that begin with / change settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.text import MAX_SEED, TextGenerator

HELP = """\
A line is a prompt, and the model continues it; an empty line begins a new document.
  /NAME VALUE   changes a setting: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
                num_samples, seed, or stop; VALUE null takes a filter away
  /settings     shows them
  /help         shows this
Ctrl-C stops an answer, Ctrl-D leaves. The seed grows with every answer, so that the next one differs."""


class Session:
    """Settings and a model, told what to do line by line.

    Args:
        model: Continues the prompts.
        settings: How, to begin with.
        num_samples: Answers to a prompt.
        seed: Of the first answer; each answer takes the next.
        stop: A text that ends an answer, or None.
    """

    def __init__(
        self,
        model: TextGenerator,
        settings: SamplingSettings,
        *,
        num_samples: int = 1,
        seed: int = 0,
        stop: str | None = None,
    ):
        self.model = model
        self.settings: dict[str, Any] = {
            **asdict(settings),
            "num_samples": num_samples,
            "seed": seed,
            "stop": stop,
        }

    def respond(self, line: str) -> Iterator[str]:
        """What to show for a line of input, in pieces as they come.

        Raises:
            ValueError: If a command or its value does not exist, or the prompt cannot be encoded.
        """
        if line.startswith("/"):
            yield self.command(*line[1:].split(maxsplit=1))
            return
        settings = dict(self.settings)
        samples, stop = settings.pop("num_samples"), settings.pop("stop") or ()
        self.settings["seed"] += samples
        for number, piece in self.model.in_order([line] * samples, stop=stop, **settings):
            yield piece.text
            if piece.finish and number < samples - 1:
                yield "\n---\n"

    def command(self, name: str = "help", value: str | None = None) -> str:
        """Do what `/name value` says, and return what there is to show.

        Raises:
            ValueError: If there is no such setting, or it cannot have this value; nothing is changed then.
        """
        if name == "help":
            return HELP
        if name == "settings":
            return "\n".join(f"{key} = {json.dumps(found)}" for key, found in self.settings.items())
        if name not in self.settings:
            raise ValueError(f"no setting /{name}; /help lists them")
        if value is None:
            return f"{name} = {json.dumps(self.settings[name])}"
        changed = {**self.settings, name: _parse(value)}
        if name == "stop":
            changed[name] = None if value == "null" else str(_parse(value))
        check(**changed)
        self.settings = changed
        return f"{name} = {json.dumps(changed[name])}"


def check(*, num_samples: Any, seed: Any, stop: Any, **settings: Any) -> SamplingSettings:
    """Settings that a user gave, if they are possible.

    Raises:
        ValueError: Names the first that is not.
    """
    for key, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < MAX_SEED:
            raise ValueError(f"{key}={value!r} must be a whole number from {least} to {MAX_SEED - 1}")
    if stop is not None and (not isinstance(stop, str) or not stop):
        raise ValueError(f"stop={stop!r} must be a text of at least one character, or null")
    return SamplingSettings(**settings)


def _parse(value: str) -> Any:
    """A number, null, or a text in JSON's quotes, which may hold \\n; otherwise the text as it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value
