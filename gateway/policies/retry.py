"""Retries: whether a failed request may be sent again, when, and how many at all (RESILIENCE.md, 3)."""

from collections.abc import Callable
from math import inf
from typing import ClassVar

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"})  # RFC 9110, 9.2.2
TRANSIENT = frozenset({500, 502, 503, 504})  # other 5xx say what no repetition changes
REFUSALS = frozenset({429, 503})  # with Retry-After they say that the request was not worked on
LONGEST_WAIT = 1.0  # seconds; a service that asks for more is taken at its word, in front of the client

BACKOFF = 0.05  # seconds, doubling
LONGEST_BACKOFF = 1.0


def may_resend(
    *,
    method: str,
    retried: int,
    retries: int,
    time_left: float,
    random: Callable[[], float],
    dispatched: bool,
    reused_and_silent: bool = False,
    status: int | None = None,
    retry_after: float | None = None,
    keyed: bool = False,
    all_methods: bool = False,
    replayable: bool = True,
    sent_to_client: bool = False,
    probe: bool = False,
) -> float | None:
    """Whether a request that failed may be sent again: the seconds to wait before, or None.

    It says what is safe. Whether there is a retry to spend is for ``RetryBudget`` to say, to be asked after this.

    Args:
        method: of the request.
        retried: how often it has been sent again already.
        retries: how often it may be.
        time_left: seconds to its deadline.
        random: gives a number from 0 up to 1.
        dispatched: some byte of it may have reached the service.
        reused_and_silent: the connection had been used before, and closed before any byte of the answer: most likely
            it was closed as idle, so nothing is gained by waiting.
        status: of the answer, if one began; None if none did.
        retry_after: the seconds that answer asks to wait.
        keyed: it carries an ``Idempotency-Key``.
        all_methods: the service is declared to bear repetition of any method.
        replayable: what was read of its body is kept in full.
        sent_to_client: a byte of an answer to it has been sent.
        probe: it tests a half-open breaker, for which one answer is to be had, whatever it is.
    """
    if sent_to_client or probe or not replayable or retried >= retries:
        return None
    wait = backoff(retried, random)
    if status is None:
        if reused_and_silent:
            wait = 0.0
    elif status in REFUSALS and retry_after is not None:
        if retry_after > LONGEST_WAIT:
            return None
        wait += retry_after  # not at the same instant as everyone else who was told so
        dispatched = False
    elif status not in TRANSIENT:
        return None
    if dispatched and not (method in IDEMPOTENT or keyed or all_methods):
        return None
    return wait if wait < time_left else None


def backoff(retried: int, random: Callable[[], float]) -> float:
    """Seconds to wait before a retry: anything up to a bound that doubles ("full jitter")."""
    return float(random() * min(LONGEST_BACKOFF, BACKOFF * 2 ** min(retried, 10)))


class RetryBudget:
    """How many retries a service gets: a fifth of its requests and one a second, so that they can't bury it.

    Each request deposits 0.2, which serves for the next 10 seconds (deposits are counted by the second they fall in,
    so for 9 at least); a retry takes 1. Where the deposits do not suffice there is a reserve that grows by 1 a second,
    up to 10, and is full at the start. So the retries in any 10 seconds are at most a fifth of the requests of those
    and of the 10 seconds before, and 20.

    ``now`` is monotonic seconds.
    """

    PRICE: ClassVar[int] = 5  # deposits a retry; whole numbers, so that nothing is lost in rounding
    LIFETIME: ClassVar[int] = 10  # seconds
    RESERVE: ClassVar[float] = 10.0

    def __init__(self) -> None:
        self._deposits = [0] * self.LIFETIME  # by second, the newest at `_second % LIFETIME`
        self._total = 0  # of them, without those that are `_fresh`
        self._fresh = 0  # deposits of the newest second, not among the others yet
        self._second = 0
        self._second_ends = 1
        self._reserve_empty_at = -inf  # the reserve is the seconds since then, up to its bound

    def deposit(self, now: float) -> None:
        """Count a request, once, however often it will be sent."""
        if now >= self._second_ends:
            self._expire(now)
        self._fresh += 1

    def take(self, now: float) -> bool:
        """Spend a retry, if there is one."""
        self._expire(now)
        if self._total >= self.PRICE:
            self._spend_oldest()
            return True
        reserve_empty_at = max(self._reserve_empty_at, now - self.RESERVE)
        if now - reserve_empty_at >= 1:
            self._reserve_empty_at = reserve_empty_at + 1
            return True
        return False

    def left(self, now: float) -> int:
        """How many retries there are to spend."""
        self._expire(now)
        return self._total // self.PRICE + int(min(self.RESERVE, now - self._reserve_empty_at))

    def _expire(self, now: float) -> None:
        self._deposits[self._second % self.LIFETIME] += self._fresh
        self._total += self._fresh
        self._fresh = 0
        second = int(now)
        for passed in range(self._second + 1, min(second, self._second + self.LIFETIME) + 1):
            self._total -= self._deposits[passed % self.LIFETIME]
            self._deposits[passed % self.LIFETIME] = 0
        self._second = max(self._second, second)
        self._second_ends = self._second + 1

    def _spend_oldest(self) -> None:
        self._total -= self.PRICE
        due = self.PRICE
        for age in range(1, self.LIFETIME + 1):
            slot = (self._second + age) % self.LIFETIME
            spent = min(due, self._deposits[slot])
            self._deposits[slot] -= spent
            due -= spent
            if not due:
                return
