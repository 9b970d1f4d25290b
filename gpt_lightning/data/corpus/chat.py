"""Conversations: .jsonl files of messages, whose answers alone are learned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_lightning.data.corpus.base import END_OF_TEXT, Split, digest_files, kind_of, select
from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.corpus.readers import read_objects

ROLES = ("system", "user", "assistant")
MARKERS = [f"<|{role}|>" for role in ROLES]
ANSWER = "<|assistant|>\n"  # ordinary text, so that any tokenizer has it; what follows is the response
# `render` in the language of transformers' tokenizers
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def render(messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that asks for an answer to the messages, in the form that the training text has."""
    turns = (
        turn(message["role"], message["content"]) + (END_OF_TEXT if message["role"] == "assistant" else "\n")
        for message in messages
    )
    return END_OF_TEXT + "".join(turns) + ANSWER


def turn(role: str, content: str) -> str:
    """A message in the format of the training text, without what follows."""
    return f"<|{role}|>\n{content.strip()}"


def exchanges(row: Mapping[str, Any], where: str) -> list[str]:
    """The texts of a conversation, one for each answer; messages after the last answer are left out.

    Raises:
        ValueError: If the row is something else, has no answer, or contains the marker of a role.
    """
    messages = row.get("messages")
    if messages is None and "prompt" in row and "response" in row:
        contents = zip(("user", "assistant"), (row["prompt"], row["response"]), strict=True)
        messages = [{"role": role, "content": content} for role, content in contents]
    if not isinstance(messages, list):
        raise ValueError(f"{where} has neither `messages` nor `prompt` and `response`; give one of them")
    texts, text = [], ""
    for message in messages:
        known = message if isinstance(message, dict) else {}
        role, content = known.get("role"), known.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(f"{where}: a message needs a text `content` and a `role` of {', '.join(ROLES)}")
        if any(marker in content for marker in MARKERS):
            raise ValueError(f"{where}: a message has {', '.join(MARKERS)} in it; they separate messages")
        text += turn(role, content)
        if role == "assistant":
            texts.append(text)
        text = "" if role == "assistant" else text + "\n"
    if not texts:
        raise ValueError(f"{where} has no message of the assistant; leave it out")
    return texts


@dataclass(frozen=True)
class Chat(TextFiles):
    """Conversations from .jsonl files, also as .gz; validation takes whole conversations.

    Every answer with the messages since the one before is a document, in the form of `render`. The loss
    counts the tokens of the answer and the end-of-text token behind it.

    Raises:
        ValueError: As TextFiles, and, when read, if a file or a row is something else.
    """

    separated = True
    response_marker = ANSWER

    def digest(self) -> str:
        settings: list[object] = ["Chat", 1, None if self.val_path else self.val_fraction]
        return digest_files(settings, self.files("train"), self.files("val") if self.val_path else [])

    def files(self, split: Split) -> list[Path]:
        found = super().files(split)
        for file in found:
            if kind_of(file) != "jsonl":
                raise ValueError(f"{file}: data=chat reads .jsonl files, a conversation per line")
        return found

    def documents(self, split: Split) -> Iterator[str]:
        rows = (exchanges(*row) for file in self.files(split) for row in read_objects(file))
        fraction = None if self.val_path else self.val_fraction
        for conversation in select(rows, split, fraction, f"data.path={self.path}"):
            yield from conversation
