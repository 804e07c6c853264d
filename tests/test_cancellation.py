"""Clients that leave, in each phase of a request, through the whole stack: the service is let go and nothing is kept.

Whoever leaves by a reset, or by closing without waiting for more, is noticed within 250 ms. That is counted in turns of
the event loop of 5 ms each, so that a machine which stands still for a while does not count against it.
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import orjson
import prometheus_client
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.app import Gateway, create_app
from gateway.context import Cause, RequestContext, unheard
from gateway.middleware.admission import AdmissionASGI
from gateway.policies.edge import EdgeLimits
from gateway.proxy.app import ProxyApp
from gateway.proxy.pool import ConnectionPool
from gateway.proxy.route import LISTEN_AFTER
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.frames import TEXT, Raw, frame, handshake, speaks
from tests.wire import OK, Reader, Request, Service, Writer, call, held_back, read_body, reply, service, serving, until

PATH = "/api/v1/chat"
NAME = "chatbot-service"
NO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def soon(condition: Callable[[], Any]) -> None:
    """Something becomes true within 250 ms."""
    for _ in range(50):
        if condition():
            return
        await asyncio.sleep(0.005)
    assert condition(), "not within 250 ms"


class Client:
    """A client's connection, and the two ways to leave it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setblocking(False)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self, ending: bytes) -> bytes:
        data = b""
        async with asyncio.timeout(5):
            while not data.endswith(ending):
                data += await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        return data

    def leave(self, by: str) -> None:
        if by == "RST":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.socket.close()


class Rig:
    """A gateway whose one service the test plays; ``baseline`` is what must be found again in the end."""

    def __init__(self, port: int, upstream: Service, app: Gateway, output: pytest.CaptureFixture[bytes]) -> None:
        self.port, self.upstream, self.app, self.output = port, upstream, app, output
        self.lines = b""
        self.sent = 0  # by a service that floods
        layer: Any = app.app.__self__  # type: ignore[attr-defined]
        while not isinstance(layer, AdmissionASGI):
            layer = layer.app.__self__  # layers hold one another's methods
        self.admission = layer

    def state(self) -> dict[str, Any]:
        """What a request holds while it runs."""
        routes = self.app.proxy._routes.values()
        pools = [pool for route in routes for pool in route.pools.values()]
        now = asyncio.get_running_loop().time()
        return {
            "exchanges": len(self.app.proxy.exchanges),
            "admitted": self.admission.in_flight,
            "gauge": prometheus_client.REGISTRY.get_sample_value("gateway_requests_in_flight"),
            "connections in use": sum(pool.open - pool.idle for pool in pools),
            "at replicas": sum(one["in_flight"] for route in routes for one in route.replicas.status(now)),
        }

    async def breaker(self) -> dict[str, Any]:
        status: dict[str, Any] = orjson.loads((await call(self.port, "/circuit-breakers")).body)[NAME]
        return status

    def ends(self) -> list[tuple[str, str, int]]:
        """Of the log lines so far: how each request to the service ended."""
        self.lines += self.output.readouterr().out
        lines = [orjson.loads(line) for line in self.lines.splitlines()]
        assert not [line for line in lines if line["level"] == "ERROR"]
        return [
            (line.get("cause", "completed"), line["path"], line["status_code"])
            for line in lines
            if line.get("path") == PATH
        ]


OURS = partial(GatewayProtocol, limits=EdgeLimits())


@asynccontextmanager
async def gateway(output: pytest.CaptureFixture[bytes], http: Any = OURS, **environ: str) -> AsyncIterator[Rig]:
    async with service() as upstream:
        url = environ.pop("URL", upstream.url)
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": url, **environ}))
        async with serving(app, http=http) as port:
            yield Rig(port, upstream, app, output)


def a_request(method: str = "GET", *fields: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join((f"{method} {PATH} HTTP/1.1".encode(), b"Host: h", *fields, b"", body))


HALF = a_request("POST", b"Content-Length: 1000", body=b"half")


async def silent(request: Request, reader: Reader, writer: Writer) -> None:
    """A service that waits for more until its client has left."""
    await reader.read(-1)
    raise ConnectionError


# Each brings a client into its phase. What the service saw of it must be over once the client has left.
Phase = Callable[[Rig, Client], Coroutine[Any, Any, None]]


async def queued_for_a_connection(gw: Rig, client: Client) -> None:
    await queued(gw, client, a_request())


async def queued_with_half_of_the_body(gw: Rig, client: Client) -> None:
    await queued(gw, client, HALF)


async def queued(gw: Rig, client: Client, request: bytes) -> None:
    await call(gw.port, PATH)
    (route,) = gw.app.proxy._routes.values()
    (pool,) = route.pools.values()
    assert isinstance(pool, ConnectionPool)
    pool.close_idle()
    pool.limit = 0  # by settings alone, admission would come first
    await client.send(request)
    await until(lambda: pool._waiting)


async def sending_the_body(gw: Rig, client: Client) -> None:
    gw.upstream.handler = silent
    await client.send(HALF)
    await until(lambda: gw.upstream.requests)


async def sending_a_body_in_chunks(gw: Rig, client: Client) -> None:
    gw.upstream.handler = silent
    await client.send(a_request("POST", b"Transfer-Encoding: chunked", body=b"4\r\nhalf\r\n"))
    await until(lambda: gw.upstream.requests)


async def waiting_for_the_first_byte(gw: Rig, client: Client) -> None:
    gw.upstream.handler = silent
    await client.send(a_request("POST", b"Content-Length: 2", body=b"{}"))
    await until(lambda: gw.upstream.requests)


async def streaming(gw: Rig, client: Client) -> None:
    async def begin(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await silent(request, reader, writer)

    gw.upstream.handler = begin
    await client.send(a_request())
    await client.read(b"hi\r\n")
    (exchange,) = gw.app.proxy.exchanges
    exchange.context.started -= 1  # who closes its side along with its request may well want the answer


async def streaming_to_one_who_does_not_read(gw: Rig, client: Client) -> None:
    async def pour(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            gw.sent += 65536

    gw.upstream.handler = pour
    await client.send(a_request())
    await held_back(lambda: gw.sent)


async def awaiting_the_answer_to_a_body_that_came_in_two(gw: Rig, client: Client) -> None:
    await sending_the_body(gw, client)
    await client.send(b"x" * 996)
    (exchange,) = gw.app.proxy.exchanges
    await until(lambda: exchange._uploaded)


async def answered_with_half_of_the_body_sent(gw: Rig, client: Client) -> None:
    async def begin(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await silent(request, reader, writer)

    gw.upstream.handler = begin
    await client.send(HALF)
    await client.read(b"hi\r\n")


async def between_two_attempts(gw: Rig, client: Client) -> None:
    async def refuse(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")

    gw.upstream.handler = refuse
    await client.send(a_request())
    await until(lambda: gw.upstream.requests)
    await until(lambda: gw.state()["connections in use"] == 0)


async def a_websockets_handshake(gw: Rig, client: Client) -> None:
    gw.upstream.handler = silent
    await client.send(handshake(PATH))
    await until(lambda: gw.upstream.requests)


async def a_websockets_handshake_with_much_behind_it(gw: Rig, client: Client) -> None:
    await a_websockets_handshake(gw, client)
    await client.send(frame(TEXT, b"x" * 100_000))


async def an_open_websocket(gw: Rig, client: Client) -> None:
    async def read_on(raw: Raw) -> None:
        await raw.reader.read(-1)
        raise ConnectionError

    gw.upstream.handler = speaks(read_on)
    await client.send(handshake(PATH))
    await client.read(b"\r\n\r\n")


async def a_websocket_whose_service_does_not_read(gw: Rig, client: Client) -> None:
    async def read_nothing(raw: Raw) -> None:
        await gw.upstream.left.wait()

    gw.upstream.handler = speaks(read_nothing)
    await client.send(handshake(PATH))
    await client.read(b"\r\n\r\n")
    await flood(client, frame(TEXT, b"x" * 60_000))


async def sending_a_body_that_the_service_does_not_read(gw: Rig, client: Client) -> None:
    async def read_nothing(request: Request, reader: Reader, writer: Writer) -> None:
        await gw.upstream.left.wait()
        writer.close()

    gw.upstream.handler = read_nothing
    await client.send(a_request("POST", b"Content-Length: 1000000000"))
    await flood(client, b"x" * 60_000)


async def flood(client: Client, data: bytes) -> None:
    """Send until nothing more has been taken for a while."""
    with suppress(TimeoutError):
        while True:
            await asyncio.wait_for(client.send(data), 0.3)


PHASES: list[Phase] = [
    queued_for_a_connection,
    sending_the_body,
    queued_with_half_of_the_body,
    sending_a_body_in_chunks,
    awaiting_the_answer_to_a_body_that_came_in_two,
    answered_with_half_of_the_body_sent,
    waiting_for_the_first_byte,
    streaming,
    streaming_to_one_who_does_not_read,
    between_two_attempts,
    a_websockets_handshake,
    a_websockets_handshake_with_much_behind_it,
    an_open_websocket,
]
# A FIN waits behind what was sent before it: where nobody reads that, it is only heard of by the next ping.
CASES = [pytest.param(phase, by, id=f"{phase.__name__}-{by}") for phase in PHASES for by in ("RST", "FIN")]
CASES += [
    pytest.param(a_websocket_whose_service_does_not_read, "RST", id="a_websocket_whose_service_does_not_read-RST"),
    pytest.param(
        sending_a_body_that_the_service_does_not_read,
        "RST",
        id="sending_a_body_that_the_service_does_not_read-RST",
    ),
]


@pytest.mark.parametrize(("phase", "by"), CASES)
async def test_a_client_that_leaves_ends_its_request_within_250_ms(
    phase: Phase, by: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async with gateway(capfdbinary, MAX_BODY_BYTES="1000000000") as gw:
        baseline = gw.state()
        client = Client(gw.port)
        await phase(gw, client)
        during = gw.state()
        assert during["admitted"] == during["gauge"] == baseline["admitted"] + 1
        requests = len(gw.upstream.requests)
        client.leave(by)
        try:
            await soon(lambda: gw.state() == baseline)
        finally:
            if phase.__name__.endswith("does_not_read"):
                gw.upstream.left.set()
        if not phase.__name__.endswith("does_not_read"):
            await soon(lambda: gw.upstream.open == sum_of_idle(gw))
        await soon(lambda: gw.ends()[-1:] and gw.ends()[-1][0] == "client_left")
        assert len(gw.upstream.requests) == requests, "nothing is sent again for somebody who has left"
        breaker = await gw.breaker()
        assert (breaker["state"], breaker["recent_failures"]) == ("closed", 0)


def sum_of_idle(gw: Rig) -> int:
    return sum(pool.idle for route in gw.app.proxy._routes.values() for pool in route.pools.values())


@pytest.mark.parametrize("by", ["RST", "FIN"])
@pytest.mark.parametrize("opening", [a_request(), HALF, handshake(PATH)], ids=["request", "upload", "websocket"])
async def test_a_client_that_leaves_while_its_service_does_not_even_accept_ends_the_attempt(
    opening: bytes, by: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for filler in (one, two):  # the backlog is full: further SYNs go unanswered
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        async with gateway(capfdbinary, URL=url, CONNECT_TIMEOUT="30") as gw:
            baseline = gw.state()
            client = Client(gw.port)
            await client.send(opening)
            await until(lambda: connecting(listener) == 1)
            client.leave(by)
            await soon(lambda: gw.state() == baseline)
            await soon(lambda: connecting(listener) == 0)
            await soon(lambda: gw.ends()[-1:] and gw.ends()[-1][0] == "client_left")
            assert (await gw.breaker())["recent_failures"] == 0


def connecting(listener: socket.socket) -> int:
    """How many connections of this machine to a listener wait for an answer to their SYN, less the one that fills."""
    port = b":%04X" % listener.getsockname()[1]
    rows = [row.split() for row in Path("/proc/net/tcp").read_bytes().splitlines()[1:]]
    return sum(row[2].endswith(port) and row[3] == b"02" for row in rows) - 1


@pytest.mark.parametrize("phase", [waiting_for_the_first_byte, a_websockets_handshake], ids=lambda one: one.__name__)
async def test_a_probe_whose_client_leaves_gives_its_place_back(
    phase: Phase, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    quick = {"FAILURE_THRESHOLD": "1", "SUCCESS_THRESHOLD": "1", "TIMEOUT": "0.1"}
    async with gateway(capfdbinary, **{f"CIRCUIT_BREAKER_{name}": value for name, value in quick.items()}) as gw:
        gw.upstream.handler = fail
        await call(gw.port, PATH)
        while (await gw.breaker())["state"] != "half_open":
            pass
        gw.upstream.requests.clear()
        baseline = gw.state()
        client = Client(gw.port)
        await phase(gw, client)
        assert (await call(gw.port, PATH)).status == 503, "one probe at a time"
        client.leave("RST")
        await soon(lambda: gw.state() == baseline)
        assert (await gw.breaker())["state"] == "half_open"
        gw.upstream.handler = well
        assert (await call(gw.port, PATH)).status == 200
        assert (await gw.breaker())["state"] == "closed"


async def fail(request: Request, reader: Reader, writer: Writer) -> None:
    writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")


async def well(request: Request, reader: Reader, writer: Writer) -> None:
    await read_body(request, reader)
    writer.write(OK)


# What the server tells of the client's going


async def an_upload_that_stands_still(gw: Rig, client: Client) -> None:
    """The service takes nothing more, and the server reads on: it has little to keep so far."""

    async def read_nothing(request: Request, reader: Reader, writer: Writer) -> None:
        await gw.upstream.left.wait()
        writer.close()

    gw.upstream.handler = read_nothing
    chunk = b"8000\r\n" + b"x" * 32768 + b"\r\n"
    await client.send(a_request("POST", b"Transfer-Encoding: chunked", body=chunk))
    await until(lambda: gw.upstream.requests)
    (exchange,) = gw.app.proxy.exchanges
    context = exchange.context
    with suppress(TimeoutError):
        for size in range(32768, 1 << 28, 32768):
            await until(partial(has_read, context, size), timeout=0.3)
            await client.send(chunk)


def has_read(context: RequestContext, size: int) -> bool:
    return context.bytes_in == size


async def test_an_upload_that_stands_still_hears_that_the_server_turned_its_client_away(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    async with gateway(capfdbinary, MAX_BODY_BYTES="1000000000") as gw:
        baseline = gw.state()
        client = Client(gw.port)
        await an_upload_that_stands_still(gw, client)
        await client.send(b"not the size of a chunk\r\n")
        await soon(lambda: gw.state() == baseline)
        gw.upstream.left.set()
        assert b" 400 " in await client.read(b"}")
        await soon(lambda: gw.ends() == [("refused", PATH, 400)])
        client.leave("FIN")


async def test_a_client_that_the_server_finds_too_slow_is_charged_for_it(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    http = partial(GatewayProtocol, limits=EdgeLimits(client_timeout=0.4))
    async with gateway(capfdbinary, http) as gw:
        baseline = gw.state()
        client = Client(gw.port)
        await streaming_to_one_who_does_not_read(gw, client)
        await until(lambda: gw.state() == baseline)
        await until(lambda: gw.ends() == [("client_too_slow", PATH, 200)])
        client.leave("FIN")


@pytest.mark.parametrize("size", [2, 100_000])
async def test_who_leaves_with_a_whole_answer_has_not_left(
    size: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async with gateway(capfdbinary) as gw:
        gw.upstream.handler = reply(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, b"x" * size))
        baseline = gw.state()
        client = Client(gw.port)
        await client.send(a_request())
        await until(lambda: gw.upstream.requests)
        await until(lambda: gw.state() == baseline)
        client.leave("RST")
        await until(gw.ends)
        assert gw.ends() == [("completed", PATH, 200)]


@pytest.mark.parametrize(("http", "tasks"), [(OURS, 1), ("h11", 2)], ids=["ours", "h11"])
@pytest.mark.parametrize("phase", [waiting_for_the_first_byte, streaming], ids=lambda one: one.__name__)
async def test_only_where_the_server_does_not_tell_a_task_watches_whether_the_client_leaves(
    phase: Phase, http: Any, tasks: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    async with gateway(capfdbinary, http) as gw:
        baseline, before = gw.state(), asyncio.all_tasks()
        client = Client(gw.port)
        await phase(gw, client)
        services_own = 1
        (exchange,) = gw.app.proxy.exchanges
        now = asyncio.get_running_loop().time
        await soon(lambda: exchange.due - now() > 2 * LISTEN_AFTER)  # it was looked at, and will be again much later
        assert len(asyncio.all_tasks() - before) == tasks + services_own
        client.leave("RST")
        await soon(lambda: gw.state() == baseline)
        await soon(lambda: gw.ends() and gw.ends()[0][0] == "client_left")


async def test_a_layer_in_between_may_say_that_nobody_waits_any_more() -> None:
    def impatient(app: ASGIApp) -> ASGIApp:
        """Gives up on what is slow, answers itself, and says so as a server would, like Starlette's middleware."""

        async def layer(scope: Scope, receive: Receive, send: Send) -> None:
            body = await receive()
            given_up = asyncio.Event()

            async def receive_or_give_up() -> Message:
                if not messages:
                    await given_up.wait()
                    return {"type": "http.disconnect"}
                return messages.pop()

            async def send_nothing(message: Message) -> None: ...

            messages = [body]
            inner = asyncio.ensure_future(app(scope, receive_or_give_up, send_nothing))
            await until(lambda: upstream.requests)
            await send({"type": "http.response.start", "status": 504, "headers": []})
            await send({"type": "http.response.body"})
            given_up.set()
            await inner

        return layer

    async with service(silent) as upstream:
        app = impatient(ProxyApp({"/": upstream.url}))
        async with serving(app, http=OURS, lifespan="off") as port:
            assert (await call(port, PATH)).status == 504
            async with asyncio.timeout(5):
                await upstream.left.wait()


async def test_the_server_is_left_with_nothing_to_call_when_a_request_has_ended() -> None:
    contexts: list[RequestContext] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["gateway"]
        contexts.append(context)
        assert context.on_left is unheard
        await proxy(scope, receive, send)
        assert context.on_left is unheard

    async with service() as upstream:
        proxy = ProxyApp({"/": upstream.url})
        async with serving(note, http=OURS) as port:
            assert (await call(port, PATH)).status == 200
            upstream.handler = silent
            client = Client(port)
            await client.send(a_request())
            await until(lambda: len(upstream.requests) == 2)
            assert contexts[1].on_left is not unheard
            client.leave("RST")
            await upstream.left.wait()
            await until(lambda: contexts[1].on_left is unheard)
            assert (contexts[1].cause, contexts[1].client_left, contexts[1].whole) == (Cause.CLIENT_LEFT, True, False)
            assert (contexts[0].cause, contexts[0].client_left, contexts[0].whole) == (Cause.COMPLETED, False, True)


@pytest.mark.parametrize("seed", range(4))
async def test_many_who_leave_at_any_moment_leave_nothing_behind(
    seed: int, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """So many at once that what they send is held for company (``gateway.outbox``)."""
    random = Random(seed)

    async def answer_sometime(request: Request, reader: Reader, writer: Writer) -> None:
        answer = random.choice([OK, OK, b"HTTP/1.1 429 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n", b""])
        await turns(random.randrange(40))
        await read_body(request, reader)
        if not answer:
            await silent(request, reader, writer)
        cut = random.randrange(len(answer))
        for part in (answer[:cut], answer[cut:]):
            await turns(random.randrange(20))
            if writer.is_closing() or reader.exception() is not None:
                raise ConnectionError
            writer.write(part)

    async def come_and_leave() -> None:
        client = Client(gw.port)
        chunked = b"Transfer-Encoding: chunked", b"4\r\nhalf\r\n0\r\n\r\n"
        field, body = random.choice([(b"X-None: 0", b""), (b"Content-Length: 3000", b"x" * 3000), chunked])
        data = a_request("POST", field, body=body)
        sent = random.choice([len(data), random.randrange(len(data))])
        await client.send(data[:sent])
        await turns(random.randrange(60))
        with suppress(ConnectionError):  # it may have been turned away
            await client.send(data[sent : sent + random.choice([0, 0, len(data)])])
        await turns(random.randrange(20))
        client.leave(random.choice(["RST", "FIN"]))

    async with gateway(capfdbinary, RATE_LIMIT_PER_MINUTE="off", RATE_LIMIT_PER_HOUR="off") as gw:
        gw.upstream.handler = answer_sometime
        baseline = gw.state()
        for _ in range(4):
            await asyncio.gather(*[come_and_leave() for _ in range(40)])
            await soon(lambda: gw.state() == baseline)
        await soon(lambda: gw.upstream.open == sum_of_idle(gw))
        assert gw.ends()
        assert {cause for cause, _, _ in gw.ends()} <= {"client_left", "completed"}
        breaker = await gw.breaker()
        assert breaker["state"] == "closed"
        gw.upstream.handler = well
        assert (await call(gw.port, PATH)).status == 200


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)
