"""Real sockets for tests: an application under uvicorn, a service that does as it is told, a client of raw bytes."""

import asyncio
import http.client
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import uvicorn
from starlette.types import ASGIApp

from gateway.policies.edge import EdgeLimits
from gateway.server.worker import GatewayServer, server_config
from gateway.server.workers import bind

T = TypeVar("T")


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def both_event_loops(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """For a module whose tests shall run under either: ``anyio_backend = both_event_loops``."""
    return "asyncio", {"use_uvloop": request.param}


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 for a server in another process; nobody else is given it meanwhile.

    It refuses connections until somebody listens there, which takes SO_REUSEADDR; servers set it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


# Of each connection that a listener accepts the kernel keeps so many bytes unread. By itself it keeps ever more, up to
# 32 MiB, the longer a reader falls behind: on a busy machine as much as a gateway that holds nobody back.
KEEP_LITTLE = (socket.SOL_SOCKET, socket.SO_RCVBUF, 131_072)


class RunningServer(uvicorn.Server):
    """uvicorn on a free port of the test's own event loop, without its signal handlers and its ticking."""

    async def start(self) -> int:
        if not self.config.loaded:
            self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup()
        listener = self.servers[0].sockets[0]
        listener.setsockopt(*KEEP_LITTLE)
        port: int = listener.getsockname()[1]
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


@asynccontextmanager
async def serving_at_the_edge(app: ASGIApp, **limits: Any) -> AsyncIterator[int]:
    """Serve an application by the gateway's own server, in this loop; gives the port on 127.0.0.1."""
    async with leaving_server(app, **limits) as (port, _, _):
        yield port


@asynccontextmanager
async def leaving_server(app: ASGIApp, **limits: Any) -> AsyncIterator[tuple[int, GatewayServer, "asyncio.Task[None]"]]:
    """Serve likewise, where the test tells the server to leave: gives the port, the server, and the task that it is."""
    edge = EdgeLimits(**limits)
    listeners = bind("127.0.0.1", 0)
    listeners[0].setsockopt(*KEEP_LITTLE)
    ready = asyncio.Event()
    server = GatewayServer(server_config(app, edge), edge, on_ready=ready.set)
    running = asyncio.create_task(server.serve(sockets=listeners))
    await ready.wait()
    try:
        yield listeners[0].getsockname()[1], server, running
    finally:
        server.quit()
        await running


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

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        lines = [line.partition(b":") for line in self.head.split(b"\r\n")[1:-2]]
        return [(name.lower(), value.strip(b" \t")) for name, _, value in lines]

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
        listener = self._server.sockets[0]
        listener.setsockopt(*KEEP_LITTLE)
        self.port = listener.getsockname()[1]

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


class UnsoundError(Exception):
    """An answer that RFC 9112 does not allow, or that two readers could take differently."""


STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: [^\r\n]*)?")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t \x21-\x7e\x80-\xff]*)")
TRAILER = re.compile(rb"[\t \x21-\x7e\x80-\xff]+")  # dropped, so no more need be said of it
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})(?:[ \t]*;[\t \x21-\x7e\x80-\xff]*)?")


async def read_answer(reader: Reader, method: bytes = b"GET") -> Answer:
    """One answer off a connection that may go on behind it, by the letter of RFC 9112; interim ones are read over.

    One whose head came whole and whose body did not is returned, as not ``whole``; its ``raw`` is all the heads.

    Raises:
        asyncio.IncompleteReadError, ConnectionError: the connection ended before the end of the head.
        UnsoundError: what came is not an answer, or its framing is unsound.
    """
    raw = b""
    while True:
        raw += (head := await reader.readuntil(b"\r\n\r\n"))
        first, *lines = head[:-4].split(b"\r\n")
        start = STATUS_LINE.fullmatch(first)
        found = [FIELD.fullmatch(line) for line in lines]
        if start is None or None in found:
            raise UnsoundError(f"a malformed head: {head[:200]!r}")
        if start[2] == b"101":
            raise UnsoundError("another protocol")
        if start[2] >= b"200":
            break
    status = int(start[2])
    headers = [(match[1].lower(), match[2].strip(b" \t")) for match in found if match is not None]
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings and (codings != [b"chunked"] or lengths or start[1] == b"0"):
        raise UnsoundError(f"an ambiguous or unknown framing: {headers}")
    if lengths and (len(lengths) > 1 or not re.fullmatch(rb"\d+", lengths[0])):
        raise UnsoundError(f"an ambiguous length: {lengths}")
    body = bytearray()
    whole = True
    if method != b"HEAD" and status not in (204, 304):
        try:
            if codings:
                await _read_chunks(reader, body)
            elif lengths:
                await _read_into(body, reader, int(lengths[0]))
            else:
                while data := await reader.read(65536):
                    body += data
        except (asyncio.IncompleteReadError, ConnectionError):
            whole = False
    return Answer(status, headers, bytes(body), whole, raw)


async def _read_into(body: bytearray, reader: Reader, size: int) -> None:
    while size > 0:
        data = await reader.read(min(size, 65536))
        if not data:
            raise asyncio.IncompleteReadError(b"", size)
        body += data
        size -= len(data)


async def _read_chunks(reader: Reader, body: bytearray) -> None:
    while True:
        line = (await reader.readuntil(b"\r\n"))[:-2]
        size = CHUNK_SIZE.fullmatch(line)
        if size is None:
            raise UnsoundError(f"the size of a chunk: {line[:100]!r}")
        if int(size[1], 16) == 0:
            break
        await _read_into(body, reader, int(size[1], 16))
        if await reader.readexactly(2) != b"\r\n":
            raise UnsoundError("a chunk that does not end where it should")
    while line := (await reader.readuntil(b"\r\n"))[:-2]:
        if TRAILER.fullmatch(line) is None:
            raise UnsoundError(f"a malformed trailer: {line[:100]!r}")


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[Reader, Writer]]:
    """A client's connection, closed in the end; it holds a large head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def reset(writer: Writer) -> None:
    """Close a connection by a RST, whatever is under way."""
    raw = writer.transport.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def until(condition: Callable[[], Any], timeout: float = 5.0) -> float:
    """Wait for something to become true; returns how long it took, in seconds. A TimeoutError where it does not."""
    began = asyncio.get_running_loop().time()
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.005)
    return asyncio.get_running_loop().time() - began


def eventually(look: Callable[[], T | None], seconds: float = 20.0) -> T:
    """What ``look`` gives, once it gives something: for tests of other processes, without an event loop."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError, http.client.HTTPException):
            if found := look():
                return found
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def is_healthy(port: int) -> bool:
    asked = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with closing(asked), suppress(OSError):
        asked.request("GET", "/health")
        return asked.getresponse().status == 200
    return False


async def held_back(sent: Callable[[], int]) -> int:
    """Wait until a sender, having begun, comes no further; returns how far it came.

    That is known after 100 ms: one that is not held back waits for no more than an acknowledgement, which the kernel
    puts off by 40 ms at most.
    """
    before = 0
    while before != (before := sent()) or not before:  # noqa: ASYNC110  that nothing happens sets no event
        await asyncio.sleep(0.1)
    return before
