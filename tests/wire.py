"""Real sockets for tests: an application under uvicorn, a service that does as it is told, a client of raw bytes."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp


class RunningServer(uvicorn.Server):
    """uvicorn on a free port of the test's own event loop, without its signal handlers and its ticking."""

    async def start(self) -> int:
        if not self.config.loaded:
            self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    async def stop(self) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        for task in list(self.server_state.tasks):
            task.cancel()
        await until(lambda: not self.server_state.tasks)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self.lifespan.shutdown()


@asynccontextmanager
async def serving(app: ASGIApp, **options: Any) -> AsyncIterator[int]:
    """Serve an application; gives the port on 127.0.0.1."""
    defaults: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "log_config": None,
        "access_log": False,
        "proxy_headers": False,
        "server_header": False,
        "date_header": False,
        "ws": "websockets-sansio",
    }
    server = RunningServer(uvicorn.Config(app, **(defaults | options)))
    port = await server.start()
    try:
        yield port
    finally:
        await server.stop()


@dataclass
class Request:
    """A request as a service got it, byte for byte."""

    head: bytes
    body: bytes = b""
    connection: int = 0

    @property
    def target(self) -> bytes:
        return self.head.split(b" ", 2)[1]

    @property
    def method(self) -> bytes:
        return self.head.split(b" ", 1)[0]

    def values(self, name: bytes) -> list[bytes]:
        lines = self.head.split(b"\r\n")[1:]
        return [line.split(b":", 1)[1].strip() for line in lines if line.lower().startswith(name.lower() + b":")]


Reader = asyncio.StreamReader
Writer = asyncio.StreamWriter
Handler = Callable[[Request, Reader, Writer], Awaitable[None]]


def reply(answer: bytes) -> Handler:
    """A handler that reads the whole request and answers these bytes."""

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(answer)

    return handle


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Service:
    """A service on loopback that answers by a handler and remembers what it got.

    Attributes:
        handler: what is done with each request; set it at any time.
        requests: those that came, in order.
        connections: how many were opened so far.
        open: how many are open now.
    """

    def __init__(self) -> None:
        self.handler: Handler = reply(OK)
        self.requests: list[Request] = []
        self.connections = 0
        self.open = 0
        self.left = asyncio.Event()  # a client closed its connection
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await until(lambda: self.open == 0)

    async def _serve(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        self._writers.add(writer)
        try:
            while True:
                request = Request(await reader.readuntil(b"\r\n\r\n"), connection=number)
                self.requests.append(request)
                await self.handler(request, reader, writer)
                if writer.is_closing():
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            self.left.set()
        finally:
            self.open -= 1
            self._writers.discard(writer)
            if not writer.is_closing():  # else it may be closed, which CPython 3.11 does not forgive
                writer.transport.abort()


@asynccontextmanager
async def service(handler: Handler | None = None) -> AsyncIterator[Service]:
    """A service for the length of a test."""
    one = Service()
    if handler is not None:
        one.handler = handler
    await one.start()
    try:
        yield one
    finally:
        await one.stop()


async def read_body(request: Request, reader: asyncio.StreamReader) -> bytes:
    """Read the rest of a request into it, as its head frames it."""
    length = request.values(b"content-length")
    if length:
        request.body = await reader.readexactly(int(length[0]))
    elif request.values(b"transfer-encoding"):
        while (size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)) > 0:
            request.body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    return request.body


@dataclass
class Answer:
    """An answer as a client got it.

    Attributes:
        whole: it ended as its head said it would.
        raw: everything the connection brought.
    """

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    whole: bool
    raw: bytes

    def values(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name.lower()]


async def send_raw(port: int, data: bytes, *, timeout: float = 5.0) -> bytes:
    """Send bytes, then read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(timeout):
            writer.write(data)
            with suppress(ConnectionError):
                return await reader.read(-1)
            return b""
    finally:
        writer.transport.abort()


async def call(
    port: int,
    target: str | bytes = "/",
    method: str = "GET",
    headers: tuple[tuple[str, str], ...] = (),
    body: bytes = b"",
    timeout: float = 5.0,
) -> Answer:
    """One request on a connection of its own; chunks of the answer are joined."""
    path = target if isinstance(target, bytes) else target.encode()
    lines = [method.encode() + b" " + path + b" HTTP/1.1", b"Host: gateway.test", b"Connection: close"]
    lines += [f"{name}: {value}".encode() for name, value in headers]
    if body:
        lines.append(b"Content-Length: %d" % len(body))
    raw = await send_raw(port, b"\r\n".join(lines) + b"\r\n\r\n" + body, timeout=timeout)
    return parse(raw)


def parse(raw: bytes) -> Answer:
    """An answer from the bytes up to the end of its connection."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    match = re.match(rb"HTTP/1\.[01] (\d{3})", lines[0])
    assert match, raw[:200]
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines[1:])]
    whole = True
    length = dict(headers).get(b"content-length")
    if (b"transfer-encoding", b"chunked") in headers:
        body, whole = unchunk(body)
    elif length is not None:
        whole = not body or len(body) == int(length)  # a HEAD has none
    return Answer(int(match[1]), headers, body, whole, raw)


def unchunk(body: bytes) -> tuple[bytes, bool]:
    """The data in a chunked body, and whether it is whole and nothing follows it."""
    data, rest = b"", body
    while True:
        size, line_ends, rest = rest.partition(b"\r\n")
        count = int(size, 16) if line_ends else -1
        if count == 0:
            return data, rest == b"\r\n"
        data += rest[: max(0, count)]
        if rest[count : count + 2] != b"\r\n" or count < 0:
            return data, False
        rest = rest[count + 2 :]


async def until(condition: Callable[[], Any], timeout: float = 5.0) -> None:
    """Wait for something to become true; a TimeoutError where it does not."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.005)
