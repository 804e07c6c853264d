"""The two-bucket policy: its promises R1 to R6 of RESILIENCE.md, on any sequence of requests and gaps."""

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.policies.token_bucket import (
    FULL,
    HOUR_US,
    MINUTE_US,
    Decision,
    Limit,
    Limits,
    State,
    full_at_us,
    rescale,
    share,
    take,
)

START = 1_764_239_400_000_000  # a moment in 2025, Unix microseconds
SECOND = 1_000_000

tokens = st.one_of(st.integers(1, 100), st.integers(1, 2_501_998))
limits = st.builds(Limits.of, st.none() | tokens, st.none() | tokens)
gaps = st.one_of(st.just(0), st.integers(0, 5 * SECOND), st.integers(0, 2 * HOUR_US))
seqs = st.lists(gaps, max_size=60)


def buckets(limits: Limits) -> list[Limit]:
    return [limit for limit in (limits.minute, limits.hour) if limit is not None]


@given(limits, st.lists(st.tuples(gaps, st.integers(0, 40)), max_size=30))
def test_r1_no_interval_sees_more_than_the_limit_and_its_refill(limits: Limits, bursts: list[tuple[int, int]]) -> None:
    state, now, admitted_at = FULL, START, []
    for gap, burst in bursts:
        now += gap
        for _ in range(burst):
            state, decision = take(state, limits, now)
            if decision.admitted:
                admitted_at.append(now)
    for first, begin in enumerate(admitted_at):
        for last in range(first, len(admitted_at)):
            span = admitted_at[last] - begin
            for limit in buckets(limits):
                assert last - first + 1 <= limit.tokens + limit.tokens * span / limit.period_us


@given(st.integers(1, 100), st.integers(1, 1000), st.integers(0, 300))
def test_r2_asking_without_pause_gets_what_flows_back(per_minute: int, per_hour: int, seconds: int) -> None:
    limits = Limits.of(per_minute, per_hour)
    state, admitted = FULL, 0
    for tick in range(seconds * 10 + 1):
        for _ in range(per_minute + 1):
            state, decision = take(state, limits, START + tick * SECOND // 10)
            if not decision.admitted:
                break
            admitted += 1
        assert not decision.admitted
    assert admitted >= min(limit.tokens * seconds * SECOND // limit.period_us - 1 for limit in buckets(limits))


@given(limits, seqs)
def test_r3_who_waits_retry_after_is_admitted_and_who_waits_a_microsecond_less_is_not(
    limits: Limits, gaps: list[int]
) -> None:
    state, now = FULL, START
    for gap in [*gaps, *[0] * 120]:
        now += gap
        state, decision = take(state, limits, now)
        if not decision.admitted:
            assert decision.retry_after is not None
            assert decision.wait_us is not None
            assert decision.retry_after >= 1
            assert take(state, limits, now + decision.retry_after * SECOND)[1].admitted
            assert take(state, limits, now + decision.wait_us)[1].admitted
            assert not take(state, limits, now + decision.wait_us - 1)[1].admitted


@given(limits, seqs, st.booleans())
def test_r4_who_obeys_remaining_and_reset_is_never_refused(limits: Limits, gaps: list[int], by_header: bool) -> None:
    state, now = FULL, START
    for gap in gaps:
        now += gap
        state, decision = take(state, limits, now)
        for limit, remaining, reset, full in (
            (limits.minute, decision.remaining_minute, decision.reset_minute, decision.full_minute),
            (limits.hour, decision.remaining_hour, decision.reset_hour, decision.full_hour),
        ):
            if limit is None:
                continue
            if remaining == 0:
                now = max(now, reset * SECOND if by_header else now + full * SECOND)
            assert decision.admitted


@given(limits, seqs)
def test_remaining_requests_pass_at_once_and_the_next_does_not(limits: Limits, gaps: list[int]) -> None:
    state, now = FULL, START
    for gap in gaps:
        now += gap
        state, _ = take(state, limits, now)
    _, look = take(state, limits, now, cost=0)
    remaining = [
        r for limit, r in ((limits.minute, look.remaining_minute), (limits.hour, look.remaining_hour)) if limit
    ]
    if remaining and min(remaining) <= 200:
        for _ in range(min(remaining)):
            state, decision = take(state, limits, now)
            assert decision.admitted
        assert not take(state, limits, now)[1].admitted


@given(limits, seqs)
def test_at_the_reset_a_bucket_is_full_and_not_a_second_sooner(limits: Limits, gaps: list[int]) -> None:
    state, now, decision = FULL, START, None
    for gap in gaps:
        now += gap
        state, decision = take(state, limits, now)
    if decision is None:
        return
    if limits.minute is not None:
        then = decision.reset_minute * SECOND
        assert take(state, limits, max(now, then), cost=0)[1].remaining_minute == limits.minute.tokens
        if then - SECOND > now:
            debt_left = state[0] - (then - SECOND - state[2]) * limits.minute.tokens
            assert debt_left > 0
    assert take(state, limits, full_at_us(state, limits), cost=0)[1].full_minute == 0
    assert take(state, limits, full_at_us(state, limits), cost=0)[1].full_hour == 0


@given(limits, seqs)
def test_r5_a_refusal_changes_neither_bucket(limits: Limits, gaps: list[int]) -> None:
    state, now = FULL, START
    for gap in [*gaps, *[0] * 110]:
        now += gap
        before = state
        state, decision = take(state, limits, now)
        assert decision.admitted or state == before


@given(limits, st.lists(st.integers(-2 * HOUR_US, 2 * HOUR_US), max_size=60))
def test_r6_a_clock_that_goes_back_grants_nothing(limits: Limits, steps: list[int]) -> None:
    state: State = FULL
    model: State = FULL
    now, furthest = START, 0
    for step in steps:
        now += step
        furthest = max(furthest, now)
        state, decision = take(state, limits, now)
        model, expected = take(model, limits, furthest)  # a clock that stands still while the other is behind
        assert (state, decision.admitted) == (model, expected.admitted)
        if decision.wait_us is not None:
            assert take(state, limits, now + decision.wait_us)[1].admitted


def test_a_new_caller_may_spend_both_buckets_and_no_more_whatever_the_clock_says() -> None:
    limits = Limits.of(60, 1000)
    assert full_at_us(FULL, limits) == 0
    for now in (0, START):
        state = FULL
        for spent in range(1, 61):
            state, decision = take(state, limits, now)
            assert (decision.remaining_minute, decision.remaining_hour) == (60 - spent, 1000 - spent)
        assert not take(state, limits, now)[1].admitted
        assert take(state, limits, now)[1].wait_us == 1_000_000
        assert full_at_us(state, limits) == now + 216_000_000  # 60 of 1,000 flow back in that part of an hour
        assert (decision.full_minute, decision.full_hour) == (60, 216)


@pytest.mark.parametrize(("limits", "token"), [(Limits.of(1, None), MINUTE_US), (Limits.of(None, 1), HOUR_US)])
def test_a_token_comes_back_to_the_microsecond(limits: Limits, token: int) -> None:
    assert (MINUTE_US, HOUR_US) == (60 * SECOND, 3600 * SECOND)
    state, first = take(FULL, limits, 0)
    assert first.admitted
    for now, wait_us, retry_after in (
        (0, token, token // SECOND),
        (token - SECOND - 1, SECOND + 1, 2),
        (token - SECOND, SECOND, 1),
        (token - 1, 1, 1),
    ):
        _, refused = take(state, limits, now)
        assert (refused.admitted, refused.wait_us, refused.retry_after) == (False, wait_us, retry_after)
    assert take(state, limits, token)[1].admitted


def test_a_microsecond_refills_and_a_full_bucket_holds_no_more() -> None:
    limits = Limits.of(60, 1000)
    state = (60 * MINUTE_US, 60 * HOUR_US, START)
    assert take(state, limits, START + 1)[1].wait_us == SECOND - 1
    refilled, _ = take((61, 1001, START), limits, START + 1)
    assert refilled == (MINUTE_US + 1, HOUR_US + 1, START + 1)
    for debt in (60, 59, 1, 0):
        state, decision = take((debt, debt, START), limits, START + 1, cost=1)
        assert state == (MINUTE_US, HOUR_US, START + 1)
        assert (decision.remaining_minute, decision.remaining_hour) == (59, 999)


def test_a_cost_beyond_what_is_there_is_refused_and_says_when_a_token_is() -> None:
    state, decision = take(FULL, Limits.of(60, 1000), START, cost=61)
    assert state == FULL
    assert (decision.admitted, decision.remaining_minute, decision.wait_us, decision.retry_after) == (False, 60, 0, 1)
    assert take(FULL, Limits.of(60, 1000), START, cost=60)[1].admitted


def test_zero_denies_all_and_names_no_time_to_come_back() -> None:
    for limits in (Limits.of(0, 1000), Limits.of(60, 0), Limits.of(0, None)):
        state, decision = take(FULL, limits, START)
        assert (decision.admitted, decision.retry_after, state) == (False, None, FULL)


def test_limits_stay_as_they_were_made_and_show_what_they_were_made_of() -> None:
    limits = Limits.of(60, None)
    with pytest.raises(AttributeError):
        limits.minute = None  # type: ignore[misc]  # that it is refused is the point
    assert limits.minute is not None
    with pytest.raises(AttributeError):
        limits.minute.tokens = 61  # type: ignore[misc]
    assert repr(limits) == "Limits(minute=Limit(tokens=60, period_us=60000000), hour=None)"


def test_off_limits_nothing() -> None:
    state = FULL
    for _ in range(10):
        state, decision = take(state, Limits.of(None, None), START)
        assert decision.admitted


def test_a_cost_of_nothing_only_looks() -> None:
    state, decision = take(FULL, Limits.of(60, 1000), START, cost=0)
    assert state == FULL
    assert (decision.admitted, decision.remaining_minute, decision.remaining_hour) == (True, 60, 1000)


def exactly(state: State, limits: Limits, now: int, cost: int) -> tuple[State, Decision]:
    """What `take` answers, in fractions of tokens that are never rounded until they are shown."""
    reached = max(now, state[2])
    held: list[Fraction] = []  # tokens in the buckets
    waits = [Fraction(0)]
    for limit, debt in ((limits.minute, state[0]), (limits.hour, state[1])):
        if limit is None:
            held.append(Fraction(cost))  # always as much as is asked for
            continue
        per_us = Fraction(limit.tokens, limit.period_us)
        before = max(Fraction(0), limit.tokens - Fraction(debt, limit.period_us))
        held.append(min(Fraction(limit.tokens), before + (reached - state[2]) * per_us))
        waits.append((1 - held[-1]) / per_us if per_us else Fraction(0))
    admitted = all(tokens >= cost for tokens in held)

    debts, remaining, full_at = [], [], []
    for limit, tokens in zip((limits.minute, limits.hour), held, strict=True):
        left = tokens - cost if admitted else tokens
        missing = limit.tokens - left if limit else Fraction(0)
        debts.append(int(missing * limit.period_us) if limit else 0)
        remaining.append(floor(left) if limit else 0)
        full_at.append(reached + (ceil(missing * limit.period_us / limit.tokens) if limit and limit.tokens else 0))
    no_use = admitted or any(limit.tokens == 0 for limit in buckets(limits))
    decision = Decision(
        admitted,
        remaining_minute=remaining[0],
        remaining_hour=remaining[1],
        reset_minute=ceil(Fraction(full_at[0], SECOND)),
        reset_hour=ceil(Fraction(full_at[1], SECOND)),
        full_minute=ceil(Fraction(full_at[0] - now, SECOND)),
        full_hour=ceil(Fraction(full_at[1] - now, SECOND)),
        wait_us=None if no_use else ceil(max(waits)) + reached - now,
    )
    return (debts[0], debts[1], reached) if admitted and cost else state, decision


few = st.integers(0, 3) | st.sampled_from([7, 60, 1000])


@given(
    st.builds(Limits.of, st.none() | few, st.none() | few),
    st.tuples(st.integers(0, 8 * MINUTE_US), st.integers(0, 8 * HOUR_US)),
    st.sampled_from([0, 1, 9 * SECOND, START, START + 1]),
    st.sampled_from([0, 1, 2, SECOND - 1, SECOND, SECOND + 1]) | st.integers(-5 * SECOND, -1) | st.integers(0, HOUR_US),
    st.integers(0, 3),
)
@example(Limits.of(60, 1000), (3 * MINUTE_US, 3 * HOUR_US), START, -3 * SECOND, 0)
@settings(max_examples=400)
def test_a_decision_is_what_exact_fractions_say(
    limits: Limits, debts: tuple[int, int], last: int, gap: int, cost: int
) -> None:
    state = (*debts, last)
    assert take(state, limits, max(0, last + gap), cost) == exactly(state, limits, max(0, last + gap), cost)


def after(gaps: list[int], limits: Limits) -> State:
    """What buckets hold after requests so many microseconds apart."""
    state, now = FULL, START
    for gap in gaps:
        now += gap
        state, _ = take(state, limits, now)
    return state


@given(limits, seqs, st.integers(1, 8))
def test_a_share_is_as_far_from_full_as_the_whole_in_whole_units_rounded_up(
    limits: Limits, gaps: list[int], workers: int
) -> None:
    state, part = after(gaps, limits), share(limits, workers)
    expected = [
        ceil(Fraction(debt * to.tokens, whole.tokens)) if whole and to else 0
        for debt, whole, to in ((state[0], limits.minute, part.minute), (state[1], limits.hour, part.hour))
    ]
    later = START + sum(gaps) + 1
    assert rescale(state, limits, part, later) == (*expected, later)


def test_a_bucket_that_is_off_or_denies_all_has_no_debt_to_share() -> None:
    debts = (MINUTE_US, HOUR_US, START)
    for limits, part, scaled in (
        (Limits.of(None, 10), Limits.of(5, 5), (0, HOUR_US // 2, START)),
        (Limits.of(10, 10), Limits.of(5, None), (MINUTE_US // 2, 0, START)),
        (Limits.of(0, 1), Limits.of(5, 1), (0, HOUR_US, START)),
    ):
        assert rescale(debts, limits, part, START) == scaled


def test_a_lowered_limit_counts_an_older_debt_as_an_empty_bucket() -> None:
    state, limits = FULL, Limits.of(1000, None)
    for _ in range(1000):
        state, _ = take(state, limits, START)
    _, decision = take(state, Limits.of(10, None), START)
    assert (decision.admitted, decision.remaining_minute, decision.retry_after) == (False, 0, 6)


@pytest.mark.parametrize(("per_minute", "per_hour"), [(-1, None), (None, -1), (150_119_987, None), (None, 2_501_999)])
def test_a_limit_that_cannot_be_counted_exactly_is_refused(per_minute: int | None, per_hour: int | None) -> None:
    with pytest.raises(ValueError, match=r"^a limit of .* per (60 s is not within 0 to 150119986|3600 s .* 2501998)$"):
        Limits.of(per_minute, per_hour)


def test_the_largest_limits_stay_below_what_a_double_holds() -> None:
    assert Limit(2**53 - 2, 1).tokens + 1 < 2**53
    with pytest.raises(ValueError):
        Limit(2**53 - 1, 1)
    with pytest.raises(ValueError):
        Limit((2**53 - 1) // 3, 3)
    with pytest.raises(ValueError, match="per 1000000 s"):
        Limit(-1, 1_000_000 * SECOND)
    for limit in (Limit(150_119_986, MINUTE_US), Limit(2_501_998, HOUR_US)):
        assert (limit.tokens + 1) * limit.period_us < 2**53
        assert (limit.tokens + 2) * limit.period_us >= 2**53


@given(limits, st.integers(1, 64))
@example(Limits.of(60, 1000), 1)
@example(Limits.of(60, 1000), 2)
def test_the_shares_of_all_workers_do_not_exceed_the_limit(limits: Limits, workers: int) -> None:
    for whole, part in zip(buckets(limits), buckets(share(limits, workers)), strict=True):
        assert part.tokens == max(1, whole.tokens // workers)
    assert share(Limits.of(0, 0), workers) == Limits.of(0, 0)


@given(limits, seqs, st.integers(1, 8))
def test_a_share_begun_from_the_whole_promises_no_more_and_is_full_no_later(
    limits: Limits, gaps: list[int], workers: int
) -> None:
    state, part = after(gaps, limits), share(limits, workers)
    scaled = rescale(state, limits, part, state[2])
    whole_left = take(state, limits, state[2], cost=0)[1]
    part_left = take(scaled, part, state[2], cost=0)[1]
    assert part_left.remaining_minute <= max(1, whole_left.remaining_minute)
    assert part_left.remaining_hour <= max(1, whole_left.remaining_hour)
    assert abs(full_at_us(scaled, part) - full_at_us(state, limits)) <= 1
