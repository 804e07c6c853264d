"""What opens the breaker and what does not, through the whole gateway; and that a request is judged once, for all."""

import asyncio
import errno
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import prometheus_client
import pytest

from gateway.app import Gateway, create_app
from gateway.context import OUTCOMES, Cause, is_failure
from gateway.policies.circuit_breaker import Outcome
from gateway.proxy.pool import ConnectionPool
from gateway.settings import Settings
from tests.frames import CLOSE, Raw, client, handshake, speaks
from tests.proxy_rig import CHUNKED, EVENTS, silent
from tests.wire import (
    OK,
    Handler,
    Reader,
    Request,
    Service,
    Writer,
    call,
    connected,
    read_body,
    reply,
    reset,
    send_raw,
    service,
    serving_at_the_edge,
    until,
)

PATH = "/api/v1/chat"
NAME = "chatbot-service"
QUICK = {
    "RATE_LIMIT_PER_MINUTE": "off",
    "RATE_LIMIT_PER_HOUR": "off",
    "CONNECT_TIMEOUT": "0.2",
    "POOL_TIMEOUT": "0.05",
    "WRITE_TIMEOUT": "0.2",
    "FIRST_BYTE_TIMEOUT": "0.2",
    "BETWEEN_BYTES_TIMEOUT": "0.2",
    "ANSWER_TIMEOUT": "0.3",
    "WEBSOCKET_PING_INTERVAL": "0.1",
    "MAX_BODY_BYTES": "1000000000",
    "RETRIES": "0",
}
Output = pytest.CaptureFixture[bytes]


class Rig:
    """A gateway whose one service, which the test plays, it knows under two addresses."""

    def __init__(self, port: int, upstream: Service, app: Gateway, output: Output) -> None:
        self.port, self.upstream, self.app, self.output = port, upstream, app, output
        self.lines = b""

    async def breaker(self) -> dict[str, Any]:
        status: dict[str, Any] = orjson.loads((await call(self.port, "/circuit-breakers")).body)[NAME]
        return status

    def replicas(self) -> dict[str, int]:
        """The failures in a row of each; it is left by all."""
        (route,) = self.app.proxy._routes.values()
        told = route.replicas.status(route.loop.time())
        assert not any(one["in_flight"] for one in told)
        return {str(one["address"]): int(one["failure_count"]) for one in told}

    def log(self) -> list[dict[str, Any]]:
        """The lines of requests to the service so far."""
        self.lines += self.output.readouterr().out
        lines = [orjson.loads(line) for line in self.lines.splitlines()]
        return [line for line in lines if line.get("path") == PATH]

    async def logged(self, number: int) -> dict[str, Any]:
        """The last of so many lines, once it is there."""
        await until(lambda: len(self.log()) == number)
        return self.log()[-1]

    async def post(self, body: bytes = b"{}", **more: Any) -> None:
        await call(self.port, PATH, "POST", body=body, **more)


@asynccontextmanager
async def gateway(output: Output, **environ: str) -> AsyncIterator[Rig]:
    async with service() as upstream:
        urls = f"{upstream.url},http://localhost:{upstream.port}"
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": urls, **QUICK, **environ}))
        async with serving_at_the_edge(app, body_timeout=0.2) as port:
            yield Rig(port, upstream, app, output)


# --- streams that begin well and end badly


def stream(last: bytes, then: str) -> Handler:
    """A stream of two events, after which it says the last, and ends, stalls or is cut."""

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(EVENTS)
        for event in (b"data: 1\n\n", b"data: 2\n\n", last):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
        if then == "stalls":
            await silent(request, reader, writer)
        elif then == "is cut":
            await writer.drain()
            writer.close()
        else:
            writer.write(b"0\r\n\r\n")

    return handle


ENDS_WELL = stream(b"data: [DONE]\n\n", "ends")
BADLY = {
    Cause.ERROR_EVENT: stream(b'event: error\ndata: {"error": "overloaded"}\n\n', "ends"),
    Cause.STALLED: stream(b"data: 3\n\n", "stalls"),
    Cause.CUT_SHORT: stream(b"data: 3\n\n", "is cut"),
}
KINDS = [[cause] for cause in BADLY] + [list(BADLY)]


@pytest.mark.parametrize("kinds", KINDS, ids=["error event", "stall", "cut", "mixed"])
async def test_30_of_50_streams_that_begin_with_200_and_end_badly_open_the_breaker(
    kinds: list[Cause], capfdbinary: Output
) -> None:
    endings = [BADLY[kinds[number % len(kinds)]] for number in range(30)] + [ENDS_WELL] * 20
    random.Random(5).shuffle(endings)

    async def one_after_another(request: Request, reader: Reader, writer: Writer) -> None:
        await endings.pop()(request, reader, writer)

    async with gateway(capfdbinary) as gw:
        gw.upstream.handler = one_after_another
        await asyncio.gather(*[call(gw.port, PATH, "POST", body=b"{}") for _ in range(50)])
        breaker = await gw.breaker()
        assert (breaker["state"], breaker["times_opened"]) == ("open", 1)
        await gw.logged(50)
        causes = [line.get("cause", "completed") for line in gw.log()]
        assert {line["status_code"] for line in gw.log()} == {200}
        assert causes.count("completed") == 20
        assert {*causes} == {"completed", *kinds}
        assert (await call(gw.port, PATH)).status == 503


async def test_they_open_it_though_good_ones_come_between(capfdbinary: Output) -> None:
    """So that there are never five in a row, only three of five."""
    bad = list(BADLY.values())
    endings = [ENDS_WELL if number % 5 in (1, 3) else bad[number % 3] for number in range(50)]
    async with gateway(capfdbinary, BETWEEN_BYTES_TIMEOUT="0.05") as gw:
        for number, ending in enumerate(endings):  # noqa: B007  looked at below
            gw.upstream.handler = ending
            await gw.post()
            if (await gw.breaker())["state"] == "open":
                break
        assert number == 7  # the fifth failure of eight calls


async def test_1000_clients_that_abort_do_not_move_it(capfdbinary: Output) -> None:
    chance = random.Random(11)
    phases = ["within the head", "within the body", "before the answer", "after its head", "mid-stream"]
    left = dict.fromkeys(phases, 0)

    async def by_path(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        if request.values(b"x-phase") != [b"before the answer"]:
            writer.write(EVENTS)
            if request.values(b"x-phase") == [b"after its head"]:
                await asyncio.sleep(0.1)  # who closes within that may have done so on purpose, and is sent the answer
            while not writer.is_closing():
                writer.write(b"9\r\ndata: 1\n\n\r\n")
                await asyncio.sleep(0.005)
        await silent(request, reader, writer)

    async def come_and_leave() -> None:
        phase = chance.choice(phases)
        head = f"POST {PATH} HTTP/1.1\r\nHost: h\r\nX-Phase: {phase}\r\nContent-Length: 2000\r\n\r\n".encode()
        data = head + b"x" * 2000
        sent = {phases[0]: chance.randrange(len(head)), phases[1]: len(head) + chance.randrange(2000)}
        async with connected(gw.port) as (reader, writer):
            writer.write(data[: sent.get(phase, len(data))])
            with suppress(asyncio.LimitOverrunError):
                if phase in phases[3:]:
                    await reader.readuntil(b"\r\n\r\n")
                if phase == phases[4]:
                    for _ in range(chance.randrange(1, 4)):
                        await reader.readuntil(b"data: 1\n\n")
            for _ in range(chance.randrange(50)):
                await asyncio.sleep(0)
            left[phase] += 1
            if chance.random() < 0.5:
                reset(writer)

    patient = {"FIRST_BYTE_TIMEOUT": "60", "BETWEEN_BYTES_TIMEOUT": "60", "ANSWER_TIMEOUT": "60"}
    async with gateway(capfdbinary, **patient) as gw:
        gw.upstream.handler = by_path
        for _ in range(20):
            await asyncio.gather(*[come_and_leave() for _ in range(50)])
            await until(lambda: not gw.app.proxy.exchanges)
        assert sum(left.values()) == 1000
        assert all(number > 100 for number in left.values())
        breaker = await gw.breaker()
        assert (breaker["state"], breaker["failure_count"], breaker["recent_failures"]) == ("closed", 0, 0)
        assert breaker["total_calls"] > 500
        assert {*gw.replicas().values()} == {0}
        await gw.logged(breaker["total_calls"])
        assert {line["cause"] for line in gw.log()} == {"client_left"}


# --- one verdict a request


Scenario = Callable[[Rig], Awaitable[object]]


def answered(handler: Handler, body: bytes = b"{}", *headers: tuple[str, str]) -> Scenario:
    """A POST to a service that does so."""

    async def scenario(gw: Rig) -> None:
        gw.upstream.handler = handler
        await gw.post(body, headers=headers)

    return scenario


def then(data: bytes, end: Callable[[Request, Reader, Writer], Awaitable[None]] = silent) -> Handler:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(data)
        await end(request, reader, writer)

    return handle


async def hang_up(request: Request, reader: Reader, writer: Writer) -> None:
    await writer.drain()
    writer.close()


async def drip(request: Request, reader: Reader, writer: Writer) -> None:
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.02)


async def a_service_that_is_gone(gw: Rig) -> None:
    await gw.upstream.stop()
    await gw.post()


async def a_service_that_cannot_be_reached(gw: Rig) -> None:
    await gw.upstream.stop()
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", gw.upstream.port))
        listener.listen(0)
        for each in (first, second):  # more than it has room for
            each.setblocking(False)
            assert each.connect_ex(("127.0.0.1", gw.upstream.port)) == errno.EINPROGRESS
        await gw.post()


async def a_service_that_takes_no_body(gw: Rig) -> None:
    async def take_nothing(request: Request, reader: Reader, writer: Writer) -> None:
        await gw.upstream.left.wait()
        raise ConnectionError

    gw.upstream.handler = take_nothing
    async with connected(gw.port) as (reader, writer):
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: 900000000\r\n\r\n".encode())

        async def pump() -> None:
            with suppress(ConnectionError):
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()

        pumping = asyncio.create_task(pump())
        await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        pumping.cancel()
    gw.upstream.left.set()


async def no_free_connection(gw: Rig) -> None:
    (route,) = gw.app.proxy._routes.values()
    for pool in route.pools.values():
        assert isinstance(pool, ConnectionPool)
        pool.close_idle()
        pool.limit = 0  # by settings alone, admission would come first
    await gw.post()


async def a_client_that_leaves(gw: Rig) -> None:
    gw.upstream.handler = silent
    async with connected(gw.port) as (_, writer):
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        await until(lambda: gw.app.proxy.exchanges)
        reset(writer)
        await until(lambda: not gw.app.proxy.exchanges)


async def a_client_that_leaves_a_stream(gw: Rig) -> None:
    gw.upstream.handler = then(EVENTS + b"9\r\ndata: 1\n\n\r\n")
    async with connected(gw.port) as (reader, writer):
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        await reader.readuntil(b"data: 1\n\n")
        reset(writer)
        await until(lambda: not gw.app.proxy.exchanges)


async def a_client_that_leaves_a_failure(gw: Rig) -> None:
    gw.upstream.handler = then(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\noops")
    async with connected(gw.port) as (reader, writer):
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        await reader.readuntil(b"oops")
        reset(writer)
        await until(lambda: not gw.app.proxy.exchanges)


async def a_client_that_stops_sending(gw: Rig) -> None:
    gw.upstream.handler = silent
    async with connected(gw.port) as (reader, writer):
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: h\r\nContent-Length: 2000\r\n\r\nhalf".encode())
        assert b" 408 " in await reader.readuntil(b"\r\n")


async def a_body_that_is_too_large(gw: Rig) -> None:
    gw.upstream.handler = silent
    async with connected(gw.port) as (reader, writer):
        writer.write(f"POST {PATH} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        writer.write(b"4\r\nhalf\r\n")
        await until(lambda: len(gw.upstream.requests) == 3)
        writer.write(b"7d0\r\n" + b"x" * 2000 + b"\r\n")
        assert b" 413 " in await reader.readuntil(b"\r\n")


async def a_gateway_that_stops(gw: Rig) -> None:
    gw.upstream.handler = then(EVENTS + b"9\r\ndata: 1\n\n\r\n")
    async with connected(gw.port) as (reader, writer):
        writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        await reader.readuntil(b"data: 1\n\n")
        gw.app.cut()
        await until(lambda: not gw.app.proxy.exchanges)


def in_a_websocket(behaviour: Callable[[Raw], Awaitable[None]]) -> Scenario:
    async def scenario(gw: Rig) -> None:
        gw.upstream.handler = speaks(behaviour)
        async with client(gw.port, PATH) as ws:
            while (await ws.read()).opcode != CLOSE:
                pass

    return scenario


async def drop(ws: Raw) -> None:
    reset(ws.writer)


async def break_down(ws: Raw) -> None:
    ws.close(1011)


async def say_goodbye(ws: Raw) -> None:
    ws.close(1000)
    await ws.read()


async def answer_no_pings(ws: Raw) -> None:
    await ws.reader.read(-1)


def at_the_handshake(handler: Handler) -> Scenario:
    async def scenario(gw: Rig) -> None:
        gw.upstream.handler = handler
        await send_raw(gw.port, handshake(PATH, "Connection: close"))

    return scenario


async def a_websocket_to_a_service_that_is_gone(gw: Rig) -> None:
    await gw.upstream.stop()
    await send_raw(gw.port, handshake(PATH, "Connection: close"))


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"
CASES: list[tuple[str, Cause, Scenario]] = [
    ("a whole answer", Cause.COMPLETED, answered(reply(OK))),
    ("a 404", Cause.COMPLETED, answered(reply(b"HTTP/1.1 404 Not\r\nContent-Length: 0\r\n\r\n"))),
    ("a 429", Cause.COMPLETED, answered(reply(b"HTTP/1.1 429 Busy\r\nContent-Length: 0\r\n\r\n"))),
    ("a 501", Cause.COMPLETED, answered(reply(b"HTTP/1.1 501 Never\r\nContent-Length: 0\r\n\r\n"))),
    ("a 500", Cause.COMPLETED, answered(reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"))),
    (
        "a 503",
        Cause.COMPLETED,
        answered(reply(b"HTTP/1.1 503 Busy\r\nRetry-After: 9\r\nContent-Length: 0\r\n\r\n")),
    ),
    ("gone", Cause.CONNECT_FAILED, a_service_that_is_gone),
    ("unreachable", Cause.CONNECT_TIMEOUT, a_service_that_cannot_be_reached),
    ("taking nothing", Cause.WRITE_TIMEOUT, a_service_that_takes_no_body),
    ("hanging up", Cause.RESET, answered(then(b"", hang_up))),
    ("no HTTP", Cause.GARBLED, answered(then(b"SSH-2.0\r\n\r\n"))),
    ("half a head", Cause.GARBLED, answered(then(b"HTTP/1.1 200 OK\r\n", hang_up))),
    ("100 for ever", Cause.GARBLED, answered(then(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000))),
    ("silent", Cause.FIRST_BYTE_TIMEOUT, answered(silent)),
    ("silent after 100", Cause.FIRST_BYTE_TIMEOUT, answered(then(b"HTTP/1.1 100 Continue\r\n\r\n"))),
    ("stalled", Cause.STALLED, answered(then(HALF))),
    ("stalled stream", Cause.STALLED, answered(BADLY[Cause.STALLED])),
    ("drip", Cause.ANSWER_TIMEOUT, answered(then(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n", drip))),
    ("cut", Cause.CUT_SHORT, answered(then(HALF, hang_up))),
    ("cut stream", Cause.CUT_SHORT, answered(BADLY[Cause.CUT_SHORT])),
    ("bad chunk", Cause.GARBLED, answered(then(CHUNKED + b"2\r\nhi\r\nxyz\r\n"))),
    ("error event", Cause.ERROR_EVENT, answered(BADLY[Cause.ERROR_EVENT])),
    ("no connection", Cause.NO_CONNECTION, no_free_connection),
    ("client left", Cause.CLIENT_LEFT, a_client_that_leaves),
    ("client left a stream", Cause.CLIENT_LEFT, a_client_that_leaves_a_stream),
    ("client left a 500", Cause.CLIENT_LEFT, a_client_that_leaves_a_failure),
    ("client too slow", Cause.CLIENT_TOO_SLOW, a_client_that_stops_sending),
    ("deadline", Cause.CLIENT_DEADLINE, answered(silent, b"{}", ("X-Request-Timeout-Ms", "50"))),
    ("no time at all", Cause.CLIENT_DEADLINE, answered(silent, b"{}", ("X-Request-Timeout-Ms", "0"))),
    ("refused", Cause.REFUSED, a_body_that_is_too_large),
    ("shutdown", Cause.SHUTDOWN, a_gateway_that_stops),
    ("WebSocket", Cause.COMPLETED, in_a_websocket(say_goodbye)),
    ("WebSocket dropped", Cause.DROPPED, in_a_websocket(drop)),
    ("WebSocket 1011", Cause.DROPPED, in_a_websocket(break_down)),
    ("WebSocket stalled", Cause.STALLED, in_a_websocket(answer_no_pings)),
    ("WebSocket gone", Cause.CONNECT_FAILED, a_websocket_to_a_service_that_is_gone),
    ("WebSocket 403", Cause.COMPLETED, at_the_handshake(reply(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"))),
    ("WebSocket 503", Cause.COMPLETED, at_the_handshake(reply(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"))),
    ("WebSocket garbled", Cause.GARBLED, at_the_handshake(then(b"SSH-2.0\r\n\r\n", hang_up))),
    ("WebSocket silent", Cause.FIRST_BYTE_TIMEOUT, at_the_handshake(silent)),
]


def test_there_is_a_case_for_every_cause_that_can_come_over_the_wire() -> None:
    assert {cause for _, cause, _ in CASES} == {*Cause} - {Cause.GATEWAY_FAULT}  # a mistake of our own, if we make one


@pytest.mark.parametrize(("cause", "scenario"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
async def test_log_metric_breaker_and_replica_agree_on_a_request(
    cause: Cause, scenario: Scenario, capfdbinary: Output
) -> None:
    def counted() -> Counter[str]:
        samples = [sample for family in prometheus_client.REGISTRY.collect() for sample in family.samples]
        outcomes = [sample for sample in samples if sample.name == "gateway_request_outcomes_total"]
        return Counter({one.labels["cause"]: int(one.value) for one in outcomes if one.labels["service"] == NAME})

    async with gateway(capfdbinary, MAX_BODY_BYTES="2000" if cause is Cause.REFUSED else "1000000000") as gw:
        gw.upstream.handler = reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
        await gw.post()
        await gw.post()  # to the other: the first keeps its place for a second
        await gw.logged(2)
        before, calls = counted(), (await gw.breaker())["recent_calls"]
        assert {*gw.replicas().values()} == {1}

        await scenario(gw)
        line = await gw.logged(3)
        await until(lambda: not gw.app.proxy.exchanges)

        assert line.get("cause", "completed") == cause
        assert counted() - before == {cause: 1}
        outcome = OUTCOMES[cause]
        if cause is Cause.COMPLETED and is_failure(line["status_code"]):
            outcome = Outcome.FAILURE
        breaker = await gw.breaker()
        accepted = line["status_code"] == 101  # a success by itself, from which the row of failures begins anew
        after = {Outcome.SUCCESS: 0, Outcome.FAILURE: 1 if accepted else 3, Outcome.NEUTRAL: 0 if accepted else 2}
        assert breaker["failure_count"] == after[outcome]
        assert breaker["recent_calls"] - calls == (outcome is not Outcome.NEUTRAL) + (
            accepted and outcome is not Outcome.SUCCESS
        )
        after = {Outcome.SUCCESS: 0, Outcome.FAILURE: 1 if accepted else 2, Outcome.NEUTRAL: 0 if accepted else 1}
        if "replica" in line:
            other = gw.replicas()
            assert other.pop(line["replica"]) == after[outcome]
            assert [*other.values()] == [1]
        else:
            assert {*gw.replicas().values()} == {1}


async def test_a_retry_counts_at_each_replica_as_it_went_there_and_once_at_the_breaker(capfdbinary: Output) -> None:
    async def fail_once(request: Request, reader: Reader, writer: Writer) -> None:
        failed = len(gw.upstream.requests) == 1
        writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n" if failed else OK)

    async with gateway(capfdbinary, RETRIES="1") as gw:
        gw.upstream.handler = fail_once
        assert (await call(gw.port, PATH)).status == 200
        line = await gw.logged(1)
        assert ("cause" not in line, line["attempts"]) == (True, 2)
        breaker = await gw.breaker()
        assert (breaker["recent_calls"], breaker["recent_failures"]) == (1, 0)
        replicas = gw.replicas()
        assert replicas.pop(line["replica"]) == 0
        assert [*replicas.values()] == [1]
