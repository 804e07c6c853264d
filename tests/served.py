"""An application whose every request a test sees, and a client that talks to it byte by byte."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tests.wire import connected

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Application:
    """Runs a handler for each request; keeps what happened."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.scopes: list[Scope] = []
        self.refusals: list[tuple[int, str]] = []
        self.known: list[tuple[str, str, str]] = []
        self.left: list[Message] = []
        self.events: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.scopes.append(scope)
        self.events.put_nowait("begun")
        try:
            await self.handler(scope, receive, send)
        finally:
            self.events.put_nowait("ended")

    def on_refusal(
        self, peer: str, status: int, reason: str, correlation_id: str = "", method: str = "", path: str = ""
    ) -> None:
        assert peer == "127.0.0.1"
        self.refusals.append((status, reason))
        self.known.append((correlation_id, method, path))


async def talk(port: int, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send the pieces, each by itself, and read until the server closes."""
    async with connected(port) as (reader, writer), asyncio.timeout(10):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        if half_close:
            writer.write_eof()
        return await reader.read()


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """One answer with a Content-Length: status line, headers, body."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head[:-4].split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        body: bytes = await reader.readexactly(int(headers.get(b"content-length", 0)))
        return status, headers, body


def parse(answer: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return int(status.split(b" ")[1]), dict(line.split(b": ", 1) for line in lines), body


async def read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


async def answer(send: Send, body: bytes = b"ok", status: int = 200, headers: Any = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def say_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, await read_body(receive))


async def show_path(scope: Scope, receive: Receive, send: Send) -> None:
    await read_body(receive)
    await answer(send, scope["raw_path"])


def head(*lines: bytes) -> bytes:
    return b"\r\n".join((b"GET / HTTP/1.1", b"Host: a", *lines, b"", b""))


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"", b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def echo_messages(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": next(iter(scope["subprotocols"]), None)})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})
