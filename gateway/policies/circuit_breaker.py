"""The circuit breaker: whether a call may go to a service, judged by how the last ones went (RESILIENCE.md, 1)."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum
from math import isfinite
from typing import Any

LEASE = 30.0  # seconds a probe holds its slot at most, so that one that hangs can't hold up recovery
MEMORY = 10  # times `timeout`: what is older says nothing about now
PATIENCE = 30.0  # seconds after which a caller's giving up says something about the service
ALARM = 60.0  # seconds a peer's alarm lasts at most
FRESH = 5.0  # seconds for which a failure of our own bears out a peer's alarm


class State(StrEnum):
    CLOSED = "closed"  # calls pass
    OPEN = "open"  # calls fail at once
    HALF_OPEN = "half_open"  # a few probes test whether the service has recovered


class Outcome(Enum):
    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"  # says nothing about the service: the caller left, or we refused the call ourselves


class Event(StrEnum):
    """Why a breaker changes its state."""

    TRIPPED = "failures"
    ALARMED = "alarm"  # a peer opened, and a failure of our own bore it out
    RESTED = "timeout"
    PROBE_FAILED = "probe_failed"
    RECOVERED = "recovered"
    PEER_RECOVERED = "peer_recovered"
    RESET = "reset"


CLOSED, OPEN, HALF_OPEN = State  # a plain global is several times faster to read than a member of an Enum class
SUCCESS, FAILURE, NEUTRAL = Outcome

TRANSITIONS = {
    (CLOSED, Event.TRIPPED): OPEN,
    (CLOSED, Event.ALARMED): OPEN,
    (OPEN, Event.RESTED): HALF_OPEN,
    (HALF_OPEN, Event.PROBE_FAILED): OPEN,
    (HALF_OPEN, Event.RECOVERED): CLOSED,
    (HALF_OPEN, Event.PEER_RECOVERED): CLOSED,
    (CLOSED, Event.RESET): CLOSED,
    (OPEN, Event.RESET): CLOSED,
    (HALF_OPEN, Event.RESET): CLOSED,
}
OnChange = Callable[[State, State, Event], None]


@dataclass(frozen=True, slots=True)
class CircuitBreakerConfig:
    """When a breaker opens and closes.

    Args:
        failure_threshold: failures that open it, in a row or (see ``min_failure_ratio``) in the window. One above
            ``window_size`` is never reached, which switches the breaker off.
        success_threshold: successful probes that close it.
        timeout: seconds it stays open before it lets probes through.
        window_size: the last so many outcomes are remembered, for at most 10 × ``timeout``.
        min_failure_ratio: failures that are not in a row count only where they are at least this part of the
            window, so that a busy service with a few errors stays available. 0: any ``failure_threshold`` open it.

    Raises:
        ValueError: a value out of its range.
    """

    failure_threshold: int = 5
    success_threshold: int = 2
    timeout: float = 60
    window_size: int = 100
    min_failure_ratio: float = 0.2

    def __post_init__(self) -> None:
        for name in ("failure_threshold", "success_threshold", "window_size"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
        if not _is_number(self.timeout) or self.timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds, not {self.timeout!r}")
        if not _is_number(self.min_failure_ratio) or not 0 <= self.min_failure_ratio <= 1:
            raise ValueError(f"min_failure_ratio must be from 0 to 1, not {self.min_failure_ratio!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


class Refusal:
    """No call now: the state that forbids it, and the seconds after which one is let through at the latest."""

    __slots__ = ("retry_after", "state")

    def __init__(self, state: State, retry_after: float) -> None:
        self.state = state
        self.retry_after = retry_after


class Permit:
    """Leave to make one call, to be finished once, whatever becomes of the call.

    Attributes:
        probe: the breaker is half-open, and this call helps to decide whether it closes.
        began: when it was given, in seconds.
        finished: an outcome was given; a further one does nothing.
    """

    __slots__ = ("_breaker", "_generation", "began", "finished", "probe")

    def __init__(self, breaker: "CircuitBreaker", generation: int, began: float) -> None:
        self._breaker = breaker
        self._generation = generation
        self.began = began
        self.probe = False
        self.finished = False

    def finish(self, outcome: Outcome, now: float) -> None:
        """Say how the call went."""
        if self.finished:
            return
        self.finished = True
        breaker = self._breaker
        if (
            outcome is SUCCESS
            and not (breaker._failures or self.probe or breaker._alarmed_at is not None)
            and self._generation == breaker._generation
        ):
            breaker._window.append((now, False, None))  # beside successes alone it changes no count
        else:
            breaker._conclude(self, self._generation, outcome, now)

    def finish_abandoned(self, now: float, *, caller: str, waited: float) -> None:
        """Say that ``caller`` left after ``waited`` seconds without a byte of the answer.

        That is a failure after more than 30 seconds, but only one for each caller in a window, or a single impatient
        caller could open the breaker for all. Else it is neutral.
        """
        if not self.finished:
            self.finished = True
            gave_up = waited > PATIENCE and self._breaker._is_first_to_give_up(caller, now)
            self._breaker._conclude(self, self._generation, FAILURE if gave_up else NEUTRAL, now, caller)

    def succeed_so_far(self, now: float) -> "Permit | None":
        """Finish as a success before the call is over; what remains of it gets a permit where the breaker is closed.

        It is for a probe whose answer has begun, so that recovery need not wait for its end. The permit returned is
        the same call's, which ``total_calls`` has once.
        """
        self.finish(SUCCESS, now)
        return self._breaker._permit_for_the_rest(now)


class CircuitBreaker:
    """The breaker of one service. Nothing in it waits or reads a clock: ``now`` is monotonic seconds.

    Every change of state, and every reset, starts a new generation, and an outcome of a call that was let through in
    an older one changes nothing: a call that began before an outage neither ends nor prolongs it.

    Args:
        name: of the service.
        config: when to open and close; its defaults if None.
        on_change: called after each change of state with the old state, the new one and why. (What is open becomes
            half-open by the clock alone; the call comes when that is first acted upon.)
    """

    def __init__(
        self, name: str, config: CircuitBreakerConfig | None = None, *, on_change: OnChange | None = None
    ) -> None:
        self.name = name
        self.config = CircuitBreakerConfig() if config is None else config
        self.on_change = on_change
        self.total_calls = 0  # let through since the start
        self.refused_calls = 0
        self.times_opened = 0

        self._state = CLOSED
        self._generation = 0
        self._half_open_at = 0.0  # while OPEN
        self._successes = 0  # of probes, while HALF_OPEN
        self._leases: dict[Permit, float] = {}  # probes that hold a slot, and until when: the oldest first
        self._alarmed_at: float | None = None  # since when a peer's alarm waits for an outcome of our own
        self._alarm_ends = 0.0

        # Outcomes since the breaker last closed, oldest first: when, whether a failure, which caller gave up. Those
        # that are too old are there until they are asked after.
        self._window: deque[tuple[float, bool, str | None]] = deque(maxlen=self.config.window_size)
        self._failures = 0  # in the window
        self._run = 0  # of failures, up to the newest in the window
        self._gave_up: set[str] = set()  # callers whose giving up is in the window

        self._memory = MEMORY * self.config.timeout
        self._lease = min(self.config.timeout, LEASE)

    # --- calls

    def acquire(self, now: float) -> Permit | Refusal:
        """Ask to make a call. Never raises; a refusal is an answer like the other, and costs no more."""
        if self._state is not CLOSED:
            self._settle(now)
            return self._acquire_probe(now)
        self.total_calls += 1
        return Permit(self, self._generation, now)

    def reset(self, now: float) -> None:
        """Close it by hand and forget every outcome; what is in flight has no say any more."""
        self._settle(now)
        self._move(Event.RESET, now)

    # --- what peers say (RESILIENCE.md, 1, "Fleet"): evidence is shared, verdicts are not

    def heard_alarm(self, now: float) -> None:
        """A peer opened by its own evidence: the outcome of a call begun from now on decides, or a fresh failure."""
        if self._state is not CLOSED:
            return
        if self._window:
            at, failed, _ = self._window[-1]
            if failed and now - at < FRESH:
                self._move(Event.ALARMED, now)
                return
        self._await_own_outcome(now)

    def heard_closing(self, now: float) -> None:
        """A peer's breaker closed: if ours is half-open it closes too, and the outcome of its next call decides."""
        self._settle(now)
        if self._state is HALF_OPEN:
            self._move(Event.PEER_RECOVERED, now)
            self._await_own_outcome(now)

    # --- what it says of itself

    def state(self, now: float) -> State:
        """A function of the clock: open for ``timeout`` seconds, then half-open, with or without traffic."""
        return HALF_OPEN if self._state is OPEN and now >= self._half_open_at else self._state

    def retry_after(self, now: float) -> float:
        """Seconds after which a call is let through at the latest; 0: now."""
        if self.state(now) is OPEN:
            return self._half_open_at - now
        in_lease = [ends for ends in self._leases.values() if ends > now]  # none, unless probes are out
        too_many = len(in_lease) - self._slots()
        return 0.0 if too_many < 0 else in_lease[too_many] - now

    def status(self, now: float) -> dict[str, Any]:
        """As ``GET /circuit-breakers`` shows it (SPEC.md, 5): four fixed fields, and some more."""
        self._forget_old(now)
        return {
            "state": self.state(now).value,
            "failure_count": self._run,
            "recent_failures": self._failures,
            "total_calls": self.total_calls,
            "recent_calls": len(self._window),
            "refused_calls": self.refused_calls,
            "times_opened": self.times_opened,
            "retry_after": round(self.retry_after(now), 3),
        }

    # --- how it works

    def _acquire_probe(self, now: float) -> Permit | Refusal:
        if self._state is HALF_OPEN:
            self._end_leases(now)
            if len(self._leases) < self._slots():
                probe = Permit(self, self._generation, now)
                probe.probe = True
                self._leases[probe] = now + self._lease
                self.total_calls += 1
                return probe
        self.refused_calls += 1
        return Refusal(self._state, self.retry_after(now))

    def _slots(self) -> int:
        """How many probes may be out: no more than still needed, so that a round costs users few errors."""
        return self.config.success_threshold - self._successes

    def _end_leases(self, now: float) -> None:
        """Free the slots of probes that take too long; their outcomes still count."""
        while self._leases:
            oldest = next(iter(self._leases))
            if self._leases[oldest] > now:
                return
            del self._leases[oldest]

    def _permit_for_the_rest(self, now: float) -> Permit | None:
        return Permit(self, self._generation, now) if self._state is CLOSED else None

    def _conclude(
        self, permit: Permit, generation: int, outcome: Outcome, now: float, caller: str | None = None
    ) -> None:
        if generation != self._generation:
            return
        if permit.probe:
            self._leases.pop(permit, None)
        if outcome is NEUTRAL:
            return
        failed = outcome is FAILURE
        self._record(now, failed, caller if failed else None)
        if permit.probe:
            self._judge_probe(failed, now)
        elif failed and self._has_tripped():  # asked at failures alone: a success never opens a breaker
            self._move(Event.TRIPPED, now)
        elif self._alarmed_at is not None:
            self._judge_alarm(permit, failed, now)

    def _judge_probe(self, failed: bool, now: float) -> None:
        if failed:
            self._move(Event.PROBE_FAILED, now)
            return
        self._successes += 1
        if self._successes == self.config.success_threshold:
            self._move(Event.RECOVERED, now)

    def _judge_alarm(self, permit: Permit, failed: bool, now: float) -> None:
        assert self._alarmed_at is not None
        if now >= self._alarm_ends:
            self._alarmed_at = None
        elif permit.began >= self._alarmed_at:
            self._alarmed_at = None
            if failed:
                self._move(Event.ALARMED, now)

    def _await_own_outcome(self, now: float) -> None:
        if self._alarmed_at is None or now >= self._alarm_ends:
            self._alarmed_at = now  # a later alarm doesn't move it, or calls slower than alarms would never decide
        self._alarm_ends = now + ALARM

    def _has_tripped(self) -> bool:
        threshold = self.config.failure_threshold
        return self._run >= threshold or (
            self._failures >= threshold and self._failures / len(self._window) >= self.config.min_failure_ratio
        )

    def _settle(self, now: float) -> None:
        """Become what the clock says."""
        if self._state is OPEN and now >= self._half_open_at:
            self._move(Event.RESTED, now)

    def _move(self, event: Event, now: float) -> None:
        old = self._state
        self._state = new = TRANSITIONS[old, event]
        self._generation += 1
        self._successes = 0
        self._leases.clear()
        self._alarmed_at = None
        if new is OPEN:
            self.times_opened += 1
            self._half_open_at = now + self.config.timeout
        elif new is CLOSED:
            self._window.clear()
            self._gave_up.clear()
            self._failures = self._run = 0
        if new is not old and self.on_change is not None:
            self.on_change(old, new, event)

    # --- the window: counts are kept as outcomes come and go

    def _record(self, now: float, failed: bool, caller: str | None) -> None:
        self._forget_old(now)
        if len(self._window) == self._window.maxlen:
            self._forget_oldest()
        self._window.append((now, failed, caller))
        if failed:
            self._failures += 1
            self._run += 1
            if caller is not None:
                self._gave_up.add(caller)
        else:
            self._run = 0

    def _forget_old(self, now: float) -> None:
        too_old = now - self._memory
        while self._window and self._window[0][0] < too_old:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, failed, caller = self._window.popleft()
        if failed:
            self._failures -= 1
            self._run = min(self._run, len(self._window))
            if caller is not None:
                self._gave_up.discard(caller)

    def _is_first_to_give_up(self, caller: str, now: float) -> bool:
        self._forget_old(now)
        return caller not in self._gave_up
