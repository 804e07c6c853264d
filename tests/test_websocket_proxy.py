"""WebSockets through ProxyApp, with a real client in front and a real service behind."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request as Handshake
from websockets.http11 import Response
from websockets.typing import Subprotocol

from gateway.context import Cause
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from tests.test_proxy import Seen
from tests.wire import parse, reply, send_raw, service, serving, until

HANDSHAKE = (
    b"GET /api/ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
Behaviour = Callable[[ServerConnection], Awaitable[None]]


class Rig:
    def __init__(self, port: int, seen: Seen, connections: list[ServerConnection]) -> None:
        self.port, self.seen, self.connections = port, seen, connections

    def connect(self, path: str = "/api/ws", **options: object) -> connect:
        return connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, compression=None, **options)  # type: ignore[arg-type]

    async def cause(self) -> Cause | None:
        await until(lambda: self.seen.contexts and self.seen.last.cause is not None)
        return self.seen.last.cause


async def echo(connection: ServerConnection) -> None:
    async for message in connection:
        await connection.send(message)


@asynccontextmanager
async def rig(behaviour: Behaviour = echo, **options: object) -> AsyncIterator[Rig]:
    connections: list[ServerConnection] = []

    async def handle(connection: ServerConnection) -> None:
        connections.append(connection)
        await behaviour(connection)

    timeouts = options.pop("timeouts", Timeouts())
    assert isinstance(timeouts, Timeouts)
    preserve_host = bool(options.pop("preserve_host", False))
    async with serve(handle, "127.0.0.1", 0, compression=None, **options) as server:  # type: ignore[arg-type]
        port = next(iter(server.sockets)).getsockname()[1]
        replicas = (f"http://127.0.0.1:{port}/base",)
        target = Target(name="api", prefix="/api", replicas=replicas, timeouts=timeouts, preserve_host=preserve_host)
        seen = Seen(ProxyApp([target]))
        async with serving(seen) as gateway_port:
            yield Rig(gateway_port, seen, connections)


async def test_messages_cross_both_ways_as_they_are() -> None:
    async with rig() as gw, gw.connect() as client:
        for message in ("text ü", b"\0bytes", "", b"", "x" * 300_000):
            await client.send(message)
            assert await client.recv() == message
        await client.close()
        assert await gw.cause() is Cause.COMPLETED
        assert gw.seen.last.status == 101


async def test_the_handshake_keeps_path_query_headers_and_says_who_is_calling() -> None:
    async with rig() as gw:
        headers = {"X-Own": "1", "Origin": "https://shop.example", "Cookie": "a=b"}
        async with gw.connect("/api/a%2Fb;c?x=1&x=2", additional_headers=headers):
            await until(lambda: gw.connections)
        request = gw.connections[0].request
        assert request is not None
        assert request.path == "/base/api/a%2Fb;c?x=1&x=2"
        assert [request.headers[name] for name in headers] == list(headers.values())
        assert request.headers["X-Forwarded-For"] == "127.0.0.1"
        assert request.headers["X-Forwarded-Host"] == f"127.0.0.1:{gw.port}"
        assert request.headers.get_all("Host") == [f"127.0.0.1:{gw.connections[0].local_address[1]}"]


async def test_a_service_may_ask_for_the_clients_host() -> None:
    async with rig(preserve_host=True) as gw:
        async with gw.connect():
            await until(lambda: gw.connections)
        request = gw.connections[0].request
        assert request is not None
        assert request.headers.get_all("Host") == [f"127.0.0.1:{gw.port}"]


async def test_the_subprotocol_that_the_service_chose_reaches_the_client() -> None:
    async with rig(subprotocols=[Subprotocol("chat.v2")]) as gw:
        offered = [Subprotocol("chat.v1"), Subprotocol("chat.v2")]
        async with gw.connect(subprotocols=offered) as client:
            assert client.subprotocol == "chat.v2"


async def closed(client: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed):
        await asyncio.wait_for(client.recv(), 3)
    assert client.close_code is not None
    return client.close_code, client.close_reason or ""


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1001, "moving"), (4321, "own reason ü"), (1011, "oops")])
async def test_the_services_close_code_and_reason_reach_the_client(code: int, reason: str) -> None:
    async with rig(lambda connection: connection.close(code, reason)) as gw, gw.connect() as client:
        assert await closed(client) == (code, reason)
        assert await gw.cause() is (Cause.DROPPED if code == 1011 else Cause.COMPLETED)


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (4001, "bye")])
async def test_the_clients_close_code_and_reason_reach_the_service(code: int, reason: str) -> None:
    async with rig() as gw:
        async with gw.connect() as client:
            await until(lambda: gw.connections)
            await client.close(code, reason)
        await until(lambda: gw.connections[0].close_code is not None)
        assert (gw.connections[0].close_code, gw.connections[0].close_reason) == (code, reason)
        assert await gw.cause() is Cause.COMPLETED


async def test_a_service_that_drops_the_connection_is_a_bad_gateway_to_the_client() -> None:
    async def drop(connection: ServerConnection) -> None:
        connection.transport.abort()

    async with rig(drop) as gw, gw.connect() as client:
        assert (await closed(client))[0] == 1014
        assert await gw.cause() is Cause.DROPPED


async def test_a_client_that_vanishes_ends_the_services_connection() -> None:
    async with rig() as gw:
        client = await gw.connect()
        await until(lambda: gw.connections)
        client.transport.abort()
        async with asyncio.timeout(1):
            await gw.connections[0].wait_closed()
        await gw.cause()


async def test_a_websocket_that_neither_side_uses_is_closed_as_idle() -> None:
    async with rig(timeouts=Timeouts(websocket_idle=0.05)) as gw, gw.connect() as client:
        assert await closed(client) == (1001, "idle")


async def test_the_services_refusal_of_a_handshake_reaches_the_client() -> None:
    def refuse(connection: ServerConnection, request: Handshake) -> Response:
        return connection.respond(403, "members only\n")

    async with rig(process_request=refuse) as gw:
        with pytest.raises(InvalidStatus) as refusal:
            await gw.connect()
        assert refusal.value.response.status_code == 403
        assert refusal.value.response.body == b"members only\n"
        assert await gw.cause() is Cause.COMPLETED


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n", 302),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno", 502),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n", 502),
        (b"garbage\r\n\r\n", 502),
        (b"", 502),
    ],
)
async def test_a_handshake_that_is_not_accepted_never_hangs(answer: bytes, status: int) -> None:
    async def handle(request: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    async with service(handle) as upstream:
        seen = Seen(ProxyApp({"/api": upstream.url}))
        async with serving(seen) as port:
            assert parse(await send_raw(port, HANDSHAKE)).status == status
            if b"200 OK" in answer:
                assert seen.last.cause is Cause.REFUSED, "that a service knows no WebSocket is no failure of it"


async def test_a_service_that_is_not_there_or_silent_refuses_the_handshake() -> None:
    async with service() as upstream:
        gone = upstream.url

        async def silent(request: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(-1)
            raise ConnectionError

        upstream.handler = silent
        targets = [
            Target(name="gone", prefix="/gone", replicas=("http://127.0.0.1:1",)),
            Target(name="slow", prefix="/slow", replicas=(gone,), timeouts=Timeouts(first_byte=0.05)),
        ]
        async with serving(ProxyApp(targets)) as port:
            for path, status in (("gone", 502), ("slow", 504)):
                with pytest.raises(InvalidStatus) as refusal:
                    await connect(f"ws://127.0.0.1:{port}/{path}", proxy=None)
                assert refusal.value.response.status_code == status


async def test_a_path_that_leads_nowhere_is_refused_before_the_handshake() -> None:
    async with service(reply(b"")) as upstream, serving(ProxyApp({"/api": upstream.url})) as port:
        with pytest.raises(InvalidStatus) as refusal:
            await connect(f"ws://127.0.0.1:{port}/other", proxy=None)
        assert refusal.value.response.status_code == 404
        assert not upstream.requests
