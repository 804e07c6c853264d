"""Reaching a replica: over a unix socket, by address, by a name that is looked up each time, and through TLS."""

import asyncio
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect as open_websocket
from websockets.asyncio.server import ServerConnection, unix_serve

from gateway.context import Cause
from gateway.policies.services import Address
from gateway.policies.services import Service as Target
from gateway.problems import ForwardingError
from gateway.proxy.app import ProxyApp
from gateway.proxy.http1 import Http1Connection
from gateway.proxy.pool import HEAD_START, ConnectionPool
from tests.garbage import cyclic_garbage
from tests.wire import OK, Request, both_event_loops, call, reserved_port, service, serving, until

TLS = Path(__file__).parent / "tls"  # a certificate for localhost and 127.0.0.1 that is its own authority
anyio_backend = both_event_loops


class Replica:
    """What listens in these tests: answers everything, and remembers what it got and on which of its addresses."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.reached: list[str] = []
        self.server_names: list[str | None] = []
        self.servers: list[asyncio.Server] = []
        self.open: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def listen(self, host: str, tls: ssl.SSLContext | None = None) -> "Replica":
        """On one more address, at the port of the first."""
        self.servers.append(await asyncio.start_server(self._serve, host, self.port, ssl=tls))
        self.port = self.servers[-1].sockets[0].getsockname()[1]
        return self

    async def listen_at(self, path: Path) -> "Replica":
        self.servers.append(await asyncio.start_unix_server(self._serve, path))
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.add(writer)
        name = writer.get_extra_info("sockname")
        self.reached.append(name[0] if isinstance(name, tuple) else "unix")
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                self.requests.append(Request(await reader.readuntil(b"\r\n\r\n")))
                writer.write(OK)
        self.open.discard(writer)
        writer.transport.abort()


@asynccontextmanager
async def replica() -> AsyncIterator[Replica]:
    one = Replica()
    try:
        yield one
    finally:
        for server in one.servers:
            server.close()
        for writer in list(one.open):
            writer.transport.abort()
        await until(lambda: not one.open)


def names(monkeypatch: pytest.MonkeyPatch, lookup: Callable[[str], list[str]]) -> None:
    """Have the resolver, as the event loop asks it, answer by ``lookup``."""

    loop = asyncio.get_running_loop()
    really = loop.getaddrinfo

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[tuple[Any, ...]]:
        if host[0].isdigit():  # so does uvloop before it connects
            return list(await really(host, port, **options))
        found = lookup(host)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)


async def connected(pool: ConnectionPool) -> Http1Connection:
    assert await pool.reserve() is None
    return await pool.connect()


# Unix sockets


async def test_a_service_on_a_unix_socket_is_reached_with_its_path_prefix(tmp_path: Path) -> None:
    async with replica() as upstream:
        path = tmp_path / "search.sock"
        await upstream.listen_at(path)
        async with serving(ProxyApp({"/api": f"unix:{path}:/v2", "/plain": f"unix:{path}"})) as port:
            assert (await call(port, "/api/x?y=1")).body == b"ok"
            assert (await call(port, "/plain/x")).body == b"ok"
        first, second = upstream.requests
        assert (first.target, second.target) == (b"/v2/api/x?y=1", b"/plain/x")
        assert first.values(b"host") == [b"localhost"]


async def test_a_websocket_to_a_unix_socket(tmp_path: Path) -> None:
    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    path = str(tmp_path / "chat.sock")
    async with (
        unix_serve(echo, path),
        serving(ProxyApp({"/api": f"unix:{path}"})) as port,
        open_websocket(f"ws://127.0.0.1:{port}/api/chat", proxy=None) as client,
    ):
        await client.send("hello")
        assert await client.recv() == "hello"


async def test_a_unix_socket_that_is_not_there_is_502(tmp_path: Path) -> None:
    async with serving(ProxyApp({"/api": f"unix:{tmp_path / 'gone.sock'}"})) as port:
        answer = await call(port, "/api")
        assert (answer.status, b"no such file" in answer.body) == (502, True)


# Addresses and names


async def test_an_ipv6_address_in_brackets() -> None:
    async with replica() as upstream:
        await upstream.listen("::1")
        async with serving(ProxyApp({"/api": f"http://[::1]:{upstream.port}"})) as port:
            assert (await call(port, "/api")).body == b"ok"
        assert upstream.requests[0].values(b"host") == [b"[::1]:%d" % upstream.port]


async def test_a_name_is_looked_up_at_each_connect_so_a_changed_answer_is_followed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with replica() as upstream:
        await upstream.listen("127.0.0.1")
        await upstream.listen("127.0.0.2")
        answers = {"search": ["127.0.0.1"]}
        names(monkeypatch, lambda name: answers[name])
        pool = ConnectionPool(Address.parse(f"http://search:{upstream.port}"))
        for answer in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
            answers["search"] = [answer]
            (await connected(pool)).abort()
            await until(lambda: pool.open == 0)
            assert upstream.reached[-1] == answer
        answers["search"] = []
        with pytest.raises(ForwardingError, match="no such name"):
            await connected(pool)
        assert pool.open == 0


@pytest.mark.parametrize(("max_age", "connections"), [(60.0, 1), (-1.0, 4)])
async def test_a_connection_that_has_been_busy_for_long_is_given_up_between_two_requests(
    max_age: float, connections: int
) -> None:
    async with service() as upstream:
        pool = ConnectionPool(Address.parse(upstream.url), max_age=max_age)
        for _ in range(4):
            connection = pool.take_idle(asyncio.get_running_loop().time()) or await connected(pool)
            connection.request(b"GET", b"/", b"h", b"", b"", b"")
            while not connection.complete:
                await connection.progress()
            assert connection.take() == b"ok"
            pool.give_back(connection)
        assert upstream.connections == connections
        pool.close_idle()
        await until(lambda: pool.open == 0)


async def test_the_next_address_of_a_name_is_tried_where_one_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    async with replica() as upstream:
        await upstream.listen("127.0.0.3")
        names(monkeypatch, lambda _: ["127.0.0.1", "127.0.0.2", "127.0.0.3"])
        pool = ConnectionPool(Address.parse(f"http://search:{upstream.port}"))
        (await connected(pool)).abort()
        await until(lambda: upstream.reached == ["127.0.0.3"])


async def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    async with replica() as upstream:
        await upstream.listen("127.0.0.1")
        with black_hole("127.0.0.2", upstream.port):
            names(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.1"])
            pool = ConnectionPool(Address.parse(f"http://search:{upstream.port}"))
            began = asyncio.get_running_loop().time()
            (await connected(pool)).abort()
            assert HEAD_START <= asyncio.get_running_loop().time() - began < 2
        await until(lambda: upstream.reached == ["127.0.0.1"])


async def test_an_address_that_takes_its_time_is_still_waited_for_where_the_next_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with black_hole("127.0.0.2", 0) as hole:
        names(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.1"])
        pool = ConnectionPool(Address.parse(f"http://search:{hole.port}"))
        connecting = asyncio.create_task(connected(pool))
        done, _ = await asyncio.wait([connecting], timeout=2 * HEAD_START)
        assert not done  # though 127.0.0.1 has refused
        hole.take_all()
        (await connecting).abort()  # by the SYN that the kernel sends again after a second


async def test_a_name_whose_addresses_all_refuse_leaves_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.3"])
    with reserved_port() as port:
        pool = ConnectionPool(Address.parse(f"http://search:{port}"))

        async def fail() -> None:
            failure = None
            try:
                await pool.connect()
            except ForwardingError as error:
                failure = error
            assert failure is not None
            assert failure.cause is Cause.CONNECT_FAILED
            failure.__traceback__ = None

        await fail()
        with cyclic_garbage() as garbage:
            await fail()
        assert not [each for each in garbage if isinstance(each, BaseException)]


async def test_who_gives_up_on_a_name_leaves_no_socket_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def sockets() -> int:
        return sum("socket:" in str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink())

    with black_hole("127.0.0.2", 0) as hole, black_hole("127.0.0.3", hole.port):
        names(monkeypatch, lambda _: ["127.0.0.2", "127.0.0.3", "127.0.0.4"])
        pool = ConnectionPool(Address.parse(f"http://search:{hole.port}"))
        before = sockets()
        connecting = asyncio.create_task(connected(pool))
        await until(lambda: sockets() == before + 2)
        connecting.cancel()
        await asyncio.wait([connecting])
        await until(lambda: sockets() == before)
        assert pool.open == 0


class black_hole:  # noqa: N801  reads as what it is, a context
    """An address that takes no further connection and refuses none: the queue of its listener is full."""

    def __init__(self, host: str, port: int) -> None:
        self.sockets = [socket.create_server((host, port), backlog=0)]
        port = self.port = self.sockets[0].getsockname()[1]
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((host, port))
            self.sockets.append(filler)

    def take_all(self) -> None:
        """Take connections again, from now on."""
        listener = self.sockets[0]
        listener.setblocking(False)
        listener.listen(100)
        with suppress(BlockingIOError):
            while True:
                self.sockets.append(listener.accept()[0])

    def __enter__(self) -> "black_hole":
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.close()


# TLS


def server_tls(names_seen: list[str | None]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")

    def saw(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        names_seen.append(name)

    context.sni_callback = saw
    return context


@pytest.mark.parametrize(
    ("host", "ca_file", "status", "why"),
    [
        ("localhost", "cert.pem", 200, b"ok"),
        ("127.0.0.1", "cert.pem", 200, b"ok"),
        ("127.0.0.2", "cert.pem", 502, b"IP address mismatch"),
        ("wrong.localhost", "cert.pem", 502, b"Hostname mismatch"),
        ("localhost", None, 502, b"self-signed certificate"),
    ],
)
async def test_a_certificate_must_be_for_the_host_and_by_an_authority_that_is_known(
    host: str, ca_file: str | None, status: int, why: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, lambda _: ["127.0.0.1"])
    async with replica() as upstream:
        tls = server_tls(upstream.server_names)
        await upstream.listen("127.0.0.2" if host == "127.0.0.2" else "127.0.0.1", tls)
        url = f"https://{host}:{upstream.port}"
        ca = str(TLS / ca_file) if ca_file else None
        target = Target(name="api", prefix="/api", replicas=(url,), ca_file=ca, retries=0)
        async with serving(ProxyApp([target])) as port:
            answer = await call(port, "/api")
        assert answer.status == status
        assert why in answer.body
        assert len(upstream.requests) == (status == 200)
        is_address = host[0].isdigit()  # which is nothing for SNI to tell (RFC 6066, 3)
        assert upstream.server_names == [None if is_address else host]


# What each new connection is like


@pytest.mark.parametrize("kind", ["address", "name", "tls"])
async def test_no_connection_holds_small_writes_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch, lambda _: ["127.0.0.1"])
    async with replica() as upstream:
        await upstream.listen("127.0.0.1", server_tls([]) if kind == "tls" else None)
        host = "127.0.0.1" if kind == "address" else "localhost"
        tls = ssl.create_default_context(cafile=TLS / "cert.pem")
        pool = ConnectionPool(Address.parse(f"http{'s' * (kind == 'tls')}://{host}:{upstream.port}"), tls=tls)
        connection = await connected(pool)
        assert connection.transport is not None
        raw = connection.transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.abort()
        await until(lambda: pool.open == 0)


CONNECT_TWICE = """
import os, socket, sys, uvloop
from gateway.policies.services import Address
from gateway.proxy.pool import ConnectionPool

async def main():
    for url in sys.argv[1:]:
        pool = ConnectionPool(Address.parse(url))
        await pool.reserve()
        (await pool.connect()).abort()
    print(sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")))

uvloop.run(main())
"""


async def test_an_address_is_dialled_without_a_thread() -> None:
    """One for each connection cost a sixth of what a new stream does, and made it wait for whoever had them."""
    async with replica() as upstream:
        await upstream.listen("127.0.0.1")
        await upstream.listen("::1")
        urls = f"http://127.0.0.1:{upstream.port}", f"http://[::1]:{upstream.port}"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CONNECT_TWICE, *urls, stdout=asyncio.subprocess.PIPE
        )
        threads = (await process.communicate())[0]
    assert threads.count(b"'") == 2, threads
    assert len(upstream.reached) == 2


def open_files() -> set[str]:
    return {one.name for one in Path("/proc/self/fd").iterdir()}


async def test_a_connection_given_up_while_it_is_made_is_closed() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as fillers:
        for _ in range(3):  # further ones go unanswered
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        before = open_files()
        pool = ConnectionPool(Address.parse(f"http://127.0.0.1:{full.getsockname()[1]}"))
        connecting = asyncio.ensure_future(connected(pool))
        await until(lambda: open_files() != before)
        connecting.cancel()
        await asyncio.wait([connecting])
        assert connecting.cancelled()
        assert open_files() == before
        assert pool.open == 0
