"""Every hostile request through the whole gateway, over real sockets, whole and cut where a reader is easily confused.

What a case becomes stands with it in ``hostile_requests``; here is what holds for all: the service gets what was said
there and nothing else, byte for byte; behind a refusal nothing is read; a stranger's garbage moves no breaker, is not
an error of the gateway's, and leaves nothing behind.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from gateway.app import Gateway, create_app
from gateway.circuit_breaker import circuit_breaker_registry
from gateway.server.worker import GatewayServer
from gateway.settings import Settings
from tests.hostile_requests import CASES, FOLLOWING, PATH, PSEUDONYM, Arrives, Case
from tests.wire import OK, Reader, Request, Service, Writer, call, leaving_server, read_body, service, until

SHORT = 220  # bytes; up to here a case is also sent one at a time
MOST_CUTS = 12
FOLLOWED = Arrives(target=b"/api/v1/chat/smuggled")
RESULT = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[!#-~]+: ?[^\r\n\0]*\r\n)+)\r\n")
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
NAMED = re.compile(rb"x-correlation-id: ([0-9a-f]{32})\r\n")
FRAMING = re.compile(rb"(?:content-length: (\d+)\r\n|transfer-encoding: chunked\r\n)?\r\n")


@pytest.fixture(scope="module", params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


class Client(asyncio.Protocol):
    """Keeps all that comes, even if a reset follows, and may send on when the gateway has said its last."""

    def __init__(self) -> None:
        self.received = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        self.ended.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


class Rig:
    """The gateway with one service behind it, for strangers, and what went wrong beside the way of any request."""

    def __init__(self, app: Gateway, upstream: Service, server: GatewayServer, port: int) -> None:
        self.app, self.upstream, self.server, self.port = app, upstream, server, port
        self.whole: list[Request] = []
        self.faults: list[dict[str, Any]] = []

    async def record(self, request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        self.whole.append(request)
        writer.write(OK.replace(b"\r\n\r\nok", b"\r\n\r\n") if request.method == b"HEAD" else OK)

    async def send(self, pieces: list[bytes], leaves: bool) -> bytes:
        """Send the pieces, each by itself, then read until the gateway closes."""
        loop = asyncio.get_running_loop()
        transport, client = await loop.create_connection(Client, "127.0.0.1", self.port)
        try:
            async with asyncio.timeout(10):
                for piece in pieces:
                    if transport.is_closing():
                        break
                    transport.write(piece)
                    await asyncio.sleep(0)  # it is sent, for what is written at once may be sent as one ...
                    await asyncio.sleep(0)  # ... and here it is read
                if leaves:
                    transport.write_eof()
                await client.ended.wait()
        finally:
            transport.abort()
        return client.received

    def expected_head(self, arrives: Arrives) -> bytes:
        """A head at the service, but for what frames its body and for a correlation ID of the gateway's making."""
        fields = b"".join([field + b"\r\n" for field in arrives.fields])
        lines = {
            b"x-correlation-id": arrives.named,
            b"x-forwarded-for": b"127.0.0.1",
            b"x-forwarded-proto": b"http",
            b"x-forwarded-host": arrives.host,
            b"x-real-ip": b"127.0.0.1" if arrives.real_ip else b"",
            b"via": arrives.via + b"1.1 " + self.app.proxy.via,
            b"x-gateway-attempt": b"1",
        }
        said = b"".join([b"%b: %b\r\n" % line for line in lines.items() if line[1]])
        start = b"%b %b HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n" % (arrives.method, arrives.target, self.upstream.port)
        return start + fields + said

    def assert_arrived(self, request: Request, arrives: Arrives) -> None:
        head = request.head
        if not arrives.named:
            assert len(NAMED.findall(head)) == 1
            head = NAMED.sub(b"", head)
        expected = self.expected_head(arrives)
        assert head[: len(expected)] == expected
        framing = FRAMING.fullmatch(head, len(expected))
        assert framing is not None, head
        if arrives.body is None:
            assert framing[0] == b"\r\n"
        else:
            assert framing[1] in (None, b"%d" % len(arrives.body))
            assert framing[0] != b"\r\n"
            assert request.body == arrives.body

    async def settle(self) -> None:
        """Nothing is left of anything."""
        proxy, state = self.app.proxy, self.server.server_state

        def settled() -> bool:
            nobody = not (state.connections or state.tasks or proxy.exchanges)
            return nobody and proxy.open_connections == self.upstream.open <= 1

        for _ in range(50):  # turns of the event loop, most often enough; waiting by the clock costs 5 ms each time
            if settled():
                return
            await asyncio.sleep(0)
        await until(settled)

    async def try_out(self, case: Case, pieces: list[bytes]) -> None:
        self.whole.clear()
        self.upstream.requests.clear()
        received = await self.send(pieces, case.leaves)
        await self.settle()

        # What the client is told
        statuses = []
        at = 0
        received = received.replace(INTERIM, b"")
        while at < len(received):
            answer = RESULT.match(received, at)
            assert answer is not None, received[at:]
            fields = dict(line.split(b": ", 1) for line in answer[2].splitlines())
            statuses.append(int(answer[1]))
            at = answer.end()
            if answer[1] != b"200" or not received.startswith(b"HTTP/", at):  # else that was one to HEAD
                at += int(fields[b"content-length"])
            assert fields.get(b"connection", b"") == (b"close" if at == len(received) else b"")
        assert statuses == [*case.answers, *([200] if case.goes_on else [])]

        # What the service gets
        arrives = [*case.arrives, *([FOLLOWED] if case.goes_on else [])]
        assert len(self.whole) == len(arrives), self.whole
        for request, each in zip(self.whole, arrives, strict=True):
            self.assert_arrived(request, each)
        begun = [request for request in self.upstream.requests if request not in self.whole]
        assert len(begun) <= case.may_begin, begun
        assert not any(b"smuggled" in request.head or b"inner" in request.head for request in begun)

        # What nobody may notice
        assert self.faults == []
        for name, breaker in circuit_breaker_registry.status().items():
            assert (breaker["state"], breaker["failure_count"], breaker["recent_failures"]) == ("closed", 0, 0), name


@asynccontextmanager
async def serving_strangers() -> AsyncIterator[Rig]:
    loop = asyncio.get_running_loop()
    before = {name: circuit_breaker_registry.get(name) for name in circuit_breaker_registry.names()}
    async with service() as upstream:
        settings = {"CHATBOT_SERVICE_URL": upstream.url, "TRUSTED_PROXIES": "none", "LOG_LEVEL": "ERROR"}
        app = create_app(Settings.load(settings | {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off"}))
        async with leaving_server(app) as (port, server, _):
            await call(port, PATH)  # what a worker has once is there
            tasks = len(asyncio.all_tasks())
            rig = Rig(app, upstream, server, port)
            upstream.handler = rig.record
            loop.set_exception_handler(lambda _, context: rig.faults.append(context))
            yield rig
            loop.set_exception_handler(None)
            assert len(asyncio.all_tasks()) <= tasks
            status = orjson.loads((await call(port, "/circuit-breakers")).body)
            assert {each["state"] for each in status.values()} == {"closed"}
            assert {each["recent_failures"] for each in status.values()} == {0}
    circuit_breaker_registry.replace_all({name: breaker for name, breaker in before.items() if breaker})


@pytest.fixture(scope="module")
async def gw(anyio_backend: object) -> AsyncIterator[Rig]:
    async with serving_strangers() as rig:
        yield rig


def awkward(data: bytes) -> list[int]:
    """Where to cut: within the line, at the ends of lines, within what follows them, before the end."""
    line = data.find(b"\r\n")
    places = {1, line // 2, line - 1, len(data) - 1, len(data) - 2, len(data) - 3, len(data)}
    ends = [found.start() for found in re.finditer(b"\r\n", data[:40_000])]
    for end in ends[:3] + ends[-3:]:
        places |= {end, end + 1, end + 2, end + 3}
    inside = sorted(place for place in places if 0 < place <= len(data))
    return inside if len(inside) <= MOST_CUTS else inside[:: -(-len(inside) // MOST_CUTS)]


def ways(case: Case, data: bytes) -> Iterator[list[bytes]]:
    """The ways in which a case is sent: at once, in two pieces, byte by byte."""
    following = b"" if case.leaves else FOLLOWING
    yield [data + following]
    for number, place in enumerate(awkward(data)):
        rest = [data[place:] + following] if number % 2 else [data[place:], following]
        yield [piece for piece in (data[:place], *rest) if piece]
    if len(data) <= SHORT:
        yield [*(data[at : at + 1] for at in range(len(data))), following]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.line}: {case.name}")
async def test_a_hostile_request_is_refused_or_arrives_in_one_form_however_it_is_cut(gw: Rig, case: Case) -> None:
    for pieces in ways(case, case.data.replace(PSEUDONYM, gw.app.proxy.via)):
        await gw.try_out(case, pieces)


def test_the_corpus_says_nothing_twice() -> None:
    assert (
        len({(case.data, case.leaves) for case in CASES})
        == len({(case.line, case.name) for case in CASES})
        == len(CASES)
    )
