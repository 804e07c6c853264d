"""The limit of one caller over real gateways of several processes, and what they cost Redis."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from gateway.policies.token_bucket import HOUR_US
from tests.redis_server import RedisServer, redis_server
from tests.wire import Answer, Service, eventually, is_healthy, parse, reserved_port, service, until

LIMIT = 1000
WORKERS = 4
CONNECTIONS = 32  # to each gateway: enough to reach all of its workers
REQUEST = b"GET /api/v1/chat HTTP/1.1\r\nHost: gateway.test\r\nX-User-ID: %b\r\n\r\n"


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
async def upstream() -> AsyncIterator[Service]:
    async with service() as one:
        yield one


@asynccontextmanager
async def serving(
    directory: Path, upstream: Service, port: int, *, workers: int = WORKERS, **environ: str
) -> AsyncIterator[int]:
    """``ai-gateway serve`` in processes of its own, of which the first one answers; the supervisor's ID."""
    settings = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": os.environ["PATH"],
        "CHATBOT_SERVICE_URL": upstream.url,
        "RATE_LIMIT_PER_MINUTE": "off",
        "RATE_LIMIT_PER_HOUR": str(LIMIT),
        "RATE_LIMIT_REDIS_DEADLINE_MS": "1000",  # so that a crowded machine does not change the mode
        "DRAIN_DELAY": "0",
        "LOG_LEVEL": "ERROR",
    }
    command = [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", str(workers)]
    process = subprocess.Popen(command, env=settings | environ, cwd=directory)  # noqa: ASYNC220  it returns at once
    try:
        await asyncio.to_thread(eventually, lambda: is_healthy(port) or process.poll() is not None)
        assert process.poll() is None
        yield process.pid
    finally:
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0


class Connection:
    """A kept-alive connection, and so to one worker."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> "Connection":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def ask(self, user: bytes = b"alice") -> Answer:
        self.writer.write(REQUEST % user)
        head = await self.reader.readuntil(b"\r\n\r\n")
        (length,) = parse(head).values(b"content-length")
        return parse(head + await self.reader.readexactly(int(length)))


async def ask_until_refused(port: int, answers: list[Answer]) -> None:
    """Ask on one connection without pause, and then a little longer."""
    async with Connection(port) as connection:
        refusals = 0
        while refusals < 5:
            answers.append(await connection.ask())
            refusals += answers[-1].status == 429


def admitted(answers: list[Answer]) -> int:
    assert {answer.status for answer in answers} <= {200, 429}
    return sum(answer.status == 200 for answer in answers)


def now_us(redis: RedisServer) -> int:
    _, _, seconds, _, microseconds, _ = redis.command("TIME").split(b"\r\n")
    return int(seconds) * 1_000_000 + int(microseconds)


def stored(redis: RedisServer) -> tuple[int, int]:
    """The debt of the hour's bucket, and the moment of which it is true."""
    _, debt, moment = map(int, redis.command("GET", "gateway:1:user:alice").split(b"\r\n")[1].split())
    return debt, moment


def clients(redis: RedisServer) -> int:
    return redis.command("CLIENT", "LIST").count(b"cmd=evalsha")


async def test_two_gateways_of_four_workers_admit_one_caller_to_the_token(
    redis: RedisServer, upstream: Service, tmp_path: Path
) -> None:
    async with AsyncExitStack() as gateways:
        ports = [gateways.enter_context(reserved_port()) for _ in range(2)]
        starting = [serving(tmp_path, upstream, port, REDIS_URL=redis.url) for port in ports]
        await asyncio.gather(*map(gateways.enter_async_context, starting))
        await until(lambda: clients(redis) == 2 * WORKERS, timeout=20)
        answers: list[Answer] = []
        async with Connection(ports[0]) as first:
            answers.append(await first.ask())
        _, began_us = stored(redis)
        await asyncio.gather(*[ask_until_refused(port, answers) for port in ports * CONNECTIONS])
        ended_us = now_us(redis)
        debt, moment_us = stored(redis)

    count = admitted(answers)
    assert all(answer.values(b"x-ratelimit-mode") == [] for answer in answers)
    assert len(upstream.requests) == count
    # Every token is accounted for, and none was left: a refusal is remembered for a second at most.
    assert count * HOUR_US == debt + (moment_us - began_us) * LIMIT
    refilled = [(now_us - began_us) * LIMIT // HOUR_US for now_us in (ended_us - 1_000_000, ended_us)]
    assert LIMIT + refilled[0] <= count <= LIMIT + refilled[1]


async def test_four_workers_without_redis_admit_no_more_than_the_limit(
    upstream: Service, tmp_path: Path, port: int
) -> None:
    answers: list[Answer] = []
    async with serving(tmp_path, upstream, port):
        began = time.monotonic()
        async with asyncio.timeout(20):
            while admitted(answers) < LIMIT:  # until all workers were met
                await asyncio.gather(*[ask_until_refused(port, answers) for _ in range(CONNECTIONS)])
        ended = time.monotonic()
    assert {b"".join(answer.values(b"x-ratelimit-limit-hour")) for answer in answers} == {b"%d" % LIMIT}
    each = LIMIT // WORKERS
    assert LIMIT <= admitted(answers) <= WORKERS * (each + each * (ended - began) // 3600)


async def test_64_callers_at_once_cost_redis_a_round_trip_for_each_ten_requests_at_most(
    redis: RedisServer, upstream: Service, tmp_path: Path, port: int
) -> None:
    callers, times = 64, 20
    async with (
        serving(tmp_path, upstream, port, workers=1, REDIS_URL=redis.url) as supervisor,
        AsyncExitStack() as connected,
    ):
        (worker,) = children(supervisor)
        connections = [await connected.enter_async_context(Connection(port)) for _ in range(callers)]

        async def ask_all() -> None:
            os.kill(worker, signal.SIGSTOP)  # while they are sent, so that they come at once however slow we are
            asking = [asyncio.ensure_future(each.ask(b"user-%d" % n)) for n, each in enumerate(connections)]
            await asyncio.sleep(0)
            os.kill(worker, signal.SIGCONT)
            assert {answer.status for answer in await asyncio.gather(*asking)} == {200}

        await ask_all()
        before = reads(redis)
        for _ in range(times):
            await ask_all()
        round_trips = reads(redis) - before
    assert round_trips <= 0.1 * callers * times


def children(process: int) -> list[int]:
    return list(map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()))


def reads(redis: RedisServer) -> int:
    lines = dict(line.split(":") for line in redis.command("INFO", "stats").decode().splitlines() if ":" in line)
    return int(lines["total_reads_processed"])
