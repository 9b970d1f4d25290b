"""The web page of a model that was trained on conversations: a chat."""

from __future__ import annotations

import contextlib
import html
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from gpt_lightning.data.corpus.chat import render
from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.serving.engine import Busy, Engine
from gpt_lightning.serving.page import QUIET, heading, name_of, pace, stoppable, token_pages, token_view


def build_chat(engine: Engine) -> gr.Blocks:
    """The page; messages are escaped there, so that a model cannot make a browser load anything."""
    most, info = engine.max_new_tokens, engine.model.info
    with gr.Blocks(title=f"{name_of(info)} - gpt_lightning", analytics_enabled=False) as page:
        gr.Markdown(heading(info))
        conversation = gr.Chatbot(  # it has a button that begins a new conversation
            label="Conversation", render_markdown=False, buttons=["copy_all"], elem_id="conversation"
        )
        message = gr.Textbox(label="Message", max_length=engine.max_prompt_chars)
        with gr.Row():
            send = gr.Button("Send", variant="primary")
            stop = gr.Button("Stop", variant="stop", interactive=False)
        with gr.Accordion("Settings", open=False):
            settings: list[gr.components.Component] = [
                gr.Slider(1, most, min(most, 200), step=1, label="New tokens, at most"),
                gr.Slider(0, 2, SamplingSettings().temperature, step=0.05, label="Temperature"),
            ]
        place, tokens = token_view(info)

        async def answer(*values: Any) -> AsyncGenerator[tuple[str, list[dict[str, Any]]], None]:
            async with contextlib.aclosing(respond(engine, *values)) as updates:
                async for history in updates:
                    yield "", history

        async def look(history: list[dict[str, Any]], layer: int, head: int) -> str:
            """The tokens of the last answer, which is read with its question alone, as in training."""
            if not history:
                return ""
            *question, answer = as_messages(history[-2:])
            prompt = render(question)
            return await token_pages(engine, prompt, [prompt + answer["content"]], layer=layer, head=head)

        inputs, outputs = [message, conversation, *settings], [message, conversation]
        begun = gr.on([send.click, message.submit], lambda: gr.update(interactive=True), None, stop, **QUIET)
        run = stoppable(begun, answer, inputs, outputs, stop)
        for event in (run.success, *(field.change for field in place)):
            event(look, [conversation, *place], tokens, **QUIET)
    return page.queue(max_size=engine.queue + 1, default_concurrency_limit=None)  # the engine queues


async def respond(
    engine: Engine, message: str, history: list[dict[str, Any]], max_new_tokens: int, temperature: float
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """The conversation with the message and as much of its answer as there is.

    Raises:
        gradio.Error: For a mistake of the user or a full queue; the page shows it.
    """
    shown = [*history, {"role": "user", "content": html.escape(message)}]
    messages = as_messages(shown)
    while len(messages) > 2 and len(render(messages)) > engine.max_prompt_chars:
        messages = messages[2:]  # the oldest question and its answer
    text, seed, due = "", secrets.randbelow(2**31), pace()

    def state() -> list[dict[str, Any]]:
        return [*shown, {"role": "assistant", "content": html.escape(text)}]

    try:
        settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        async with contextlib.aclosing(engine.pieces([render(messages)], settings)) as steps:
            async for (piece,) in steps:
                text += piece.text
                if due(len(text)):
                    yield state()
        yield state()
    except (ValueError, Busy) as error:
        raise gr.Error(str(error), print_exception=False) from None


def as_messages(history: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The messages of a conversation as text."""
    return [{"role": turn["role"], "content": without_html(turn["content"])} for turn in history]


def without_html(content: Any) -> str:
    """The text of a message as the browser sends it, HTML in one or several parts."""
    parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return html.unescape("".join(parts))
