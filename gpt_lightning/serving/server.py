"""A server with completions in OpenAI's format and the web page.

Source: https://platform.openai.com/docs/api-reference/completions. Options that are not implemented, such
as logprobs, are refused rather than ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from gpt_lightning.inference.sampling import RANGES, SamplingSettings
from gpt_lightning.inference.text import BATCH, Piece, TextGenerator
from gpt_lightning.serving.chat import build_chat
from gpt_lightning.serving.engine import Busy, Engine
from gpt_lightning.serving.gate import Gate, PatientProtocol, problem, refusal
from gpt_lightning.serving.page import build_page, mount

log = logging.getLogger(__name__)

# OpenAI's defaults: sampling from all tokens
DEFAULTS: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0, "top_k": None}
SETTINGS = {field.name for field in fields(SamplingSettings)}


class OpenAICompletion(BaseModel):
    """Body of a request in OpenAI's format; null stands for the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | list[str] | None = None
    max_new_tokens: int | None = Field(None, alias="max_tokens")
    temperature: float | None = None
    top_p: float | None = None
    num_samples: int | None = Field(None, alias="n", ge=1, le=BATCH)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    user: str | None = None
    # only with the value that is implemented
    best_of: int | None = Field(None, ge=1, le=1)
    echo: Literal[False] | None = None
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: None = None
    logprobs: None = None
    suffix: None = None


# A field for each setting that OpenAI has not, such as top_k
OWN: dict[str, Any] = {
    name: (kind | None, None)
    for name, (kind, *_) in RANGES.items()
    if name not in OpenAICompletion.model_fields
}
if TYPE_CHECKING:
    Completion = OpenAICompletion
else:
    Completion = create_model("Completion", __base__=OpenAICompletion, **OWN)


async def chunks(engine: Engine, body: Completion, model: str) -> AsyncGenerator[dict[str, Any], None]:
    """New text as it is generated, one choice per chunk; the last chunk has the usage and no choice."""
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
    settings = {"seed": secrets.randbelow(2**31), **DEFAULTS}
    settings |= body.model_dump(include=SETTINGS, exclude_none=True)
    head: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": model}
    made: list[Piece] = []
    async with contextlib.aclosing(engine.pieces(prompts, SamplingSettings(**settings))) as steps:
        async for made in steps:
            for index, piece in enumerate(made):
                if not piece.text and not piece.finish:
                    continue
                choice = {"text": piece.text, "index": index, "finish_reason": piece.finish, "logprobs": None}
                yield {**head, "choices": [choice]}
    read, new = sum(len(engine.model.encode(text)) for text in prompts), sum(piece.tokens for piece in made)
    usage = {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}
    yield {**head, "choices": [], "usage": usage}


async def whole(parts: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    """The chunks joined into one answer."""
    choices: dict[int, dict[str, Any]] = {}
    async for part in parts:
        for new in part["choices"]:
            text = choices[new["index"]]["text"] if new["index"] in choices else ""
            choices[new["index"]] = {**new, "text": text + new["text"]}
    return {**part, "choices": [choices[index] for index in sorted(choices)]}


async def events(
    first: dict[str, Any], parts: AsyncGenerator[dict[str, Any], None], with_usage: bool
) -> AsyncGenerator[str, None]:
    """The chunks as server-sent events."""
    part: dict[str, Any] | None = first
    async with contextlib.aclosing(parts):
        try:
            while part is not None:
                if with_usage or part["choices"]:
                    yield f"data: {json.dumps({'usage': None, **part} if with_usage else part)}\n\n"
                part = await anext(parts, None)
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status is already sent
            if not isinstance(error, Busy):
                log.exception("a completion failed")
            yield f"data: {json.dumps(problem(500, str(error)))}\n\n"


class EventStream(StreamingResponse):
    """Closes the iterator, which ends the computation, when the client disconnects."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


@contextlib.asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancels the block when the client disconnects."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


def api(engine: Engine, model: str) -> FastAPI:
    """`POST /v1/completions`, `GET /v1/models` and `GET /health` for one model."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": engine.inside}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "gpt_lightning"}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: Completion, request: Request) -> Response:
        if body.model not in (None, model):
            message = f"the model {body.model!r} does not exist; this server has {model!r}"
            return refusal(404, message, "model", "model_not_found")
        parts = chunks(engine, body, model)
        try:
            async with while_connected(request):
                if not body.stream:
                    return JSONResponse(await whole(parts))
                first = await anext(parts)
        except asyncio.CancelledError:
            return Response(status_code=499)  # the client has disconnected
        except Busy as error:
            return refusal(429, str(error), code="queue_full")
        except ValueError as error:
            return refusal(400, str(error).replace("max_new_tokens", "max_tokens"))
        with_usage = bool((body.stream_options or {}).get("include_usage"))
        return EventStream(events(first, parts, with_usage), media_type="text/event-stream")

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][1]) if len(first["loc"]) > 1 else "body"
        return refusal(400, f"{param}: {first['msg']}", param)

    @app.exception_handler(HTTPException)  # JSON that is too deep, or has too long a number
    async def unreadable(request: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, error.detail)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(500, "the server failed; its log says why")

    return app


class Site(Gate):
    """Page, completions and health behind a gate; `curves` is a picture of the model's run, for the page."""

    def __init__(
        self,
        model: TextGenerator,
        *,
        curves: Path | None = None,
        hosts: list[str],
        api_key: str | None = None,
        **limits: Any,
    ):
        self.engine = Engine(model, **limits)
        app = api(self.engine, str(model.info.get("name") or "gpt_lightning"))
        mount(app, build_chat(self.engine) if model.info.get("chat") else build_page(self.engine, curves))
        max_bytes = 2**16 + 12 * self.engine.max_prompt_chars  # JSON takes up to 12 bytes per character
        super().__init__(app, max_bytes=max_bytes, hosts=hosts, api_key=api_key)


class Server(uvicorn.Server):
    """Ends running computations before it waits for open connections."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.engine.stopped = True  # type: ignore[union-attr]
        await super().shutdown(sockets)


def configuration(app: ASGIApp) -> uvicorn.Config:
    """How uvicorn serves an application."""
    options: dict[str, Any] = {"http": PatientProtocol, "ws": "none", "server_header": False}
    return uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, **options)


def run(site: Site, listener: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        Server(configuration(site)).run(sockets=[listener])
