"""What the server lets in, in this process, with an application of its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="the extra demo is not installed")
gate, server = (pytest.importorskip(f"gpt_lightning.serving.{name}") for name in ("gate", "server"))

KEY = "sésame"


LONG = 1 << 26  # bytes, more than the buffers of two sockets
left = threading.Event()  # the client of a long answer has gone


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        body = await receive()
        assert not body["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        long = scope["path"] == "/robots.txt"
        await send({"type": "http.response.body", "body": b"x" * LONG * long, "more_body": long})
        if long and (await receive())["type"] == "http.disconnect":
            left.set()


def ask(headers: dict[str, str | bytes], body: list[bytes] | None = None, **options: Any) -> tuple[int, int]:
    """Status of the answer to a request, and how many parts of its body were not received."""
    options = {"max_bytes": 100, "hosts": ["demo.example"], "api_key": None, **options}
    parts, sent = [*(body or [b""])], []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    pairs = [(k.lower().encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers.items()]
    scope = {
        "type": "http",
        "path": "/health",
        "headers": pairs,
        "server": ("192.0.2.7", 80),
        "method": "GET",
    }
    asyncio.run(gate.Gate(application, **options)(scope, receive, send))
    assert not any(b"access-control" in name for name, _ in sent[0]["headers"])
    return sent[0]["status"], len(parts)


@pytest.mark.parametrize("host", ["localhost:80", "127.0.0.1", "[::1]:7860", "192.0.2.7", "Demo.example:1"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert ask({"Host": host}) == (200, 0)
    assert ask({"Host": host, "Origin": f"http://{host}"}) == (200, 0)
    assert ask({"Host": socket.gethostname(), "Origin": f"https://{host}"}) == (200, 0)


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.demo.example", "192.0.2.8", "", "[", "localhost@evil"]
)
def test_other_names_are_refused(name: str) -> None:
    assert ask({"Host": name}) == (403, 1)
    assert ask({"Host": "localhost", "Origin": f"http://{name}"}) == (403, 1)
    assert ask({"Host": "localhost", "Origin": name or "null"}) == (403, 1)


def test_request_without_the_key_is_refused() -> None:
    given: list[tuple[str | bytes, int]] = [
        (f"Bearer {KEY}", 200),
        (b"basic " + base64.b64encode(f"anyone:{KEY}".encode()), 200),
        (f"Bearer {KEY}s", 401),
        ("Bearer ", 401),
        (b"Basic " + base64.b64encode(KEY.encode()), 401),
        ("Basic é", 401),
        ("", 401),
    ]
    for authorization, status in given:
        headers = {"Host": "localhost", "Authorization": authorization}
        assert ask(headers, api_key=KEY)[0] == status, authorization


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "2"}])
def test_bytes_of_a_body_are_counted_as_they_arrive(
    headers: dict[str, str | bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {"Host": "localhost", "Transfer-Encoding": "chunked", **headers}
    monkeypatch.setattr(gate, "DISCARDED", 1000)
    assert ask(headers, [b"x" * 50] * 2) == (200, 0)
    assert ask(headers, [b"x" * 50] * 3) == (413, 0)  # the client has sent all before it reads
    assert ask(headers, [b"x" * 50] * 1000) == (413, 1000 - 23)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    """Makes connections to a server of little patience, which ends with the test."""
    monkeypatch.setattr(gate, "PATIENCE", 0.1)
    site = gate.Gate(application, max_bytes=1000, hosts=[], api_key=None)
    running = uvicorn.Server(server.configuration(site))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        address = listener.getsockname()
        yield lambda: socket.create_connection(address, timeout=30)
        running.should_exit = True
        thread.join()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionError):  # reset, as it is closed with bytes that nobody read
        while new := connection.recv(1 << 16):
            data += new
    return data


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /health HTTP/1.1\r\nHost: loc", b""),
        (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc", b"HTTP/1.1 408 "),
        (b"POST /secret HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nabc", b"HTTP/1.1 404 "),
    ],
    ids=["nothing", "half a header", "half a body", "half a body that was refused"],
)
def test_connection_that_says_no_more_is_closed(
    connect: Callable[[], socket.socket], sent: bytes, answer: bytes
) -> None:
    with connect() as connection:
        connection.sendall(sent)
        assert received(connection)[:13] == answer


def test_connection_whose_header_never_ends_is_closed(connect: Callable[[], socket.socket]) -> None:
    def dribble(connection: socket.socket) -> None:
        for part in [b"GET /health HTTP/1.1\r\nHost: ", *[b"x"] * 5000]:
            connection.sendall(part)
            time.sleep(0.01)

    with connect() as connection, pytest.raises(ConnectionError):
        dribble(connection)


def test_client_that_stops_reading_is_disconnected(connect: Callable[[], socket.socket]) -> None:
    with connect() as connection:
        connection.sendall(b"GET /robots.txt HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.settimeout(None)
        assert left.wait(30)
        assert 0 < len(received(connection)) < LONG
