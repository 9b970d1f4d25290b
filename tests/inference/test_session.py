"""Interactive sessions: prompts and commands."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from support.models import BYTES, random_net, reciting

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.session import Session
from gpt_lightning.inference.text import TextGenerator


def session(**options) -> Session:
    settings = SamplingSettings(max_new_tokens=8, temperature=0.9, seed=3, **options)
    return Session(TextGenerator(random_net(), BYTES), settings)


def say(session: Session, line: str) -> str:
    return "".join(session.respond(line))


def test_line_is_continued_with_the_settings_and_the_next_seed() -> None:
    talk = session()
    options = {"max_new_tokens": 8, "temperature": 0.9}
    expected = [talk.model.generate("ab", seed=seed, **options) for seed in (3, 4)]
    assert [say(talk, "ab"), say(talk, "ab")] == expected
    assert expected[0] != expected[1]
    say(talk, "/seed 3")
    assert say(talk, "ab") == expected[0]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/temperature 0.5", "temperature", 0.5),
        ("/temperature 0", "temperature", 0),
        ("/top_k null", "top_k", None),
        ("/max_new_tokens 3", "max_new_tokens", 3),
        ("/num_samples 2", "num_samples", 2),
        ("/stop The end", "stop", "The end"),
        (r'/stop "\n\n"', "stop", "\n\n"),
        ("/stop null", "stop", None),
        ("/stop 7", "stop", "7"),
    ],
)
def test_command_changes_a_setting_and_shows_it(line: str, name: str, value: object) -> None:
    talk = session(stop="x")
    assert say(talk, line).startswith(f"{name} = ")
    assert getattr(talk.settings, name) == value
    assert say(talk, f"/{name}") == say(talk, line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/temperature -1", "temperature=-1"),
        ("/temperature hot", "temperature='hot'"),
        ("/top_k 0", "top_k=0"),
        ("/seed 1.5", "seed=1.5"),
        ("/num_samples true", "num_samples=True"),
        ("/stop", None),
        ("/warmth 1", "no setting /warmth"),
        ("/", None),
    ],
)
def test_wrong_command_is_refused_and_changes_nothing(line: str, message: str | None) -> None:
    talk = session()
    before = talk.settings
    if message is None:
        say(talk, line)
    else:
        with pytest.raises(ValueError, match=message):
            say(talk, line)
    assert talk.settings == before


def test_help_and_settings_name_every_setting() -> None:
    talk = session()
    for name in asdict(talk.settings):
        assert name in say(talk, "/help")
        assert f"{name} = " in say(talk, "/settings")


def test_samples_are_separated_by_a_line() -> None:
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0, num_samples=2, stop="lo")
    talk = Session(reciting("hello"), settings)
    assert say(talk, "") == "hel\n---\nhel"
