"""The connections to one replica: reuse, bounds, turns, TLS; and the wheel that holds all deadlines."""

import asyncio
import ssl
from pathlib import Path

import pytest

from gateway.context import Cause
from gateway.policies.services import Address
from gateway.policies.services import Service as Target
from gateway.problems import ForwardingError
from gateway.proxy.app import ProxyApp
from gateway.proxy.http1 import Http1Connection
from gateway.proxy.pool import ConnectionPool
from gateway.proxy.timers import TICK, Deadline, TimerWheel
from tests.wire import OK, Service, call, read_body, service, serving, until

TLS = Path(__file__).parent / "tls"  # a certificate for localhost that is its own authority, good for a century


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://search:8002", Address("search", 8002, False, b"search:8002", b"")),
        ("http://search", Address("search", 80, False, b"search", b"")),
        ("https://search/v2/", Address("search", 443, True, b"search", b"/v2")),
        ("http://[::1]:8002/a/b", Address("::1", 8002, False, b"[::1]:8002", b"/a/b")),
        ("unix:/run/search.sock", Address("localhost", 80, False, b"localhost", b"", "/run/search.sock")),
        ("unix:/run/search.sock:/v2/", Address("localhost", 80, False, b"localhost", b"/v2", "/run/search.sock")),
    ],
)
def test_an_address_from_its_url(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        *(
            "search:8002",
            "ftp://search",
            "http://",
            "http://a?b",
            "http://a#b",
            "http://a:x",
            "http://a:0",
            "http://a:",
        ),
        *("http://me:secret@a", "http://a/b/../c", "http://a/b%2Fc", "http://a b", "http://a,http://b", "http://a..b"),
        *("unix:", "unix:run/a.sock", "unix:/", "unix:/run/a.sock:", "unix:/run/a.sock:v2", "unix:/run/../a.sock"),
        *("unix:///run/a.sock", "unix:/run/a.sock?b", "unix:/" + 107 * "a", "http://unix:/run/a.sock"),
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        Address.parse(url)


def pool_for(upstream: Service, **options: float) -> ConnectionPool:
    return ConnectionPool(Address.parse(upstream.url), **options)  # type: ignore[arg-type]


async def fetch(pool: ConnectionPool) -> Http1Connection:
    """One exchange, up to its last byte."""
    now = asyncio.get_running_loop().time()
    connection = pool.take_idle(now) or await pool.reserve() or await pool.connect()
    connection.request(b"GET", b"/", b"h", b"", b"", b"")
    while not connection.complete:
        await connection.progress()
    assert connection.take() == b"ok"
    return connection


async def test_a_connection_is_used_again_until_it_has_been_idle_too_long() -> None:
    async with service() as upstream:
        pool = pool_for(upstream, idle_timeout=5)
        pool.give_back(await fetch(pool))
        again = await fetch(pool)
        assert upstream.connections == 1
        pool.give_back(again)
        assert (pool.open, pool.idle) == (1, 1)
        assert pool.take_idle(asyncio.get_running_loop().time() + 6) is None
        await until(lambda: pool.open == 0)


async def test_a_connection_that_the_service_closed_is_not_used_again() -> None:
    async with service() as upstream:
        pool = pool_for(upstream)
        pool.give_back(await fetch(pool))
        await upstream.stop()
        await until(lambda: pool.open == 0)
        assert pool.idle == 0
        assert pool.take_idle(asyncio.get_running_loop().time()) is None


async def test_those_who_wait_are_served_in_their_order_and_one_who_leaves_passes_the_turn_on() -> None:
    async with service() as upstream:
        pool = pool_for(upstream, limit=1, max_waiting=2)
        first = await fetch(pool)
        leaving, staying = (asyncio.create_task(pool.reserve()) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(ForwardingError) as refusal:
            await pool.reserve()
        assert refusal.value.cause is Cause.NO_CONNECTION
        pool.give_back(first)
        leaving.cancel()  # it has been given the connection already, and never got to know
        assert await staying is first
        assert leaving.cancelled()
        pool.close_idle()
        first.abort()
        await until(lambda: pool.open == 0)


async def test_a_lost_connection_gives_its_place_to_the_first_who_waits() -> None:
    async with service() as upstream:
        pool = pool_for(upstream, limit=1)
        first = await fetch(pool)
        leaving, staying = (asyncio.create_task(pool.reserve()) for _ in range(2))
        await asyncio.sleep(0)
        first.connection_lost(None)
        leaving.cancel()  # its turn has come already, and it never got to know
        first.abort()
        assert await staying is None
        second = await pool.connect()
        second.abort()
        await until(lambda: pool.open == 0)
        assert upstream.connections == 2


async def test_a_service_that_can_not_be_reached_leaves_no_place_taken() -> None:
    pool = ConnectionPool(Address.parse("http://127.0.0.1:1"), limit=1)
    for _ in range(3):
        assert await pool.reserve() is None
        with pytest.raises(ForwardingError, match="connection refused"):
            await pool.connect()
    pool = ConnectionPool(Address.parse("http://no-such-name.invalid:1"), limit=1)
    assert await pool.reserve() is None
    with pytest.raises(ForwardingError, match="can't be reached"):
        await pool.connect()
    assert pool.open == 0


async def test_tls_is_verified_against_the_authority_that_is_set() -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    by_name = (f"https://localhost:{port}",)
    targets = [
        Target(name="known", prefix="/known", replicas=by_name, ca_file=str(TLS / "cert.pem")),
        Target(name="stranger", prefix="/stranger", replicas=by_name),
    ]
    async with serving(ProxyApp(targets)) as gateway:
        assert (await call(gateway, "/known")).body == b"ok"
        answer = await call(gateway, "/stranger")
        assert answer.status == 502
        assert b"certificate is not valid" in answer.body
    server.close()


async def test_a_plain_service_where_tls_is_expected_is_502() -> None:
    async def speak_plainly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(speak_plainly, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with serving(ProxyApp({"/api": url})) as port:
        answer = await call(port, "/api")
        assert (answer.status, b"TLS failed" in answer.body) == (502, True)
    server.close()


async def test_a_hundred_requests_through_three_connections_leave_nothing_behind() -> None:
    async with service() as upstream:
        seen = 0

        async def count(request: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal seen
            seen = max(seen, upstream.open)
            await read_body(upstream.requests[-1], reader)
            writer.write(OK)

        upstream.handler = count
        proxy = ProxyApp({"/api": upstream.url}, max_connections=3)
        async with serving(proxy) as port:
            answers = await asyncio.gather(*(call(port, "/api") for _ in range(100)))
            assert {answer.status for answer in answers} == {200}
            assert seen <= 3
            assert not proxy.exchanges


# Deadlines


class Alarm:
    def __init__(self, due: float, rung: list[float]) -> None:
        self.due = due
        self.slot: set[Deadline] | None = None
        self.rung = rung

    def expire(self) -> None:
        self.rung.append(asyncio.get_running_loop().time() - self.due)


async def test_deadlines_fire_in_time_and_never_early() -> None:
    loop, rung = asyncio.get_running_loop(), list[float]()
    wheel = TimerWheel(loop)
    for delay in (0.03, 0.0, 0.011, 0.02, 0.02):
        wheel.add(Alarm(loop.time() + delay, rung))
    assert len(wheel) == 5
    await until(lambda: len(rung) == 5)
    assert min(rung) >= 0
    assert len(wheel) == 0


async def test_a_deadline_that_was_removed_or_moved_does_not_fire_at_its_old_time() -> None:
    loop, rung = asyncio.get_running_loop(), list[float]()
    wheel = TimerWheel(loop)
    removed, later, sooner = (Alarm(loop.time() + delay, rung) for delay in (0.01, 0.01, 60))
    for alarm in (removed, later, sooner):
        wheel.add(alarm)
    wheel.remove(removed)
    wheel.remove(removed)
    later.due += 5 * TICK
    wheel.bring_forward(sooner, loop.time() + 0.02)
    await until(lambda: len(rung) == 2)
    assert min(rung) >= 0
    wheel.add(Alarm(loop.time() + 60, rung))
    wheel.close()
    assert len(wheel) == 0
