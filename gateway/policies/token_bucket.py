"""Two token buckets a caller, in whole numbers: what is admitted, what is left, and when to come back."""

from dataclasses import dataclass

MINUTE_US = 60_000_000
HOUR_US = 3_600_000_000
EXACT_BELOW = 2**53  # whole numbers a double, and so Lua, holds without rounding

NORMAL = "normal"  # the buckets asked are the ones that count
LOCAL = "local"  # the shared ones are out of reach: this worker's own
OPEN = "open"  # out of reach, and everyone passes
CLOSED = "closed"  # out of reach, and nobody does

# debt_minute, debt_hour, last_us. A token is worth `period_us` units of debt, of which `tokens` flow back each µs.
State = tuple[int, int, int]
FULL: State = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Limit:
    """A bucket of ``tokens``, refilled evenly at that many per ``period_us`` microseconds; 0 tokens deny all.

    Raises:
        ValueError: fewer than none, or more than can be counted exactly.
    """

    tokens: int
    period_us: int

    def __post_init__(self) -> None:
        most = (EXACT_BELOW - 1) // self.period_us - 1
        if not 0 <= self.tokens <= most:
            raise ValueError(f"a limit of {self.tokens} per {self.period_us // 1_000_000} s is not within 0 to {most}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may do; None means no such bucket."""

    minute: Limit | None
    hour: Limit | None

    @staticmethod
    def of(per_minute: int | None, per_hour: int | None) -> "Limits":
        """Limits by their numbers: None is off, 0 denies all.

        Raises:
            ValueError: one is negative or too large to be counted exactly (2.5 million an hour, 150 million a minute).
        """
        return Limits(
            None if per_minute is None else Limit(per_minute, MINUTE_US),
            None if per_hour is None else Limit(per_hour, HOUR_US),
        )


@dataclass(slots=True)
class Decision:
    """What became of one request, and what its answer says of the buckets; a bucket that is off counts as 0.

    Attributes:
        admitted: whether it took its token, of both buckets or of neither.
        remaining_minute: whole requests that would pass now.
        reset_minute: when the bucket is full again, Unix seconds, rounded up.
        full_minute: seconds until then, rounded up.
        wait_us: refused: microseconds until a token is there; None: never, or it was admitted.
        mode: ``normal``, ``local``, ``open`` or ``closed``.
    """

    admitted: bool
    remaining_minute: int
    remaining_hour: int
    reset_minute: int
    reset_hour: int
    full_minute: int
    full_hour: int
    wait_us: int | None = None
    mode: str = NORMAL

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, at least 1, after which a lone caller is admitted; None where waiting does not help."""
        return None if self.wait_us is None else max(1, -(-self.wait_us // 1_000_000))


def take(state: State, limits: Limits, now_us: int, cost: int = 1) -> tuple[State, Decision]:
    """Spend ``cost`` tokens of both buckets or of neither; return what they then hold, and the decision.

    A refusal returns the state it was given. A clock that steps back grants nothing. A cost of 0 only looks.
    """
    debt_minute, debt_hour, last_us = state
    elapsed = now_us - last_us
    reached_us = now_us if elapsed > 0 else last_us
    admitted = True
    if limits.minute is None:
        debt_minute = 0
    else:
        debt_minute = _debt_after(debt_minute, elapsed, limits.minute)
        admitted = debt_minute + cost * limits.minute.period_us <= limits.minute.tokens * limits.minute.period_us
    if limits.hour is None:
        debt_hour = 0
    else:
        debt_hour = _debt_after(debt_hour, elapsed, limits.hour)
        if debt_hour + cost * limits.hour.period_us > limits.hour.tokens * limits.hour.period_us:
            admitted = False

    if admitted and cost:
        if limits.minute is not None:
            debt_minute += cost * limits.minute.period_us
        if limits.hour is not None:
            debt_hour += cost * limits.hour.period_us
        state = (debt_minute, debt_hour, reached_us)
    return state, describe(admitted, (debt_minute, debt_hour, reached_us), limits, now_us)


def describe(admitted: bool, state: State, limits: Limits, now_us: int) -> Decision:
    """Put in words for the caller what a decision left behind.

    Args:
        admitted: the decision.
        state: the buckets after it, as of ``now_us`` or, where the clock stepped back, as of a later moment.
        limits: by which it was taken.
        now_us: Unix microseconds on the clock it was taken by.
    """
    debt_minute, debt_hour, reached_us = state
    remaining_minute = remaining_hour = 0
    full_minute_us = full_hour_us = reached_us
    wait_us: int | None = 0
    minute, hour = limits.minute, limits.hour
    if minute is not None:
        remaining_minute = minute.tokens + -debt_minute // minute.period_us
        if minute.tokens:
            full_minute_us -= -debt_minute // minute.tokens
        if not admitted:
            wait_us = _wait_us(debt_minute, minute)
    if hour is not None:
        remaining_hour = hour.tokens + -debt_hour // hour.period_us
        if hour.tokens:
            full_hour_us -= -debt_hour // hour.tokens
        if not admitted and wait_us is not None:
            wait_hour_us = _wait_us(debt_hour, hour)
            wait_us = None if wait_hour_us is None else max(wait_us, wait_hour_us)
    if admitted:
        wait_us = None
    elif wait_us is not None:
        wait_us += reached_us - now_us  # nothing flows back before the clock is where it was
    return Decision(
        admitted,
        remaining_minute,
        remaining_hour,
        -(-full_minute_us // 1_000_000),
        -(-full_hour_us // 1_000_000),
        -((now_us - full_minute_us) // 1_000_000),
        -((now_us - full_hour_us) // 1_000_000),
        wait_us,
    )


def full_at_us(state: State, limits: Limits) -> int:
    """When both buckets are full again, microseconds on the clock of ``state``, which then need not be kept."""
    debt_minute, debt_hour, last_us = state
    minute_us = hour_us = 0
    if limits.minute is not None and limits.minute.tokens:
        minute_us = -(-debt_minute // limits.minute.tokens)
    if limits.hour is not None and limits.hour.tokens:
        hour_us = -(-debt_hour // limits.hour.tokens)
    return last_us + max(minute_us, hour_us)


def share(limits: Limits, workers: int) -> Limits:
    """One worker's part of ``limits`` where ``workers`` can't ask one another: at least 1, unless all is denied."""

    def part(limit: Limit | None) -> Limit | None:
        if limit is None or limit.tokens == 0:
            return limit
        return Limit(max(1, limit.tokens // workers), limit.period_us)

    return limits if workers == 1 else Limits(part(limits.minute), part(limits.hour))


def rescale(state: State, limits: Limits, to: Limits, now_us: int) -> State:
    """The buckets of ``limits`` as buckets of ``to`` that are as far from full and full at the same moment."""

    def scaled(debt: int, limit: Limit | None, part: Limit | None) -> int:
        if limit is None or part is None or limit.tokens == 0:
            return 0
        return -(-debt * part.tokens // limit.tokens)

    return scaled(state[0], limits.minute, to.minute), scaled(state[1], limits.hour, to.hour), now_us


def _debt_after(debt: int, elapsed_us: int, limit: Limit) -> int:
    """The debt left after ``elapsed_us``, negative where the clock stepped back."""
    debt = min(debt, limit.tokens * limit.period_us)  # a limit that was larger when the debt was made
    if elapsed_us <= 0:
        return debt
    return max(0, debt - min(elapsed_us, limit.period_us) * limit.tokens)


def _wait_us(debt: int, limit: Limit) -> int | None:
    """Microseconds until the bucket holds a token, 0 if it does; None: it never will."""
    excess = debt + limit.period_us - limit.tokens * limit.period_us
    if excess <= 0:
        return 0
    return -(-excess // limit.tokens) if limit.tokens else None
