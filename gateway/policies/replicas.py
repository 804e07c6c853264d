"""Replicas: which address of a service a request goes to (RESILIENCE.md, 5)."""

import random
from collections.abc import Callable, Collection, Iterable
from heapq import heappop, heappush
from typing import Any

from gateway.policies.circuit_breaker import Outcome

# Seconds a failed attempt still counts as in flight, times the failures in a row: failing fast must not look like being
# free, least of all where half are set aside already and this one has to stay.
LINGER = 1.0
LONGEST_LINGER = 10.0
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
        "failed_probe",
        "failures",
        "in_flight",
        "lingering",
        "spell",
        "times_aside",
        "trial",
        "trial_until",
    )

    def __init__(self, address: str) -> None:
        self.address = address
        self.in_flight = 0  # with those that linger
        self.lingering: list[float] = []  # when each failed attempt gives up its place: a heap
        self.failures = 0  # in a row
        self.failed_probe = False  # of the breaker, and has not done better since
        self.spell = 0  # counts its comings and goings: an outcome from an earlier spell has no say
        self.times_aside = 0  # without a full recovery between
        self.aside_until: float | None = None
        self.trial: Place | None = None  # the one under way, where there is one
        self.trial_until = 0.0  # its lease
        self.back_since: float | None = None  # while it ramps up

    def load(self, now: float) -> int:
        while self.lingering and self.lingering[0] <= now:
            heappop(self.lingering)
            self.in_flight -= 1
        return self.in_flight

    def is_on_trial(self, now: float) -> bool:
        return self.trial is not None and now < self.trial_until


class Place:
    """One attempt's place at a replica, to be given back once with ``finish``.

    Attributes:
        address: of the replica.
        trial: the replica was set aside, and this attempt decides whether it comes back.
    """

    __slots__ = ("_finished", "_probe", "_replica", "_replicas", "_spell", "address", "trial")

    def __init__(self, replicas: "Replicas", replica: _Replica, trial: bool, probe: bool) -> None:
        self._replicas = replicas
        self._replica = replica
        self._spell = replica.spell
        self._probe = probe
        self._finished = False
        self.address = replica.address
        self.trial = trial

    def succeed_so_far(self, now: float) -> None:
        """Say that it has begun well, which is all a trial has to show: its end may be a minute of tokens away.

        What becomes of the rest is still for ``finish`` to say, neutral where that is nothing new.
        """
        if not self._finished:
            self._replicas._succeed(self, self._replica, now)

    def finish(self, outcome: Outcome, now: float) -> None:
        """Say how the attempt went; a second time does nothing."""
        if not self._finished:
            self._finished = True
            self._replicas._conclude(self, self._replica, outcome, now)


class _OnlyPlace(Place):
    """All places at a service's only replica in one: it is never set aside, so an attempt need not be told apart."""

    __slots__ = ()

    def succeed_so_far(self, now: float) -> None:
        self._replica.failures = 0

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
    them are. It comes back through one trial attempt, and then gets its full share over 30 seconds. One that has to
    stay although it fails is asked the less, the longer it fails. ``now`` is monotonic seconds.

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
        self._only = _OnlyPlace(self, self._all[0], False, False) if len(self._all) == 1 else None

    def choose(self, now: float, avoid: Collection[str] = (), probe: bool = False) -> Place:
        """Take a place for an attempt; at another replica than those in ``avoid`` where one is in service.

        Args:
            now: monotonic seconds.
            avoid: addresses that this request has failed at already.
            probe: the attempt tells a half-open breaker how the service does.
        """
        only = self._only
        if only is not None:
            only._replica.in_flight += 1
            return only
        # A retry is no trial: whoever sends it has had one failure already.
        due = self._due_for_trial(now, probe) if self._aside and not avoid else None
        if due is not None:
            due.in_flight += 1
            due.trial_until = now + TRIAL_LEASE
            due.trial = trial = Place(self, due, True, probe)
            return trial
        replica = self._pick(now, avoid, probe)
        replica.in_flight += 1
        return Place(self, replica, False, probe)

    def status(self, now: float) -> list[dict[str, Any]]:
        """Each replica as an operator sees it.

        ``state`` is ``in_use``, ``set_aside``, ``on_trial`` or, back from there, ``ramping``; ``retry_after`` the
        seconds until one set aside may be tried; ``in_flight`` its attempts under way, ``failure_count`` the failures
        in a row; ``set_aside`` says whether it is, on trial too.
        """
        return [
            {
                "address": replica.address,
                "state": self._state(replica, now),
                "in_flight": replica.load(now) - len(replica.lingering),
                "failure_count": replica.failures,
                "set_aside": replica.aside_until is not None,
                "retry_after": 0.0 if replica.aside_until is None else round(max(0.0, replica.aside_until - now), 3),
            }
            for replica in self._all
        ]

    def _state(self, replica: _Replica, now: float) -> str:
        if replica.aside_until is not None:
            return "on_trial" if replica.is_on_trial(now) else "set_aside"
        return "in_use" if replica.back_since is None or now - replica.back_since >= RAMP else "ramping"

    def _due_for_trial(self, now: float, probe: bool) -> _Replica | None:
        # By a probe the breaker judges the service: it must not be asked of the one that is known to be ill, unless all
        # others have failed theirs, for then that one may be the only one well.
        if probe and not all(replica.failed_probe for replica in self._in_service):
            return None
        for replica in self._aside:
            assert replica.aside_until is not None
            if replica.aside_until <= now and not replica.is_on_trial(now):
                return replica
        return None

    def _pick(self, now: float, avoid: Collection[str], probe: bool) -> _Replica:
        candidates = self._in_service
        if avoid:
            candidates = [replica for replica in candidates if replica.address not in avoid] or candidates
        if avoid or probe:  # this one must go well
            candidates = [replica for replica in candidates if not replica.failures] or candidates
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

    def _conclude(self, place: Place, replica: _Replica, outcome: Outcome, now: float) -> None:
        if replica.trial is place:
            replica.trial = None  # where it said nothing, the next attempt is the trial
        if outcome is not FAILURE:
            replica.in_flight -= 1
            if outcome is SUCCESS:
                self._succeed(place, replica, now)
            return
        if place._spell == replica.spell:
            replica.failures += 1
            replica.failed_probe = replica.failed_probe or place._probe
            if place.trial:
                self._set_aside(replica, now)
            elif replica.failures >= FAILURES and 2 * (len(self._aside) + 1) <= len(self._all):
                self._in_service.remove(replica)
                self._aside.append(replica)
                self._set_aside(replica, now)
        heappush(replica.lingering, now + min(LONGEST_LINGER, LINGER * max(1, replica.failures)))

    def _succeed(self, place: Place, replica: _Replica, now: float) -> None:
        if place._spell != replica.spell:
            return
        if place.trial:
            place.trial = False
            self._aside.remove(replica)
            self._in_service.append(replica)
            replica.spell += 1
            place._spell = replica.spell
            replica.trial = None
            replica.aside_until = None
            replica.back_since = now
        replica.failures = 0
        replica.failed_probe = False

    def _set_aside(self, replica: _Replica, now: float) -> None:
        if replica.back_since is not None and now - replica.back_since >= RAMP:
            replica.times_aside = 0
        replica.spell += 1
        replica.aside_until = now + min(LONGEST_ASIDE, ASIDE * 2 ** min(replica.times_aside, 10))
        replica.back_since = None
        replica.trial = None
        replica.times_aside += 1
