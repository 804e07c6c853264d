"""Circuit breakers, all of it: four workers of ``ai-gateway serve``, and a service that dies under load and returns."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import orjson

from tests.redis_server import redis_server
from tests.wire import call, connected, read_answer, reserved_port, service

NAME, PATH = "chatbot-service", "/api/v1/chat"
WORKERS, THRESHOLD, TIMEOUT = 4, 5, 2.0
CLIENTS, EACH, RATE = 50, 5, 500  # clients, requests on one connection of each, requests a second in all
POST = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}" % PATH.encode()
ENVIRON = {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off", "DRAIN_DELAY": "0"}


class Asked(NamedTuple):
    """A request and how it was answered; times on the loop's clock."""

    began: float
    ended: float
    status: int


class Load:
    """Clients that ask all the time, whatever they get."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.loop = asyncio.get_running_loop()
        self.asked: list[Asked] = []
        self.clients = [self.loop.create_task(self._ask(number)) for number in range(CLIENTS)]

    async def _ask(self, number: int) -> None:
        due = self.loop.time() + number / RATE
        while True:
            async with connected(self.port) as (reader, writer):  # each anew, so that all workers have their share
                for _ in range(EACH):
                    await asyncio.sleep(max(0.0, due - self.loop.time()))
                    due = max(due + CLIENTS / RATE, self.loop.time())
                    began = self.loop.time()
                    writer.write(POST)
                    answer = await read_answer(reader)
                    self.asked.append(Asked(began, self.loop.time(), answer.status))

    async def for_a_while(self, seconds: float) -> None:
        """Go on; a client that gets no answer is a failure."""
        done, _ = await asyncio.wait(self.clients, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for client in done:
            client.result()

    async def end(self) -> None:
        for client in self.clients:
            client.cancel()
        await asyncio.gather(*self.clients, return_exceptions=True)


@asynccontextmanager
async def workers(port: int, **environ: str) -> AsyncIterator[list[str]]:
    """The gateway in processes of its own; once they have ended there are the lines that they logged of breakers."""
    command = ("-m", "gateway", "serve", "--host", "127.0.0.1", "--port", str(port), "--workers", str(WORKERS))
    running = await asyncio.create_subprocess_exec(
        sys.executable, *command, env={**os.environ, **ENVIRON, **environ}, stdout=asyncio.subprocess.PIPE
    )
    said: list[str] = []

    async def read() -> None:
        assert running.stdout is not None
        said.extend([orjson.loads(line)["message"] async for line in running.stdout if b"ircuit breaker" in line])

    reading = asyncio.create_task(read())
    try:
        yield said
    finally:
        running.terminate()
        await running.wait()
        await reading


async def shows(port: int, **expected: object) -> None:
    async with asyncio.timeout(20):
        while True:
            with suppress(OSError, AssertionError):
                status = orjson.loads((await call(port, "/circuit-breakers")).body)[NAME]
                if status.items() >= expected.items():
                    return
            await asyncio.sleep(0.05)


async def test_a_service_dies_under_load_and_returns() -> None:
    with redis_server() as redis, reserved_port() as port, reserved_port() as behind:
        async with service() as upstream:
            await upstream.stop()
            await upstream.start(behind)
            environ = {"REDIS_URL": redis.url, "CHATBOT_SERVICE_URL": upstream.url, "ADMIN_TOKEN": "t"}
            async with workers(port, **environ, CIRCUIT_BREAKER_TIMEOUT=f"{TIMEOUT:g}") as said:
                await shows(port, workers=f"{WORKERS} of {WORKERS}")
                load = Load(port)
                try:
                    await load.for_a_while(2)
                    died = load.loop.time()
                    await upstream.stop()
                    await load.for_a_while(1.5)
                    await shows(port, state="open")
                    await upstream.start(behind)
                    returned = load.loop.time()
                    await load.for_a_while(TIMEOUT + 2)
                    await shows(port, state="closed", workers=f"{WORKERS} of {WORKERS}")
                finally:
                    await load.end()

    assert all(one.status == 200 for one in load.asked if one.ended < died)
    after = [one for one in load.asked if one.ended >= died]
    opened = min(one.ended for one in after if one.status == 503)
    errors = [one for one in after if one.status not in (200, 503) and one.ended < died + TIMEOUT / 2]
    last_error = max(one.ended for one in errors)
    # Each worker had calls under way when it opened, which the clients only know to be between these two moments.
    moments = died, *(opened + (last_error - opened) * step / 8 for step in range(9))
    in_flight = sum(any(one.began < moment < one.ended for moment in moments) for one in after)
    last_refusal = max(one.ended for one in after if one.status != 200)
    openings = [line for line in said if re.search("from closed to open: (failures|alarm)", line)]
    told = (
        f"{len(errors)} errors, {in_flight} in flight; first 503 {(opened - died) * 1000:.0f} ms after the death, last "
        f"error {(last_error - opened) * 1000:.0f} ms after that; last refusal {last_refusal - returned:.2f} s after "
        f"the return; {len(load.asked)} requests; {sorted(line.rpartition(': ')[2] for line in openings)}"
    )
    print(told)  # noqa: T201
    assert len(openings) == WORKERS, told
    assert len(errors) <= WORKERS * (THRESHOLD - 1) + 1 + in_flight, told
    assert last_error - opened <= 0.1, told
    assert last_refusal - returned <= TIMEOUT + 1, told
