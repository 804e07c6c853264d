"""The circuit breaker's promises (RESILIENCE.md, 1): by example, against a naive model, over all short histories."""

from collections import Counter
from copy import deepcopy
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.circuit_breaker import CircuitBreakerRegistry, UnknownBreakerError
from gateway.policies.circuit_breaker import (
    TRANSITIONS,
    CircuitBreaker,
    CircuitBreakerConfig,
    Event,
    Outcome,
    Permit,
    Refusal,
    State,
)

CLOSED, OPEN, HALF_OPEN = State
SUCCESS, FAILURE, NEUTRAL = Outcome
NAIVE = CircuitBreakerConfig(min_failure_ratio=0)


def permit_of(breaker: CircuitBreaker, now: float) -> Permit:
    permit = breaker.acquire(now)
    assert isinstance(permit, Permit)
    return permit


def refusal_of(breaker: CircuitBreaker, now: float) -> Refusal:
    refusal = breaker.acquire(now)
    assert isinstance(refusal, Refusal)
    return refusal


def call(breaker: CircuitBreaker, outcome: Outcome, now: float, times: int = 1) -> None:
    for _ in range(times):
        permit_of(breaker, now).finish(outcome, now)


def opened(now: float = 0.0, config: CircuitBreakerConfig | None = None) -> CircuitBreaker:
    breaker = CircuitBreaker("search-service", config)
    call(breaker, FAILURE, now, breaker.config.failure_threshold)
    assert breaker.state(now) is OPEN
    return breaker


# --- by example


def test_five_failures_in_a_row_open_it_and_four_do_not() -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, FAILURE, 0, times=4)
    assert breaker.state(0) is CLOSED
    call(breaker, FAILURE, 0)
    assert breaker.state(0) is OPEN


def test_a_success_between_them_starts_the_row_anew() -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, SUCCESS, 0, times=80)
    for _ in range(4):
        call(breaker, FAILURE, 0, times=4)
        call(breaker, SUCCESS, 0)
    assert breaker.state(0) is CLOSED  # 16 failures, but of 100 calls
    assert breaker.status(0)["failure_count"] == 0


def test_a_service_that_is_95_percent_healthy_stays_available() -> None:
    breaker = CircuitBreaker("search-service")
    for _ in range(100):
        call(breaker, SUCCESS, 0, times=19)
        call(breaker, FAILURE, 0)
    assert breaker.state(0) is CLOSED


def test_one_that_fails_every_fourth_call_does_not() -> None:
    breaker = CircuitBreaker("search-service")
    for _ in range(5):
        call(breaker, SUCCESS, 0, times=3)
        call(breaker, FAILURE, 0)
    assert breaker.state(0) is OPEN


def test_a_success_never_opens_it_even_as_older_successes_are_forgotten() -> None:
    breaker = CircuitBreaker("search-service", CircuitBreakerConfig(5, timeout=1, min_failure_ratio=0.5))
    call(breaker, SUCCESS, 0, times=20)
    for _ in range(5):
        call(breaker, FAILURE, 9)
        call(breaker, SUCCESS, 9)
    call(breaker, SUCCESS, 10.5)  # now 5 of 11 are failures; at 10.5 the twenty are gone
    assert breaker.state(10.5) is CLOSED


def test_outcomes_older_than_ten_timeouts_count_no_more() -> None:
    breaker = CircuitBreaker("search-service", CircuitBreakerConfig(timeout=2))
    call(breaker, FAILURE, 0, times=4)
    assert breaker.status(20)["recent_failures"] == 4
    assert breaker.status(20.125) | {"recent_failures": 0, "failure_count": 0} == breaker.status(20.125)
    call(breaker, FAILURE, 20.125)
    assert breaker.state(20.125) is CLOSED


def test_a_threshold_above_the_window_switches_it_off() -> None:
    breaker = CircuitBreaker("search-service", CircuitBreakerConfig(failure_threshold=101, window_size=100))
    call(breaker, FAILURE, 0, times=1000)
    assert breaker.state(0) is CLOSED


def test_it_is_open_until_its_timeout_to_the_instant_with_or_without_traffic() -> None:
    breaker = opened(now=10)
    assert (breaker.state(69.875), breaker.retry_after(69.875)) == (OPEN, 0.125)
    assert refusal_of(breaker, 69.875).retry_after == 0.125
    assert (breaker.state(70), breaker.retry_after(70)) == (HALF_OPEN, 0)
    assert breaker.state(1e9) is HALF_OPEN
    assert permit_of(breaker, 70).probe


def test_probes_are_as_few_as_are_still_needed() -> None:
    breaker = opened()
    first, second = permit_of(breaker, 60), permit_of(breaker, 61)
    refusal = refusal_of(breaker, 62)
    assert (refusal.state, refusal.retry_after) == (HALF_OPEN, 28)  # when the lease of the first ends
    first.finish(SUCCESS, 63)
    assert isinstance(breaker.acquire(63), Refusal)  # one success more is needed, and one probe is out
    second.finish(SUCCESS, 64)
    assert breaker.state(64) is CLOSED
    assert breaker.status(64)["recent_calls"] == 0


def test_one_failed_probe_opens_it_again() -> None:
    breaker = opened()
    first, second = permit_of(breaker, 60), permit_of(breaker, 60)
    first.finish(SUCCESS, 61)
    second.finish(FAILURE, 62)
    assert (breaker.state(121.875), breaker.state(122)) == (OPEN, HALF_OPEN)


def test_a_probe_that_tells_nothing_gives_its_slot_back() -> None:
    breaker = opened()
    for _ in range(1000):
        call(breaker, NEUTRAL, 60)
    assert breaker.state(60) is HALF_OPEN


def test_a_probe_that_hangs_gives_its_slot_back_and_its_outcome_still_counts() -> None:
    breaker = opened()
    slow = [permit_of(breaker, 60), permit_of(breaker, 60)]
    assert isinstance(breaker.acquire(89.875), Refusal)
    permit_of(breaker, 90)  # and this one hangs too
    for permit in slow:
        permit.finish(SUCCESS, 100)
    assert breaker.state(100) is CLOSED


def test_a_late_success_narrows_the_slots_for_those_that_come_after() -> None:
    breaker = opened()
    late = permit_of(breaker, 60)
    permit_of(breaker, 60)
    permit_of(breaker, 90)
    permit_of(breaker, 95)
    late.finish(SUCCESS, 100)  # one more is needed, and two are out: both leases must end before another may go
    assert refusal_of(breaker, 100).retry_after == 25
    assert isinstance(breaker.acquire(124.875), Refusal)
    permit_of(breaker, 125)


def test_a_call_from_before_the_outage_neither_closes_it_nor_opens_it() -> None:
    breaker = CircuitBreaker("search-service")
    old = [permit_of(breaker, 0) for _ in range(10)]
    call(breaker, FAILURE, 0, times=5)
    old[0].finish(SUCCESS, 61)
    old[1].finish(SUCCESS, 61)
    assert breaker.state(61) is HALF_OPEN
    old[2].finish(FAILURE, 61)
    assert breaker.state(61) is HALF_OPEN
    call(breaker, SUCCESS, 61, times=2)
    for permit in old[3:]:
        permit.finish(FAILURE, 62)
    assert breaker.state(62) is CLOSED


def test_a_permit_counts_once() -> None:
    breaker = CircuitBreaker("search-service")
    permit = permit_of(breaker, 0)
    for _ in range(10):
        permit.finish(FAILURE, 0)
        permit.finish_abandoned(0, caller="user:1", waited=31)
    assert breaker.status(0)["recent_failures"] == 1


def test_a_probe_judged_early_leaves_an_ordinary_permit_once_closed() -> None:
    breaker = opened()
    first, second = permit_of(breaker, 60), permit_of(breaker, 60)
    assert first.succeed_so_far(61) is None  # half-open still: what becomes of the rest is not judged
    rest = second.succeed_so_far(61)
    assert rest is not None
    assert not rest.probe
    assert breaker.state(61) is CLOSED
    rest.finish(FAILURE, 62)
    assert breaker.status(62)["recent_failures"] == 1
    assert breaker.status(62)["total_calls"] == 7  # the rest of a call is no further call


def test_callers_who_give_up_after_half_a_minute_are_failures_once_each() -> None:
    breaker = CircuitBreaker("chatbot-service")

    def leaves(caller: str, waited: float) -> None:
        permit_of(breaker, 40).finish_abandoned(40, caller=caller, waited=waited)

    for _ in range(100):
        leaves("user:hasty", 30)
        leaves("user:impatient", 31)
    assert breaker.status(40)["recent_failures"] == 1
    for number in range(4):
        leaves(f"user:{number}", 31)
    assert breaker.state(40) is OPEN


def test_a_caller_whose_giving_up_has_left_the_window_counts_again() -> None:
    breaker = CircuitBreaker("chatbot-service", CircuitBreakerConfig(window_size=10))

    def recent_failures_after_leaving() -> int:
        permit_of(breaker, 40).finish_abandoned(40, caller="user:1", waited=31)
        return int(breaker.status(40)["recent_failures"])

    assert recent_failures_after_leaving() == 1
    call(breaker, SUCCESS, 40, times=9)
    assert recent_failures_after_leaving() == 1  # the first of them still
    call(breaker, SUCCESS, 40)
    assert recent_failures_after_leaving() == 1  # a new one, the first having made way


def test_a_reset_closes_and_empties_it_whatever_is_in_flight() -> None:
    breaker = CircuitBreaker("search-service")
    in_flight = [permit_of(breaker, 0) for _ in range(10)]
    call(breaker, FAILURE, 0, times=5)
    breaker.reset(1)
    in_flight += [permit_of(breaker, 1) for _ in range(10)]
    breaker.reset(1)
    for permit in in_flight:
        permit.finish(FAILURE, 2)
    status = breaker.status(2)
    assert status["state"] == "closed"
    assert (status["failure_count"], status["recent_failures"], status["recent_calls"]) == (0, 0, 0)
    assert status["total_calls"] == 25  # since the start


def test_each_change_of_state_is_told_with_its_reason() -> None:
    told: list[tuple[State, State, Event]] = []
    breaker = CircuitBreaker("search-service", on_change=lambda old, new, why: told.append((old, new, why)))
    call(breaker, FAILURE, 0, times=5)
    call(breaker, FAILURE, 60)
    breaker.reset(200)
    breaker.reset(200)
    assert told == [
        (CLOSED, OPEN, Event.TRIPPED),
        (OPEN, HALF_OPEN, Event.RESTED),
        (HALF_OPEN, OPEN, Event.PROBE_FAILED),
        (OPEN, HALF_OPEN, Event.RESTED),
        (HALF_OPEN, CLOSED, Event.RESET),
    ]


def test_the_table_of_transitions_leaves_no_state_without_a_way_out() -> None:
    assert {old for old, _ in TRANSITIONS} == set(State)
    assert all(TRANSITIONS[state, Event.RESET] is CLOSED for state in State)
    assert set(Event) == {event for _, event in TRANSITIONS}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"failure_threshold": 0}, "failure_threshold"),
        ({"failure_threshold": 2.5}, "failure_threshold"),
        ({"success_threshold": -1}, "success_threshold"),
        ({"success_threshold": True}, "success_threshold"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": inf}, "timeout"),
        ({"timeout": "60"}, "timeout"),
        ({"window_size": 0}, "window_size"),
        ({"min_failure_ratio": 1.1}, "min_failure_ratio"),
        ({"min_failure_ratio": float("nan")}, "min_failure_ratio"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CircuitBreakerConfig(**options)


def test_the_configuration_takes_its_values_in_the_order_users_know() -> None:
    config = CircuitBreakerConfig(5, 2, 60, 100)
    assert config == CircuitBreakerConfig(failure_threshold=5, success_threshold=2, timeout=60, window_size=100)
    assert config == CircuitBreakerConfig()


# --- what peers say


def test_an_alarm_alone_opens_nothing_but_the_next_failure_does() -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, SUCCESS, 0)
    breaker.heard_alarm(1)
    assert breaker.state(1) is CLOSED
    call(breaker, FAILURE, 2)
    assert breaker.state(2) is OPEN


def test_a_success_ends_an_alarm() -> None:
    breaker = CircuitBreaker("search-service")
    breaker.heard_alarm(1)
    call(breaker, SUCCESS, 2)
    call(breaker, FAILURE, 3)
    assert breaker.state(3) is CLOSED


def test_a_reset_ends_an_alarm() -> None:
    breaker = CircuitBreaker("search-service")
    breaker.heard_alarm(1)
    breaker.reset(2)
    call(breaker, FAILURE, 3)
    assert breaker.state(3) is CLOSED


def test_a_call_begun_before_the_alarm_does_not_decide() -> None:
    breaker = CircuitBreaker("search-service")
    before = permit_of(breaker, 0)
    breaker.heard_alarm(1)
    before.finish(FAILURE, 2)
    assert breaker.state(2) is CLOSED
    call(breaker, FAILURE, 3)
    assert breaker.state(3) is OPEN


@pytest.mark.parametrize(("age", "state"), [(4.875, OPEN), (5, CLOSED)])
def test_a_fresh_failure_of_its_own_bears_an_alarm_out_at_once(age: float, state: State) -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, FAILURE, 10)
    breaker.heard_alarm(10 + age)
    assert breaker.state(10 + age) is state


def test_an_alarm_lasts_a_minute_and_a_later_one_prolongs_it() -> None:
    breaker = CircuitBreaker("search-service")
    breaker.heard_alarm(0)
    call(breaker, FAILURE, 60)
    assert breaker.state(60) is CLOSED

    call(breaker, SUCCESS, 60)
    breaker.heard_alarm(61)
    slow = permit_of(breaker, 62)
    breaker.heard_alarm(100)
    slow.finish(FAILURE, 125)
    assert breaker.state(125) is OPEN


def test_an_opening_upon_an_alarm_is_told_apart_from_one_by_own_evidence() -> None:
    why: list[Event] = []
    breaker = CircuitBreaker("search-service", on_change=lambda _old, _new, event: why.append(event))
    breaker.heard_alarm(0)
    call(breaker, FAILURE, 0)
    breaker.reset(0)
    call(breaker, FAILURE, 0, times=4)
    breaker._await_own_outcome(0)
    call(breaker, FAILURE, 0)
    assert why == [Event.ALARMED, Event.RESET, Event.TRIPPED]


def test_a_half_open_one_closes_when_a_peer_does_and_its_next_outcome_decides() -> None:
    breaker = opened()
    probe = permit_of(breaker, 60)
    breaker.heard_closing(61)
    assert breaker.state(61) is CLOSED
    probe.finish(FAILURE, 62)  # of an older generation
    assert breaker.state(62) is CLOSED
    call(breaker, FAILURE, 63)
    assert breaker.state(63) is OPEN
    breaker.heard_closing(64)
    assert breaker.state(64) is OPEN


# --- against a naive model


class Model:
    """The same rules, written for the eye alone: everything is recounted whenever it is asked for."""

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.config = config
        self.lease = min(config.timeout, 30)
        self.now = 0.0
        self.total = 0
        self.opened_at: float | None = None
        self.alarm: tuple[float, float] | None = None
        self.new_generation(forget=True)

    def new_generation(self, *, forget: bool) -> None:
        self.generation = object()
        self.successes = 0
        self.probes: dict[int, float] = {}  # by permit's number, when it was given
        self.alarm = None
        if forget:
            self.opened_at = None
            self.outcomes: list[tuple[float, bool, str | None]] = []

    def state(self) -> State:
        if self.opened_at is None:
            return CLOSED
        return OPEN if self.now < self.opened_at + self.config.timeout else HALF_OPEN

    def window(self) -> list[tuple[float, bool, str | None]]:
        recent = self.outcomes[-self.config.window_size :]
        return [outcome for outcome in recent if outcome[0] >= self.now - 10 * self.config.timeout]

    def failures(self) -> int:
        return sum(failed for _, failed, _ in self.window())

    def run(self) -> int:
        length = 0
        for _, failed, _ in reversed(self.window()):
            if not failed:
                break
            length += 1
        return length

    def in_lease(self) -> list[float]:
        return [given for given in self.probes.values() if self.now < given + self.lease]

    def slots(self) -> int:
        return self.config.success_threshold - self.successes

    def admits(self) -> bool:
        return self.state() is CLOSED or (self.state() is HALF_OPEN and len(self.in_lease()) < self.slots())

    def open(self) -> None:
        self.new_generation(forget=False)
        self.opened_at = self.now

    def conclude(self, number: int, began: float, outcome: Outcome, caller: str | None = None) -> None:
        was_probe = number in self.probes or self.state() is HALF_OPEN
        self.probes.pop(number, None)
        if outcome is NEUTRAL:
            return
        failed = outcome is FAILURE
        self.outcomes.append((self.now, failed, caller if failed else None))
        if was_probe:
            if failed:
                self.open()
            else:
                self.successes += 1
                if self.successes >= self.config.success_threshold:
                    self.new_generation(forget=True)
            return
        threshold, ratio = self.config.failure_threshold, self.config.min_failure_ratio
        enough = self.failures() >= threshold and self.failures() / len(self.window()) >= ratio
        if failed and (self.run() >= threshold or enough):
            self.open()
        elif self.alarm is not None and self.now < self.alarm[1] and began >= self.alarm[0]:
            self.alarm = None
            if failed:
                self.open()

    def hear_alarm(self) -> None:
        if self.state() is CLOSED:
            window = self.window()
            if window and window[-1][1] and self.now - window[-1][0] < 5:
                self.open()
            else:
                self.await_own_outcome()

    def hear_closing(self) -> None:
        if self.state() is HALF_OPEN:
            self.new_generation(forget=True)
            self.await_own_outcome()

    def await_own_outcome(self) -> None:
        running = self.alarm is not None and self.now < self.alarm[1]
        self.alarm = (self.alarm[0] if running and self.alarm else self.now, self.now + 60)


class Held:
    """A permit in flight, and what the model knows of it."""

    def __init__(self, permit: Permit, number: int, generation: object) -> None:
        self.permit, self.number, self.generation = permit, number, generation


class Pair:
    """The breaker and its model, led through the same history and compared at each step."""

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.breaker = CircuitBreaker("search-service", config)
        self.model = Model(config)
        self.held: list[Held] = []

    def acquire(self) -> None:
        model = self.model
        admits, state, lease = model.admits(), model.state(), model.lease
        given = self.breaker.acquire(model.now)
        if isinstance(given, Refusal):
            assert not admits
            assert given.state is state
            assert given.retry_after > 0
            if state is HALF_OPEN:
                assert given.retry_after <= lease
            return
        assert admits  # P1, P2
        assert given.probe == (state is HALF_OPEN)
        model.total += 1
        if given.probe:
            model.probes[model.total] = model.now
            assert len(model.in_lease()) <= model.slots()
        self.held.append(Held(given, model.total, model.generation))

    def finish(self, index: int, outcome: Outcome, *, again: bool = False) -> None:
        held = self.held.pop(index)
        held.permit.finish(outcome, self.model.now)
        if again:
            held.permit.finish(FAILURE, self.model.now)  # P5
        if held.generation is self.model.generation:  # P4
            self.model.conclude(held.number, held.permit.began, outcome)

    def abandon(self, index: int, caller: str, waited: float) -> None:
        held = self.held.pop(index)
        held.permit.finish_abandoned(self.model.now, caller=caller, waited=waited)
        if held.generation is self.model.generation:
            counted = {who for _, _, who in self.model.window()}
            outcome = FAILURE if waited > 30 and caller not in counted else NEUTRAL
            self.model.conclude(held.number, held.permit.began, outcome, caller)

    def pass_early(self, index: int) -> None:
        held = self.held.pop(index)
        rest = held.permit.succeed_so_far(self.model.now)
        if held.generation is self.model.generation:
            self.model.conclude(held.number, held.permit.began, SUCCESS)
        assert (rest is not None) == (self.model.opened_at is None)
        if rest is not None:
            self.held.append(Held(rest, -1, self.model.generation))

    def advance(self, seconds: float) -> None:
        self.model.now += seconds

    def reset(self) -> None:
        self.breaker.reset(self.model.now)
        self.model.new_generation(forget=True)
        assert not self.breaker._window
        assert not self.breaker._leases

    def hear_alarm(self) -> None:
        self.breaker.heard_alarm(self.model.now)
        self.model.hear_alarm()

    def hear_closing(self) -> None:
        self.breaker.heard_closing(self.model.now)
        self.model.hear_closing()

    def compare(self) -> None:
        breaker, model, now = self.breaker, self.model, self.model.now
        wait = breaker.retry_after(now)
        assert breaker.state(now) is model.state()
        assert (wait == 0) == model.admits()
        status = breaker.status(now)
        assert status["state"] == model.state()
        assert status["total_calls"] == model.total
        assert status["recent_failures"] == model.failures()  # P7
        assert status["recent_calls"] == len(model.window())
        assert status["failure_count"] == model.run()
        assert len(breaker._window) <= model.config.window_size
        assert len(breaker._leases) <= model.config.success_threshold
        assert breaker._gave_up == {who for _, _, who in model.window() if who is not None}

    def look_ahead(self) -> None:
        """P6: what it says is what the next ``acquire`` does, now and then. P3: within one lease of being half-open."""
        now, wait = self.model.now, self.breaker.retry_after(self.model.now)
        if wait:
            assert isinstance(deepcopy(self.breaker).acquire(now + wait - 1 / 16), Refusal)
        assert isinstance(deepcopy(self.breaker).acquire(now + wait), Permit)
        if self.breaker.state(now) is HALF_OPEN:
            assert isinstance(deepcopy(self.breaker).acquire(now + self.model.lease), Permit)


CONFIGS = st.builds(
    CircuitBreakerConfig,
    failure_threshold=st.integers(1, 4),
    success_threshold=st.integers(1, 3),
    timeout=st.sampled_from([0.5, 2, 40, 60]),
    window_size=st.integers(1, 8),
    min_failure_ratio=st.sampled_from([0, 0.2, 0.5, 1]),
)
seen: Counter[State] = Counter()


class BreakerMachine(RuleBasedStateMachine):
    @initialize(config=CONFIGS, broken=st.booleans())
    def start(self, config: CircuitBreakerConfig, broken: bool) -> None:
        self.pair = Pair(config)
        if broken:
            self.break_down_and_rest()

    @rule()
    def acquire(self) -> None:
        self.pair.acquire()

    @rule(outcome=st.sampled_from(Outcome), times=st.integers(1, 4))
    def call(self, outcome: Outcome, times: int) -> None:
        for _ in range(times):
            before = len(self.pair.held)
            self.pair.acquire()
            if len(self.pair.held) > before:
                self.pair.finish(-1, outcome)

    @precondition(lambda self: self.pair.model.state() is CLOSED)
    @rule()
    def break_down_and_rest(self) -> None:
        for _ in range(4):
            self.call(FAILURE, 1)
        self.wait_for_the_timeout(1)

    @precondition(lambda self: self.pair.held)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), again=st.booleans())
    def finish(self, data: st.DataObject, outcome: Outcome, again: bool) -> None:
        self.pair.finish(data.draw(st.integers(0, len(self.pair.held) - 1)), outcome, again=again)

    @precondition(lambda self: self.pair.held)
    @rule(data=st.data(), caller=st.sampled_from("ab"), waited=st.sampled_from([30, 30.125]))
    def abandon(self, data: st.DataObject, caller: str, waited: float) -> None:
        self.pair.abandon(data.draw(st.integers(0, len(self.pair.held) - 1)), caller, waited)

    @precondition(lambda self: self.pair.held)
    @rule(data=st.data())
    def pass_early(self, data: st.DataObject) -> None:
        self.pair.pass_early(data.draw(st.integers(0, len(self.pair.held) - 1)))

    @precondition(lambda self: self.pair.held)
    @rule()
    def lose(self) -> None:
        self.pair.held.pop(0)  # a call that hangs or crashes, and never finishes its permit

    @rule(seconds=st.sampled_from([0.125, 0.5, 1, 5, 30]))
    def wait(self, seconds: float) -> None:
        self.pair.advance(seconds)

    @rule(part=st.sampled_from([1, 1, 1, 10]))
    def wait_for_the_timeout(self, part: int) -> None:
        self.pair.advance(part * self.pair.model.config.timeout)

    @precondition(lambda self: self.pair.model.state() is not CLOSED)
    @rule()
    def reset(self) -> None:
        self.pair.reset()

    @rule()
    def hear_alarm(self) -> None:
        self.pair.hear_alarm()

    @rule()
    def hear_closing(self) -> None:
        self.pair.hear_closing()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pair"):
            seen[self.pair.model.state()] += 1
            self.pair.compare()
            self.pair.look_ahead()


def test_it_does_what_the_naive_model_does_and_is_half_open_often() -> None:
    seen.clear()
    run_state_machine_as_test(
        BreakerMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
    assert seen[HALF_OPEN] > sum(seen.values()) / 10, seen


@pytest.mark.parametrize("config", [CircuitBreakerConfig(2, 2, 2, 3, 0), CircuitBreakerConfig(2, 1, 2, 3, 0.75)])
def test_every_short_history_does_what_the_naive_model_does(config: CircuitBreakerConfig) -> None:
    """All histories of up to ten steps with up to three calls in flight; each state met is gone on from once."""

    def key(pair: Pair) -> tuple[object, ...]:
        model, now = pair.model, pair.model.now
        return (
            None if model.opened_at is None else min(now - model.opened_at, config.timeout),
            model.successes,
            tuple((now - at, failed) for at, failed, _ in model.window()),
            tuple(
                (held.generation is model.generation, held.permit.probe, min(now - held.permit.began, model.lease))
                for held in pair.held
            ),
            tuple(sorted(min(now - given, model.lease) for given in model.probes.values())),
        )

    def steps(pair: Pair) -> list[tuple[Any, ...]]:
        held = range(len(pair.held))
        given = [("acquire",)] if len(held) < 3 else []
        finished = [("finish", index, outcome) for index in held for outcome in Outcome]
        return [("advance", 1), ("reset",), *given, *finished]

    frontier, met = [Pair(config)], set()
    for _ in range(10):
        following = []
        for pair in frontier:
            for name, *arguments in steps(pair):
                after = deepcopy(pair)
                getattr(after, name)(*arguments)
                after.compare()
                if key(after) not in met:
                    met.add(key(after))
                    after.look_ahead()
                    following.append(after)
        frontier = following
    assert len(met) > 1000


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60),
    st.integers(1, 6),
    st.integers(1, 10),
)
def test_with_ratio_0_it_opens_at_exactly_so_many_failures_among_the_last_calls(
    calls: list[tuple[bool, int]], threshold: int, size: int
) -> None:
    config = CircuitBreakerConfig(threshold, timeout=4, window_size=size, min_failure_ratio=0)
    breaker, now, past = CircuitBreaker("search-service", config), 0, []
    for failed, gap in calls:
        now += gap
        call(breaker, FAILURE if failed else SUCCESS, now)
        past.append((now, failed))
        recent = [failure for at, failure in past[-size:] if at >= now - 40]
        assert (breaker.state(now) is OPEN) == (sum(recent) >= threshold)
        if breaker.state(now) is OPEN:
            return


# --- the registry


def test_the_registry_resets_a_breaker_by_name_and_shows_all_in_the_fixed_form() -> None:
    registry = CircuitBreakerRegistry(clock=lambda: 1.0)
    registry.register(opened())
    registry.register(CircuitBreaker("chatbot-service"))
    assert registry.names() == ["search-service", "chatbot-service"]
    assert registry.status()["search-service"]["state"] == "open"
    registry.reset_breaker("search-service")
    fixed = {"state": "closed", "failure_count": 0, "recent_failures": 0, "total_calls": 5}
    assert registry.status()["search-service"].items() >= fixed.items()
    breaker = registry.get("search-service")
    assert breaker is not None
    assert breaker.state(1.0) is CLOSED
    assert registry.get("pricing-service") is None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    registry = CircuitBreakerRegistry()
    registry.replace_all({name: CircuitBreaker(name) for name in ("search-service", "chatbot-service")})
    with pytest.raises(UnknownBreakerError) as caught:
        registry.reset_breaker("serach-service")
    assert str(caught.value) == (
        "there is no circuit breaker 'serach-service'; there are search-service, chatbot-service"
    )
    assert isinstance(caught.value, KeyError)


def test_a_process_without_breakers_is_told_how_to_reach_those_of_the_gateway() -> None:
    with pytest.raises(UnknownBreakerError, match="POST /circuit-breakers/search-service/reset"):
        CircuitBreakerRegistry().reset_breaker("search-service")


def test_the_application_created_last_replaces_the_breakers_of_earlier_ones() -> None:
    registry = CircuitBreakerRegistry()
    registry.register(CircuitBreaker("search-service"))
    registry.replace_all({"chatbot-service": CircuitBreaker("chatbot-service")})
    assert registry.names() == ["chatbot-service"]
