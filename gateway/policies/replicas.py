"""Replicas: which address of a service a request goes to (RESILIENCE.md, 5)."""

import random
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

from gateway.policies.circuit_breaker import Outcome

LINGER = 1.0  # seconds a failed attempt still counts as in flight: failing fast must not look like being free
FAILURES = 3  # in a row, that set a replica aside
ASIDE = 10.0  # seconds, doubling each time
LONGEST_ASIDE = 300.0
RAMP = 30.0  # seconds from a replica's return to its full share
TRIAL_LEASE = 30.0  # seconds after which a trial without an end no longer keeps back the next (its outcome counts)

FAILURE, SUCCESS = Outcome.FAILURE, Outcome.SUCCESS


class _Replica:
    """What is known of one address."""

    __slots__ = (
        "address",
        "aside_until",
        "back_since",
        "failures",
        "in_flight",
        "lingering",
        "spell",
        "times_aside",
        "trial_until",
    )

    def __init__(self, address: str) -> None:
        self.address = address
        self.in_flight = 0  # with those that linger
        self.lingering: deque[float] = deque()  # when each failed attempt gives up its place
        self.failures = 0  # in a row
        self.spell = 0  # counts its comings and goings: an outcome from an earlier spell has no say
        self.times_aside = 0  # without a full recovery between
        self.aside_until: float | None = None
        self.trial_until = 0.0  # the lease of the trial under way
        self.back_since: float | None = None  # while it ramps up

    def load(self, now: float) -> int:
        while self.lingering and self.lingering[0] <= now:
            self.lingering.popleft()
            self.in_flight -= 1
        return self.in_flight


class Place:
    """One attempt's place at a replica, to be given back once with ``finish``.

    Attributes:
        address: of the replica.
        trial: the replica was set aside, and this attempt decides whether it comes back.
    """

    __slots__ = ("_finished", "_replica", "_replicas", "_spell", "address", "trial")

    def __init__(self, replicas: "Replicas", replica: _Replica, trial: bool) -> None:
        self._replicas = replicas
        self._replica = replica
        self._spell = replica.spell
        self._finished = False
        self.address = replica.address
        self.trial = trial

    def finish(self, outcome: Outcome, now: float) -> None:
        """Say how the attempt went; a second time does nothing."""
        if not self._finished:
            self._finished = True
            self._replicas._conclude(self, self._replica, self._spell, outcome, now)


class _OnlyPlace(Place):
    """All places at a service's only replica in one: it is never set aside, so an attempt need not be told apart."""

    __slots__ = ()

    def finish(self, outcome: Outcome, now: float) -> None:
        replica = self._replica
        replica.in_flight -= 1
        if outcome is FAILURE:
            replica.failures += 1
        elif outcome is SUCCESS:
            replica.failures = 0


class Replicas:
    """The replicas of one service: of two taken at random, the one with fewer attempts in flight.

    A replica that fails three times in a row is set aside for a while, longer each time, but never more than half of
    them are. It comes back through one trial attempt, and then gets its full share over 30 seconds. ``now`` is
    monotonic seconds.

    Args:
        addresses: of the replicas, one at least.
        rng: gives a number from 0 up to 1.

    Raises:
        ValueError: no address, or one twice.
    """

    def __init__(self, addresses: Iterable[str], rng: Callable[[], float] = random.random) -> None:
        self._all = [_Replica(address) for address in addresses]
        if not self._all:
            raise ValueError("a service needs at least one replica")
        if len({replica.address for replica in self._all}) < len(self._all):
            raise ValueError("a replica's address may be given only once")
        self._random = rng
        self._in_service = list(self._all)
        self._aside: list[_Replica] = []
        self._only = _OnlyPlace(self, self._all[0], False) if len(self._all) == 1 else None

    def choose(self, now: float, avoid: Collection[str] = ()) -> Place:
        """Take a place for an attempt; at another replica than those in ``avoid`` where one is in service."""
        only = self._only
        if only is not None:
            only._replica.in_flight += 1
            return only
        # A retry is no trial: whoever sends it has had one failure already.
        due = self._due_for_trial(now) if self._aside and not avoid else None
        if due is not None:
            due.in_flight += 1
            due.trial_until = now + TRIAL_LEASE
            return Place(self, due, True)
        replica = self._pick(now, avoid)
        replica.in_flight += 1
        return Place(self, replica, False)

    def status(self, now: float) -> list[dict[str, Any]]:
        """Each replica's address, attempts in flight, failures in a row, and whether it is set aside."""
        return [
            {
                "address": replica.address,
                "in_flight": replica.load(now),
                "failure_count": replica.failures,
                "set_aside": replica.aside_until is not None,
            }
            for replica in self._all
        ]

    def _due_for_trial(self, now: float) -> _Replica | None:
        for replica in self._aside:
            assert replica.aside_until is not None
            if replica.aside_until <= now and replica.trial_until <= now:
                return replica
        return None

    def _pick(self, now: float, avoid: Collection[str]) -> _Replica:
        candidates = self._in_service
        if avoid:
            candidates = [replica for replica in candidates if replica.address not in avoid] or candidates
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        one, other = candidates[first], candidates[second]
        if other.load(now) < one.load(now):  # at a tie the first, which chance has chosen
            one, other = other, one
        if one.back_since is not None and not self._has_its_share(one, now):
            return other
        return one

    def _has_its_share(self, replica: _Replica, now: float) -> bool:
        """Whether a replica that ramps up takes this attempt: with a chance that grows from 0 to 1."""
        assert replica.back_since is not None
        recovered = (now - replica.back_since) / RAMP
        if recovered >= 1:
            replica.back_since = None
            replica.times_aside = 0
            return True
        return self._random() < recovered

    def _conclude(self, place: Place, replica: _Replica, spell: int, outcome: Outcome, now: float) -> None:
        if outcome is not FAILURE:
            replica.in_flight -= 1
        else:
            replica.lingering.append(now + LINGER)
        if spell != replica.spell:
            return
        if place.trial:
            if outcome is FAILURE:
                self._set_aside(replica, now)
            elif outcome is SUCCESS:
                self._take_back(replica, now)
            else:
                replica.trial_until = now  # it said nothing: the next attempt is the trial
        elif outcome is SUCCESS:
            replica.failures = 0
        elif outcome is FAILURE:
            replica.failures += 1
            if replica.failures >= FAILURES and 2 * (len(self._aside) + 1) <= len(self._all):
                self._in_service.remove(replica)
                self._aside.append(replica)
                self._set_aside(replica, now)

    def _set_aside(self, replica: _Replica, now: float) -> None:
        replica.spell += 1
        replica.aside_until = now + min(LONGEST_ASIDE, ASIDE * 2 ** min(replica.times_aside, 10))
        replica.trial_until = 0.0
        replica.times_aside += 1

    def _take_back(self, replica: _Replica, now: float) -> None:
        self._aside.remove(replica)
        self._in_service.append(replica)
        replica.spell += 1
        replica.failures = 0
        replica.aside_until = None
        replica.back_since = now
