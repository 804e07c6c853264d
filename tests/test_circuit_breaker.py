"""The circuit breaker's promises (RESILIENCE.md, 1): by example, each as a property, and against a naive model."""

import logging
import re
import runpy
from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
from itertools import cycle, product
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
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
logger = logging.getLogger(__name__)  # what was found: `pytest --log-cli-level=INFO tests/test_circuit_breaker.py`


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


def test_a_service_of_which_exactly_a_fifth_of_the_calls_fail_does_not() -> None:
    breaker = CircuitBreaker("search-service")
    for failures in range(1, 6):
        assert breaker.state(0) is CLOSED
        call(breaker, SUCCESS, 0, times=4)
        call(breaker, FAILURE, 0)
        assert breaker.status(0)["recent_failures"] == failures
    assert breaker.state(0) is OPEN


def test_a_service_that_gets_worse_opens_it_at_the_failure_that_makes_a_fifth() -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, SUCCESS, 0, times=30)
    call(breaker, FAILURE, 0, times=4)
    call(breaker, SUCCESS, 0)
    call(breaker, FAILURE, 0, times=3)
    assert breaker.state(0) is CLOSED  # 7 of 38
    call(breaker, FAILURE, 0)
    assert breaker.state(0) is OPEN  # 8 of 39


def test_five_in_a_row_open_it_however_well_it_went_before() -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, SUCCESS, 0, times=95)
    call(breaker, FAILURE, 0, times=4)
    assert breaker.state(0) is CLOSED
    call(breaker, FAILURE, 0)
    assert breaker.state(0) is OPEN


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


def test_large_numbers_are_counted_as_small_ones_are() -> None:
    config = CircuitBreakerConfig(300, success_threshold=300, window_size=301, min_failure_ratio=1)
    breaker = CircuitBreaker("search-service", config)
    call(breaker, FAILURE, 0)
    call(breaker, SUCCESS, 0, times=301)
    assert breaker.status(0)["recent_failures"] == 0
    call(breaker, FAILURE, 0, times=299)
    assert breaker.state(0) is CLOSED
    call(breaker, FAILURE, 0)
    assert breaker.state(0) is OPEN
    call(breaker, SUCCESS, 60, times=299)
    assert breaker.state(60) is HALF_OPEN
    call(breaker, SUCCESS, 60)
    assert breaker.state(60) is CLOSED


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


def test_its_status_says_all_of_it_and_its_parts_go_by_name() -> None:
    breaker = CircuitBreaker(name="search-service", config=None, on_change=None)
    none = {"failure_count": 0, "recent_failures": 0, "total_calls": 0, "recent_calls": 0, "refused_calls": 0}
    assert breaker.status(now=0) == {"state": "closed", **none, "times_opened": 0, "retry_after": 0}
    for _ in range(5):
        permit_of(breaker, 0).finish_abandoned(now=0, caller=f"user:{breaker.total_calls}", waited=31)
    refusal_of(breaker, 0)
    refusal_of(breaker, 0)
    some = {"failure_count": 5, "recent_failures": 5, "total_calls": 5, "recent_calls": 5, "refused_calls": 2}
    assert breaker.status(now=0.0002) == {"state": "open", **some, "times_opened": 1, "retry_after": 60}
    assert breaker.status(now=0.0012)["retry_after"] == 59.999


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
        leaves("user:hastier", 0.125)
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


def test_the_picture_shows_the_transitions_of_the_table_and_no_others() -> None:
    docs = Path(__file__).parent.parent / "docs"
    picture = (docs / "circuit-breaker.svg").read_text()
    arrows = re.findall(r'data-from="(\w+)" data-to="(\w+)" data-event="(\w+)"', picture)
    assert sorted(arrows) == sorted((old, new, event) for (old, event), new in TRANSITIONS.items())
    assert picture == runpy.run_path(str(docs / "draw.py"))["circuit_breaker"](), "python docs/draw.py"
    named = set(re.findall(r"^\| `(\w+)` \|", (docs / "circuit-breaker.md").read_text(), re.MULTILINE))
    assert named == set(Event), "docs/circuit-breaker.md says what each event means"


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
        ({"timeout": -1}, "timeout"),
        ({"timeout": inf}, "timeout"),
        ({"timeout": "60"}, "timeout"),
        ({"window_size": 0}, "window_size"),
        ({"min_failure_ratio": 1.1}, "min_failure_ratio"),
        ({"min_failure_ratio": -0.1}, "min_failure_ratio"),
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
    with pytest.raises(AttributeError):
        config.timeout = 30  # type: ignore[misc]  # that it is refused is the point


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


@pytest.mark.parametrize(("age", "state"), [(4.875, OPEN), (5, CLOSED), (6, CLOSED)])
def test_a_fresh_failure_of_its_own_bears_an_alarm_out_at_once(age: float, state: State) -> None:
    breaker = CircuitBreaker("search-service")
    call(breaker, FAILURE, 10)
    breaker.heard_alarm(10 + age)
    assert breaker.state(10 + age) is state


@pytest.mark.parametrize(("after", "state"), [(59.875, OPEN), (60, CLOSED), (60.125, CLOSED)])
def test_an_alarm_lasts_a_minute(after: float, state: State) -> None:
    breaker = CircuitBreaker("search-service")
    breaker.heard_alarm(10)
    call(breaker, FAILURE, 10 + after)
    assert breaker.state(10 + after) is state


@pytest.mark.parametrize(("again", "state"), [(59.875, OPEN), (60, CLOSED), (60.125, CLOSED)])
def test_a_later_alarm_prolongs_it_while_it_lasts_and_begins_it_anew_thereafter(again: float, state: State) -> None:
    breaker = CircuitBreaker("search-service")
    breaker.heard_alarm(10)
    slow = permit_of(breaker, 11)
    breaker.heard_alarm(10 + again)
    slow.finish(FAILURE, 100)
    assert breaker.state(100) is state


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


# --- the naive model


class Model:
    """The same rules, written for the eye alone: everything is recounted whenever it is asked for."""

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.config = config
        self.lease = min(config.timeout, 30)
        self.now = 0.0
        self.total = self.refused = 0
        self.changes: list[tuple[State, State, Event]] = []
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

    def open(self, why: Event) -> None:
        self.changes.append((self.state(), OPEN, why))
        self.new_generation(forget=False)
        self.opened_at = self.now

    def close(self, why: Event) -> None:
        if self.state() is not CLOSED:
            self.changes.append((self.state(), CLOSED, why))
        self.new_generation(forget=True)

    def conclude(self, number: int, began: float, outcome: Outcome, caller: str | None = None) -> None:
        was_probe = number in self.probes or self.state() is HALF_OPEN
        self.probes.pop(number, None)
        if outcome is NEUTRAL:
            return
        failed = outcome is FAILURE
        self.outcomes.append((self.now, failed, caller if failed else None))
        if was_probe:
            if failed:
                self.open(Event.PROBE_FAILED)
            else:
                self.successes += 1
                if self.successes >= self.config.success_threshold:
                    self.close(Event.RECOVERED)
            return
        threshold, ratio = self.config.failure_threshold, self.config.min_failure_ratio
        enough = self.failures() >= threshold and self.failures() / len(self.window()) >= ratio
        if failed and (self.run() >= threshold or enough):
            self.open(Event.TRIPPED)
        elif self.alarm is not None and self.now < self.alarm[1] and began >= self.alarm[0]:
            self.alarm = None
            if failed:
                self.open(Event.ALARMED)

    def hear_alarm(self) -> None:
        if self.state() is CLOSED:
            window = self.window()
            if window and window[-1][1] and self.now - window[-1][0] < 5:
                self.open(Event.ALARMED)
            else:
                self.await_own_outcome()

    def hear_closing(self) -> None:
        if self.state() is HALF_OPEN:
            self.close(Event.PEER_RECOVERED)
            self.await_own_outcome()

    def await_own_outcome(self) -> None:
        running = self.alarm is not None and self.now < self.alarm[1]
        self.alarm = (self.alarm[0] if running and self.alarm else self.now, self.now + 60)


class Held:
    """A permit in flight, and what the model knows of it."""

    def __init__(self, permit: Permit, number: int, generation: object) -> None:
        self.permit, self.number, self.generation = permit, number, generation


class Pair:
    """The breaker and its model, led through the same history."""

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.breaker = CircuitBreaker("search-service", config, on_change=self.note)
        self.model = Model(config)
        self.held: list[Held] = []
        self.changes: list[tuple[State, State, Event]] = []

    def note(self, old: State, new: State, why: Event) -> None:
        self.changes.append((old, new, why))

    def do(self, name: str, *arguments: Any) -> None:
        """One step of a history, a method's name and arguments; to finish a call where there is none is nothing."""
        if name in ("finish", "abandon", "pass_early", "lose"):
            if not self.held:
                return
            arguments = (arguments[0] % len(self.held), *arguments[1:])
        getattr(self, name)(*arguments)

    def twin(self) -> CircuitBreaker:
        """The breaker once more, to try things with."""
        self.breaker.on_change = None
        twin = deepcopy(self.breaker)
        self.breaker.on_change = self.note
        return twin

    def acquire(self) -> None:
        model = self.model
        admits, state, lease = model.admits(), model.state(), model.lease
        given = self.breaker.acquire(model.now)
        if isinstance(given, Refusal):
            model.refused += 1
            assert not admits
            assert given.state is state
            assert given.retry_after > 0
            if state is HALF_OPEN:
                assert given.retry_after <= lease
            return
        assert admits
        assert given.probe == (state is HALF_OPEN)
        model.total += 1
        if given.probe:
            model.probes[model.total] = model.now
        self.held.append(Held(given, model.total, model.generation))

    def finish(self, index: int, outcome: Outcome, *, again: bool = False) -> None:
        held = self.held.pop(index)
        held.permit.finish(outcome, self.model.now)
        if again:
            held.permit.finish(FAILURE, self.model.now)
        if held.generation is self.model.generation:
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

    def lose(self, index: int) -> None:
        del self.held[index]  # a call that hangs or crashes, and never finishes its permit

    def advance(self, seconds: float) -> None:
        self.model.now += seconds

    def rest(self, times: int) -> None:
        self.model.now += times * self.model.config.timeout

    def reset(self) -> None:
        self.breaker.reset(self.model.now)
        self.model.close(Event.RESET)

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
        assert status["refused_calls"] == model.refused
        assert status["times_opened"] == sum(new is OPEN for _, new, _ in model.changes)
        assert status["retry_after"] == round(wait, 3)
        assert status["recent_failures"] == model.failures()
        assert status["recent_calls"] == len(model.window())
        assert status["failure_count"] == model.run()
        assert len(breaker._window) <= model.config.window_size
        assert len(breaker._leases) <= model.config.success_threshold
        assert breaker._gave_up == {who for _, _, who in model.window() if who is not None}
        assert [change for change in self.changes if change[2] is not Event.RESTED] == model.changes

    def look_ahead(self) -> None:
        """What it says is what the next ``acquire`` does (P6); half-open, that is a permit within a lease (P3)."""
        now, state, wait = self.model.now, self.breaker.state(self.model.now), self.breaker.retry_after(self.model.now)
        given = self.twin().acquire(now)
        if isinstance(given, Refusal):
            assert (given.state, given.retry_after) == (state, wait)
            assert isinstance(self.twin().acquire(now + wait - 1 / 16), Refusal)
        else:
            assert wait == 0
            assert given.probe == (state is HALF_OPEN)
        assert isinstance(self.twin().acquire(now + wait), Permit)
        if state is HALF_OPEN:
            assert isinstance(self.twin().acquire(now + self.model.lease), Permit)


CONFIGS = st.builds(
    CircuitBreakerConfig,
    failure_threshold=st.integers(1, 4),
    success_threshold=st.integers(1, 3),
    timeout=st.sampled_from([0.5, 2, 40, 60]),
    window_size=st.integers(1, 8),
    min_failure_ratio=st.sampled_from([0, 0.2, 0.5, 1]),
)
INDEX = st.integers(0, 5)  # of a call in flight
WAITS = st.sampled_from([0.125, 0.5, 1, 5, 30])
STEPS = st.one_of(
    st.just(("acquire",)),
    st.just(("acquire",)),
    st.tuples(st.just("finish"), INDEX, st.sampled_from(Outcome)),
    st.tuples(st.just("finish"), INDEX, st.sampled_from(Outcome)),
    st.tuples(st.just("abandon"), INDEX, st.sampled_from("ab"), st.sampled_from([30, 30.125])),
    st.tuples(st.just("pass_early"), INDEX),
    st.tuples(st.just("lose"), INDEX),
    st.tuples(st.just("advance"), WAITS),
    st.tuples(st.just("rest"), st.sampled_from([1, 1, 1, 10])),
    st.sampled_from([("reset",), ("hear_alarm",), ("hear_closing",)]),
)
BREAKS = [step for _ in range(4) for step in (("acquire",), ("finish", -1, FAILURE))]
BEGINNINGS: list[list[tuple[Any, ...]]] = [
    [],
    [("acquire",), ("acquire",), *BREAKS],  # open, with calls in flight from before
    [("acquire",), *BREAKS, ("rest", 1)],  # half-open
    [("acquire",), *BREAKS, ("rest", 1), ("acquire",), ("acquire",)],  # with probes out
]
HISTORIES = st.builds(lambda beginning, steps: beginning + steps, st.sampled_from(BEGINNINGS), st.lists(STEPS))
WAYS: list[Callable[[Permit, float], object]] = [
    lambda permit, now: permit.finish(SUCCESS, now),
    lambda permit, now: permit.finish(FAILURE, now),
    lambda permit, now: permit.finish(NEUTRAL, now),
    lambda permit, now: permit.finish_abandoned(now, caller="c", waited=31),
    lambda permit, now: permit.succeed_so_far(now),
]


def led(config: CircuitBreakerConfig, history: list[tuple[Any, ...]]) -> Iterator[Pair]:
    """The pair after each step."""
    pair = Pair(config)
    for step in history:
        pair.do(*step)
        yield pair


def at_the_end(config: CircuitBreakerConfig, history: list[tuple[Any, ...]]) -> Pair:
    return [Pair(config), *led(config, history)][-1]


def inside(pair: Pair) -> dict[str, Any]:
    """All that the breaker is, what is too old forgotten."""
    pair.breaker.status(pair.model.now)
    return {name: copy(value) for name, value in vars(pair.breaker).items()}


@given(CONFIGS, HISTORIES)
def test_p1_nothing_passes_while_it_is_open_before_its_timeout(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for pair in led(config, history):
        if pair.model.state() is OPEN:
            assert pair.model.opened_at is not None
            assert isinstance(pair.twin().acquire(pair.model.now), Refusal)
            assert isinstance(pair.twin().acquire(pair.model.opened_at + config.timeout - 1 / 16), Refusal)
            assert isinstance(pair.twin().acquire(pair.model.opened_at + config.timeout), Permit)


@given(CONFIGS, HISTORIES)
def test_p2_probes_within_their_lease_are_never_more_than_are_needed(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for pair in led(config, history):
        if pair.model.state() is HALF_OPEN:
            out, needed = len(pair.model.in_lease()), config.success_threshold - pair.model.successes
            assert out <= config.success_threshold
            twin = pair.twin()
            given = [twin.acquire(pair.model.now) for _ in range(config.success_threshold + 1)]
            assert sum(isinstance(each, Permit) for each in given) == max(0, needed - out)


@given(CONFIGS, HISTORIES)
def test_p3_half_open_it_gives_a_permit_within_one_lease_and_a_sound_service_closes_it(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for pair in led(config, history):
        now, lease = pair.model.now, pair.model.lease
        if pair.model.state() is HALF_OPEN:
            assert isinstance(pair.twin().acquire(now + lease), Permit)
    pair = at_the_end(config, history)
    twin, began, now = pair.twin(), pair.model.now, pair.model.now
    for _ in range(config.success_threshold):
        now += twin.retry_after(now)
        permit = twin.acquire(now)
        assert isinstance(permit, Permit)
        permit.finish(SUCCESS, now)
    assert twin.state(now) is CLOSED
    assert now - began <= config.timeout + config.success_threshold * pair.model.lease


@given(CONFIGS, HISTORIES)
def test_p4_no_outcome_of_an_older_generation_has_an_effect(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    pair = at_the_end(config, history)
    late = [held.permit for held in pair.held if held.generation is not pair.model.generation]
    event(f"calls of an older generation: {min(len(late), 3)}")
    for permit, way in zip(late, cycle(WAYS), strict=False):
        before = inside(pair)
        way(permit, pair.model.now)
        assert inside(pair) == before


@given(CONFIGS, HISTORIES)
def test_p5_a_permit_has_one_outcome_at_most_whatever_it_is_told_later(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for first, second in product(WAYS, WAYS):
        pair = at_the_end(config, history)
        for held in pair.held[:2]:
            first(held.permit, pair.model.now)
            once = inside(pair)
            second(held.permit, pair.model.now)
            assert inside(pair) == once


@given(CONFIGS, HISTORIES)
def test_p6_what_it_says_is_what_the_next_acquire_does(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for pair in led(config, history):
        pair.look_ahead()


@given(CONFIGS, HISTORIES)
def test_p7_the_counts_of_its_window_equal_a_recount(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]]
) -> None:
    for pair in led(config, history):
        window, status = pair.model.window(), pair.breaker.status(pair.model.now)
        assert status["recent_calls"] == len(window) <= config.window_size
        assert status["recent_failures"] == sum(failed for _, failed, _ in window)
        row = "".join("f" if failed else "s" for _, failed, _ in window)
        assert status["failure_count"] == len(row) - len(row.rstrip("f"))


@given(CONFIGS, HISTORIES, st.sampled_from(WAYS))
def test_p8_after_a_reset_it_is_closed_and_empty_whatever_is_in_flight(
    config: CircuitBreakerConfig, history: list[tuple[Any, ...]], way: Callable[[Permit, float], object]
) -> None:
    pair = at_the_end(config, history)
    pair.reset()
    fresh = {"state": "closed", "failure_count": 0, "recent_failures": 0, "recent_calls": 0, "retry_after": 0}
    assert fresh.items() <= pair.breaker.status(pair.model.now).items()
    empty = inside(pair)
    for held in pair.held:
        way(held.permit, pair.model.now)
    assert inside(pair) == empty
    assert empty.items() >= {"_leases": {}, "_gave_up": set(), "_alarmed_at": None}.items()
    assert not empty["_window"]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=60),
    st.integers(1, 6),
    st.integers(1, 10),
)
def test_p9_with_ratio_0_it_opens_at_exactly_so_many_failures_among_the_last_calls(
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


# --- against the naive model, step by step

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
        self.pair.lose(0)

    @rule(seconds=st.sampled_from([0.125, 0.5, 1, 5, 30]))
    def wait(self, seconds: float) -> None:
        self.pair.advance(seconds)

    @rule(part=st.sampled_from([1, 1, 1, 10]))
    def wait_for_the_timeout(self, part: int) -> None:
        self.pair.rest(part)

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
            event(f"state: {self.pair.model.state()}")
            self.pair.compare()
            self.pair.look_ahead()


def test_it_does_what_the_naive_model_does_and_is_half_open_often() -> None:
    seen.clear()
    run_state_machine_as_test(
        BreakerMachine, settings=settings(max_examples=200, stateful_step_count=40, deadline=None)
    )
    logger.info("Steps of random histories by the state they led to: %s", dict(seen))
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
