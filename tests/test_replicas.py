"""Which replica a request goes to (RESILIENCE.md, 5)."""

import random
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

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
    assert replicas.status(100) == [
        {
            "address": A,
            "state": "in_use",
            "in_flight": 0,
            "failure_count": 100,
            "set_aside": False,
            "retry_after": 0.0,
        }
    ]


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


def test_a_retry_goes_where_the_last_attempt_went_well() -> None:
    replicas = replicas_of(A, B, C)
    fail(replicas, B, 0, times=1)
    assert {replicas.choose(5, avoid=(A,)).address for _ in range(50)} == {C}
    assert {replicas.choose(5, avoid=(A, C)).address for _ in range(50)} == {B}


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


@given(
    count=st.integers(2, 5),
    a_second=st.sampled_from([5, 50, 500]),
    takes=st.sampled_from([0.01, 0.3, 5]),
    failing=st.sampled_from([0.6, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_failing_fast_attracts_no_traffic_whatever_the_load(
    count: int, a_second: int, takes: float, failing: float, seed: int
) -> None:
    chance, calls = random.Random(seed), 3000
    addresses = [f"http://vision-{number}:8007" for number in range(count)]
    replicas = Replicas(addresses, chance.random)
    chosen: Counter[str] = Counter()
    in_flight: list[tuple[float, int, Place]] = []
    for number in range(calls):
        now = number / a_second
        while in_flight and in_flight[0][0] <= now:
            until, _, done = heappop(in_flight)
            done.finish(SUCCESS, until)
        place = replicas.choose(now)
        chosen[place.address] += 1
        if place.address == addresses[0]:
            place.finish(FAILURE if chance.random() < failing else SUCCESS, now)
        else:
            heappush(in_flight, (now + takes, number, place))
    assert chosen[addresses[0]] <= calls / count  # B3


# --- half are set aside, and another fails


def half_aside() -> Replicas:
    """Three replicas, of which A is set aside, so that B has to stay."""
    replicas = replicas_of(A, B, C)
    fail(replicas, A, 0)
    return replicas


def test_one_that_has_to_stay_is_asked_the_less_the_longer_it_fails() -> None:
    replicas = half_aside()
    for _ in range(5):
        assert replicas.choose(0, avoid=(A, B)).address == C  # which has five in flight all the time
    asked = []
    for now in range(1, 9000):
        place = replicas.choose(now / 1000)
        if place.address == B:
            asked.append(now)
        place.finish(FAILURE if place.address == B else SUCCESS, now / 1000)
    assert set_aside(replicas, 9) == {A}
    assert 5 <= len(asked) <= 15  # not 5 a second
    assert asked[-1] > 5000  # but it is asked still


def test_one_that_has_to_stay_is_asked_again_soon_after_it_has_recovered() -> None:
    replicas = half_aside()
    fail(replicas, B, 0, times=50)
    assert shares(replicas, 9.9)[B] == 0
    assert shares(replicas, 10, calls=600)[B] > 0


def test_the_next_failure_sets_it_aside_once_there_is_room() -> None:
    replicas = half_aside()
    fail(replicas, B, 0, times=9)
    replicas.choose(10).finish(SUCCESS, 10)
    assert set_aside(replicas, 10) == set()
    fail(replicas, B, 10, times=1)
    assert set_aside(replicas, 10) == {B}


# --- trials


def test_a_trial_that_ends_late_does_not_make_way_for_a_third_beside_the_second() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    late, second = replicas.choose(10), replicas.choose(40)
    late.finish(NEUTRAL, 41)
    assert not replicas.choose(42).trial
    second.finish(NEUTRAL, 43)
    assert replicas.choose(43).trial


def test_a_trial_is_over_as_soon_as_its_answer_begins_well() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    trial = replicas.choose(10)
    trial.succeed_so_far(11)
    assert set_aside(replicas, 11) == set()
    trial.finish(FAILURE, 70)  # its end counts as any other's
    assert [replica["failure_count"] for replica in replicas.status(71)] == [1, 0]


def test_an_answer_that_began_well_before_its_replica_was_set_aside_does_not_bring_it_back() -> None:
    replicas = replicas_of(A, B)
    old = replicas.choose(0, avoid=(B,))
    fail(replicas, A, 0)
    old.succeed_so_far(1)
    old.finish(SUCCESS, 2)
    assert set_aside(replicas, 2) == {A}


def test_a_full_recovery_counts_although_there_was_nobody_to_be_compared_with() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    replicas.choose(10).finish(SUCCESS, 10)
    fail(replicas, B, 10)
    replicas.choose(11).finish(SUCCESS, 11)  # A alone, for as long as B is away
    replicas.choose(20).finish(SUCCESS, 3600)
    fail(replicas, A, 3600)
    assert replicas.status(3600)[0]["retry_after"] == 10


# --- a breaker's probes speak for the whole service


def test_a_probe_is_not_risked_on_a_trial() -> None:
    replicas = replicas_of(A, B, C)
    fail(replicas, A, 0)
    assert not any(replicas.choose(600, probe=True).trial for _ in range(20))
    assert replicas.choose(600).trial


def test_a_probe_is_a_trial_where_all_in_service_have_failed_theirs() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    probe = replicas.choose(60, probe=True)
    assert probe.address == B
    probe.finish(FAILURE, 60)
    trial = replicas.choose(120, probe=True)
    assert (trial.address, trial.trial) == (A, True)
    trial.finish(SUCCESS, 120)
    assert {replicas.choose(180, probe=True).address for _ in range(20)} == {A}  # B must do better first
    assert {replicas.choose(180).address for _ in range(90)} == {A, B}


def test_a_probe_that_failed_is_forgotten_after_a_success() -> None:
    replicas = replicas_of(A, B)
    fail(replicas, A, 0)
    replicas.choose(60, probe=True).finish(FAILURE, 60)
    replicas.choose(62, avoid=(A,)).finish(SUCCESS, 62)
    assert replicas.choose(120, probe=True).address == B


# --- what an operator sees


def test_the_status_says_what_each_replica_is_used_for() -> None:
    replicas = replicas_of(A, B)
    running = replicas.choose(0, avoid=(B,))
    fail(replicas, A, 0)
    first = replicas.status(4)[0]
    assert first == {
        "address": A,
        "state": "set_aside",
        "in_flight": 1,
        "failure_count": 3,
        "set_aside": True,
        "retry_after": 6.0,
    }
    running.finish(NEUTRAL, 5)
    trial = replicas.choose(12)
    assert [replica["state"] for replica in replicas.status(12)] == ["on_trial", "in_use"]
    assert [replica["state"] for replica in replicas.status(42)] == ["set_aside", "in_use"]  # it hangs
    trial.finish(SUCCESS, 42)
    assert [replica["state"] for replica in replicas.status(71.9)] == ["ramping", "in_use"]
    assert [replica["state"] for replica in replicas.status(72)] == ["in_use", "in_use"]
    assert [replica["in_flight"] for replica in replicas.status(72)] == [0, 0]


# --- any history


@dataclass
class Attempt:
    """One that the model knows of: where, in which spell of its replica, and what it was for."""

    place: Place
    spell: int
    trial: bool
    probe: bool
    lease_ends: float


@dataclass
class Known:
    """What the rules say of one replica, told as plainly as they are."""

    held: list[Attempt] = field(default_factory=list)
    lingers_until: list[float] = field(default_factory=list)
    failures: int = 0
    failed_probe: bool = False
    spell: int = 0
    aside_until: float | None = None
    seconds_aside: float = 10  # the next time
    back_since: float = -inf

    def load(self, now: float) -> int:
        return len(self.held) + sum(until > now for until in self.lingers_until)

    def is_on_trial(self, now: float) -> bool:
        return any(each.trial and each.spell == self.spell and each.lease_ends > now for each in self.held)

    def set_aside(self, now: float) -> None:
        if self.aside_until is None and now >= self.back_since + 30:
            self.seconds_aside = 10
        self.aside_until = now + self.seconds_aside
        self.seconds_aside = min(300, 2 * self.seconds_aside)
        self.spell += 1

    def bring_back(self, now: float) -> None:
        self.aside_until, self.back_since, self.failures, self.failed_probe = None, now, 0, False
        self.spell += 1


class ReplicasMachine(RuleBasedStateMachine):
    """Choices, outcomes, callers who leave, attempts that hang for ever, and time, in any order."""

    @initialize(count=st.integers(1, 5), seed=st.integers(0, 1000))
    def start(self, count: int, seed: int) -> None:
        self.known = {f"http://vision-{number}:8007": Known() for number in range(count)}
        self.replicas = replicas_of(*self.known, seed=seed)
        self.now = 0.0

    def aside(self) -> set[str]:
        return {address for address, known in self.known.items() if known.aside_until is not None}

    def due(self) -> set[str]:
        return {
            address
            for address, known in self.known.items()
            if known.aside_until is not None and known.aside_until <= self.now and not known.is_on_trial(self.now)
        }

    def take(self, avoid: frozenset[str] = frozenset(), probe: bool = False) -> Attempt:
        known, now = self.known, self.now
        in_service = known.keys() - self.aside()
        assert in_service  # B1
        due = set() if avoid else self.due()
        if probe and not all(known[address].failed_probe for address in in_service):
            due = set()
        candidates = due or (in_service - avoid) or in_service
        if not due and (avoid or probe):
            candidates = {address for address in candidates if not known[address].failures} or candidates
        place = self.replicas.choose(now, avoid, probe)
        assert place.address in candidates
        assert place.trial == bool(due)
        loads = sorted(known[address].load(now) for address in candidates)
        if not due and len(loads) > 1 and not any(known[address].back_since + 30 > now for address in candidates):
            assert known[place.address].load(now) < loads[-1] or loads[-2] == loads[-1]  # never the busiest
        attempt = Attempt(place, known[place.address].spell, bool(due), probe, now + 30)
        known[place.address].held.append(attempt)
        return attempt

    def conclude(self, attempt: Attempt, outcome: Outcome) -> None:
        known, now = self.known[attempt.place.address], self.now
        attempt.place.finish(outcome, now)
        known.held = [each for each in known.held if each is not attempt]
        if attempt.spell == known.spell:
            if outcome is SUCCESS:
                self.well(known, attempt)
            elif outcome is FAILURE:
                known.failures += 1
                known.failed_probe = known.failed_probe or attempt.probe
                room = len(self.aside()) + 1 <= len(self.known) / 2
                if attempt.trial or (known.failures >= 3 and room):
                    known.set_aside(now)
        if outcome is FAILURE and len(self.known) > 1:
            known.lingers_until.append(now + min(10, max(1, known.failures)))

    def well(self, known: Known, attempt: Attempt) -> None:
        if attempt.trial:
            known.bring_back(self.now)
            attempt.trial, attempt.spell = False, known.spell
        known.failures, known.failed_probe = 0, False

    @rule(data=st.data(), probe=st.sampled_from([False, False, True]))
    def choose(self, data: st.DataObject, probe: bool) -> None:
        self.take(data.draw(st.frozensets(st.sampled_from(sorted(self.known)))), probe)

    @rule(probe=st.booleans())
    def choose_anew(self, probe: bool) -> None:
        self.take(probe=probe)

    @precondition(lambda self: any(known.held for known in self.known.values()))
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), again=st.sampled_from(Outcome))
    def finish(self, data: st.DataObject, outcome: Outcome, again: Outcome) -> None:
        attempt = data.draw(st.sampled_from([each for known in self.known.values() for each in known.held]))
        self.conclude(attempt, outcome)
        if len(self.known) > 1:
            attempt.place.finish(again, self.now)  # does nothing

    @precondition(lambda self: any(known.held for known in self.known.values()))
    @rule(data=st.data())
    def begin_well(self, data: st.DataObject) -> None:
        attempt = data.draw(st.sampled_from([each for known in self.known.values() for each in known.held]))
        attempt.place.succeed_so_far(self.now)
        known = self.known[attempt.place.address]
        if attempt.spell == known.spell:
            self.well(known, attempt)

    @rule(outcome=st.sampled_from([FAILURE, FAILURE, SUCCESS, NEUTRAL]), times=st.integers(1, 12), probe=st.booleans())
    def call(self, outcome: Outcome, times: int, probe: bool) -> None:
        for _ in range(times):
            self.conclude(self.take(probe=probe), outcome)

    @rule(seconds=st.sampled_from([0.5, 1, 9.75, 10, 20, 29.75, 30, 300]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.aside())
    @rule(outcome=st.sampled_from([FAILURE, SUCCESS, NEUTRAL, None, None]))
    def try_one(self, outcome: Outcome | None) -> None:
        """As soon as that may be; without an outcome it hangs."""
        while not self.due():
            self.now += 5
        trial = self.take()
        if outcome is not None:
            self.conclude(trial, outcome)

    @rule(outcome=st.sampled_from([FAILURE, SUCCESS, NEUTRAL, None]))
    def all_that_are_set_aside_are_tried(self, outcome: Outcome | None) -> None:  # B2
        aside = self.aside()
        self.now += 300  # longer than any time aside, and than any lease: a trial is never lost
        trials = [self.take() for _ in aside]
        assert {trial.place.address for trial in trials} == aside
        for trial in trials if outcome else ():  # else they hang
            self.conclude(trial, outcome or NEUTRAL)

    @invariant()
    def no_more_than_half_are_aside(self) -> None:
        if hasattr(self, "known"):
            assert 2 * len(set_aside(self.replicas, self.now)) <= len(self.known)

    @invariant()
    def failures_keep_their_places(self) -> None:
        for replica in self.replicas._all if hasattr(self, "known") else ():
            assert replica.load(self.now) == self.known[replica.address].load(self.now)

    @invariant()
    def the_status_is_what_the_rules_say(self) -> None:
        for told in self.replicas.status(self.now) if hasattr(self, "known") else ():
            known = self.known[str(told["address"])]
            set_aside = known.aside_until is not None
            ramping = "ramping" if self.now < known.back_since + 30 else "in_use"
            state = ("on_trial" if known.is_on_trial(self.now) else "set_aside") if set_aside else ramping
            assert told == {
                "address": told["address"],
                "state": state,
                "in_flight": len(known.held),
                "failure_count": known.failures,
                "set_aside": set_aside,
                "retry_after": max(0, (known.aside_until or 0) - self.now),
            }


def test_any_history_goes_by_the_rules() -> None:
    run_state_machine_as_test(
        ReplicasMachine, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )
