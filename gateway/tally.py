"""How values are spread, in plain numbers: a tenth of the cost of a histogram, which they become before a scrape."""

from bisect import bisect_left

# Seconds. What lies above the last bound counts, too. Nothing finer than uvloop's clock, which has milliseconds.
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WAITS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
LAGS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Tally:
    """How many values lie up to each of some bounds.

    Args:
        bounds: in ascending order.
    """

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def take(self) -> tuple[list[int], float]:
        """How many lay between each bound and the one before it, and the sum of all; begin anew."""
        taken = self._counts, self._total
        self._counts, self._total = [0] * (len(self._bounds) + 1), 0.0
        return taken
