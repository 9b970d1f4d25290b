"""The web page: a prompt, settings, streaming answers, the loss of each token, a table about the model."""

from __future__ import annotations

import base64
import contextlib
import html
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from gpt_lightning.inference.sampling import SamplingSettings
from gpt_lightning.inference.token_page import token_page
from gpt_lightning.interop.folder import ModelCard
from gpt_lightning.serving.engine import STOP_LENGTH, STOPS, Busy, Engine

SAMPLES = 4  # side by side, at most
REFRESH = 0.05  # seconds between updates of the page, at least; browsers cannot take more
DRAWING = 1e-5  # seconds more for each character that an update draws again
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}  # options of events
SHOWN = {
    "data": "training text",
    "tokenizer": "tokenizer",
    "parameters": "parameters",
    "n_layer": "layers",
    "n_head": "attention heads per layer",
    "n_embd": "width",
    "block_size": "context in tokens",
    "vocab_size": "vocabulary",
    "step": "training steps",
    "train_loss": "training loss, nats per token",
    "val_loss": "validation loss, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
# .dark is gradio's; the picture is drawn on white
CSS = """
.text {white-space: pre-wrap; overflow-wrap: anywhere; min-height: 12em}
.text .given {opacity: .6}
#card :is(table, tr, td) {border: 0; padding: 0 0.8em 0.1em 0} #card table {width: auto}
#card div {display: flex; flex-wrap: wrap; gap: 2em}
#card img {flex: 1 1 18em; max-width: min(100%, 36em); object-fit: contain}
.dark #card img {filter: invert(1) hue-rotate(180deg)}
#tokens iframe {width: 100%; height: 32em; border: 0; resize: vertical; color-scheme: light}
.dark #tokens iframe {color-scheme: dark}
"""


def card_html(info: ModelCard, curves: Path | None) -> str:
    """HTML table about a model; the picture is embedded, so that no file has to be served."""

    def text(value: Any) -> str:
        spec = "," if isinstance(value, int) else ".4f" if isinstance(value, float) else ""
        return html.escape(format(value, spec))

    values: dict[str, Any] = {**info}
    known = [(label, values[key]) for key, label in SHOWN.items() if values.get(key) is not None]
    rows = "".join(f"<tr><td>{label}</td><td>{text(value)}</td></tr>" for label, value in known)
    data = base64.b64encode(curves.read_bytes()).decode() if curves else ""
    image = f'<img alt="Losses over the run\'s steps" src="data:image/png;base64,{data}">' if data else ""
    return f"<div><table>{rows}</table>{image}</div>"


def name_of(info: ModelCard) -> str:
    """The name of a model."""
    return str(info.get("name") or "gpt_lightning")


def heading(info: ModelCard) -> str:
    """Which model it is, in Markdown."""
    text = f"# {html.escape(name_of(info))}: {info.get('parameters', 0):,} parameters"
    return text + (f", trained on {html.escape(str(info['data']))}" if info.get("data") else "")


def sample_html(prompt: str, text: str) -> str:
    """A text, with the prompt that it begins with set off.

    It is shown as Markdown, which gradio updates more reliably than HTML while a text grows; on a single
    line, nothing in an HTML block is read as Markdown.
    """
    given, new = (html.escape(part).replace("\n", "&#10;") for part in (prompt, text[len(prompt) :]))
    return f'<div class="text"><span class="given">{given}</span>{new}</div>'


def sample_box(number: int) -> gr.Markdown:
    """Where a sample is shown; the first one is there from the beginning."""
    return gr.Markdown(
        sample_html("", ""), container=True, padding=True, latex_delimiters=[], visible=number == 1,
        elem_id=f"sample-{number}",
    )  # fmt: skip


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


def token_view(info: ModelCard) -> tuple[list[gr.Number], gr.HTML]:
    """Where the tokens of the samples are shown, below the layer and the head whose attention is."""
    known: dict[str, Any] = {**info}
    fields = {"Layer": known.get("n_layer", 1), "Attention head": known.get("n_head", 1)}
    with gr.Accordion("Loss of each token, and attention", open=False):
        with gr.Row():
            place = [
                gr.Number(0, precision=0, minimum=0, maximum=count - 1, label=label)
                for label, count in fields.items()
            ]
        return place, gr.HTML("Appears when a text is complete.", elem_id="tokens")


def stoppable(begun: Any, answer: Any, inputs: Any, outputs: Any, stop: gr.Button) -> Any:
    """The event that runs `answer` after `begun`, which enables Stop, until it has ended or is stopped."""
    run = begun.then(answer, inputs, outputs, **QUIET)
    for over in (run.success, run.failure):
        over(lambda: gr.update(interactive=False), None, stop, **QUIET)
    stop.click(lambda: gr.update(interactive=False), None, stop, cancels=[run], **QUIET)
    return run


def build_page(engine: Engine, curves: Path | None) -> gr.Blocks:
    """The page of a model; `curves` is a picture of its run."""
    info = engine.model.info
    with gr.Blocks(title=f"{name_of(info)} - gpt_lightning", analytics_enabled=False) as page:
        gr.Markdown(heading(info))
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    "Once upon a time", label="Prompt", lines=3, max_length=engine.max_prompt_chars
                )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop", variant="stop", interactive=False)
                status = gr.Markdown("Nothing generated yet.", elem_id="status")
                with gr.Row():
                    boxes = [sample_box(number) for number in range(1, SAMPLES + 1)]
                place, tokens = token_view(info)
                gr.HTML(card_html(info, curves), elem_id="card")
            with gr.Column(scale=1, min_width=280):
                settings = settings_of(engine)

        async def answer(prompt: str | None, *values: Any) -> AsyncGenerator[list[Any], None]:
            given, chosen = prompt or "", dict(zip(settings, values, strict=True))
            updates = respond(engine, prompt, **chosen)
            async with contextlib.aclosing(updates):
                async for line, texts in updates:
                    rest = [""] * (SAMPLES - len(texts))
                    shown = [sample_html(given, text) for text in texts] + rest
                    yield [line, *shown, (given, texts)]

        async def look(made: tuple[str, list[str]], layer: int, head: int) -> str:
            return await token_pages(engine, *made, layer=layer, head=head)

        def show(number: int) -> list[Any]:
            """As many samples as will be generated, and the button that stops them."""
            return [gr.update(visible=n < number) for n in range(SAMPLES)] + [gr.update(interactive=True)]

        made = gr.State(("", []))  # the prompt and the samples that are shown
        inputs, outputs = [prompt, *settings.values()], [status, *boxes, made]
        begun = start.click(show, settings["num_samples"], [*boxes, stop], **QUIET)
        run = stoppable(begun, answer, inputs, outputs, stop)
        for event in (run.success, *(field.change for field in place)):
            event(look, [made, *place], tokens, **QUIET)
    return page.queue(max_size=engine.queue + 1, default_concurrency_limit=None)  # the engine queues


async def token_pages(engine: Engine, prompt: str, texts: Sequence[str], **place: int) -> str:
    """The page of the tokens of each sample, as far as the model reads a text at once; each in a frame.

    `place` is the layer and the head whose attention it shows.
    """
    frames = []
    for number, text in enumerate(texts, start=1):
        ids = engine.model.encode(prompt)
        length = len(ids)
        with contextlib.suppress(ValueError):  # a character that the vocabulary lacks, or a single token
            ids += engine.model.encode(text[len(prompt) :])
            seen, weights = await engine.inspect(ids, **place)
            facts: dict[str, Any] = {"total": len(ids), "prompt": length, "weights": weights, **place}
            page = token_page(seen, f"Sample {number}", **facts)
            frames.append(f'<iframe title="Tokens of sample {number}" srcdoc="{html.escape(page)}"></iframe>')
    return "".join(frames)


def pace() -> Callable[[int], bool]:
    """Whether to update a page that shows so many characters: a browser that gets behind cannot stop."""
    shown = 0.0

    def due(characters: int) -> bool:
        nonlocal shown
        now = time.monotonic()
        if now - shown <= REFRESH + DRAWING * characters:
            return False
        shown = now
        return True

    return due


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
    started, tokens, texts, due = 0.0, 0, [prompt or ""], pace()
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
                if due(sum(map(len, texts))):
                    yield state(), texts
        yield "Done: " + state(), texts
    except (ValueError, Busy) as error:
        raise gr.Error(str(error), print_exception=False) from None


def mount(app: FastAPI, page: gr.Blocks) -> None:
    """Mount the page at the root of a server; it serves no files and uses no other servers."""
    gr.mount_gradio_app(
        app, page, path="/", css=CSS, footer_links=[], allowed_paths=[], run_history=False,
        ssr_mode=False, mcp_server=False, pwa=False,
    )  # fmt: skip
