"""The limiter in memory: its bound, whom it lets go of, and its share of a limit."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.memory import MemoryLimiter, unix_microseconds
from gateway.policies.token_bucket import MINUTE_US, Limits
from tests.clocks import FakeMicroseconds

SECOND = 1_000_000
LIMITS = Limits.of(60, 1000)


def admitted(limiter: MemoryLimiter, key: str, times: int, limits: Limits = LIMITS) -> int:
    return sum(limiter.take(key, limits).admitted for _ in range(times))


def test_a_caller_gets_its_burst_and_then_a_token_a_second() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(clock=clock)
    assert admitted(limiter, "ip:a", 100) == 60
    assert limiter.take("ip:a", LIMITS).retry_after == 1
    clock.advance(1)
    assert admitted(limiter, "ip:a", 100) == 1
    assert admitted(limiter, "ip:b", 100) == 60


def test_a_caller_who_saturates_its_limit_gets_exactly_what_the_model_says() -> None:
    clock = FakeMicroseconds()
    limiter, limits = MemoryLimiter(clock=clock), Limits.of(100, None)
    begin, count = clock.now, 0
    for _ in range(3 * 60 * 100):  # three minutes, asking every 10 ms
        count += limiter.take("ip:a", limits).admitted
        assert count == min(count, 100 + 100 * (clock.now - begin) // MINUTE_US)
        clock.advance(0.01)
    assert count == 100 + 100 * (clock.now - SECOND // 100 - begin) // MINUTE_US


def test_each_of_n_workers_admits_its_share() -> None:
    clock = FakeMicroseconds()
    workers = [MemoryLimiter(workers=4, clock=clock) for _ in range(4)]
    assert sum(admitted(worker, "ip:a", 100) for worker in workers) == 60
    assert admitted(MemoryLimiter(workers=100, clock=clock), "ip:a", 100) == 1


def test_those_who_are_full_again_go_first() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(capacity=100, clock=clock)
    for number in range(50):
        assert admitted(limiter, f"ip:spent-{number}", 61) == 60
    for number in range(50):
        assert admitted(limiter, f"ip:light-{number}", 1) == 1
    clock.advance(0.5)
    for number in range(50):
        assert admitted(limiter, f"ip:new-{number}", 1) == 1
    assert len(limiter) == 100
    for number in range(50):
        assert admitted(limiter, f"ip:spent-{number}", 1) == 0


def test_callers_whose_buckets_are_full_are_forgotten_before_there_is_need() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(clock=clock)
    for number in range(10_000):
        limiter.take(f"ip:{number}", LIMITS)
        clock.advance(0.01)
    assert len(limiter) <= 4 / 0.01


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8 * SECOND)), max_size=200))
def test_the_table_keeps_to_its_bound_and_files_each_caller_once(requests: list[tuple[int, int]]) -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(capacity=5, clock=clock)
    for caller, gap_us in requests:
        clock.now += gap_us
        limiter.take(f"ip:{caller}", LIMITS)
        assert len(limiter) <= 5
        assert sorted(key for _, key in limiter._filed) == sorted(limiter._callers)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8 * SECOND)), max_size=100))
def test_forgetting_the_full_changes_no_decision(requests: list[tuple[int, int]]) -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(clock=clock)
    alone = {caller: MemoryLimiter(clock=clock) for caller in range(4)}
    for caller, gap_us in requests:
        clock.now += gap_us
        assert limiter.take(f"ip:{caller}", LIMITS) == alone[caller].take("ip:x", LIMITS)


def test_a_flood_of_callers_tidied_at_the_bound_is_still_bounded() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(capacity=2000, clock=clock)
    for _ in range(3):
        for number in range(2000):
            limiter.take(f"ip:{number}", LIMITS)
    for number in range(100):
        limiter.take(f"ip:new-{number}", LIMITS)
        assert len(limiter) <= 2000


def test_what_is_known_of_the_whole_bucket_begins_the_share() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(workers=2, clock=clock)
    limiter.remember("ip:spent", LIMITS, (60 * MINUTE_US, 0, 0))
    limiter.remember("ip:half", LIMITS, (30 * MINUTE_US, 0, 0))
    assert admitted(limiter, "ip:spent", 100) == 0
    assert admitted(limiter, "ip:half", 100) == 15
    assert admitted(limiter, "ip:new", 100) == 30


def test_what_was_known_a_while_ago_has_flowed_back_since() -> None:
    clock = FakeMicroseconds()
    limiter = MemoryLimiter(workers=2, clock=clock)
    limiter.remember("ip:spent", LIMITS, (60 * MINUTE_US, 0, 0), age_us=20 * SECOND)
    assert admitted(limiter, "ip:spent", 100) == 10


def test_the_default_clock_is_unix_time_and_never_goes_back() -> None:
    readings = [unix_microseconds() for _ in range(1000)]
    assert readings == sorted(readings)
    assert readings[0] > 1_700_000_000_000_000
