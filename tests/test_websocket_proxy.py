"""WebSockets through ProxyApp, with a real client in front and a real service behind; then frame by frame."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.http11 import Request as Handshake
from websockets.http11 import Response
from websockets.typing import Subprotocol

from gateway.app import create_app
from gateway.context import Cause
from gateway.policies.edge import EdgeLimits
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.frames import BINARY, CLOSE, CONT, PING, PONG, TEXT, Frame, Raw, client, frame, goodbye, handshake, speaks
from tests.proxy_rig import Seen
from tests.wire import (
    Reader,
    Request,
    Service,
    Writer,
    held_back,
    leaving_server,
    parse,
    reply,
    send_raw,
    service,
    serving,
    until,
)

HANDSHAKE = handshake()
Behaviour = Callable[[ServerConnection], Awaitable[None]]


class Rig:
    def __init__(self, port: int, seen: Seen, connections: list[ServerConnection]) -> None:
        self.port, self.seen, self.connections = port, seen, connections

    def connect(self, path: str = "/api/ws", **options: object) -> connect:
        return connect(f"ws://127.0.0.1:{self.port}{path}", proxy=None, compression=None, **options)  # type: ignore[arg-type]


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
        assert await gw.seen.cause() is Cause.COMPLETED
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
        assert await gw.seen.cause() is (Cause.DROPPED if code == 1011 else Cause.COMPLETED)


@pytest.mark.parametrize(("code", "reason"), [(1000, ""), (4001, "bye")])
async def test_the_clients_close_code_and_reason_reach_the_service(code: int, reason: str) -> None:
    async with rig() as gw:
        async with gw.connect() as client:
            await until(lambda: gw.connections)
            await client.close(code, reason)
        await until(lambda: gw.connections[0].close_code is not None)
        assert (gw.connections[0].close_code, gw.connections[0].close_reason) == (code, reason)
        assert await gw.seen.cause() is Cause.COMPLETED


async def test_a_service_that_drops_the_connection_is_a_bad_gateway_to_the_client() -> None:
    async def drop(connection: ServerConnection) -> None:
        connection.transport.abort()

    async with rig(drop) as gw, gw.connect() as client:
        assert (await closed(client))[0] == 1014
        assert await gw.seen.cause() is Cause.DROPPED


async def test_a_client_that_vanishes_ends_the_services_connection() -> None:
    async with rig() as gw:
        client = await gw.connect()
        await until(lambda: gw.connections)
        client.transport.abort()
        async with asyncio.timeout(1):
            await gw.connections[0].wait_closed()
        await gw.seen.cause()


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
        assert await gw.seen.cause() is Cause.COMPLETED


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


# Frame by frame, through the gateway's own server


class RawRig:
    def __init__(self, port: int, upstream: Service, seen: Seen) -> None:
        self.port, self.upstream, self.seen = port, upstream, seen
        self.services: asyncio.Queue[Raw] = asyncio.Queue()  # the service's end of each WebSocket


@asynccontextmanager
async def raw_rig(*lines: str, timeouts: Timeouts = Timeouts(), **options: Any) -> AsyncIterator[RawRig]:  # noqa: B008
    """The gateway between a client and a service of raw frames; the test is both of them."""
    over = asyncio.Event()

    async def hand_out(raw: Raw) -> None:
        gw.services.put_nowait(raw)
        await over.wait()

    async with service(speaks(hand_out, *lines)) as upstream:
        seen = Seen(ProxyApp([Target(name="api", prefix="/api", replicas=(upstream.url,), timeouts=timeouts)]))
        limits = EdgeLimits(client_timeout=options.pop("client_timeout", 30.0))
        async with serving(seen, http=partial(GatewayProtocol, limits=limits), **options) as port:
            gw = RawRig(port, upstream, seen)
            try:
                yield gw
            finally:
                over.set()


@pytest.fixture
def nothing_logged(caplog: pytest.LogCaptureFixture) -> Any:
    """Strangers, and services, fill no log, whatever its level."""
    caplog.set_level(logging.DEBUG)
    yield
    noise = {"asyncio"}  # the event loop names its selector
    assert [record.getMessage() for record in caplog.records if record.name not in noise] == []


BROKEN_RULES = {
    "reserved bit 1": (1002, frame(TEXT, b"hi", rsv=4)),
    "reserved bit 2": (1002, frame(TEXT, b"hi", rsv=2)),
    "reserved bit 3 of a ping": (1002, frame(PING, b"hi", rsv=1)),
    "reserved opcode": (1002, frame(3, b"hi")),
    "reserved control opcode": (1002, frame(11)),
    "a fragmented ping": (1002, frame(PING, b"hi", fin=False)),
    "a long ping": (1002, frame(PING, b"x" * 126)),
    "a continuation of nothing": (1002, frame(CONT, b"hi")),
    "a message within a message": (1002, frame(TEXT, b"h", fin=False) + frame(TEXT, b"i")),
    "text that is not UTF-8": (1007, frame(TEXT, b"\xc3\x28")),
    "text that is not UTF-8, in fragments": (1007, frame(TEXT, b"\xe2\x82", fin=False) + frame(CONT, b"\x28")),
    "text with a surrogate": (1007, frame(TEXT, b"\xed\xa0\x80")),
    "text that is not UTF-8, then a goodbye": (1007, frame(TEXT, b"\xff") + goodbye(1000)),
    "a close frame of one byte": (1002, frame(CLOSE, b"\3")),
    "a close code below 1000": (1002, goodbye(999)),
    "a close code that may not be sent": (1002, goodbye(1005)),
    "another": (1002, goodbye(1006)),
    "a close reason that is not UTF-8": (1007, goodbye(1000, b"\xff")),
}


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize("broken", BROKEN_RULES)
async def test_a_client_that_breaks_the_rules_is_told_how(broken: str) -> None:
    code, frames = BROKEN_RULES[broken]
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        near.send(TEXT, b"before")
        near.writer.write(frames)
        near.send(TEXT, b"after")
        said = await near.read()
        if said.code != 1000:  # a goodbye in the same packet may be agreed to before the text is read
            assert said.code == code
        else:
            assert broken.endswith("then a goodbye")
            code = 1000
        assert await near.ended()
        assert await far.read() == Frame(TEXT, b"before")
        assert (await far.read()).code == code
        assert await gw.seen.cause() is Cause.COMPLETED


@pytest.mark.usefixtures("nothing_logged")
async def test_a_client_that_does_not_mask_is_told_so() -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        near.writer.write(frame(TEXT, b"hi", masked=False))
        assert (await near.read()).code == 1002


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize("broken", [name for name in BROKEN_RULES if not name.endswith("goodbye")])
async def test_a_service_that_breaks_the_rules_is_told_how_and_a_bad_gateway_to_the_client(broken: str) -> None:
    code, frames = BROKEN_RULES[broken]
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        far.send(TEXT, b"before")
        far.writer.write(unmasked(frames))
        assert await near.read() == Frame(TEXT, b"before")
        assert (await far.read()).code == code
        assert (await near.read()).code == 1014
        near.close(1014)
        assert await near.ended()
        assert await gw.seen.cause() is Cause.DROPPED


def unmasked(frames: bytes) -> bytes:
    """The same frames as a service would send them; all of these are short."""
    made = b""
    while frames:
        size, at = frames[1] & 127, 6
        length = b""
        if size == 126:
            size, at = int.from_bytes(frames[2:4]), 8
            length = frames[2:4]
        mask, payload = frames[at - 4 : at], frames[at : at + size]
        data = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        made += frames[:1] + bytes([frames[1] & 127]) + length + data
        frames = frames[at + size :]
    return made


@pytest.mark.usefixtures("nothing_logged")
async def test_pings_are_answered_at_both_ends_even_within_a_message() -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        for one, other in ((near, far), (far, near)):
            one.send(PONG, b"nobody asked")
            one.send(PING, b"are you there")
            assert await one.read() == Frame(PONG, b"are you there")
            one.send(TEXT, b"\xe2\x82", fin=False)  # a character cut in two
            one.send(PING, b"x" * 125)
            assert await one.read() == Frame(PONG, b"x" * 125)
            one.send(CONT, b"", fin=False)
            one.send(CONT, b"\xac uro")
            assert await other.read() == Frame(TEXT, b"\xe2\x82\xac uro")
            one.send(BINARY, b"\xff", fin=False)
            one.send(CONT, b"\xfe")
            assert await other.read() == Frame(BINARY, b"\xff\xfe")
            one.send(TEXT)
            assert await other.read() == Frame(TEXT, b"")


async def test_a_message_of_very_many_fragments_is_whole() -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        near.writer.write(frame(TEXT, b"a", fin=False) + frame(CONT, b"b", fin=False) * 20_000 + frame(CONT, b"c"))
        message = await far.read()
        assert message == Frame(TEXT, b"a" + b"b" * 20_000 + b"c")


async def test_compression_that_a_client_offers_is_not_agreed_to_nor_passed_on() -> None:
    offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-other"
    async with raw_rig() as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(handshake("/api/ws", offer))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"extensions" not in head.lower()
        assert not gw.upstream.requests[0].values(b"sec-websocket-extensions")
        writer.transport.abort()


async def test_compression_that_a_service_insists_on_is_a_bad_gateway() -> None:
    async with raw_rig("Sec-WebSocket-Extensions: permessage-deflate") as gw:
        assert parse(await send_raw(gw.port, HANDSHAKE)).status == 502
        assert await gw.seen.cause() is Cause.GARBLED


@pytest.mark.parametrize(
    ("offered", "chosen", "status"),
    [("chat.v1, chat.v2", "chat.v2", 101), ("chat.v1", "", 101), ("chat.v1", "chat.v9", 502), ("", "chat.v1", 502)],
)
async def test_only_a_subprotocol_that_the_client_offered_is_agreed_to(offered: str, chosen: str, status: int) -> None:
    async with raw_rig(*([f"Sec-WebSocket-Protocol: {chosen}"] if chosen else [])) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(handshake("/api/ws", *([f"Sec-WebSocket-Protocol: {offered}"] if offered else [])))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 %d " % status)
        line = b"\r\nSec-WebSocket-Protocol: chat.v2\r\n"
        assert (line.lower() in head.lower()) is (chosen == "chat.v2")
        assert gw.upstream.requests[0].values(b"sec-websocket-protocol") == ([offered.encode()] if offered else [])
        writer.transport.abort()


LARGEST = 10 * 1024 * 1024


async def test_messages_up_to_10_mebibytes_pass_both_ways() -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        for one, other in ((near, far), (far, near)):
            one.send(BINARY, b"x" * LARGEST)
            assert len((await other.read(20)).payload) == LARGEST


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize("fragmented", [False, True])
async def test_a_larger_message_of_the_clients_is_closed_with_1009(fragmented: bool) -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        near.send(BINARY, b"x" * (LARGEST if fragmented else LARGEST + 1), fin=not fragmented)
        if fragmented:
            near.send(CONT, b"x")
        assert (await near.read(20)).code == 1009
        assert (await far.read()).code == 1009


@pytest.mark.usefixtures("nothing_logged")
@pytest.mark.parametrize("fragmented", [False, True])
async def test_a_larger_message_of_the_services_is_closed_with_1009_and_no_failure(fragmented: bool) -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        far.send(BINARY, b"x" * (LARGEST if fragmented else LARGEST + 1), fin=not fragmented)
        if fragmented:
            far.send(CONT, b"x")
        assert (await far.read(20)).code == 1009
        assert (await near.read()).code == 1009
        assert await gw.seen.cause() is Cause.COMPLETED, "a client may have asked for it, and must open no breaker"


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (goodbye(1000), 1000),
        (goodbye(1001, b"moving"), 1001),
        (goodbye(1011, b"oops"), 1011),
        (goodbye(1012), 1012),
        (goodbye(3000), 3000),
        (goodbye(4999, "\N{EURO SIGN}".encode()), 4999),
        (frame(CLOSE), 1000),  # without a code
    ],
)
async def test_close_codes_and_reasons_cross_both_ways(sent: bytes, got: int) -> None:
    async with raw_rig() as gw:
        async with client(gw.port) as near:
            far = await gw.services.get()
            near.writer.write(sent)
            heard = await far.read()
            assert (heard.code, heard.payload[2:]) == (got, unmasked(sent)[4:])
            assert await near.read() == Frame(CLOSE, unmasked(sent)[2:]), "and are agreed to"
            assert await near.ended()
            assert await gw.seen.cause() is Cause.COMPLETED
        async with client(gw.port) as near:
            far = await gw.services.get()
            far.writer.write(unmasked(sent))
            heard = await near.read()
            assert (heard.code, heard.payload[2:]) == (got, unmasked(sent)[4:])
            assert await far.read() == Frame(CLOSE, unmasked(sent)[2:])
            near.close(got)
            assert await near.ended()


async def test_a_service_that_dies_within_a_message_is_a_bad_gateway_and_half_of_it_goes_nowhere() -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        far.writer.write(frame(TEXT, b"half of a message", masked=False)[:9])
        far.writer.close()
        assert (await near.read()).code == 1014
        assert await gw.seen.cause() is Cause.DROPPED


async def test_a_client_that_leaves_within_a_message_hangs_up_on_the_service_and_half_of_it_goes_nowhere() -> None:
    async with raw_rig() as gw:
        async with client(gw.port) as near:
            far = await gw.services.get()
            near.send(TEXT, b"one")
            near.send(TEXT, b"two", fin=False)
            near.writer.write(frame(CONT, b"three")[:5])
            assert await far.read() == Frame(TEXT, b"one")
        assert await far.ended(), "1006 to the service: a close frame would be a goodbye"
        assert await gw.seen.cause() is Cause.CLIENT_LEFT


# Slow ends


class Flood:
    """One end that sends as fast as it is let.

    Attributes:
        sent: bytes that have left it.
    """

    def __init__(self, end: Raw, kind: int = BINARY, size: int = 65536) -> None:
        self.end = end
        self.data = frame(kind, bytes(size), masked=end.masks) * max(1, 65536 // (size + 6))
        self.sent = 0

    async def __aenter__(self) -> "Flood":
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self.end.writer.write(self.data)
            await self.end.writer.drain()
            self.sent += len(self.data)

    async def held_back(self) -> int:
        """Wait until nothing more leaves; returns how much did."""
        return await held_back(lambda: self.sent)


BOUND = 40 * 1024 * 1024  # what the kernel keeps on four sockets, and a little of ours


@pytest.mark.parametrize(("kind", "size"), [(BINARY, 65536), (TEXT, 2000)], ids=["large", "small"])
async def test_a_client_that_does_not_read_holds_the_service_back_and_is_cut_in_the_end(kind: int, size: int) -> None:
    async with raw_rig(timeouts=Timeouts(websocket_ping=0.1), client_timeout=0.7) as gw, client(gw.port):
        far = await gw.services.get()
        async with Flood(far, kind, size) as flood:
            assert await flood.held_back() < BOUND
            assert await gw.seen.cause() is Cause.CLIENT_LEFT
            await until(lambda: far.writer.transport.is_closing())


async def test_a_client_that_reads_again_in_time_gets_it_all_though_the_services_pongs_had_to_wait() -> None:
    async with raw_rig(timeouts=Timeouts(websocket_ping=0.05)) as gw, client(gw.port) as near:
        far = await gw.services.get()
        async with Flood(far) as flood:
            await flood.held_back()
            for _ in range(6):  # to none of which the pong comes through
                assert (await far.read()).opcode == PING
        far.send(TEXT, b"the last")
        while (message := await near.read()).opcode != TEXT:
            assert message.opcode == BINARY
        assert message.payload == b"the last"


async def test_a_service_that_does_not_read_holds_the_client_back_and_is_hung_up_on_in_the_end() -> None:
    async with raw_rig(timeouts=Timeouts(write=0.7)) as gw, client(gw.port) as near:
        await gw.services.get()
        async with Flood(near) as flood:
            assert await flood.held_back() < BOUND
            assert (await near.read()).code == 1014
            assert await gw.seen.cause() is Cause.WRITE_TIMEOUT


async def test_a_service_that_reads_again_in_time_gets_it_all_though_the_clients_pongs_had_to_wait() -> None:
    async with raw_rig(ws_ping_interval=0.05, ws_ping_timeout=0.05) as gw, client(gw.port) as near:
        far = await gw.services.get()
        async with Flood(near) as flood:
            await flood.held_back()
            assert (await near.read()).opcode == PING
            await asyncio.sleep(0.1)  # in the gateway's own event loop: what it allows for the pong ends before this
        near.send(TEXT, b"the last")
        while (message := await far.read()).opcode != TEXT:
            assert message.opcode == BINARY
        assert message.payload == b"the last"


@pytest.mark.parametrize("side", ["client", "service"])
async def test_who_sends_pings_and_reads_no_pongs_is_held_back(side: str) -> None:
    async with raw_rig() as gw, client(gw.port) as near:
        far = await gw.services.get()
        end = near if side == "client" else far
        async with Flood(end, PING, 125) as pings:
            assert await pings.held_back() < BOUND


async def test_a_client_that_answers_no_pings_is_told_and_cut_and_the_service_is_hung_up_on() -> None:
    async with raw_rig(ws_ping_interval=0.05, ws_ping_timeout=0.05) as gw, client(gw.port) as near:
        far = await gw.services.get()
        assert (await near.read()).opcode == PING
        assert (await near.read()).code == 1011
        assert await far.ended()
        assert await gw.seen.cause() is Cause.CLIENT_LEFT


async def test_a_service_that_answers_no_pings_is_a_bad_gateway_and_one_that_does_is_not() -> None:
    async with raw_rig(timeouts=Timeouts(websocket_ping=0.1)) as gw, client(gw.port) as near:
        far = await gw.services.get()
        for _ in range(4):
            asked = await far.read()
            assert asked.opcode == PING
            far.send(PONG, asked.payload)
        assert (await near.read()).code == 1014
        assert await gw.seen.cause() is Cause.STALLED


async def test_messages_of_nothing_keep_a_websocket_from_being_idle() -> None:
    async with raw_rig(timeouts=Timeouts(websocket_idle=0.2)) as gw, client(gw.port) as near:
        far = await gw.services.get()
        began = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < began + 0.5:
            near.send(TEXT)
            assert await far.read() == Frame(TEXT, b"")
            await asyncio.sleep(0.02)
        assert ((said := await near.read()).code, said.reason) == (1001, "idle")
        assert ((said := await far.read()).code, said.reason) == (1001, "idle")


# Refusals, and the end of the gateway


async def test_a_refusal_reaches_the_client_as_it_is_and_the_services_connection_is_closed() -> None:
    held = asyncio.Event()

    async def refuse(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 13\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\r\nmembers only\n"
        )
        await reader.read(-1)  # keeps its side open for as long as the gateway does
        held.set()

    async with raw_rig() as gw:
        gw.upstream.handler = refuse
        answer = parse(await send_raw(gw.port, HANDSHAKE))
        assert (answer.status, answer.body) == (403, b"members only\n")
        assert sorted(answer.headers) == [
            (b"connection", b"close"), (b"content-length", b"13"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"),
        ]  # fmt: skip
        await asyncio.wait_for(held.wait(), 2)
        await until(lambda: gw.upstream.open == 0)


async def test_a_handshake_that_came_through_this_gateway_before_is_508() -> None:
    async with raw_rig() as gw:
        via = "Via: 1.1 " + gw.seen.app.via.decode()
        assert parse(await send_raw(gw.port, handshake("/api/ws", via))).status == 508
        assert not gw.upstream.requests


@asynccontextmanager
async def leaving(upstream: Service) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """The whole gateway under its own server, and how to tell it to leave."""
    app = create_app(Settings.load({"CHATBOT_SERVICE_URL": upstream.url}))
    async with leaving_server(app, drain_delay=0, drain_timeout=0.05) as (port, server, _):
        yield port, server.drain


@pytest.mark.usefixtures("short_farewell")
async def test_a_gateway_that_leaves_says_1012_to_both_ends(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    ends: asyncio.Queue[Raw] = asyncio.Queue()
    over = asyncio.Event()

    async def hand_out(raw: Raw) -> None:
        ends.put_nowait(raw)
        await over.wait()

    async with service(speaks(hand_out)) as upstream:
        async with leaving(upstream) as (port, leave), client(port, "/api/v1/chat") as near:
            far = await ends.get()
            leave()
            assert (await near.read()).code == (await far.read()).code == 1012
        over.set()
    assert causes(capfdbinary) == [(101, "shutdown")]


@pytest.mark.usefixtures("short_farewell")
async def test_a_gateway_that_leaves_refuses_handshakes_that_still_wait(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    came = asyncio.Event()

    async def silent(request: Request, reader: Reader, writer: Writer) -> None:
        came.set()
        await reader.read(-1)
        raise ConnectionError

    async with service(silent) as upstream, leaving(upstream) as (port, leave):
        answering = asyncio.create_task(send_raw(port, handshake("/api/v1/chat", "X-Correlation-ID: abc")))
        await came.wait()
        leave()
        answer = parse(await answering)
        assert (answer.status, answer.values(b"retry-after")) == (503, [b"1"])
        assert orjson.loads(answer.body)["error"]["correlation_id"] == "abc"
        await until(lambda: upstream.open == 0)
    assert causes(capfdbinary) == [(499, "shutdown")]


def causes(output: pytest.CaptureFixture[bytes]) -> list[tuple[int, str]]:
    """How each request ended, by its line of the log; there is no traceback beside them."""
    lines = [orjson.loads(line) for line in output.readouterr().out.splitlines()]
    assert not [line for line in lines if line["level"] == "ERROR"]
    return [(line["status_code"], line["cause"]) for line in lines if "status_code" in line]
