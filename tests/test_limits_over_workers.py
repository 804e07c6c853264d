"""What all workers together let one caller have: to the token, and by a model of time over outages."""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis import Redis

from gateway.backends import redis as backend
from gateway.backends.memory import unix_microseconds
from gateway.backends.redis import RedisLimiter
from gateway.policies.token_bucket import FULL, HOUR_US, MINUTE_US, Limit, Limits, take
from tests.redis_server import RedisServer, redis_server
from tests.wire import until

SECOND = 1_000_000
SCRIPT = Path(backend.__file__).with_name("token_bucket.lua").read_text()


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


def buckets(limits: Limits) -> list[Limit]:
    return [limit for limit in (limits.minute, limits.hour) if limit is not None]


# To the token


def in_python(limits: Limits, moments: list[int]) -> list[bool]:
    state, admitted = FULL, []
    for now_us in moments:
        state, decision = take(state, limits, now_us)
        admitted.append(decision.admitted)
    return admitted


def in_redis(limits: Limits, moments: list[int]) -> list[bool]:
    timed = SCRIPT.replace("redis.call('TIME')", "{ARGV[6], ARGV[7]}")
    assert timed.count("ARGV[7]") == 1
    numbers = [number for limit in buckets(limits) for number in (limit.tokens, limit.period_us)]
    with redis_server() as server, Redis(port=server.port) as client:
        name = client.script_load(timed)
        with client.pipeline(transaction=False) as pipeline:
            for now_us in moments:
                pipeline.evalsha(name, 1, "k", *map(str, (*numbers, 1, *divmod(now_us, SECOND))))
            return [answer[0] == 1 for answer in pipeline.execute()]


@pytest.mark.parametrize("ask", [in_python, in_redis])
@pytest.mark.parametrize(("per_hour", "in_an_hour"), [(10_000, 6_100), (1_000, 2_000)])
def test_a_caller_saturating_100_a_minute_gets_its_first_hour_to_the_token(
    ask: Callable[[Limits, list[int]], list[bool]], per_hour: int, in_an_hour: int
) -> None:
    begin = 1_764_239_400 * SECOND
    gaps = [0] * 120 + list(range(0, HOUR_US + 1, SECOND * 3 // 10))  # a burst, then all the time
    count = 0
    for gap, admitted in zip(gaps, ask(Limits.of(100, per_hour), [begin + gap for gap in gaps]), strict=True):
        count += admitted
        assert count <= min(100 + 100 * gap // MINUTE_US, per_hour + per_hour * gap // HOUR_US)
    assert count == in_an_hour


# R1 over workers and outages, by a model of time


class Admission(NamedTuple):
    """A request that passed, at some moment from ``began_us`` to ``ended_us``."""

    began_us: int
    ended_us: int


class Workers(RuleBasedStateMachine):
    """Workers on one Redis that comes and goes; callers ask as much as they like, wherever they like.

    Time runs as it does, and leaps besides: in the workers by their clocks, in Redis by moving what it has stored into
    the past. What a worker promises in a spell is told by how its decisions say they were made.
    """

    CALLERS = ("user:a", "ip:192.0.2.7", "user:b")

    def __init__(self, server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.server = server
        self.fault = ""  # of Redis
        self.leapt_us = 0
        self.owed_us = 0  # of these, what Redis was not told yet
        self.losses = 0  # of Redis's data
        self.admitted: dict[tuple[object, ...], list[Admission]] = {}
        monkeypatch.setattr(backend, "monotonic", lambda: time.monotonic() + self.leapt_us / SECOND)
        server.command("FLUSHALL")
        self.runner = asyncio.Runner()

    def now_us(self) -> int:
        return unix_microseconds() + self.leapt_us

    @property
    def is_well(self) -> bool:
        return self.fault == ""

    @initialize(
        workers=st.integers(2, 4),
        per_minute=st.integers(3, 40),
        per_hour=st.none() | st.integers(3, 100),
    )
    def begin(self, workers: int, per_minute: int, per_hour: int | None) -> None:
        self.limits = Limits.of(per_minute, per_hour)
        self.spells = [0] * workers
        self.workers = [self.worker(number, workers) for number in range(workers)]

    def worker(self, number: int, workers: int) -> RedisLimiter:
        def changed(shared: bool, reason: str) -> None:
            self.spells[number] += 1

        return RedisLimiter(self.server.url, deadline=0.05, workers=workers, on_change=changed, clock=self.now_us)

    @rule(
        caller=st.sampled_from(CALLERS),
        bursts=st.lists(
            st.tuples(
                st.just(0) | st.integers(1, 90) | st.integers(1, 7200),  # seconds that pass before
                st.sets(st.integers(0, 3), min_size=1) | st.just({0, 1, 2, 3}),  # workers asked
                st.just(45) | st.integers(1, 45),  # times
            ),
            min_size=1,
            max_size=5,
        ),
    )
    def a_caller_asks(self, caller: str, bursts: list[tuple[int, set[int], int]]) -> None:
        for seconds, numbers, times in bursts:
            self.leapt_us += seconds * SECOND
            self.owed_us += seconds * SECOND
            self.tell_redis()
            here = [number for number in numbers if number < len(self.workers)]
            self.runner.run(self.ask(here * times, caller))

    async def ask(self, numbers: list[int], caller: str) -> None:
        async def one(number: int) -> None:
            began_us = self.now_us()
            decision = await self.workers[number].take(caller, self.limits)
            if decision.admitted:
                shared = decision.mode == "normal"
                spell = ("shared", self.losses) if shared else ("own", number, self.spells[number])
                self.admitted.setdefault((caller, *spell), []).append(Admission(began_us, self.now_us()))

        await asyncio.gather(*map(one, numbers))

    def tell_redis(self) -> None:
        if self.is_well:
            with Redis(port=self.server.port) as client:
                for key in client.keys("gateway:*"):
                    left_ms = cast("int", client.pttl(key)) - self.owed_us // 1000
                    if left_ms <= 0:
                        client.delete(key)
                    elif stored := cast("bytes | None", client.get(key)):
                        *debts, last_us = map(int, stored.split())
                        client.set(key, "{} {} {}".format(*debts, last_us - self.owed_us), px=left_ms)
            self.owed_us = 0

    @precondition(lambda self: self.is_well)
    @rule(how=st.sampled_from(("stops", "dies", "is full")), is_noticed=st.booleans())
    def redis_fails(self, how: str, is_noticed: bool) -> None:
        self.fault = how
        if how == "stops":
            self.server.stop()
        elif how == "dies":
            self.server.kill()
            self.losses += 1
        else:
            self.server.command("CONFIG", "SET", "maxmemory", "1")
        if is_noticed:
            self.runner.run(self.until_all_are(shared=False))

    @precondition(lambda self: not self.is_well)
    @rule(is_noticed=st.booleans())
    def redis_is_back(self, is_noticed: bool) -> None:
        self.mend()
        self.tell_redis()
        if is_noticed:
            self.runner.run(self.until_all_are(shared=True))

    def mend(self) -> None:
        if self.fault == "stops":
            self.server.resume()
        elif self.fault == "dies":
            self.server.start()
        else:
            self.server.command("CONFIG", "SET", "maxmemory", "0")
        self.fault = ""

    @precondition(lambda self: self.is_well)
    @rule()
    def redis_forgets(self) -> None:
        self.server.command("FLUSHALL")
        self.losses += 1

    async def until_all_are(self, *, shared: bool) -> None:
        for worker in self.workers:
            await worker.start()
            await until(lambda: worker.shared is shared)  # noqa: B023

    def teardown(self) -> None:
        async def close() -> None:
            await asyncio.gather(*[worker.aclose() for worker in getattr(self, "workers", [])])

        self.runner.run(close())
        self.runner.close()
        if not self.is_well:
            self.mend()
        for (caller, kind, *_), admissions in self.admitted.items():
            for limit in buckets(self.limits):
                tokens = limit.tokens if kind == "shared" else max(1, limit.tokens // len(self.workers))
                assert_within(Limit(tokens, limit.period_us), admissions, caller)


def assert_within(limit: Limit, admissions: list[Admission], caller: object) -> None:
    """R1: over any interval no more than the limit and what flows back in it."""
    for first, begin in enumerate(admissions):
        for count, end in enumerate(admissions[first:], 1):
            most = limit.tokens + limit.tokens * (end.ended_us - begin.began_us) / limit.period_us
            assert count <= most, (caller, limit, count, most)


def test_r1_no_caller_gets_more_from_all_workers_together_whatever_redis_does(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "HEARTBEAT", 0.02)
    monkeypatch.setattr(backend, "PATIENCE", 0.1)
    run_state_machine_as_test(
        cast("type[Workers]", lambda: Workers(server, monkeypatch)),  # any maker of one will do
        settings=settings(max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck]),
    )
