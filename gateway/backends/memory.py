"""The limiter in this process: one bounded table of callers."""

from collections.abc import Callable
from heapq import heappop, heappush, heapreplace
from time import monotonic_ns, time_ns

from gateway.policies.token_bucket import (
    FULL,
    LOCAL,
    Decision,
    Figures,
    Limits,
    State,
    full_at_us,
    rescale,
    share,
    take,
)

_UNIX_AT_ZERO = time_ns() - monotonic_ns()
_STEPS = 4  # of tidying for each new caller, so that the work is spread
_STEPS_WHEN_FULL = 512  # then the best guess goes: a bound of about half a millisecond


def unix_microseconds() -> int:
    """Unix time that never steps, for it runs on the monotonic clock from the process's start."""
    return (_UNIX_AT_ZERO + monotonic_ns()) // 1000


class MemoryLimiter:
    """Token buckets in the memory of one process.

    Where there is no room for one caller more, the one goes whose buckets are full, or will be first.

    Args:
        workers: how many processes limit the same callers without asking one another; each admits its share.
        capacity: callers remembered.
        clock: Unix microseconds.

    Attributes:
        decided: how many decisions there were, all ``local``; for whoever sets it back to 0.
    """

    waits: None = None  # for no store

    def __init__(
        self, *, workers: int = 1, capacity: int = 100_000, clock: Callable[[], int] = unix_microseconds
    ) -> None:
        self.workers = workers
        self.capacity = capacity
        self.clock = clock
        self.decided = {LOCAL: 0}
        self._shares: dict[Figures, Limits] = {}
        self._callers: dict[str, tuple[State, Limits]] = {}
        # Each caller once, by a moment at which its buckets were to be full again; by now it may be a later one.
        self._filed: list[tuple[int, str]] = []

    def take(self, key: str, limits: Limits, cost: int = 1, on_failure: str = LOCAL) -> Decision:
        """Take ``cost`` tokens for a caller. ``on_failure`` has no meaning here: memory does not fail."""
        now_us = self.clock()
        self.decided[LOCAL] += 1
        if self.workers != 1:
            limits = self._share(limits)
        known = self._callers.get(key)
        state, decision = take(FULL if known is None else known[0], limits, now_us, cost)
        if decision.admitted and cost:
            if known is None:
                self._file(key, state, limits, now_us)
            self._callers[key] = (state, limits)
        return decision

    def remember(self, key: str, limits: Limits, state: State, age_us: int = 0) -> None:
        """Note what a caller's whole buckets held ``age_us`` ago, scaled to this process's share of them."""
        now_us = self.clock()
        part = self._share(limits)
        state = rescale(state, limits, part, now_us - age_us)
        if key not in self._callers:
            self._file(key, state, part, now_us)
        self._callers[key] = (state, part)

    def __len__(self) -> int:
        return len(self._callers)

    def _share(self, limits: Limits) -> Limits:
        part = self._shares.get(limits.figures)
        if part is None:
            part = self._shares[limits.figures] = share(limits, self.workers)
        return part

    def _file(self, key: str, state: State, limits: Limits, now_us: int) -> None:
        filed = self._filed
        if len(self._callers) >= self.capacity or (filed and filed[0][0] <= now_us):
            self._make_room(now_us)
        heappush(filed, (full_at_us(state, limits), key))

    def _make_room(self, now_us: int) -> None:
        """Let go of callers whose buckets are full, and, if there is no room yet, of the next to be."""
        filed, callers = self._filed, self._callers
        for step in range(_STEPS_WHEN_FULL):
            has_room = len(callers) < self.capacity
            if not filed or (has_room and (step >= _STEPS or filed[0][0] > now_us)):
                return
            filed_us, key = filed[0]
            actual_us = full_at_us(*callers[key])
            if actual_us > max(filed_us, now_us):
                heapreplace(filed, (actual_us, key))
            else:  # full, or the first that will be
                heappop(filed)
                del callers[key]
        if len(callers) >= self.capacity:
            del callers[heappop(filed)[1]]
