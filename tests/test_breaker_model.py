"""Breakers that hear of one another (RESILIENCE.md, 1, "Fleet"): every history of two, and ten of them by chance."""

import logging
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any, NamedTuple

import pytest

from gateway.policies.circuit_breaker import (
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
logger = logging.getLogger(__name__)  # what was found: `pytest --log-cli-level=INFO tests/test_breaker_model.py`

# What a worker tells the others, and the method by which they hear it. What it does at their word is not told on.
TOLD = {Event.TRIPPED: "heard_alarm", Event.PROBE_FAILED: "heard_alarm", Event.RECOVERED: "heard_closing"}


# --- every history of two workers

TIMEOUT, LEASE = 60.0, 30.0  # seconds; a window's memory is ten timeouts, which no history here lasts
CALLS = 3  # in flight at a time, of both workers together
STEPS = 8  # from each beginning
Step = tuple[Any, ...]  # a method of Fleet, and its arguments
History = tuple[Step, ...]


class Call(NamedTuple):
    permit: Permit
    era: int  # the worker's when it began


class Message(NamedTuple):
    to: int
    heard: str


class Worker:
    """A breaker, and what an onlooker who knows the rules but not the code has noted of it."""

    def __init__(self, config: CircuitBreakerConfig, fleet: "Fleet", number: int) -> None:
        self.fleet, self.number = fleet, number
        self.breaker = CircuitBreaker("search-service", config, on_change=self.changed)
        self.calls: list[Call] = []
        self.era = 0
        self.opened_at: float | None = None
        self.last_failed_at: float | None = None  # None also where the last outcome was a success
        self.heard_at: float | None = None  # when it first heard of its peer in this era
        self.ending: Permit | None = None
        self.successes = 0  # of probes, since it opened
        self.probes: dict[Permit, float] = {}  # of this era, unfinished: when they began

    def changed(self, old: State, new: State, why: Event) -> None:
        if why is Event.ALARMED and self.ending is not None:
            assert self.heard_at is not None
            assert self.ending.began >= self.heard_at, "opened by a call from before the alarm"
        self.era += 1
        self.heard_at = None
        self.successes = 0
        self.probes.clear()
        if new is OPEN:
            assert self.last_failed_at is not None, "opened without a failure of its own"
            assert self.fleet.now - self.last_failed_at < 5
            self.opened_at = self.fleet.now
        elif new is CLOSED:
            self.opened_at = self.last_failed_at = None
        if why in TOLD:
            self.fleet.bus.add(Message(1 - self.number, TOLD[why]))

    def state(self) -> State:
        if self.opened_at is None:
            return CLOSED
        return OPEN if self.fleet.now < self.opened_at + TIMEOUT else HALF_OPEN

    def in_lease(self) -> int:
        return sum(self.fleet.now < began + LEASE for began in self.probes.values())

    def inside(self) -> tuple[Any, ...]:
        """All that can make a difference to what the breaker does from now on, in seconds from now."""
        breaker, now = self.breaker, self.fleet.now
        if breaker._state is CLOSED:
            alarmed = breaker._alarmed_at is not None and now < breaker._alarm_ends
            return (
                "closed",
                tuple(failed for _, failed, _ in breaker._window),
                self.last_failed_at is not None and now - self.last_failed_at < 5,
                breaker._alarm_ends - now if alarmed else 0,
            )
        if breaker._state is OPEN:
            return ("open", max(0, breaker._half_open_at - now))
        leases = sorted(max(0, ends - now) for ends in breaker._leases.values())
        return ("half-open", breaker._successes, *leases)

    def kind(self, call: Call) -> tuple[Any, ...]:
        """All that can make a difference to what becomes of a call: two of a kind need not both be tried."""
        breaker, permit = self.breaker, call.permit
        if call.era != self.era:
            return ("late",)
        if permit.probe:
            return ("probe", max(0, breaker._leases.get(permit, 0) - self.fleet.now))
        return ("call", breaker._alarmed_at is not None and permit.began >= breaker._alarmed_at)

    def key(self) -> tuple[Any, ...]:
        return (self.inside(), tuple(sorted(self.kind(call) for call in self.calls)))


class Fleet:
    """Two workers and the bus between them. Each step checks what must hold of it.

    A message not delivered yet is one delayed, and one that is never delivered in a history is one dropped there.
    """

    def __init__(self, config: CircuitBreakerConfig) -> None:
        self.config = config
        self.now = 0.0
        self.checking = True
        self.bus: set[Message] = set()
        self.workers = [Worker(config, self, 0), Worker(config, self, 1)]

    def key(self) -> tuple[Any, ...]:
        """The same for fleets that can't behave differently; which worker is which makes no difference either."""
        return min(
            (first.key(), second.key(), tuple(sorted((to != first.number, heard) for to, heard in self.bus)))
            for first, second in (self.workers, self.workers[::-1])
        )

    def steps(self) -> Iterator[tuple[Any, ...]]:
        for number, worker in enumerate(self.workers):
            if sum(len(each.calls) for each in self.workers) < CALLS:
                yield ("begin", number)
            met = set()
            for index, call in enumerate(worker.calls):
                if worker.kind(call) not in met:
                    met.add(worker.kind(call))
                    yield from (("end", number, index, outcome) for outcome in Outcome)
                    yield ("hang", number, index)
            yield ("crash", number)
        yield from (("deliver", *message) for message in self.bus)
        yield from (("wait", seconds) for seconds in (LEASE, TIMEOUT))

    def do(self, step: tuple[Any, ...]) -> None:
        name, *arguments = step
        getattr(self, name)(*arguments)

    def begin(self, number: int) -> None:
        worker = self.workers[number]
        state, free = worker.state(), worker.in_lease() < self.config.success_threshold - worker.successes
        given = worker.breaker.acquire(self.now)
        if isinstance(given, Refusal):
            assert state is OPEN or (state is HALF_OPEN and not free)
            return
        assert state is not OPEN, "P1"
        assert given.probe == (state is HALF_OPEN)
        if given.probe:
            assert free, "P2"
            worker.probes[given] = self.now
        worker.calls.append(Call(given, worker.era))

    def end(self, number: int, index: int, outcome: Outcome) -> None:
        worker = self.workers[number]
        permit, era = worker.calls.pop(index)
        counts = era == worker.era
        before, told = self.seen(), len(self.bus)
        if counts:
            worker.probes.pop(permit, None)
            if outcome is not NEUTRAL:
                worker.last_failed_at = self.now if outcome is FAILURE else None
                worker.successes += permit.probe and outcome is SUCCESS
        worker.ending = permit
        permit.finish(outcome, self.now)
        worker.ending = None
        assert counts or (self.seen(), len(self.bus)) == (before, told), "P4"
        after, told = self.seen(), len(self.bus)
        permit.finish(FAILURE, self.now)
        assert (self.seen(), len(self.bus)) == (after, told), "P5"

    def seen(self) -> list[tuple[Any, ...]]:
        if not self.checking:
            return []
        return [(worker.inside(), worker.era, worker.breaker.status(self.now)) for worker in self.workers]

    def hang(self, number: int, index: int) -> None:
        del self.workers[number].calls[index]  # nothing is heard of it any more

    def crash(self, number: int) -> None:
        self.workers[number] = Worker(self.config, self, number)

    def deliver(self, to: int, heard: str) -> None:
        worker, told = self.workers[to], len(self.bus)
        getattr(worker.breaker, heard)(self.now)
        if worker.heard_at is None:
            worker.heard_at = self.now
        assert len(self.bus) == told, "what a worker does at another's word is not told on"

    def wait(self, seconds: float) -> None:
        self.now += seconds


def after(config: CircuitBreakerConfig, history: History) -> Fleet:
    """A fleet led through a history, which has been checked already but for its last step."""
    fleet = Fleet(config)
    fleet.checking = False
    for step in history[:-1]:
        fleet.do(step)
    fleet.checking = True
    for step in history[-1:]:
        fleet.do(step)
    return fleet


FAILS = (("begin", 0), ("end", 0, 0, FAILURE))
PEER_FAILS = (("begin", 1), ("end", 1, 0, FAILURE))
OUTAGE = (*FAILS, *FAILS, ("deliver", 1, "heard_alarm"), *PEER_FAILS, ("wait", TIMEOUT))  # both are half-open then
BEGINNINGS: list[History] = [(), OUTAGE]


def look_ahead(config: CircuitBreakerConfig, history: History, number: int) -> None:
    """What a worker says of itself is what it does next (P6), and no probes hold one up beyond their lease (P3)."""

    def then(seconds: float) -> Permit | Refusal:
        fleet = after(config, history)
        return fleet.workers[number].breaker.acquire(fleet.now + seconds)

    fleet = after(config, history)
    breaker, state = fleet.workers[number].breaker, fleet.workers[number].state()
    wait = breaker.retry_after(fleet.now)
    assert breaker.state(fleet.now) is state, "P6"
    now = then(0)
    assert (now.state, now.retry_after) == (state, wait) if isinstance(now, Refusal) else wait == 0, "P6"
    assert isinstance(then(wait), Permit), "P6"
    assert not wait or isinstance(then(wait - 1), Refusal), "P6"
    assert state is not HALF_OPEN or isinstance(then(LEASE), Permit), "P3"


@pytest.mark.parametrize("success_threshold", [1, 2])
def test_every_history_of_two_workers_keeps_p1_to_p6(success_threshold: int) -> None:
    config = CircuitBreakerConfig(2, success_threshold, TIMEOUT, window_size=4)
    met = {after(config, history).key() for history in BEGINNINGS}
    states: Counter[State] = Counter()
    transitions = 0
    frontier = BEGINNINGS
    for _ in range(STEPS):
        following: list[History] = []
        for history in frontier:
            for step in after(config, history).steps():
                transitions += 1
                longer = (*history, step)
                fleet = after(config, longer)
                key = fleet.key()
                if key not in met:
                    met.add(key)
                    following.append(longer)
                    for worker in fleet.workers:
                        states[worker.state()] += 1
                        look_ahead(config, longer, worker.number)
        frontier = following
    logger.info("%d states of two workers, met in %d steps; of each worker: %s", len(met), transitions, dict(states))
    assert states[HALF_OPEN] > sum(states.values()) / 5, states


# --- ten workers, by chance


class TenWorkers:
    """They call one service now and then, each call over at once, and what one tells reaches the others a little later.

    Attributes:
        failures: when a call failed, and which worker's.
        openings: when a breaker opened, and whose.
        heard_first_at: when the first message arrived.
    """

    def __init__(self, seed: int, *, error_rate: float) -> None:
        self.chance, self.error_rate = Random(seed), error_rate
        self.now = 0.0
        self.failures: list[tuple[float, int]] = []
        self.openings: list[tuple[float, int]] = []
        self.heard_first_at: float | None = None
        self.under_way: list[tuple[float, int, str]] = []  # messages: when they arrive, from whom, what
        self.breakers = [self.breaker(number) for number in range(10)]

    def breaker(self, number: int) -> CircuitBreaker:
        def changed(old: State, new: State, why: Event) -> None:
            if new is OPEN:
                self.openings.append((self.now, number))
            if why in TOLD:
                self.under_way.append((self.now + self.chance.uniform(0.001, 0.1), number, TOLD[why]))

        return CircuitBreaker("search-service", on_change=changed)

    def call(self, number: int, *, fails: bool) -> None:
        permit = self.breakers[number].acquire(self.now)
        if isinstance(permit, Permit):
            if fails:
                self.failures.append((self.now, number))
            permit.finish(FAILURE if fails else SUCCESS, self.now)

    def work(self, seconds: float) -> None:
        """Let each make about a call a second, at any moment."""
        end = self.now + seconds
        while (next_call := self.now + self.chance.expovariate(10)) < end:
            for message in sorted(self.under_way):
                if message[0] <= next_call:
                    self.hear(*message)
                    self.under_way.remove(message)
            self.now = next_call
            self.call(self.chance.randrange(10), fails=self.chance.random() < self.error_rate)
        self.now = end

    def hear(self, at: float, source: int, what: str) -> None:
        self.now = at
        self.heard_first_at = self.heard_first_at or at
        for number, breaker in enumerate(self.breakers):
            if number != source:
                getattr(breaker, what)(at)


def test_a_false_alarm_about_a_service_with_1_percent_errors_opens_less_than_one_further_breaker() -> None:
    trials, further = 200, Counter[int]()
    for seed in range(trials):
        workers = TenWorkers(seed, error_rate=0.01)
        workers.work(10)
        for _ in range(5):
            workers.call(0, fails=True)  # for a reason that is this worker's alone
        workers.work(180)
        assert (10, 0) in workers.openings
        further[sum(number != 0 for _, number in workers.openings)] += 1
    mean = sum(openings * times for openings, times in further.items()) / trials
    logger.info("A false alarm opened %.2f further breakers on average; by trials: %s", mean, dict(further))
    assert 0 < mean < 0.5


def test_a_dead_service_opens_all_ten_and_costs_those_who_were_warned_one_failed_call_at_most() -> None:
    trials = 200
    before = after = alone = 0
    for seed in range(trials):
        workers = TenWorkers(seed, error_rate=1)
        workers.work(30)
        assert {number for _, number in workers.openings} == set(range(10))
        assert workers.heard_first_at is not None
        first = workers.openings[0][1]
        warned = [number for at, number in workers.failures if at > workers.heard_first_at]
        assert len(warned) == len(set(warned))
        after += len(warned)
        before += sum(number != first for _, number in workers.failures) - len(warned)

        idle = TenWorkers(seed, error_rate=1)
        for _ in range(5):
            idle.call(0, fails=True)
        idle.work(30)
        assert {number for _, number in idle.openings} == set(range(10))
        alone += len(idle.failures) - 5
    calls = [failed / trials / 9 for failed in (before, after, alone)]
    logger.info(
        "Each further worker had %.2f failed calls before the alarm, %.2f after it, idle until then %.2f", *calls
    )
    assert sum(calls[:2]) < 3  # of the five that it takes alone
    assert 0.95 < calls[2] < 1.05
