"""What a server lets in: which paths, names and keys, how many bytes, and how slow a client may be."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import socket
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10.0  # seconds for a body, and between two looks at a silent connection
DISCARDED = 1 << 24  # bytes of a body that is too long, which are read so that its client sees the answer
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# All other paths are refused, including Gradio's routes to files, uploads and other servers.
PATHS = re.compile(
    r"/(|health|v1/models|v1/completions|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt"
    r"|(assets|static)/((?!\.\.)[\w./-])+|gradio_api/(startup-events|cancel|heartbeat/\w+|queue/(join|data)))"
)


def problem(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = {429: "rate_limit_error", 500: "server_error"}.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": 'Basic realm="gpt_lightning"'}, 408: {"Connection": "close"}}
    return JSONResponse(problem(status, message, param, code), status, headers.get(status))


class Gate:
    """Passes a request on if it is for this server, has the key, and is neither too long nor too slow.

    The names in Host and Origin must be this machine's, so that no page of another site reaches the server
    through a visitor's browser.

    Args:
        app: Answers what is passed on.
        max_bytes: Longest body of a request, however it is sent.
        hosts: More names of this machine.
        api_key: Every request must have it, as a bearer token or as the password of HTTP's basic
            authentication; None for none.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, hosts: list[str], api_key: str | None):
        self.app, self.max_bytes, self.api_key = app, max_bytes, api_key
        name = socket.gethostname().lower()
        self.hosts = LOOPBACK | {name, name.split(".")[0], *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refused = self.refuse(scope)
        if refused is None:
            try:
                body = await asyncio.wait_for(self._body(receive), PATIENCE)
            except asyncio.TimeoutError:
                refused = refusal(408, f"the request was not complete within {PATIENCE:.0f} s")
            else:
                if body is None:
                    return
                if len(body) > self.max_bytes:
                    refused = refusal(413, f"the request has more than the {self.max_bytes} bytes accepted")
                receive = _replayed(body, receive)
        await (refused or self.app)(scope, receive, send)

    def refuse(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that is not passed on, whatever its body is."""
        if scope["type"] != "http" or not PATHS.fullmatch(scope["path"]):
            return refusal(404, "there is nothing here")
        headers = dict(scope["headers"])
        names = {"Host": b"//" + headers.get(b"host", b""), "Origin": headers.get(b"origin", b"//localhost")}
        for header, url in names.items():
            if (name := _hostname(url)) not in self.hosts | {scope["server"][0]}:
                return refusal(403, f"{header}: {name} is no name of this server; allowed_hosts= adds names")
        if self.api_key is not None and not _has_key(headers.get(b"authorization", b""), self.api_key):
            return refusal(401, "the API key is missing or wrong", code="invalid_api_key")
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, cut off after max_bytes + 1; None if the client has gone."""
        body, size, more = b"", 0, True
        while more and size <= self.max_bytes + DISCARDED:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            new, more = message.get("body", b""), message.get("more_body", False)
            body, size = body + new[: self.max_bytes + 1 - len(body)], size + len(new)
        return body


def _hostname(url: bytes) -> str:
    try:
        return urlsplit(url.decode("latin-1")).hostname or ""
    except ValueError:
        return ""


def _has_key(authorization: bytes, api_key: str) -> bool:
    kind, _, given = authorization.partition(b" ")
    if kind.lower() == b"basic":
        try:
            given = base64.b64decode(given).partition(b":")[2]
        except ValueError:
            return False
    return secrets.compare_digest(given, api_key.encode())


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What an application receives: the body that was read, then what else the client sends."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


class PatientProtocol(H11Protocol):
    """Closes a connection that neither has a request nor takes its answer, for PATIENCE to twice as long.

    uvicorn itself has a limit between two requests only, not for one whose headers arrive byte by byte, for
    the rest of a body that was refused, or for a client that stops reading.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: tuple[Any, int] | None) -> None:
        now = self.cycle, self.transport.get_write_buffer_size()
        unread, answering = now[1], self.cycle is not None and not self.cycle.response_complete
        if now == before and (unread or not answering):
            self.transport.abort()
        self._next_look = self.loop.call_later(PATIENCE, self._look, now)
