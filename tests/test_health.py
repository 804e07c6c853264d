import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.health_checks import HealthChecks
from gateway.backends.qdrant import QdrantCheck
from gateway.policies.health import Health
from gateway.policies.timestamps import timestamp
from tests.wire import until

NOON = 1764239400.9  # 2025-11-27T10:30:00.9Z


def test_a_healthy_gateway_reports_in_the_fixed_form() -> None:
    health = Health(enabled=["redis", "qdrant"])
    health.serve()
    health.saw("redis", True)
    health.saw("qdrant", True)
    assert health.report(NOON) == (
        200,
        {
            "status": "healthy",
            "timestamp": "2025-11-27T10:30:00Z",
            "service": "api_gateway",
            "checks": {"redis": "ok", "qdrant": "ok"},
        },
    )
    assert list(health.report(NOON)[1]) == ["status", "timestamp", "service", "checks"]


def test_parts_that_are_not_used_are_disabled_and_do_not_degrade() -> None:
    health = Health()
    health.serve()
    status, body = health.report(NOON)
    assert (status, body["status"]) == (200, "healthy")
    assert body["checks"] == {"redis": "disabled", "qdrant": "disabled"}


@given(st.lists(st.sampled_from(["serve", "drain", "redis", "no redis", "qdrant", "no qdrant"])))
def test_only_starting_and_draining_are_unfit_and_draining_is_for_good(events: list[str]) -> None:
    health = Health(enabled=["redis"])
    drained = served = False
    for event in events:
        if event == "serve":
            health.serve()
            served = True
        elif event == "drain":
            health.drain()
            drained = True
        else:
            health.saw(event.split()[-1], not event.startswith("no"))
        status, body = health.report(NOON)
        assert (status == 503) == (drained or not served)
        if drained:
            assert body["status"] == "draining"
        elif not served:
            assert body["status"] == "starting"
        else:
            assert body["status"] == ("degraded" if "error" in body["checks"].values() else "healthy")
        assert health.liveness(NOON) == (200, body)


def test_a_timestamp_is_rfc_3339_in_utc() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00Z"


async def test_checks_are_seen_and_one_that_raises_or_hangs_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "gateway.health")
    health = Health(enabled=["redis", "qdrant", "third"])
    asked = 0
    hung = asyncio.Event()

    def broken() -> bool:
        raise RuntimeError("no such thing")

    async def hangs_once() -> bool:
        nonlocal asked
        asked += 1
        if asked == 2:
            await hung.wait()
        return True

    checks = HealthChecks(
        health, {"redis": lambda: True, "qdrant": hangs_once, "third": broken}, interval=0.001, deadline=0.1
    )
    try:
        await checks.round()
        assert health.checks == {"redis": "ok", "qdrant": "ok", "third": "error"}
        await checks.start()
        await checks.start()
        await until(lambda: health.checks["qdrant"] == "error")
        await checks.round()
        assert asked == 2, "a part that has not answered yet is not asked again"
        hung.set()
        await until(lambda: health.checks["qdrant"] == "ok")
    finally:
        await checks.aclose()
    told = [record.getMessage() for record in caplog.records]
    assert {"third is not well (RuntimeError); the gateway goes on without it", "redis is well"} < set(told)
    assert sum("qdrant is not well" in message for message in told) == 1, "once a change, not once a round"


async def test_a_question_given_up_before_it_began_leaves_nothing_behind() -> None:
    async def ask() -> bool:
        raise AssertionError("not reached")

    checks = HealthChecks(Health(enabled=["qdrant"]), {"qdrant": ask})
    before = asyncio.all_tasks()
    await checks.start()
    await asyncio.sleep(0)  # one turn: the round has begun, its question's task not yet
    await checks.aclose()
    assert asyncio.all_tasks() == before  # nor is there a warning of a coroutine that nobody awaited


async def test_the_rounds_survive_what_else_is_done_in_them() -> None:
    health = Health(enabled=["redis"])
    rounds = 0

    def fails() -> None:
        nonlocal rounds
        rounds += 1
        raise ValueError

    checks = HealthChecks(health, {"redis": lambda: True}, interval=0.001, each_round=[fails])
    before = asyncio.all_tasks()
    await checks.start()
    await until(lambda: rounds > 3)
    await checks.aclose()
    await checks.aclose()
    assert asyncio.all_tasks() == before, "nobody is left to begin another round"


async def test_closing_ends_a_question_under_way() -> None:
    asked = asyncio.Event()
    left = asyncio.Event()

    async def never() -> bool:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return True

    checks = HealthChecks(Health(enabled=["qdrant"]), {"qdrant": never}, deadline=5)
    await checks.start()
    await asked.wait()
    await checks.aclose()
    assert left.is_set()


async def answering(
    body: bytes, status: bytes = b"200 OK"
) -> tuple[asyncio.Server, str, Callable[[], Awaitable[None]]]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                writer.write(head % (status, len(body)) + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def stop() -> None:
        server.close()
        await server.wait_closed()

    return server, f"http://127.0.0.1:{port}", stop


@pytest.mark.filterwarnings("default")  # what the client's own imports have to say is not ours to mend
async def test_qdrant_is_well_when_it_answers_and_not_when_it_is_gone() -> None:
    body = json.dumps({"result": {"collections": []}, "status": "ok", "time": 0.0}).encode()
    _, url, stop = await answering(body)
    check = QdrantCheck(url, timeout=5)
    assert await check() is True
    assert await check() is True
    await check.aclose()
    await stop()
    with pytest.raises(Exception, match="connection"):
        await check()
    await check.aclose()
    await check.aclose()


@pytest.mark.filterwarnings("default")
async def test_a_silent_qdrant_is_not_waited_for() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    check = QdrantCheck(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout=0.05)
    with pytest.raises(TimeoutError):
        await check()
    await check.aclose()
    server.close()
    await server.wait_closed()
