"""The callers of a benchmark, in a process of their own: told what to do in JSON, they say in JSON how it went.

python -m bench.client ask 8080 '{"path": "/api/v1/search", "rate": 1000, "count": 4000}'
python -m bench.client read 8080 '{"path": "/api/v1/chat/stream", "streams": 512, "frames": 64, "every": 0.02}'
python -m bench.client hold 8080 '{"path": "/api/v1/chat/idle", "count": 5000}'
"""

import asyncio
import ctypes
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import httptools
import uvloop

from bench.figures import percentiles

CALLERS = 1000  # users who take turns
CONNECTIONS = 64
PATIENCE = 10.0  # seconds for connections to open, and beyond the load's own for what is still under way
OPENING = 32  # connections that are opened at a time
BODY = b'{"user_id":"user-000","n":10,"context":"the quick brown fox jumps over a dog"}'
TFD_TIMER_ABSTIME = 1  # timerfd_create(2)


def requests(path: str) -> list[bytes]:
    """What each caller sends."""
    head = (
        b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nX-User-ID: user-%d\r\n"
        b"Authorization: Bearer 0123456789abcdef\r\nContent-Length: %d\r\n\r\n%b"
    )
    return [head % (path.encode(), number, len(BODY), BODY) for number in range(CALLERS)]


class Connection(asyncio.Protocol):
    """A keep-alive connection for one request at a time; hands over parts of bodies, and tells where answers end."""

    def __init__(
        self,
        *,
        on_body: Callable[[bytes], object] = lambda body: None,
        on_answer: Callable[["Connection", int], object] = lambda connection, status: None,
        on_lost: Callable[["Connection"], object] = lambda connection: None,
    ) -> None:
        self.on_body = on_body
        self.on_answer = on_answer
        self.on_lost = on_lost
        self.due = 0.0  # when its request should have been sent; 0: none is under way

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.on_answer(self, self.parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        self.on_lost(self)


async def connect(port: int, makers: Sequence[Callable[[], Connection]]) -> list[Connection]:
    """Open a connection of each maker's, some at a time.

    Raises:
        TimeoutError: some could not be opened within 10 seconds.
    """
    loop = asyncio.get_running_loop()
    found: list[Connection] = []
    for start in range(0, len(makers), OPENING):
        some = makers[start : start + OPENING]
        async with asyncio.timeout(PATIENCE):
            opened = await asyncio.gather(*(loop.create_connection(make, "127.0.0.1", port) for make in some))
        found += [connection for _, connection in opened]
    return found


# Latency at a fixed rate ----------------------------------------------------------------------------------------------


def timer(first: float, interval: float) -> int:
    """A file that is readable at ``first``, monotonic seconds, and every ``interval`` after; event loops round to 1 ms.

    Raises:
        OSError: the system has no timerfd.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    file: int = libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    times = (ctypes.c_long * 4)(*(part for span in (interval, first) for part in divmod(round(span * 1e9), 10**9)))
    if file < 0 or libc.timerfd_settime(file, TFD_TIMER_ABSTIME, times, None) < 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return file


class OpenLoop:
    """Sends requests when they are due, whatever became of those before.

    Each one's latency counts from when it was due, so a server that stalls is charged for all that should have been
    sent meanwhile ("coordinated omission" is the name for forgetting those).
    """

    def __init__(self, path: str, rate: float, count: int, settling: int = 0) -> None:
        """Send ``count`` requests at ``rate`` a second; the latencies of the first ``settling`` are left out."""
        self.requests = requests(path)
        self.interval = round(1e9 / rate) / 1e9  # what the timer keeps
        self.settling = settling
        self.count = settling + count
        self.sent = self.ended = self.errors = 0
        self.latencies: list[float] = []
        self.idle: deque[Connection] = deque()
        self.late: deque[float] = deque()  # when requests were due that found no connection idle

    async def run(self, port: int) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        self.finished = loop.create_future()
        make = lambda: Connection(on_answer=self.answered, on_lost=self.lost)  # noqa: E731
        self.idle.extend(await connect(port, [make] * CONNECTIONS))
        self.first = time.monotonic() + 0.05
        file = timer(self.first, self.interval)
        loop.add_reader(file, self.tick, file)
        try:
            async with asyncio.timeout(self.count * self.interval + PATIENCE):
                await self.finished
        except TimeoutError:
            self.errors += self.count - self.ended  # what is not answered by now
        finally:
            loop.remove_reader(file)
            os.close(file)
        p50, p90, p99, p999 = percentiles(self.latencies, (50, 90, 99, 99.9))
        most = max(self.latencies)
        named = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "p99.9_ms": p999, "max_ms": most}
        counted = {"answered": len(self.latencies), "errors": self.errors}
        return {**counted, **{name: round(value * 1e3, 4) for name, value in named.items()}}

    def tick(self, file: int) -> None:
        """Send what has become due; one that finds every connection busy goes out as soon as one is not."""
        for _ in range(min(int.from_bytes(os.read(file, 8), sys.byteorder), self.count - self.sent)):
            due = self.first + self.sent * self.interval
            self.sent += 1
            if self.idle:
                self.send(self.idle.popleft(), due)
            else:
                self.late.append(due)

    def send(self, connection: Connection, due: float) -> None:
        connection.due = due
        connection.transport.write(self.requests[self.sent % CALLERS])

    def answered(self, connection: Connection, status: int) -> None:
        now = time.monotonic()
        if status != 200:
            self.errors += 1
        elif connection.due >= self.first + self.settling * self.interval:
            self.latencies.append(now - connection.due)
        connection.due = 0.0
        if self.late:
            self.send(connection, self.late.popleft())
        else:
            self.idle.append(connection)
        self.end()

    def lost(self, connection: Connection) -> None:
        if connection.due:
            self.errors += 1
            self.end()
        else:
            self.idle.remove(connection)

    def end(self) -> None:
        self.ended += 1
        if self.ended == self.count and not self.finished.done():
            self.finished.set_result(None)


# Streams --------------------------------------------------------------------------------------------------------------


class Stream:
    """One answer of events: their numbers as they came, and when each was sent and seen, in nanoseconds."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.sent: list[int] = []
        self.seen: list[int] = []
        self.rest = b""
        self.first = asyncio.get_running_loop().create_future()
        self.ended = asyncio.get_running_loop().create_future()

    def connection(self) -> Connection:
        return Connection(on_body=self.read, on_answer=self.end, on_lost=self.end)

    def read(self, body: bytes) -> None:
        now = time.monotonic_ns()
        *events, self.rest = (self.rest + body).split(b"\n\n")
        for event in events:
            _, number, sent, _ = event.split(b" ")
            self.numbers.append(int(number))
            self.sent.append(int(sent))
            self.seen.append(now)
        if events and not self.first.done():
            self.first.set_result(None)

    def end(self, connection: Connection, status: int = 0) -> None:
        for future in (self.first, self.ended):
            if not future.done():
                future.set_result(None)


async def read(port: int, path: str, streams: int, frames: int, every: float) -> dict[str, float]:
    """Read so many streams at once; they begin a millisecond apart, so that their events are spread over time."""
    readers = [Stream() for _ in range(streams)]
    connections = await connect(port, [reader.connection for reader in readers])
    asked = requests(f"{path}?frames={frames}&every={every}")
    for number, connection in enumerate(connections):
        connection.transport.write(asked[number % CALLERS])
        await asyncio.sleep(0.001)
    await asyncio.wait([reader.ended for reader in readers], timeout=frames * every + PATIENCE)
    return judge(readers, frames)


def judge(readers: Sequence[Stream], frames: int) -> dict[str, float]:
    """What became of streams of so many frames.

    ``gap`` is the time between two events as the reader sees them, ``delay`` that from the service's writing one to its
    reader's having it.
    """
    gaps = [after - before for reader in readers for before, after in pairwise(reader.seen)]
    delays = [seen - sent for reader in readers for sent, seen in zip(reader.sent, reader.seen, strict=True)]
    figures: dict[str, float] = {
        "streams": len(readers),
        "whole": sum(reader.numbers == list(range(frames)) for reader in readers),
        "lost": sum(frames - len(set(reader.numbers)) for reader in readers),
        "reordered": sum(after <= before for reader in readers for before, after in pairwise(reader.numbers)),
    }
    for name, values in (("gap", gaps), ("delay", delays)):
        p50, p99 = percentiles(values, (50, 99))
        figures |= {f"{name}_p50_ms": round(p50 / 1e6, 3), f"{name}_p99_ms": round(p99 / 1e6, 3)}
    return figures


async def hold(port: int, path: str, count: int) -> None:
    """Open so many connections, ask once on each, and keep what comes open until standard input ends.

    Prints how many have had an answer, or the first event of one.
    """
    loop = asyncio.get_running_loop()
    asked, held = requests(path), 0
    for start in range(0, count, OPENING):
        answered = [loop.create_future() for _ in range(min(OPENING, count - start))]

        def maker(future: "asyncio.Future[bool]") -> Callable[[], Connection]:
            def tell(arrived: bool) -> None:
                if not future.done():
                    future.set_result(arrived)

            return lambda: Connection(on_body=lambda body: tell(True), on_lost=lambda connection: tell(False))

        for number, connection in enumerate(await connect(port, [maker(future) for future in answered])):
            connection.transport.write(asked[(start + number) % CALLERS])
        done, _ = await asyncio.wait(answered, timeout=PATIENCE)
        held += sum(future.result() for future in done)
        if len(done) < len(answered):
            break
    print(json.dumps({"held": held}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def main(what: str, port: int, told: dict[str, Any]) -> None:
    if what == "hold":
        await hold(port, **told)
        return
    if what == "read":
        figures = await read(port, **told)
    else:
        figures = await OpenLoop(**told).run(port)
    print(json.dumps(figures))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
