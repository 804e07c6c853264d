"""The limiter on a real Redis: the script against its Python twin, grouping, outages, and cancellation."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis

from gateway.backends import redis as backend
from gateway.backends.redis import RedisLimiter
from gateway.policies.token_bucket import FULL, HOUR_US, MINUTE_US, Limits, State, describe, full_at_us, take
from tests.redis_server import RedisServer, redis_server
from tests.wire import both_event_loops, until

LIMITS = Limits.of(60, 1000)
SECOND = 1_000_000
anyio_backend = both_event_loops


@pytest.fixture(scope="module")
def shared_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    shared_server.command("FLUSHALL")
    shared_server.command("SCRIPT", "FLUSH")
    return shared_server


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class Changes(list[tuple[bool, str]]):
    def __call__(self, shared: bool, reason: str) -> None:
        self.append((shared, reason))


@asynccontextmanager
async def limiter_on(url: str, **options: Any) -> AsyncIterator[RedisLimiter]:
    limiter = RedisLimiter(url, **{"deadline": 0.5, **options})  # tests share their processor with others
    await limiter.start()
    try:
        yield limiter
    finally:
        await limiter.aclose()


def calls(server: RedisServer, command: str) -> int:
    for line in server.command("INFO", "commandstats").decode().splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            return int(line.split("calls=")[1].split(",")[0])
    return 0


# R7: the script and its twin

tokens = st.one_of(st.integers(0, 5), st.integers(0, 2_501_998))
all_limits = st.builds(Limits.of, st.none() | tokens | st.just(150_119_986), st.none() | tokens | st.just(2_501_998))
gaps = st.one_of(st.just(0), st.integers(-SECOND, 10 * SECOND), st.integers(-HOUR_US, 2 * HOUR_US))
debts = st.integers(0, 60) | st.integers(0, 2**53 - 1)


def run_script(client: Redis, key: str, limits: Limits, cost: int) -> list[int]:
    numbers = [
        number
        for limit in (limits.minute, limits.hour)
        for number in ((-1, 0) if limit is None else (limit.tokens, limit.period_us))
    ]
    return cast("list[int]", client.eval(backend._SCRIPT.decode(), 1, key, *map(str, numbers), str(cost)))


def stored(client: Redis, key: str) -> State | None:
    value = cast("bytes | None", client.get(key))
    return None if value is None else cast("State", tuple(int(number) for number in value.split()))


@given(
    all_limits,
    st.lists(st.tuples(gaps, st.integers(0, 2)), min_size=1, max_size=12),
    st.none() | st.tuples(debts, debts),
)
@settings(max_examples=150, deadline=None)
def test_r7_the_script_and_the_policy_agree_step_by_step(
    shared_server: RedisServer, limits: Limits, steps: list[tuple[int, int]], debts: tuple[int, int] | None
) -> None:
    with Redis(port=shared_server.port) as client:
        client.delete("r7")
        state: State = FULL
        if debts is not None:
            (seconds, _) = cast("tuple[int, int]", client.time())
            state = (*debts, seconds * SECOND)
            client.set("r7", "{} {} {}".format(*state))
        for gap_us, cost in steps:
            # Time passes in the script's eyes when the stored moment moves into the past.
            if state != FULL:
                state = (state[0], state[1], max(0, state[2] - gap_us))
                client.set("r7", "{} {} {}".format(*state))
            admitted, debt_minute, debt_hour, reached_us, now_us = run_script(client, "r7", limits, cost)
            state, expected = take(state, limits, now_us, cost)
            decision = describe(admitted == 1, (debt_minute, debt_hour, reached_us), limits, now_us)
            assert decision == expected
            full_ms = (full_at_us(state, limits) - now_us) / 1000
            if full_ms > 10_000:  # else it may be full, and the key gone, before we look
                assert stored(client, "r7") == state
                if expected.admitted and cost:
                    assert full_ms - 10_000 <= cast("int", client.pttl("r7")) <= full_ms + 3


def test_a_key_is_gone_when_its_buckets_are_full(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        run_script(client, "k", Limits.of(150_000_000, None), 1)
        while client.exists("k"):
            pass


@pytest.mark.parametrize("value", ["", "1 2", "-1 2 3", "x", "1 2 3 4"])
def test_a_value_that_is_no_state_counts_as_none(server: RedisServer, value: str) -> None:
    with Redis(port=server.port) as client:
        client.set("k", value)
        assert run_script(client, "k", LIMITS, 1)[:2] == [1, MINUTE_US]
        client.delete("k")
        client.rpush("k", "a list")
        assert run_script(client, "k", LIMITS, 1)[:2] == [1, MINUTE_US]


# Shared buckets


async def test_workers_share_one_bucket(server: RedisServer) -> None:
    limits = Limits.of(100, None)
    async with limiter_on(server.url) as one, limiter_on(server.unix_url) as other:
        decisions = await asyncio.gather(
            *[limiter.take("ip:a", limits) for limiter in (one, other) for _ in range(100)]
        )
        admitted = [decision for decision in decisions if decision.admitted]
        assert 100 <= len(admitted) <= 102  # 0.6 s a token
        assert {decision.mode for decision in decisions} == {"normal"}
        assert all(decision.retry_after == 1 for decision in decisions if not decision.admitted)


async def test_every_key_has_the_prefix_and_an_expiry(server: RedisServer) -> None:
    async with limiter_on(server.url, prefix="mine:") as limiter:
        await limiter.take("user:a", LIMITS)
    with Redis(port=server.port) as client:
        assert sorted(cast("list[bytes]", client.keys("*user*"))) == [b"mine:user:a"]
        assert 3000 <= cast("int", client.pttl("mine:user:a")) <= 3602


async def test_checks_of_one_turn_leave_together(server: RedisServer) -> None:
    def counted(client: Redis) -> tuple[int, int]:
        scripts = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
        return scripts, cast("dict[str, int]", client.info("stats"))["total_reads_processed"]

    with Redis(port=server.port) as client:
        async with limiter_on(server.url) as limiter:
            await limiter.take("ip:first", LIMITS)
            scripts, reads = counted(client)
            await asyncio.gather(*[limiter.take(f"ip:{number}", LIMITS) for number in range(64)])
            more_scripts, more_reads = counted(client)
    assert more_scripts - scripts == 64
    assert more_reads - reads <= 3 + 1  # one for them, two for the asking here, and at most one heartbeat


async def test_a_lookup_takes_nothing(server: RedisServer) -> None:
    async with limiter_on(server.url) as limiter:
        assert (await limiter.take("ip:a", LIMITS, 0)).remaining_minute == 60
        assert (await limiter.take("ip:a", LIMITS)).remaining_minute == 59


async def test_a_denial_is_remembered_for_as_long_as_the_script_said_and_costs_no_round_trip(
    server: RedisServer,
) -> None:
    limits = Limits.of(120, None)  # a token every half second
    async with limiter_on(server.url) as limiter:
        decisions = await asyncio.gather(*[limiter.take("ip:a", limits) for _ in range(150)])
        assert not decisions[-1].admitted
        before = calls(server, "evalsha")
        denied = [await limiter.take("ip:a", limits) for _ in range(20)]
        assert not any(decision.admitted for decision in denied)
        assert calls(server, "evalsha") - before <= 3  # heartbeats
        await until(lambda: time.monotonic() >= limiter._denied["ip:a"][0])
        assert (await limiter.take("ip:a", limits)).admitted
        assert (await limiter.take("ip:b", Limits.of(0, None))).retry_after is None


async def test_a_denial_is_not_remembered_beyond_the_change_of_who_decides(own_server: RedisServer) -> None:
    none = Limits.of(0, None)
    async with limiter_on(own_server.url) as limiter:
        assert (await limiter.take("ip:a", none)).mode == "normal"
        own_server.stop()
        late = limiter.take("ip:b", none)
        assert (await late).mode == "local"
        for key in ("ip:a", "ip:b"):
            assert (await limiter.take(key, none)).mode == "local"
            assert (await limiter.take(key, none, 1, "open")).admitted
        own_server.resume()  # which now answers late what was asked then
        await until(lambda: limiter.shared)
        own_server.kill()
        await until(lambda: not limiter.shared)
        assert (await limiter.take("ip:b", none, 1, "closed")).mode == "closed"


async def test_a_script_that_redis_forgot_is_taught_again_once(server: RedisServer) -> None:
    async with limiter_on(server.url) as limiter:
        assert calls(server, "eval") >= 1
        before = calls(server, "eval")
        server.command("SCRIPT", "FLUSH")
        decisions = await asyncio.gather(*[limiter.take("ip:a", LIMITS) for _ in range(50)])
        assert sorted(decision.remaining_minute for decision in decisions) == list(range(10, 60))
        assert limiter.shared
        assert calls(server, "eval") == before + 1


async def test_it_starts_by_itself_at_the_first_check(server: RedisServer) -> None:
    limiter = RedisLimiter(server.url, deadline=0.5)
    try:
        assert not limiter.shared
        assert (await limiter.take("ip:a", LIMITS)).mode == "normal"
        assert limiter.shared
    finally:
        await limiter.aclose()
    assert (await limiter.take("ip:a", LIMITS)).mode == "local"


def test_it_starts_anew_in_a_loop_of_its_own_each(server: RedisServer) -> None:
    limiter = RedisLimiter(server.url, deadline=0.5)

    async def remaining() -> int:
        return (await limiter.take("ip:a", LIMITS)).remaining_minute

    for left in (59, 58):
        assert asyncio.run(remaining()) == left


def test_a_second_loop_at_the_same_time_decides_without_redis_and_leaves_the_first_alone(server: RedisServer) -> None:
    limiter = RedisLimiter(server.url, deadline=0.5)

    async def mode() -> str:
        return (await limiter.take("ip:a", LIMITS)).mode

    async def with_another() -> list[str]:
        asked = limiter.take("ip:a", LIMITS)
        await asyncio.to_thread(asyncio.run, limiter.start())
        elsewhere = await asyncio.to_thread(asyncio.run, mode())
        return [(await asked).mode, elsewhere, await mode()]

    assert asyncio.run(with_another()) == ["normal", "local", "normal"]
    assert asyncio.run(mode()) == "normal"


async def test_it_logs_in_by_what_the_url_says(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        client.execute_command(
            "ACL", "SETUSER", "limiter", "on", ">s3cret", "~gateway:*", "+@all", "-@admin", "-client"
        )
    url = f"redis://limiter:s3cret@127.0.0.1:{server.port}/3?protocol=3&max_connections=5"
    async with limiter_on(url) as limiter:
        assert limiter.shared
        await limiter.take("ip:a", LIMITS)
    with Redis(port=server.port, db=3) as client:
        assert client.exists("gateway:1:ip:a")


# Redis slow, gone, back


async def test_down_at_start_is_no_different_from_down_later(own_server: RedisServer) -> None:
    own_server.kill()
    changes = Changes()
    async with limiter_on(own_server.url, on_change=changes) as limiter:
        assert not limiter.shared
        assert (await limiter.take("ip:a", LIMITS)).mode == "local"
        assert [shared for shared, _ in changes] == [False]
        own_server.start()
        assert await until(lambda: limiter.shared) < 1
        assert (await limiter.take("ip:a", LIMITS)).remaining_minute == 59


async def test_r8_a_stopped_redis_delays_no_request_beyond_the_deadline_and_is_back_within_a_second(
    own_server: RedisServer,
) -> None:
    changes = Changes()
    async with limiter_on(own_server.url, deadline=0.025, on_change=changes) as limiter:
        await until(lambda: limiter.shared)
        loop = asyncio.get_running_loop()
        own_server.stop()

        async def timed() -> float:
            began = loop.time()
            await limiter.take("ip:a", LIMITS)
            return loop.time() - began

        waits = []
        for _ in range(20):
            waits += await asyncio.gather(*[timed() for _ in range(10)])
        assert max(waits) < 0.2  # the deadline, and what the machine is late by
        assert not limiter.shared
        assert (await limiter.take("ip:b", LIMITS)).mode == "local"
        assert "25 ms" in changes[-1][1]

        # long enough for connections to be given up and made anew
        dropped = limiter._link
        await until(lambda: limiter._link is not dropped)
        await until(lambda: limiter._link is not None and bool(limiter._under_way))

        own_server.resume()
        assert await until(lambda: limiter.shared) < 1
        assert changes[-1][0]
        assert (await limiter.take("ip:c", LIMITS)).mode == "normal"


@asynccontextmanager
async def far_from(server: RedisServer, delay: float, *, one_by_one: bool = False) -> AsyncIterator[str]:
    """The URL of a Redis whose answers take ``delay`` seconds; one by one: it hears no question before that."""

    loop = asyncio.get_running_loop()
    writers: list[asyncio.StreamWriter] = []
    passing: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, below = await asyncio.open_connection("127.0.0.1", server.port)
        writers.extend((writer, below))
        passing.extend((loop.create_task(asked(reader, below)), loop.create_task(answered(above, writer))))

    async def asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if one_by_one:
                await asyncio.sleep(delay)
                writer.write(data)
            else:
                loop.call_later(delay, writer.write, data)

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{listener.sockets[0].getsockname()[1]}/0"
    finally:
        listener.close()
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        for writer in writers:
            writer.close()
        await asyncio.gather(*[writer.wait_closed() for writer in writers], return_exceptions=True)


async def asked_steadily(limiter: RedisLimiter) -> list[tuple[float, str]]:
    """Ask every 10 ms for a second, and give up every third; of the others how long they took, and their modes."""
    loop = asyncio.get_running_loop()

    async def asked() -> tuple[float, str]:
        began = loop.time()
        decision = await limiter.take("ip:a", Limits.of(10_000, None))
        return loop.time() - began, decision.mode

    tasks = []
    for _ in range(100):
        tasks.append(asyncio.ensure_future(asked()))
        await asyncio.sleep(0.01)
        if len(tasks) % 3 == 0:
            tasks[-2].cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]


async def test_no_question_waits_for_another_and_then_for_its_own_deadline(server: RedisServer) -> None:
    async with (
        limiter_on(server.url),  # which teaches it the script
        far_from(server, 0.36, one_by_one=True) as url,
        limiter_on(url, deadline=0.4) as limiter,
    ):
        await until(lambda: limiter.shared)
        asked = await asked_steadily(limiter)
        assert max(waited for waited, _ in asked) < 0.55  # the deadline, and what the machine is late by
        assert "local" in {mode for _, mode in asked}


async def test_a_redis_that_is_far_but_within_the_deadline_decides_all(server: RedisServer) -> None:
    changes = Changes()
    async with (
        limiter_on(server.url),
        far_from(server, 0.5) as url,
        limiter_on(url, deadline=0.8, on_change=changes) as limiter,
    ):
        await until(lambda: limiter.shared)
        asked = await asked_steadily(limiter)
        assert max(waited for waited, _ in asked) < 0.85
        assert {mode for _, mode in asked} == {"normal"}
        assert [shared for shared, _ in changes] == [True]


async def test_a_redis_that_only_a_lone_question_reaches_in_time_does_not_come_and_go(server: RedisServer) -> None:
    changes = Changes()
    async with (
        limiter_on(server.url),
        far_from(server, 0.37) as url,
        limiter_on(url, deadline=0.4, on_change=changes) as limiter,
    ):
        for _ in range(2):
            await asked_steadily(limiter)
    assert [shared for shared, _ in changes] in ([True, False], [False])  # where it is the machine that is late


@pytest.mark.parametrize("turns", range(4))
async def test_a_deadline_missed_because_we_were_late_is_none(server: RedisServer, turns: int) -> None:
    async with limiter_on(server.url, deadline=0.08) as limiter:
        await until(lambda: limiter.shared)
        asked = asyncio.ensure_future(limiter.take("ip:a", LIMITS))
        for _ in range(turns):  # before it is asked, before it leaves, on its way
            await asyncio.sleep(0)
        time.sleep(0.09)  # noqa: ASYNC251  the loop is blocked, on purpose
        assert (await asked).mode == "normal"
        assert limiter.shared


async def test_a_killed_redis_is_noticed_at_once_and_one_that_returns_is_used_within_a_second(
    own_server: RedisServer,
) -> None:
    changes = Changes()
    async with limiter_on(own_server.url, on_change=changes) as limiter:
        for _ in range(3):
            assert limiter.shared
            own_server.kill()
            assert await until(lambda: not limiter.shared) < 0.25
            assert (await limiter.take("ip:a", LIMITS)).mode == "local"
            own_server.start()
            assert await until(lambda: limiter.shared) < 1
            assert (await limiter.take("ip:a", LIMITS)).mode == "normal"
        assert [shared for shared, _ in changes] == [True, *[False, True] * 3]


async def test_checks_under_way_when_redis_dies_are_decided_locally(own_server: RedisServer) -> None:
    async with limiter_on(own_server.url) as limiter:
        own_server.stop()
        asked = [asyncio.ensure_future(limiter.take("ip:a", LIMITS)) for _ in range(10)]
        await until(lambda: len(limiter._under_way) >= 10)
        late = [asyncio.ensure_future(limiter.take("ip:a", LIMITS)) for _ in range(10)]
        own_server.kill()
        decisions = await asyncio.gather(*asked, *late)
        assert {decision.mode for decision in decisions} == {"local"}
        assert sorted(decision.remaining_minute for decision in decisions) == list(range(40, 60))


async def test_local_buckets_begin_from_what_was_last_known_each_worker_with_its_share(
    own_server: RedisServer,
) -> None:
    async with limiter_on(own_server.url, workers=2) as limiter:
        for _ in range(20):
            await limiter.take("ip:a", LIMITS)
        own_server.kill()
        await until(lambda: not limiter.shared)
        known = await limiter.take("ip:a", LIMITS)
        fresh = await limiter.take("ip:b", LIMITS)
        assert (known.mode, known.remaining_minute) in (("local", 19), ("local", 20))
        assert fresh.remaining_minute == 29


async def test_what_is_known_for_then_is_bounded_and_the_latest_of_it(own_server: RedisServer) -> None:
    async with limiter_on(own_server.url, capacity=8) as limiter:
        for number in range(30):
            for _ in range(2):
                await limiter.take(f"ip:{number}", LIMITS)
            assert len(limiter._known) + len(limiter._known_before) <= 8
        own_server.kill()
        await until(lambda: not limiter.shared)
        left = [(await limiter.take(f"ip:{number}", LIMITS)).remaining_minute for number in (0, 26, 27, 28, 29)]
        assert left == [59, 57, 57, 57, 57]


async def test_a_second_outage_begins_from_what_redis_said_in_between(own_server: RedisServer) -> None:
    limits = Limits.of(None, 100)  # a token in 36 s
    async with limiter_on(own_server.url, deadline=0.25) as limiter:
        for left in (98, 96):  # what is taken locally is not told to Redis, nor kept over what it says
            assert (await limiter.take("ip:a", limits)).remaining_hour == left + 1
            own_server.stop()
            await until(lambda: not limiter.shared)
            assert (await limiter.take("ip:a", limits)).remaining_hour == left
            assert (await limiter.take("ip:a", limits)).remaining_hour == left - 1
            own_server.resume()
            await until(lambda: limiter.shared)
            assert (await limiter.take("ip:a", limits)).remaining_hour == left


async def test_what_a_failure_means_is_said_call_by_call(own_server: RedisServer) -> None:
    own_server.kill()
    async with limiter_on(own_server.url) as limiter:
        passed = [await limiter.take("ip:a", Limits.of(1, None), 1, "open") for _ in range(5)]
        assert [(decision.admitted, decision.mode) for decision in passed] == [(True, "open")] * 5
        refused = await limiter.take("ip:a", LIMITS, 1, "closed")
        assert (refused.admitted, refused.mode, refused.retry_after) == (False, "closed", 1)


@pytest.mark.parametrize(
    ("break_it", "mend_it", "says"),
    [
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "READONLY"),
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "OOM"),
    ],
)
async def test_a_redis_that_answers_but_cannot_write_counts_as_gone(
    own_server: RedisServer, break_it: tuple[str, ...], mend_it: tuple[str, ...], says: str
) -> None:
    changes = Changes()
    async with limiter_on(own_server.url, on_change=changes) as limiter:
        own_server.command(*break_it)
        assert (await limiter.take("ip:a", LIMITS)).mode == "local"
        assert says in changes[-1][1]
        own_server.command(*mend_it)
        assert await until(lambda: limiter.shared) < 1
        assert (await limiter.take("ip:a", LIMITS)).mode == "normal"


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://127.0.0.1?colour=red", "redis://127.0.0.1?db=x"])
def test_a_url_that_is_none_of_redis_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        RedisLimiter(url)


async def test_a_wrong_password_is_told_and_never_shown(own_server: RedisServer) -> None:
    changes = Changes()
    async with limiter_on(f"redis://:hunter2@127.0.0.1:{own_server.port}", on_change=changes) as limiter:
        assert not limiter.shared
        assert changes
        assert "hunter2" not in changes[0][1]


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR max number of clients reached\r\n", b":1\r\n:2\r\n"]
)
async def test_what_is_no_redis_counts_as_gone(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(answer)
        await reader.read()
        writer.close()
        await writer.wait_closed()

    changes = Changes()
    imposter = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = imposter.sockets[0].getsockname()[1]
    async with imposter, limiter_on(f"redis://127.0.0.1:{port}", on_change=changes) as limiter:
        assert (await limiter.take("ip:a", LIMITS)).mode == "local"
        assert [shared for shared, _ in changes] == [False]


# Cancellation


async def test_a_cancelled_request_gives_up_its_answer_and_nobody_elses(server: RedisServer) -> None:
    async with limiter_on(server.url) as limiter:
        link = limiter._link
        for turns in range(6):  # before it leaves, on its way, when it has come
            asked = [asyncio.ensure_future(limiter.take(f"ip:{turns}-{number}", LIMITS)) for number in range(20)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in asked[::2]:
                task.cancel()
            given_up = await asyncio.gather(*asked[::2], return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) or outcome.admitted for outcome in given_up)  # type: ignore[union-attr]
            kept = await asyncio.gather(*asked[1::2])
            assert [decision.remaining_minute for decision in kept] == [59] * 10
        assert limiter._link is link
        assert limiter.shared
        await until(lambda: not limiter._under_way)


async def test_a_request_cancelled_before_it_left_costs_no_token(server: RedisServer) -> None:
    async with limiter_on(server.url) as limiter:
        asked = limiter.take("ip:a", LIMITS)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert (await limiter.take("ip:a", LIMITS)).remaining_minute == 59


async def test_closing_lets_go_of_all_who_wait(own_server: RedisServer) -> None:
    async with limiter_on(own_server.url) as limiter:
        own_server.stop()
        asked = [asyncio.ensure_future(limiter.take("ip:a", LIMITS)) for _ in range(5)]
        await until(lambda: len(limiter._under_way) >= 5)
        await limiter.aclose()
        assert {decision.mode for decision in await asyncio.gather(*asked)} == {"local"}
        await limiter.aclose()
        own_server.resume()
        await limiter.start()
        assert await until(lambda: limiter.shared) < 1
