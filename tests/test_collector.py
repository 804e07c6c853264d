"""Full garbage collections wait until nobody does."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from gateway.server import worker
from gateway.server.collector import PATIENCE, SHARE, QuietCollector
from tests.clocks import FakeClock
from tests.served import GET, read_answer
from tests.wire import connected, leaving_server, until


class Knot:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.itself = self


def old_garbage() -> "weakref.ref[Knot]":
    """A knot that was alive during two collections of the young, and then was not."""
    knot = Knot()
    gc.collect(0)
    gc.collect(1)
    return weakref.ref(knot)


@pytest.fixture
def full_collections() -> Iterator[list[int]]:
    """As many entries as there were collections of all generations."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            seen.append(info["collected"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def collector(clock: FakeClock) -> Iterator[Callable[[bool], bool]]:
    """Looks, on a worker that is quiet or not."""
    quiet = [True]
    collector = QuietCollector(lambda: quiet[0], clock=clock)

    def look(is_quiet: bool) -> bool:
        quiet[0] = is_quiet
        return collector.look()

    collector.take_over()
    yield look
    collector.hand_back()


def test_what_survived_the_young_is_freed_when_all_is_quiet(collector: Callable[[bool], bool]) -> None:
    garbage = old_garbage()
    assert garbage() is not None
    assert collector(True)
    assert garbage() is None


def test_a_worker_that_is_never_quiet_collects_after_a_minute(
    collector: Callable[[bool], bool], clock: FakeClock
) -> None:
    garbage = old_garbage()
    clock.advance(PATIENCE - 1)
    assert not collector(False)
    assert garbage() is not None
    clock.advance(1)
    assert collector(False)
    assert garbage() is None
    old_garbage()
    assert not collector(False)  # and begins to wait anew


def test_nothing_is_looked_for_where_nothing_can_be(
    collector: Callable[[bool], bool], clock: FakeClock, full_collections: list[int]
) -> None:
    clock.advance(10 * PATIENCE)
    assert not collector(True)
    assert not collector(False)
    assert full_collections == []


def test_where_a_collection_is_slow_a_busy_worker_does_it_less_often(
    collector: Callable[[bool], bool], clock: FakeClock
) -> None:
    def slow(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            clock.advance(0.5)

    gc.callbacks.append(slow)
    try:
        old_garbage()
        assert collector(True)
        old_garbage()
        clock.advance(0.5 / SHARE - 1)
        assert not collector(False)
        clock.advance(1)
        assert collector(False)
    finally:
        gc.callbacks.remove(slow)


def test_growth_alone_starts_no_full_collection(collector: Callable[[bool], bool], full_collections: list[int]) -> None:
    alive = [[[]] for _ in range(1_500_000)]  # type: ignore[var-annotated]  # of the young, some 270
    assert full_collections == []
    assert gc.get_count()[2] > 10
    del alive


def test_python_collects_as_before_once_it_is_handed_back(clock: FakeClock) -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    collector = QuietCollector(lambda: True, clock=clock)
    collector.take_over()
    assert gc.get_threshold() != before
    assert gc.get_freeze_count() > frozen
    collector.hand_back()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


async def test_a_server_collects_between_requests_only(
    monkeypatch: pytest.MonkeyPatch, full_collections: list[int]
) -> None:
    monkeypatch.setattr(worker, "LOOK", 0.001)
    held, release = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for what in "startup", "shutdown":
                await receive()
                await send({"type": f"lifespan.{what}.complete"})
            return
        if scope["path"] == "/held":
            held.set()
            await release.wait()
        await PlainTextResponse("ok")(scope, receive, send)

    before = gc.get_threshold()
    async with leaving_server(app) as (port, server, _), connected(port) as (reader, writer), asyncio.timeout(20):
        async with connected(port) as (_, other):
            other.write(GET.replace(b" / ", b" /held "))
            await held.wait()
            garbage = old_garbage()
            full_collections.clear()
            for _ in range(200):
                writer.write(GET)
                await read_answer(reader)
            assert full_collections == []
            release.set()
            await until(lambda: garbage() is None)
        server.retire()
    assert gc.get_threshold() == before
