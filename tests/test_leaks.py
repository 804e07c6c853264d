"""Clients that leave in every phase, thousands of them, and bodies of a gigabyte: nothing is left, nothing grows."""

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from starlette.types import Message

from gateway.app import Gateway, create_app
from gateway.circuit_breaker import circuit_breaker_registry
from gateway.middleware.admission import AdmissionASGI
from gateway.settings import Settings
from tests import asgi_call
from tests.garbage import cyclic_garbage
from tests.wire import (
    OK,
    Reader,
    Request,
    Writer,
    connected,
    eventually,
    held_back,
    is_healthy,
    read_answer,
    reset,
    service,
    serving_at_the_edge,
    until,
)

ABORTS = 10_000
BODY = 1 << 30
AT_ONCE = 48
CONNECTIONS = 24
MB = 1 << 20


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


# Clients that leave

PHASES = {  # and the service whose requests stay in it
    "queued": "recommendations",
    "connecting": "search",
    "sending": "chat",
    "waiting": "fraud",
    "streaming": "forecast",
    "between retries": "vision",
    "probing": "pricing",
}
NAMES = {"recommendations": "RECOMMENDATION", "chat": "CHATBOT"}


class Leaving:
    """A gateway and requests to it that are given up."""

    def __init__(self) -> None:
        self.reached: dict[bytes, asyncio.Event] = {}
        self.count = 0
        self.seen: Counter[tuple[str, str, bool]] = Counter()

    async def handle(self, request: Request, reader: Reader, writer: Writer) -> None:
        """The service: keep each request in the phase that its path names."""
        *_, phase, name = request.target.split(b"/")
        if event := self.reached.get(name):
            event.set()
        if name == b"fails":
            writer.write(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
        elif phase == b"vision":
            writer.write(b"HTTP/1.1 503 Later\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
        elif phase == b"forecast":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"5\r\nhello\r\n")
                await writer.drain()
                await asyncio.sleep(0.001)
        elif name == b"clean":
            writer.write(OK)
        else:
            await reader.read(-1)
            writer.close()

    async def leave(self, random: Random) -> None:
        """Make one request and give it up in its phase, or after any number of the loop's turns."""
        phase, place = random.choice(list(PHASES.items()))
        way = random.choice(["RST", "FIN", "cancel"])
        in_phase = random.random() < 0.5
        self.count += 1
        name = b"%d" % self.count
        reached = self.reached[name] = asyncio.Event()
        self.seen[phase, way, in_phase] += 1
        path = f"/api/v1/{place}/{place}/{name.decode()}"
        turns = random.randint(0, 30)
        try:
            if way == "cancel":
                await self.cancel(path, phase, reached, turns, in_phase)
            else:
                await self.hang_up(path, phase, reached, turns, in_phase, reset if way == "RST" else Writer.close)
        finally:
            del self.reached[name]

    async def hang_up(
        self,
        path: str,
        phase: str,
        reached: asyncio.Event,
        turns: int,
        in_phase: bool,
        end: Callable[[Writer], object],
    ) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        method = "POST" if phase == "sending" else "GET"
        length = "Content-Length: 100000\r\n" if phase == "sending" else ""
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: h\r\n{length}\r\n".encode())
        if phase == "sending":
            writer.write(b"x" * 5000)
        if in_phase and phase not in ("queued", "connecting"):
            there = [asyncio.create_task(reached.wait()), asyncio.create_task(reader.read(1))]
            await asyncio.wait(there, return_when=asyncio.FIRST_COMPLETED, timeout=2)
            for task in there:
                task.cancel()
            await asyncio.gather(*there, return_exceptions=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        end(writer)
        with suppress(OSError):
            await writer.wait_closed()

    async def cancel(self, path: str, phase: str, reached: asyncio.Event, turns: int, in_phase: bool) -> None:
        first = True

        async def receive() -> Message:
            nonlocal first
            if not first:
                await asyncio.Event().wait()
            first = False
            return {"type": "http.request", "body": b"x" * 5000, "more_body": phase == "sending"}

        async def send(message: Message) -> None:
            reached.set()

        call = asyncio.create_task(
            self.app(asgi_call.http(path, "POST" if phase == "sending" else "GET"), receive, send)
        )
        if in_phase and phase not in ("queued", "connecting"):
            with suppress(TimeoutError):
                await asyncio.wait_for(reached.wait(), 2)
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    async def leave_often(self, count: int, random: Random) -> None:
        left = iter(range(count))

        async def one_after_another() -> None:
            for _ in left:
                await self.leave(random)

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(one_after_another())

    app: Gateway
    port: int


def admission(app: Any) -> AdmissionASGI:
    while not isinstance(app, AdmissionASGI):
        app = getattr(app.app, "__self__", app.app)  # layers hold one another's methods
    return app


@contextmanager
def full_backlog() -> Iterator[int]:
    """A port at which connecting neither succeeds nor fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        try:
            for each in waiting:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            yield port
        finally:
            for each in waiting:
                each.close()


@asynccontextmanager
async def leaving() -> Any:
    there = Leaving()
    async with service(there.handle) as upstream:
        with full_backlog() as unreachable:
            places = {f"{NAMES.get(place, place.upper())}_SERVICE_URL": upstream.url for place in PHASES.values()}
            environ = {
                **places,
                "SEARCH_SERVICE_URL": f"http://127.0.0.1:{unreachable}",
                "RATE_LIMIT_PER_MINUTE": "off",
                "RATE_LIMIT_PER_HOUR": "off",
                "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000",
                "PRICING_CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1",
                "PRICING_CIRCUIT_BREAKER_TIMEOUT": "0.05",
                "CONNECT_TIMEOUT": "60",
                "POOL_TIMEOUT": "60",
                "WRITE_TIMEOUT": "60",
            }
            there.app = create_app(Settings.load(environ))
            there.app.proxy.max_connections = CONNECTIONS
            async with serving_at_the_edge(there.app) as there.port:
                yield there, upstream


# Requests that fail


async def cut_short(request: Request, reader: Reader, writer: Writer) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    await writer.drain()
    writer.transport.abort()


async def dead(request: Request, reader: Reader, writer: Writer) -> None:
    writer.transport.abort()


async def silent(request: Request, reader: Reader, writer: Writer) -> None:
    await reader.read()
    writer.transport.abort()


@pytest.mark.parametrize("ending", ["cut short", "dead", "unreachable", "too slow", "client left"])
async def test_a_request_that_fails_leaves_no_cycle_of_objects(ending: str) -> None:
    """Else only a full collection of garbage would free it, and they are rare."""
    async with service({"cut short": cut_short, "dead": dead}.get(ending, silent)) as upstream:
        url = "http://127.0.0.1:1" if ending == "unreachable" else upstream.url
        environ = {"CHATBOT_SERVICE_URL": url, "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000", "LOG_LEVEL": "ERROR"}
        if ending == "too slow":
            environ["FIRST_BYTE_TIMEOUT"] = "0.02"
        app = create_app(Settings.load(environ))
        async with serving_at_the_edge(app) as port:

            async def ask() -> None:
                asked = len(upstream.requests)
                async with connected(port) as (reader, writer):
                    writer.write(b"GET /api/v1/chat HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                    if ending == "client left":
                        await until(lambda: len(upstream.requests) > asked)
                        writer.transport.abort()
                    else:
                        with suppress(ConnectionResetError):
                            await reader.read()
                await until(lambda: not app.proxy.exchanges)

            for _ in range(3):
                await ask()
            with cyclic_garbage() as garbage:
                for _ in range(10):
                    await ask()
            ours = [type(one) for one in garbage if type(one).__module__.startswith("gateway.")]
            garbage.clear()
    assert ours == []


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_clients_that_leave_in_every_phase_leave_nothing_behind() -> None:
    random = Random(7)
    async with leaving() as (there, upstream):
        app = there.app
        tasks, files = len(asyncio.all_tasks()), descriptors()
        async with connected(there.port) as (reader, writer):
            writer.write(b"GET /api/v1/pricing/pricing/fails HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await read_answer(reader)).status == 500
        breaker = circuit_breaker_registry.get("pricing-service")
        assert breaker is not None
        await until(lambda: breaker.status(time.monotonic())["state"] == "half_open")
        holding = [await asyncio.open_connection("127.0.0.1", there.port) for _ in range(CONNECTIONS)]
        for _, writer in holding:  # all connections to one service, so that others queue
            writer.write(b"GET /api/v1/recommendations/recommendations/held HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: upstream.open >= CONNECTIONS)

        async def settle() -> None:
            await until(lambda: len(app.proxy.exchanges) == CONNECTIONS, 15)
            await until(lambda: admission(app).in_flight == CONNECTIONS)
            assert app.proxy._outbox is not None
            assert app.proxy._outbox.under_way == CONNECTIONS, "the outbox counts exactly"
            upstream.requests.clear()

        await there.leave_often(ABORTS // 5, random)
        await settle()
        sizes = [resident()]
        began = time.monotonic()
        for _ in range(2):
            await there.leave_often(ABORTS * 2 // 5, random)
            await settle()
            sizes.append(resident())
        took = time.monotonic() - began
        for _, writer in holding:
            reset(writer)
        await until(lambda: not app.proxy.exchanges)
        assert app.proxy._outbox.under_way == 0
        await until(lambda: admission(app).in_flight == 0)
        pools = [pool for route in app.proxy._routes.values() for pool in route.pools.values()]
        assert all(not pool._waiting for pool in pools)
        await until(lambda: sum(pool.open - pool.idle for pool in pools) == 0)
        assert not breaker._leases, "a probe that was given up gives its slot back"
        assert breaker.status(time.monotonic())["state"] == "half_open"
        await until(lambda: upstream.open == app.proxy.open_connections)
        await app.proxy.aclose()
        await until(lambda: upstream.open == 0)
        await until(lambda: all(pool.open == 0 for pool in pools))
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await until(lambda: descriptors() <= files)
        growth = [round((after - before) / MB, 2) for before, after in pairwise(sizes)]
        assert growth[1] < 2, f"megabytes by half: {growth}, in {took:.1f} s"
        assert len(there.seen) == len(PHASES) * 3 * 2


# Bodies of a gigabyte


PIECE = bytes(range(256)) * 1024


def read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        assert more, data
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def send_body(connection: socket.socket, size: int, sent: list[int]) -> None:
    """Send the body, as far as the other side takes it; ``sent`` is how far that was."""
    while sent[0] < size:
        sent[0] += connection.send(memoryview(PIECE)[: size - sent[0]])


def read_body(connection: socket.socket, size: int, first: bytes, got: list[int], go_on: threading.Event) -> None:
    """Read a body from when one may, and see that it is the one that was sent."""
    go_on.wait(60)
    buffer = bytearray(len(PIECE))
    twice = PIECE[:256] * (len(PIECE) // 256 + 1)
    assert PIECE.startswith(first)
    got[0] = len(first)
    while got[0] < size:
        count = connection.recv_into(buffer)
        assert count, "it broke off"
        at = got[0] % 256
        assert memoryview(buffer)[:count] == memoryview(twice)[at : at + count], "not what was sent"
        got[0] += count


class Thread(threading.Thread):
    """One whose failure its joiner hears of."""

    error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.join(120)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@contextmanager
def serve(tmp_path: Path, port: int, address: str) -> Iterator[Path]:
    """``ai-gateway serve`` with one service; gives the file in which the kernel tells of its worker."""
    environ = {
        **os.environ,
        "CHATBOT_SERVICE_URL": address,
        "MAX_BODY_BYTES": str(2 << 30),
        "DRAIN_DELAY": "0",
        "RATE_LIMIT_PER_MINUTE": "off",
        "RATE_LIMIT_PER_HOUR": "off",
    }
    command = [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, cwd=tmp_path, stdout=log, stderr=log)
    try:
        eventually(lambda: is_healthy(port) or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Path(f"/proc/{worker}/status")
    finally:
        process.terminate()
        process.wait(20)


def peak(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells how much memory was used at most")
@pytest.mark.parametrize("slow", [False, True], ids=["at full speed", "with a reader that waits"])
@pytest.mark.parametrize("way", ["upload", "download"])
def test_a_huge_body_passes_through_little_memory(way: str, slow: bool, tmp_path: Path, port: int) -> None:
    size = BODY // 4 if slow else BODY  # what piles up meanwhile does so at the beginning
    go_on = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with serve(tmp_path, port, address) as status, socket.create_connection(("127.0.0.1", port)) as client:
            length = b"Content-Length: %d\r\n" % size if way == "upload" else b""
            client.settimeout(60)
            before = peak(status)
            client.sendall(b"POST /api/v1/chat/x HTTP/1.1\r\nHost: h\r\n%b\r\n" % length)
            sent, got = [0], [0]
            sending = Thread(target=send_body, args=(client, size, sent), daemon=True)
            if way == "upload":
                sending.start()
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(60)
                _, first = read_head(peer)
                if way == "download":
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                    sending = Thread(target=send_body, args=(peer, size, sent), daemon=True)
                    sending.start()
                    _, first = read_head(client)
                reading = Thread(
                    target=read_body, args=(peer if way == "upload" else client, size, first, got, go_on), daemon=True
                )
                reading.start()
                if slow:
                    ahead = asyncio.run(held_back(lambda: sent[0]))
                    assert ahead < 32 * MB, "the fast side is made to wait"
                go_on.set()
                sending.end()
                reading.end()
                if way == "upload":
                    peer.sendall(OK)
                    assert read_head(client)[0].startswith(b"HTTP/1.1 200")
            grown = peak(status) - before
    assert got[0] == size
    assert grown < 20 * MB
