"""Replicas that die, fail, hang and come back, through the whole gateway under load (RESILIENCE.md, 5)."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest

from gateway.app import Gateway, create_app
from gateway.settings import Settings
from tests.frames import Raw, client, handshake, speaks
from tests.proxy_rig import silent
from tests.wire import (
    OK,
    Handler,
    Reader,
    Request,
    Writer,
    call,
    connected,
    reply,
    reset,
    send_raw,
    service,
    serving_at_the_edge,
    until,
)

PATH = "/api/v1/recommendations"
NAME = "recommendation-service"
CONNECTIONS = 32
IN_FLIGHT = 8  # at one of three replicas, as comes about soon


class Replica:
    """One that answers after a while, or fails at once; counts what it is asked."""

    def __init__(self) -> None:
        self.fails = False
        self.dies_over = 0  # so many requests at a time, if any
        self.asked = 0
        self.in_flight = 0
        self.port = 0
        self.connections: set[asyncio.Transport] = set()
        self.server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: Answering(self), "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    def die(self) -> None:
        """Refuse connections, and break those that there are."""
        if self.server is not None:
            self.server.close()
            self.server = None
        for connection in list(self.connections):
            connection.abort()

    async def stop(self) -> None:
        self.die()
        await until(lambda: not self.connections)


class Answering(asyncio.Protocol):
    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.replica.connections.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.replica.connections.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        assert data.endswith((b"\r\n\r\n", b"{}")), "a request in one piece"
        replica = self.replica
        replica.asked += 1
        replica.in_flight += 1
        if replica.in_flight == replica.dies_over:
            replica.die()
        asyncio.get_running_loop().call_later(0.001 if replica.fails else 0.005, self.answer, replica.fails)

    def answer(self, fails: bool) -> None:
        self.replica.in_flight -= 1
        line = b"HTTP/1.1 500 Oops" if fails else b"HTTP/1.1 200 OK"
        self.transport.write(line + b"\r\nContent-Length: 2\r\n\r\nok")


class Rig:
    """A gateway with replicas of one service, and a clock that can be put forward.

    It is the event loop's, by which replicas, timers and connections go; the breaker has another.
    """

    def __init__(self, app: Gateway, port: int, replicas: Any, patch: pytest.MonkeyPatch) -> None:
        self.app, self.port, self.replicas = app, port, replicas
        loop = asyncio.get_running_loop()
        self._real, self._ahead = loop.time, 0.0
        patch.setattr(loop, "time", lambda: self._real() + self._ahead)

    def advance(self, seconds: float) -> None:
        self._ahead += seconds

    async def load(self, requests: int, method: str = "GET", *fields: str) -> Counter[int]:
        """So many requests over 32 connections; how many were answered with which status."""
        lines = [f"{method} {PATH} HTTP/1.1", "Host: h", *(["Content-Length: 2"] if method == "POST" else []), *fields]
        request = "\r\n".join([*lines, "", "{}" if method == "POST" else ""]).encode()
        statuses: Counter[int] = Counter()
        left = iter(range(requests))

        async def one_after_another() -> None:
            async with connected(self.port) as (reader, writer):
                for _ in left:
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    statuses[int(head[9:12])] += 1

        await asyncio.gather(*[one_after_another() for _ in range(CONNECTIONS)])
        return statuses

    def status(self) -> list[dict[str, Any]]:
        (route,) = self.app.proxy._routes.values()
        return route.replicas.status(route.loop.time())

    async def breaker(self) -> dict[str, Any]:
        status: dict[str, Any] = orjson.loads((await call(self.port, "/circuit-breakers")).body)[NAME]
        return status


@asynccontextmanager
async def gateway(patch: pytest.MonkeyPatch, **environ: str) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as running:
        replicas = [Replica() for _ in range(3)]
        for replica in replicas:
            await replica.start()
            running.push_async_callback(replica.stop)
        limits = {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off", "LOG_LEVEL": "ERROR"}
        urls = ",".join(replica.url for replica in replicas)
        app = create_app(Settings.load({"RECOMMENDATION_SERVICE_URL": urls, **limits, **environ}))
        port = await running.enter_async_context(serving_at_the_edge(app))
        yield Rig(app, port, replicas, patch)


async def one_dies_and_one_fails(
    gw: Rig, requests: int, method: str, *fields: str, dies_first: bool = True
) -> Counter[int]:
    """So many requests, over the first of which one replica dies and another begins to answer 500 at once.

    The second happens after the first was noticed: what is sent again in that instant could but meet the other fault.
    """
    well, dead, failing = gw.replicas
    assert await gw.load(500, method, *fields) == {200: 500}
    failing.asked = 0
    loading = asyncio.create_task(gw.load(requests, method, *fields))
    for _ in range(2):
        if dies_first:
            dead.dies_over = IN_FLIGHT
            await until(lambda: dead.server is None)
        else:
            failing.fails, failing.asked = True, 0
        dies_first = not dies_first
        so_far = well.asked
        await until(lambda: well.asked > so_far + 2 * CONNECTIONS)  # noqa: B023
    statuses = await loading
    dead.dies_over = 0
    assert sum(statuses.values()) == requests
    assert failing.asked < max(100, requests / 50)  # under 2 %, but as many at once as connections make of it
    assert [replica["set_aside"] for replica in gw.status()].count(True) == 1  # half of three, at most
    return statuses


@pytest.mark.parametrize("dies_first", [True, False], ids=["dies first", "fails first"])
async def test_a_replica_that_dies_and_one_that_fails_fast_cost_gets_nothing_and_are_back_in_their_time(
    dies_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(monkeypatch) as gw:
        statuses = await one_dies_and_one_fails(gw, 10_000, "GET", dies_first=dies_first)
        assert 10_000 - statuses[200] <= 10 + CONNECTIONS
        breaker = await gw.breaker()
        assert (breaker["state"], breaker["times_opened"]) == ("closed", 0)

        _, dead, failing = gw.replicas
        await dead.start()
        failing.fails = False
        wait = max(replica["retry_after"] for replica in gw.status())
        assert wait <= 20  # 10 s, or twice that if it had its first trial while it was dead
        gw.advance(max(10, wait))  # the other's failures keep their places for 10 s at most
        assert await gw.load(200) == {200: 200}
        assert sorted(replica["state"] for replica in gw.status()) == ["in_use", "in_use", "ramping"]
        gw.advance(30)
        for replica in gw.replicas:
            replica.asked = 0
        assert await gw.load(900) == {200: 900}
        assert [replica["state"] for replica in gw.status()] == ["in_use"] * 3
        assert all(200 < replica.asked < 400 for replica in gw.replicas)


async def test_posts_that_carry_a_key_fare_no_worse_than_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as gw:
        statuses = await one_dies_and_one_fails(gw, 3000, "POST", "Idempotency-Key: k")
        assert 3000 - statuses[200] <= 10 + CONNECTIONS
        assert (await gw.breaker())["times_opened"] == 0


async def test_of_other_posts_those_in_flight_are_lost_and_what_the_fast_failer_gets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are never sent twice, so the breaker sees each; it must bear as many in a row as a replica has in flight."""
    async with gateway(monkeypatch, CIRCUIT_BREAKER_FAILURE_THRESHOLD="100") as gw:
        failing = gw.replicas[2]
        statuses = await one_dies_and_one_fails(gw, 3000, "POST")
        assert (
            IN_FLIGHT <= statuses[502] <= CONNECTIONS
        )  # in flight at the one that died: what comes later goes elsewhere
        assert abs(statuses[500] - failing.asked) <= CONNECTIONS  # what was in flight there as it began to fail
        assert statuses[200] + statuses[500] + statuses[502] == 3000
        assert (await gw.breaker())["times_opened"] == 0


async def test_by_default_a_replica_that_dies_over_five_posts_or_more_opens_the_breaker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch) as gw:
        gw.replicas[1].dies_over = IN_FLIGHT
        statuses = await gw.load(500, "POST")
        assert IN_FLIGHT <= statuses[502] <= CONNECTIONS
        assert statuses[503] > 0
        assert (await gw.breaker())["state"] == "open"


# --- odd replicas


@asynccontextmanager
async def two(patch: pytest.MonkeyPatch, first: Handler, **environ: str) -> AsyncIterator[Rig]:
    """A gateway with two replicas, of which the first does so and is always asked first; the other is well."""
    async with service(first) as one, service() as other:
        limits = {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off", "LOG_LEVEL": "ERROR"}
        urls = f"{one.url},{other.url}"
        app = create_app(Settings.load({"RECOMMENDATION_SERVICE_URL": urls, **limits, **environ}))
        app.proxy._random = lambda: 0.0
        async with serving_at_the_edge(app) as port:
            yield Rig(app, port, [one, other], patch)


async def set_aside(gw: Rig) -> None:
    """Have the first replica set aside, and its time be up."""
    first = gw.replicas[0]
    handler, first.handler = first.handler, reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
    for _ in range(3):
        assert (await call(gw.port, PATH)).status == 200
        gw.advance(10)
    first.handler = handler
    assert [replica["state"] for replica in gw.status()] == ["set_aside", "in_use"]


async def test_one_that_accepts_and_never_answers_is_set_aside_by_its_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(monkeypatch, silent, FIRST_BYTE_TIMEOUT="0.05") as gw:
        for _ in range(3):
            assert (await call(gw.port, PATH)).status == 504
            gw.advance(3)
        assert [replica["state"] for replica in gw.status()] == ["set_aside", "in_use"]
        assert [(await call(gw.port, PATH)).status for _ in range(20)] == [200] * 20


async def test_one_that_outlasts_the_patience_of_its_callers_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(monkeypatch, silent) as gw:
        for number in range(1, 4):
            async with connected(gw.port) as (_, writer):
                writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
                await until(lambda: len(gw.replicas[0].requests) == number)  # noqa: B023
                gw.advance(31)
                reset(writer)
            await until(lambda: not gw.app.proxy.exchanges)
            assert gw.status()[0]["failure_count"] == number
            gw.advance(3)
        assert [replica["state"] for replica in gw.status()] == ["set_aside", "in_use"]


async def test_who_leaves_earlier_says_nothing_of_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(monkeypatch, silent) as gw:
        async with connected(gw.port) as (_, writer):
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            await until(lambda: gw.replicas[0].requests)
            gw.advance(29)
            reset(writer)
        await until(lambda: not gw.app.proxy.exchanges)
        assert gw.status()[0]["failure_count"] == 0


@pytest.mark.parametrize(
    ("answer", "method"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50, "GET"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n", "POST"),
    ],
    ids=["100 for ever", "503 with Retry-After"],
)
async def test_what_another_can_answer_is_answered_and_the_odd_one_set_aside(
    answer: bytes, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(monkeypatch, reply(answer)) as gw:
        for number in range(1, 4):
            assert (await call(gw.port, PATH, method, body=b"{}" if method == "POST" else b"")).status == 200
            assert gw.status()[0]["failure_count"] == number
            gw.advance(3)
        assert [replica["state"] for replica in gw.status()] == ["set_aside", "in_use"]
        assert (await gw.breaker())["recent_failures"] == 0


async def test_a_long_answer_brings_its_replica_back_as_soon_as_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    async def begin(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await silent(request, reader, writer)

    async with two(monkeypatch, begin) as gw:
        await set_aside(gw)
        async with connected(gw.port) as (reader, writer):
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            await reader.readuntil(b"hi\r\n")
            assert [replica["state"] for replica in gw.status()] == ["ramping", "in_use"]
            assert gw.status()[0]["in_flight"] == 1


@pytest.mark.parametrize("leaves", [True, False], ids=["caller leaves", "trial hangs"])
async def test_a_trial_is_never_lost(leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(monkeypatch, silent) as gw:
        await set_aside(gw)
        first = gw.replicas[0]
        asked = len(first.requests)
        async with connected(gw.port) as (_, writer):
            writer.write(f"GET {PATH} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            await until(lambda: len(first.requests) > asked)
            assert gw.status()[0]["state"] == "on_trial"
            assert (await call(gw.port, PATH)).status == 200  # by the other
            if leaves:
                reset(writer)
                await until(lambda: not gw.app.proxy.exchanges)
            else:
                gw.advance(30)
            first.handler = reply(OK)
            assert (await call(gw.port, PATH)).status == 200
            assert gw.status()[0]["state"] == "ramping"


async def test_a_websocket_brings_its_replica_back_as_soon_as_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(ws: Raw) -> None:
        await ws.read()

    async with two(monkeypatch, speaks(listen)) as gw:
        await set_aside(gw)
        async with client(gw.port, PATH) as ws:
            assert [replica["state"] for replica in gw.status()] == ["ramping", "in_use"]
            ws.close(1000)
            await ws.read()


async def test_a_websocket_finds_another_where_its_replica_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def listen(ws: Raw) -> None:
        await ws.read()

    async with two(monkeypatch, speaks(listen)) as gw:
        await gw.replicas[0].stop()
        gw.replicas[1].handler = speaks(listen)
        for number in range(1, 4):
            async with client(gw.port, PATH) as ws:
                assert gw.status()[0]["failure_count"] == number
                ws.close(1000)
                await ws.read()
            await until(lambda: not gw.status()[1]["in_flight"])
            gw.advance(3)
        assert [replica["state"] for replica in gw.status()] == ["set_aside", "in_use"]
        gw.advance(10)
        async with client(gw.port, PATH):  # a trial that fails costs it nothing either
            assert gw.status()[0]["failure_count"] == 4
        await until(lambda: not gw.status()[1]["in_flight"])
        assert (await gw.breaker())["recent_failures"] == 0


async def test_where_no_replica_can_be_reached_a_websocket_is_refused_after_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with two(monkeypatch, silent) as gw:
        for replica in gw.replicas:
            await replica.stop()
        answer = await send_raw(gw.port, handshake(PATH, "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert [replica["failure_count"] for replica in gw.status()] == [1, 1]
        assert (await gw.breaker())["recent_failures"] == 1


async def test_a_breaker_closes_though_a_dead_replica_is_due_for_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(monkeypatch, silent, CIRCUIT_BREAKER_TIMEOUT="0.05") as gw:
        await set_aside(gw)
        dead, other = gw.replicas
        await dead.stop()
        other.handler = reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
        for _ in range(6):
            await call(gw.port, PATH, "POST", body=b"{}")
        assert (await gw.breaker())["times_opened"] == 1
        other.handler = reply(OK)
        gw.advance(300)
        while (state := (await gw.breaker())["state"]) == "open":  # noqa: ASYNC110  it turns by the clock alone
            await asyncio.sleep(0.005)
        assert state == "half_open"
        assert [(await call(gw.port, PATH, "POST", body=b"{}")).status for _ in range(2)] == [200, 200]
        breaker = await gw.breaker()
        assert (breaker["state"], breaker["times_opened"]) == ("closed", 1)


async def test_a_breaker_closes_by_the_replica_set_aside_where_the_other_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with two(monkeypatch, reply(OK), CIRCUIT_BREAKER_TIMEOUT="0.05") as gw:
        await set_aside(gw)
        await gw.replicas[1].stop()
        gw.advance(-9)  # not due yet
        for _ in range(6):
            await call(gw.port, PATH, "POST", body=b"{}")
        assert (await gw.breaker())["state"] == "open"
        gw.advance(9)
        rounds = 0
        while (state := (await gw.breaker())["state"]) != "closed":
            if state == "half_open":
                rounds += 1
                await call(gw.port, PATH, "POST", body=b"{}")
            await asyncio.sleep(0.005)
        assert rounds <= 4  # one probe to find the one gone, the others to find the other well


async def test_two_gateways_keep_the_last_replica_and_bring_the_other_back_each_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with service() as one, service() as last:
        urls = f"{one.url},{last.url}"
        limits = {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off", "LOG_LEVEL": "ERROR"}
        broken = reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
        async with AsyncExitStack() as running:
            rigs = []
            for _ in range(2):
                environ = {"RECOMMENDATION_SERVICE_URL": urls, **limits, "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000"}
                app = create_app(Settings.load(environ))
                port = await running.enter_async_context(serving_at_the_edge(app))
                rigs.append(Rig(app, port, [one, last], monkeypatch))
            one.handler = last.handler = broken
            calls = [call(gw.port, PATH, "POST", body=b"{}") for gw in rigs for _ in range(40)]
            assert {answer.status for answer in await asyncio.gather(*calls)} == {500}  # both services' own
            for gw in rigs:
                assert [replica["set_aside"] for replica in gw.status()].count(True) == 1
            one.handler = last.handler = reply(OK)
            rigs[-1].advance(40)  # the loop's clock, by which both go
            calls = [call(gw.port, PATH, "POST", body=b"{}") for gw in rigs for _ in range(40)]
            assert {answer.status for answer in await asyncio.gather(*calls)} == {200}
            for gw in rigs:
                assert sorted(replica["state"] for replica in gw.status()) == ["in_use", "ramping"]
