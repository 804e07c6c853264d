"""Which replica a request goes to (RESILIENCE.md, 5)."""

import random
from collections import Counter
from heapq import heappop, heappush

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gateway.policies.circuit_breaker import Outcome
from gateway.policies.replicas import Place, Replicas

SUCCESS, FAILURE, NEUTRAL = Outcome
A, B, C, D = (f"http://recommender-{number}:8001" for number in range(4))


def replicas_of(*addresses: str, seed: int = 0) -> Replicas:
    return Replicas(addresses, random.Random(seed).random)


def fail(replicas: Replicas, address: str, now: float, times: int = 3) -> None:
    others = {replica.address for replica in replicas._all} - {address}
    for _ in range(times):
        place = replicas.choose(now, avoid=others)
        assert place.address == address
        place.finish(FAILURE, now)


def shares(replicas: Replicas, now: float, calls: int = 400) -> Counter[str]:
    chosen: Counter[str] = Counter()
    for _ in range(calls):
        place = replicas.choose(now)
        chosen[place.address] += 1
        place.finish(SUCCESS, now)
    return chosen


def set_aside(replicas: Replicas, now: float) -> set[str]:
    return {str(replica["address"]) for replica in replicas.status(now) if replica["set_aside"]}


# --- choosing


def test_the_only_replica_is_chosen_however_it_does() -> None:
    replicas = replicas_of(A)
    for now in range(100):
        place = replicas.choose(now, avoid=(A,))
        assert place.address == A
        place.finish(FAILURE, now)
    assert replicas.status(100) == [{"address": A, "in_flight": 0, "failure_count": 100, "set_aside": False}]


def test_of_two_the_one_with_fewer_in_flight_is_chosen() -> None:
    replicas = replicas_of(A, B)
    chosen = Counter(replicas.choose(0).address for _ in range(100))
    assert chosen == {A: 50, B: 50}


def test_ties_are_broken_by_chance() -> None:
    chosen = shares(replicas_of(A, B, C), 0, calls=900)
    assert all(250 < chosen[address] < 350 for address in (A, B, C))


def test_a_retry_goes_elsewhere_where_there_is_an_elsewhere() -> None:
    replicas = replicas_of(A, B, C)
    assert {replicas.choose(0, avoid=(A,)).address for _ in range(50)} == {B, C}
    assert {replicas.choose(0, avoid=(A, B, C)).address for _ in range(50)} == {A, B, C}


def test_a_failed_attempt_keeps_its_place_for_a_second() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0, times=1)
    assert shares(replicas, 0.99) == {B: 400}
    assert set(shares(replicas, 1)) == {A, B}


def test_a_place_is_given_back_once() -> None:
    replicas = replicas_of(A, B)
    place = replicas.choose(0)
    for outcome in (NEUTRAL, FAILURE, SUCCESS):
        place.finish(outcome, 0)
    assert [replica["in_flight"] for replica in replicas.status(2)] == [0, 0]


def test_a_service_without_addresses_or_with_one_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        replicas_of()
    with pytest.raises(ValueError, match="once"):
        replicas_of(A, A)


# --- setting aside


def test_three_failures_in_a_row_set_a_replica_aside_for_ten_seconds() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    assert set_aside(replicas, 0) == {A}
    assert shares(replicas, 9.99) == {B: 400}
    trial = replicas.choose(10)
    assert (trial.address, trial.trial) == (A, True)
    assert shares(replicas, 11) == {B: 400}  # while the trial lasts
    trial.finish(SUCCESS, 12)
    assert set_aside(replicas, 12) == set()


def test_a_success_between_failures_keeps_it_in_service() -> None:
    replicas = replicas_of(A, B)
    for _ in range(10):
        fail(replicas, A, 0, times=2)
        replicas.choose(0, avoid=(B,)).finish(SUCCESS, 0)
    assert set_aside(replicas, 0) == set()


def test_each_failed_trial_doubles_the_time_up_to_five_minutes() -> None:
    replicas, now = replicas_of(A, B), 0.0
    fail(replicas, A, now)
    for seconds in (10, 20, 40, 80, 160, 300, 300):
        assert not replicas.choose(now + seconds - 0.01).trial
        now += seconds
        trial = replicas.choose(now)
        assert trial.trial
        trial.finish(FAILURE, now)


def test_a_full_recovery_starts_the_doubling_anew() -> None:
    replicas, now = replicas_of(A, B), 0.0
    for _ in range(3):
        fail(replicas, A, now)
        now += 10
        trial = replicas.choose(now)
        assert trial.trial
        trial.finish(SUCCESS, now)
        now += 30
        assert set(shares(replicas, now)) == {A, B}


def test_one_that_fails_while_it_ramps_up_is_set_aside_for_longer() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    replicas.choose(10).finish(SUCCESS, 10)
    fail(replicas, A, 20)
    assert not replicas.choose(39.99).trial
    assert replicas.choose(40).trial


def test_a_trial_that_tells_nothing_is_followed_by_another() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    replicas.choose(10).finish(NEUTRAL, 10)
    assert replicas.choose(10).trial


def test_a_trial_that_hangs_is_followed_by_another_and_still_counts() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    slow = replicas.choose(10)
    assert not replicas.choose(39.99).trial
    assert replicas.choose(40).trial
    slow.finish(SUCCESS, 45)
    assert set_aside(replicas, 45) == set()


def test_an_attempt_from_before_neither_brings_it_back_nor_keeps_it_away() -> None:
    replicas = replicas_of(A, B)
    old = [replicas.choose(0, avoid=(B,)) for _ in range(5)]
    fail(replicas, A, 0)
    trial = replicas.choose(10)
    old.pop().finish(SUCCESS, 10)
    assert set_aside(replicas, 10) == {A}
    trial.finish(SUCCESS, 11)
    for place in old:
        place.finish(FAILURE, 12)
    assert set_aside(replicas, 12) == set()


def test_a_retry_is_never_a_trial() -> None:
    replicas = replicas_of(A, B, C)
    fail(replicas, A, 0)
    assert not replicas.choose(10, avoid=(B,)).trial
    assert replicas.choose(10).trial


def test_one_that_came_back_gets_its_share_by_and_by() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    replicas.choose(10).finish(SUCCESS, 10)
    early, middle, late = (shares(replicas, now)[A] for now in (13, 25, 40))
    assert early < 40 < 60 < middle < 140 < 160 < late < 240  # of 400: a tenth of its half, half of it, all of it


@pytest.mark.parametrize(("count", "at_most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3)])
def test_never_more_than_half_are_set_aside(count: int, at_most: int) -> None:
    replicas = replicas_of(*(f"http://recommender-{number}:8001" for number in range(count)))
    for now in range(9):
        for _ in range(100):
            replicas.choose(now).finish(FAILURE, now)
    assert len(set_aside(replicas, 9)) == at_most


def test_one_that_fails_fast_gets_no_more_than_its_fair_share() -> None:
    chance = random.Random(1)
    replicas = Replicas((A, B, C), chance.random)
    chosen: Counter[str] = Counter()
    in_flight: list[tuple[float, int, Place]] = []
    for number in range(20_000):  # 500 a second; A answers at once, mostly with an error, the others take 300 ms
        now = number / 500
        while in_flight and in_flight[0][0] <= now:
            until, _, done = heappop(in_flight)
            done.finish(SUCCESS, until)
        place = replicas.choose(now)
        chosen[place.address] += 1
        if place.address == A:
            place.finish(FAILURE if chance.random() < 0.6 else SUCCESS, now)
        else:
            heappush(in_flight, (now + 0.3, number, place))
    assert chosen[A] <= 20_000 / 3


# --- any history


class ReplicasMachine(RuleBasedStateMachine):
    @initialize(count=st.integers(1, 5), seed=st.integers(0, 100))
    def start(self, count: int, seed: int) -> None:
        self.addresses = [f"http://vision-{number}:8007" for number in range(count)]
        self.replicas = replicas_of(*self.addresses, seed=seed)
        self.now = 0.0
        self.held: list[Place] = []
        self.lingering: list[tuple[float, str]] = []

    @rule(data=st.data())
    def choose(self, data: st.DataObject) -> None:
        avoid = data.draw(st.sets(st.sampled_from(self.addresses)))
        aside = set_aside(self.replicas, self.now)
        place = self.replicas.choose(self.now, avoid)
        assert place.trial == (place.address in aside)
        if set(self.addresses) - aside - avoid and not place.trial:
            assert place.address not in avoid
        self.held.append(place)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        self.conclude(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))), outcome)

    @rule(outcome=st.sampled_from([FAILURE, FAILURE, SUCCESS]), times=st.integers(1, 12))
    def call(self, outcome: Outcome, times: int) -> None:
        for _ in range(times):
            self.conclude(self.replicas.choose(self.now), outcome)

    def conclude(self, place: Place, outcome: Outcome) -> None:
        place.finish(outcome, self.now)
        if outcome is FAILURE and len(self.addresses) > 1:
            self.lingering.append((self.now + 1, place.address))

    @rule(seconds=st.sampled_from([0.5, 1, 10, 30, 300]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_more_than_half_are_aside_and_each_of_them_is_tried_again(self) -> None:
        if hasattr(self, "replicas"):
            aside = self.replicas._aside
            assert 2 * len(aside) <= len(self.addresses)  # B1
            for replica in aside:  # B2
                assert replica.aside_until is not None
                assert replica.aside_until <= self.now + 300
                assert replica.trial_until <= self.now + 30
            assert sorted(self.addresses) == sorted(replica.address for replica in [*aside, *self.replicas._in_service])

    @invariant()
    def every_place_is_accounted_for(self) -> None:
        if hasattr(self, "replicas"):
            held = Counter(place.address for place in self.held)
            held.update(address for until, address in self.lingering if until > self.now)
            for replica in self.replicas.status(self.now):
                assert replica["in_flight"] == held[str(replica["address"])]


def test_there_is_always_a_candidate_and_whatever_is_set_aside_is_tried_again() -> None:
    run_state_machine_as_test(
        ReplicasMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
