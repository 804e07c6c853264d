"""Whatever happens to Redis: two whole gateways over sockets while it stops, dies, fills up, forgets, comes back.

In each drill callers go on asking. None gets a 5xx, none waits longer for Redis than the deadline, each gateway logs
once that its limits are its own and once that they are shared again, its answers say so meanwhile, and no caller gets
more than the shared bucket and, in each spell without it, the workers' own buckets allow.
"""

import asyncio
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import pytest

from gateway.app import Gateway, create_app
from gateway.backends.redis import RedisLimiter
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.redis_server import RedisServer, redis_server
from tests.wire import Reader, Writer, call, service, serving, until

LIMIT, PERIOD = 40, 60.0
GATEWAYS = 2
DEADLINE = 0.2  # seconds: more than a crowded machine keeps a healthy Redis from answering
LATE = 0.1  # seconds that a request takes besides, where nothing stalls
TICK = 0.005


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class Asked(NamedTuple):
    """A request and what became of it; times on the loop's clock."""

    began: float
    ended: float
    user: str
    gateway: int
    status: int
    mode: bytes  # nothing: shared

    @property
    def admitted(self) -> bool:
        return self.status == 200


class Stalls:
    """How long this process did not run, by a clock that ticks in its loop: that is not the gateway's doing."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    async def watch(self) -> None:
        while True:
            self.ticks.append(asyncio.get_running_loop().time())
            await asyncio.sleep(TICK)

    def between(self, began: float, ended: float) -> float:
        pairs = zip(self.ticks, self.ticks[1:], strict=False)
        return sum(max(0.0, after - before - TICK) for before, after in pairs if after > began and before < ended)


class Drill:
    """Two gateways on one Redis, callers who go on asking, and what came of it all."""

    def __init__(self, apps: list[Gateway], ports: list[int], caplog: pytest.LogCaptureFixture) -> None:
        self.apps, self.ports, self.caplog = apps, ports, caplog
        self.loop = asyncio.get_running_loop()
        self.asked: list[Asked] = []
        self.stalls = Stalls()
        self.tasks = [self.loop.create_task(self.stalls.watch())]

    @property
    def shared(self) -> list[bool]:
        return [app.limiter.shared for app in self.apps if isinstance(app.limiter, RedisLimiter)]

    @property
    def modes(self) -> list[str]:
        """What the gateways said of their limits, in order."""
        said = {logging.WARNING: "own", logging.INFO: "shared"}
        return [said[record.levelno] for record in self.lines]

    @property
    def lines(self) -> list[logging.LogRecord]:
        """What they said at all, but for requests, and for what breakers say of Redis (test_fleet.py)."""
        ours = [record for record in self.caplog.records if record.name.startswith("gateway")]
        return [record for record in ours if record.name != "gateway.fleet"]

    def begin(self, user: str) -> None:
        """Let a user ask all gateways, over and over."""
        self.tasks += [self.loop.create_task(self._ask(user, number)) for number in range(len(self.ports))]

    async def _ask(self, user: str, gateway: int) -> None:
        while True:
            began = self.loop.time()
            answer = await call(self.ports[gateway], "/api/v1/chat", headers=(("X-User-ID", user),))
            mode = b"".join(answer.values(b"x-ratelimit-mode"))
            self.asked.append(Asked(began, self.loop.time(), user, gateway, answer.status, mode))
            await asyncio.sleep(0.004)

    async def until_asked(self, holds: Callable[[Asked], bool], gateways: int = GATEWAYS) -> None:
        """Wait until a request that begins from now on is as expected, at so many gateways."""
        now = self.loop.time()

        def seen() -> bool:
            for task in self.tasks:
                if task.done():
                    task.result()
            return len({one.gateway for one in self.asked if one.began >= now and holds(one)}) >= gateways

        await until(seen, timeout=10)

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    # What must hold

    def nobody_failed(self) -> None:
        assert {one.status for one in self.asked} <= {200, 429}

    def nobody_waited(self) -> None:
        for one in self.asked:
            waited = one.ended - one.began - self.stalls.between(one.began, one.ended)
            assert waited <= DEADLINE + LATE, one

    def modes_changed(self, *expected: bytes) -> None:
        """What answers to one user at one gateway said of their mode: this, from somewhere in it to somewhere later."""
        for key in {(one.user, one.gateway) for one in self.asked}:
            modes = tuple(mode for mode, _ in groupby(one.mode for one in self.asked if (one.user, one.gateway) == key))
            assert modes in {expected[i:j] for i in range(len(expected)) for j in range(i, len(expected) + 1)}, key

    def nobody_got_more(self, *, losses: int, spells: int) -> None:
        """Nor more of the shared bucket, full again at each loss, than it held, nor of a worker's own in each spell."""
        for user in {one.user for one in self.asked}:
            of_user = [one for one in self.asked if one.user == user and one.admitted]
            span = self.asked[-1].ended - self.asked[0].began
            shared = sum(one.mode == b"" for one in of_user)
            assert shared <= LIMIT * (1 + losses) + LIMIT * span / PERIOD
            own = Counter(one.gateway for one in of_user if one.mode == b"local")
            for admitted in own.values():
                assert admitted <= LIMIT // GATEWAYS * (spells + span / PERIOD)


@asynccontextmanager
async def drill_on(url: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Drill]:
    caplog.set_level(logging.INFO, "gateway")
    settings = {
        "REDIS_URL": url,
        "RATE_LIMIT_PER_MINUTE": str(LIMIT),
        "RATE_LIMIT_PER_HOUR": "off",
        "RATE_LIMIT_REDIS_DEADLINE_MS": f"{DEADLINE * 1000:.0f}",
        "WEB_CONCURRENCY": str(GATEWAYS),
    }
    async with service() as upstream:
        apps = [create_app(Settings.load(settings | {"CHATBOT_SERVICE_URL": upstream.url})) for _ in range(GATEWAYS)]
        async with serving(apps[0], http=GatewayProtocol) as one, serving(apps[1], http=GatewayProtocol) as other:
            drill = Drill(apps, [one, other], caplog)
            try:
                yield drill
            finally:
                await drill.end()


@dataclass
class Proxy:
    """What stands between the gateways and Redis, and may do harm.

    Attributes:
        resets: every connection that comes, as soon as it is used.
        blocks: commands that it answers itself: unknown.
    """

    to: int
    resets: bool = False
    blocks: tuple[bytes, ...] = ()
    port: int = 0
    writers: set[Writer] = field(default_factory=set)

    async def serve(self, reader: Reader, writer: Writer) -> None:
        above, below = await asyncio.open_connection("127.0.0.1", self.to)
        self.writers |= {writer, below}
        try:
            await asyncio.gather(self._pass(reader, writer, below), self._pass(above, None, writer))
        except ConnectionError:
            pass
        finally:
            self.writers -= {writer, below}
            writer.transport.abort()
            below.transport.abort()

    async def _pass(self, reader: Reader, back: Writer | None, onward: Writer) -> None:
        while data := await reader.read(65536):
            if back is not None and self.resets:
                reset(back)
                break
            refused = sum(data.count(b"\r\n%b\r\n" % word) for word in self.blocks)
            if back is not None and refused:
                back.write(b"-ERR unknown command 'EVALSHA'\r\n" * refused)
            else:
                onward.write(data)
        raise ConnectionError

    def reset_all(self) -> None:
        self.resets = True
        for writer in self.writers:
            reset(writer)


def reset(writer: Writer) -> None:
    """Cut a connection so that the other side sees a reset rather than its end."""
    link: socket.socket = writer.get_extra_info("socket")
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def proxy_to(port: int) -> AsyncIterator[Proxy]:
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        for writer in list(proxy.writers):
            writer.transport.abort()
        await until(lambda: not proxy.writers)


# What happens to Redis, and how it ends


@asynccontextmanager
async def stopped(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.stop()
    yield
    redis.resume()


@asynccontextmanager
async def killed(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.kill()
    yield
    await asyncio.to_thread(redis.start)


@asynccontextmanager
async def full(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.command("CONFIG", "SET", "maxmemory", "1")
    yield
    redis.command("CONFIG", "SET", "maxmemory", "0")


@asynccontextmanager
async def a_read_only_replica(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    with redis_server("--repl-diskless-sync-delay", "0") as primary:
        redis.command("REPLICAOF", "127.0.0.1", str(primary.port))
        await until(lambda: b"master_link_status:up" in redis.command("INFO", "replication"))
        yield
        redis.command("REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def busy_for_a_second(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.command("CONFIG", "SET", "lua-time-limit", "1000")  # after which it hears what would end a script
    running = asyncio.create_task(asyncio.to_thread(redis.command, "EVAL", "while true do end", "0"))
    yield
    await asyncio.to_thread(redis.command, "SCRIPT", "KILL")
    assert b"killed" in await running


@asynccontextmanager
async def reset_by_a_proxy(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    proxy.reset_all()
    yield
    proxy.resets = False


@asynccontextmanager
async def without_its_scripts(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.command("SCRIPT", "FLUSH")
    yield


@asynccontextmanager
async def without_its_data(redis: RedisServer, proxy: Proxy) -> AsyncIterator[None]:
    redis.command("FLUSHALL")
    yield


class Fault(NamedTuple):
    """What happens to Redis, and what is then to be seen.

    Attributes:
        happens: from when to when.
        is_outage: the gateways do without it meanwhile.
        losses: how often Redis forgets what callers have taken.
        at_boot: it begins before the gateways do.
    """

    happens: Callable[[RedisServer, Proxy], AbstractAsyncContextManager[None]]
    is_outage: bool = True
    losses: int = 0
    at_boot: bool = False

    def __str__(self) -> str:
        return self.happens.__name__ + ("_at_boot" if self.at_boot else "")


FAULTS = [
    Fault(stopped),
    Fault(killed, losses=1),
    Fault(full),
    Fault(a_read_only_replica, losses=1),  # it takes over the data of its primary, which has none
    Fault(busy_for_a_second),
    Fault(reset_by_a_proxy),
    Fault(killed, at_boot=True),
    Fault(stopped, at_boot=True),
    Fault(without_its_scripts, is_outage=False),
    Fault(without_its_data, is_outage=False, losses=1),
]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_redis_is(fault: Fault, redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async with proxy_to(redis.port) as proxy, AsyncExitStack() as gateways:
        async with AsyncExitStack() as meanwhile:
            if fault.at_boot:
                await meanwhile.enter_async_context(fault.happens(redis, proxy))
            by_proxy = fault.happens is reset_by_a_proxy
            url = f"redis://127.0.0.1:{proxy.port if by_proxy else redis.port}/0"
            drill = await gateways.enter_async_context(drill_on(url, caplog))
            drill.begin("greedy")
            await drill.until_asked(lambda one: one.status == 429)
            if not fault.at_boot:
                await meanwhile.enter_async_context(fault.happens(redis, proxy))
            drill.begin("newcomer")
            for user in ("newcomer", "greedy") if fault.is_outage else ():
                refused_by_its_own = (user, 429, b"local")
                await drill.until_asked(lambda one: (one.user, one.status, one.mode) == refused_by_its_own)  # noqa: B023
            await drill.until_asked(lambda one: (one.user, one.status) == ("newcomer", 429))
        if fault.is_outage:
            ended = drill.loop.time()
            await until(lambda: all(drill.shared))
            back = drill.loop.time()
            assert back - ended - drill.stalls.between(ended, back) <= 1
            await drill.until_asked(lambda one: one.mode == b"")
        await drill.end()

    drill.nobody_failed()
    drill.nobody_waited()
    drill.nobody_got_more(losses=fault.losses, spells=int(fault.is_outage))
    before, outage = ("shared",) * (not fault.at_boot), ("own", "shared") * fault.is_outage
    assert drill.modes == [mode for mode in (*before, *outage) for _ in drill.apps]
    drill.modes_changed(*[b""] * len(before), *[b"local", b""] * fault.is_outage)
    if not fault.at_boot:  # what a caller had taken of the shared bucket counts for the workers' own
        own = Counter(one.gateway for one in drill.asked if one.user == "greedy" and one.admitted and one.mode)
        span = drill.asked[-1].ended - drill.asked[0].began
        assert all(admitted <= 1 + LIMIT / GATEWAYS * span / PERIOD for admitted in own.values())


async def test_a_proxy_that_lets_no_script_through_is_told_from_a_redis_that_is_gone(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_to(redis.port) as proxy:
        proxy.blocks = (b"EVAL", b"EVALSHA", b"SCRIPT")
        async with drill_on(f"redis://127.0.0.1:{proxy.port}/0", caplog) as drill:
            drill.begin("newcomer")
            await drill.until_asked(lambda one: one.mode == b"local" and one.status == 429)
            assert {line.getMessage() for line in drill.lines} == {
                (
                    "Limits are counted by each worker for itself: "
                    "Redis does not run the limiter's script: ERR unknown command 'EVALSHA'"
                )
            }
            assert drill.modes == ["own"] * GATEWAYS
            proxy.blocks = ()
            await drill.until_asked(lambda one: one.mode == b"")
            await drill.end()
    drill.nobody_failed()
    drill.nobody_waited()
    assert drill.modes == ["own"] * GATEWAYS + ["shared"] * GATEWAYS
