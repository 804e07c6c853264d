"""Two token buckets a caller, in whole numbers: what is admitted, what is left, and when to come back."""

from dataclasses import dataclass, field
from math import ceil, floor
from typing import NamedTuple

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
_new_tuple = tuple.__new__


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


# What `take` counts with, worked out once: of the minute's bucket, then of the hour's, the debt that a token is, the
# most debt there can be, and how much of it flows back each µs. A bucket that is off has no debt and charges none.
Figures = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may do; None means no such bucket."""

    minute: Limit | None
    hour: Limit | None
    figures: Figures = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "figures", _figures(self.minute) + _figures(self.hour))

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


class Decision(NamedTuple):
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
    debt_minute, debt_hour, reached_us = state
    token_minute, most_minute, flow_minute, token_hour, most_hour, flow_hour = limits.figures
    if debt_minute > most_minute:  # a limit that was larger when the debt was made
        debt_minute = most_minute
    if debt_hour > most_hour:
        debt_hour = most_hour
    elapsed = now_us - reached_us
    if elapsed > 0:
        reached_us = now_us
        debt_minute -= elapsed * flow_minute
        if debt_minute < 0:
            debt_minute = 0
        debt_hour -= elapsed * flow_hour
        if debt_hour < 0:
            debt_hour = 0

    owed_minute, owed_hour = debt_minute + cost * token_minute, debt_hour + cost * token_hour
    if owed_minute <= most_minute and owed_hour <= most_hour:
        after = (owed_minute, owed_hour, reached_us)
        return after if cost else state, describe(True, after, limits, now_us)
    return state, describe(False, (debt_minute, debt_hour, reached_us), limits, now_us)


def describe(admitted: bool, state: State, limits: Limits, now_us: int) -> Decision:
    """Put in words for the caller what a decision left behind.

    Args:
        admitted: the decision.
        state: the buckets after it, as of ``now_us`` or, where the clock stepped back, as of a later moment.
        limits: by which it was taken.
        now_us: Unix microseconds on the clock it was taken by.
    """
    debt_minute, debt_hour, reached_us = state
    token_minute, most_minute, flow_minute, token_hour, most_hour, flow_hour = limits.figures
    # A quotient of whole numbers below 2^53 is never rounded to a whole number that it is not: so these are exact, as
    # Lua's are, at a third of the cost of `//`.
    minute_us, hour_us = ceil(debt_minute / flow_minute), ceil(debt_hour / flow_hour)  # to be full again
    ahead_us = reached_us - now_us  # more than 0 only where the clock stepped back
    figures = (
        admitted,
        floor((most_minute - debt_minute) / token_minute) if token_minute else 0,
        floor((most_hour - debt_hour) / token_hour) if token_hour else 0,
        ceil((reached_us + minute_us) / 1_000_000),
        ceil((reached_us + hour_us) / 1_000_000),
        ceil((ahead_us + minute_us) / 1_000_000),
        ceil((ahead_us + hour_us) / 1_000_000),
        None if admitted else _wait_us(state, limits, now_us),
        NORMAL,
    )
    return _new_tuple(Decision, figures)  # half the time of `Decision(...)`


def full_at_us(state: State, limits: Limits) -> int:
    """When both buckets are full again, microseconds on the clock of ``state``, which then need not be kept."""
    debt_minute, debt_hour, last_us = state
    _, _, flow_minute, _, _, flow_hour = limits.figures
    minute_us, hour_us = debt_minute / flow_minute, debt_hour / flow_hour
    return last_us + ceil(max(minute_us, hour_us))


def share(limits: Limits, workers: int) -> Limits:
    """One worker's part of ``limits`` where ``workers`` can't ask one another: at least 1, unless all is denied."""

    def part(limit: Limit | None) -> Limit | None:
        if limit is None or limit.tokens == 0:
            return limit
        return Limit(max(1, limit.tokens // workers), limit.period_us)

    return Limits(part(limits.minute), part(limits.hour))


def rescale(state: State, limits: Limits, to: Limits, now_us: int) -> State:
    """The buckets of ``limits`` as buckets of ``to`` that are as far from full and full at the same moment."""

    def scaled(debt: int, limit: Limit | None, part: Limit | None) -> int:
        if limit is None or part is None or limit.tokens == 0:
            return 0
        return -(-debt * part.tokens // limit.tokens)

    return scaled(state[0], limits.minute, to.minute), scaled(state[1], limits.hour, to.hour), now_us


def _figures(limit: Limit | None) -> tuple[int, int, int]:
    if limit is None:
        return 0, 0, 1
    return limit.period_us, limit.tokens * limit.period_us, max(1, limit.tokens)  # of 0 tokens there is no debt either


def _wait_us(state: State, limits: Limits, now_us: int) -> int | None:
    """Microseconds from ``now_us`` until both buckets hold a token; None: they never will."""
    debt_minute, debt_hour, reached_us = state
    wait_us = 0
    for debt, limit in ((debt_minute, limits.minute), (debt_hour, limits.hour)):
        if limit is None:
            continue
        if limit.tokens == 0:
            return None
        excess = debt + limit.period_us - limit.tokens * limit.period_us
        wait_us = max(wait_us, -(-excess // limit.tokens))
    return wait_us + reached_us - now_us  # nothing flows back before the clock is where it was
