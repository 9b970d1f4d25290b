"""The web page: a prompt, settings, streaming answers, and a table about the model."""

from __future__ import annotations

import base64
import contextlib
import html
import secrets
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.interop.folder import ModelCard
from gpt_lightning.serving.engine import STOP_LENGTH, STOPS, Busy, Engine

SAMPLES = 4  # side by side, at most
REFRESH = 0.05  # seconds between updates of the page; browsers cannot take more
SHOWN = ["data", "tokenizer", "parameters", "n_layer", "n_head", "n_embd", "block_size", "vocab_size"]
SHOWN += ["step", "train_loss", "val_loss", "perplexity", "bits_per_byte"]
CSS = """
#card :is(table, tr, td) {border: 0; padding: 0 0.8em 0.1em 0} #card div {display: flex; gap: 2em}
#card img {max-height: 20em; max-width: 65%; object-fit: contain}
"""


def card_html(info: ModelCard, curves: Path | None) -> str:
    """HTML table about a model; the picture is embedded, so that no file has to be served."""

    def text(value: Any) -> str:
        spec = "," if isinstance(value, int) else ".4f" if isinstance(value, float) else ""
        return html.escape(format(value, spec))

    values: dict[str, Any] = {**info}
    known = ((key.replace("_", " "), values[key]) for key in SHOWN if values.get(key) is not None)
    rows = "".join(f"<tr><td>{key}</td><td>{text(value)}</td></tr>" for key, value in known)
    data = base64.b64encode(curves.read_bytes()).decode() if curves else ""
    image = f'<img alt="Losses over the run\'s steps" src="data:image/png;base64,{data}">' if data else ""
    return f"<div><table>{rows}</table>{image}</div>"


def settings_of(engine: Engine) -> dict[str, gr.components.Component]:
    """The input of each field of SamplingSettings."""
    default, most = SamplingSettings(), engine.max_new_tokens
    return {
        "num_samples": gr.Slider(1, SAMPLES, 1, step=1, label="Samples"),
        "max_new_tokens": gr.Slider(1, most, min(most, 200), step=1, label="New tokens, at most"),
        "temperature": gr.Slider(0, 2, default.temperature, step=0.05, label="Temperature"),
        "top_k": gr.Number(default.top_k, precision=0, label="Top k (0 keeps all tokens)"),
        "top_p": gr.Slider(0.01, 1, default.top_p, step=0.01, label="Top p"),
        "min_p": gr.Slider(0, 1, default.min_p, step=0.01, label="Min p"),
        "repetition_penalty": gr.Slider(
            0.5, 2, default.repetition_penalty, step=0.05, label="Repetition penalty"
        ),
        "seed": gr.Number(-1, precision=0, label="Seed (-1: another one each time)"),
        "stop": gr.Textbox("", label="Stop before (one text per line)", max_length=STOPS * (STOP_LENGTH + 1)),
    }


def build_page(engine: Engine, curves: Path | None) -> gr.Blocks:
    """The page of a model; `curves` is a picture of its run."""
    with gr.Blocks(title="gpt_lightning", analytics_enabled=False) as page:
        gr.Markdown(f"# {html.escape(str(engine.model.info.get('name') or 'gpt_lightning'))}")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    "Once upon a time", label="Prompt", lines=3, max_length=engine.max_prompt_chars
                )
                with gr.Row():
                    start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
                status = gr.Markdown("Nothing generated yet.", elem_id="status")
                with gr.Row():
                    boxes = [
                        gr.Textbox(label=f"Sample {n}", lines=14, visible=n == 1, elem_id=f"sample-{n}")
                        for n in range(1, SAMPLES + 1)
                    ]
                gr.HTML(card_html(engine.model.info, curves), elem_id="card")
            with gr.Column(scale=1, min_width=280):
                settings = settings_of(engine)

        async def answer(prompt: str, *values: Any) -> AsyncGenerator[list[Any], None]:
            updates = respond(engine, prompt, **dict(zip(settings, values, strict=True)))
            async with contextlib.aclosing(updates):
                async for line, texts in updates:
                    hidden = [gr.update(visible=False)] * (SAMPLES - len(texts))
                    yield [line, *(gr.update(value=text, visible=True) for text in texts), *hidden]

        inputs, outputs = [prompt, *settings.values()], [status, *boxes]
        run = start.click(answer, inputs, outputs, api_visibility="private", show_progress="hidden")
        stop.click(None, cancels=[run])
    return page.queue(max_size=engine.queue + 1, default_concurrency_limit=None)  # the engine queues


async def respond(
    engine: Engine, prompt: str | None, **values: Any
) -> AsyncGenerator[tuple[str, list[str]], None]:
    """A status line, and every sample so far, prompt included.

    Args:
        engine: The model.
        prompt: The prompt; None is an empty one.
        values: Fields of SamplingSettings as the page has them: a seed of -1 draws one, a top_k of 0 keeps
            all tokens, and each line of `stop` is a text.

    Raises:
        gradio.Error: For a mistake of the user or a full queue; the page shows it.
    """
    started, shown, tokens, texts = 0.0, 0.0, 0, [prompt or ""]
    values["seed"] = secrets.randbelow(2**31) if values["seed"] == -1 else values["seed"]

    def state() -> str:
        seconds, rate = time.monotonic() - started, tokens / max(time.monotonic() - started, 1e-3)
        return f"{tokens} tokens in {seconds:.1f} s, {rate:.0f} tokens/s, seed {values['seed']}"

    try:
        if values["num_samples"] not in range(1, SAMPLES + 1):
            raise ValueError(f"samples={values['num_samples']} must be a whole number from 1 to {SAMPLES}")
        values |= {"top_k": values["top_k"] or None, "stop": (values["stop"] or "").splitlines()}
        settings = SamplingSettings(**values)
        texts = texts * settings.num_samples
        yield f"{engine.inside} before you" if engine.inside else "Reading the prompt", texts
        async with contextlib.aclosing(engine.pieces([prompt or ""], settings)) as steps:
            async for pieces in steps:
                started = started or time.monotonic()
                texts = [text + piece.text for text, piece in zip(texts, pieces, strict=True)]
                tokens = sum(piece.tokens for piece in pieces)
                if time.monotonic() - shown > REFRESH:
                    shown = time.monotonic()
                    yield state(), texts
        yield "Done: " + state(), texts
    except (ValueError, Busy) as error:
        raise gr.Error(str(error), print_exception=False) from None


def mount(app: FastAPI, page: gr.Blocks) -> None:
    """Mount the page at the root of a server; it serves no files and uses no other servers."""
    gr.mount_gradio_app(
        app, page, path="/", css=CSS, footer_links=[], allowed_paths=[], run_history=False, ssr_mode=False,
        mcp_server=False, pwa=False,
    )  # fmt: skip
