"""When a worker's garbage collector may look at all there is."""

import gc
import time
from collections.abc import Callable

LOOK = 1.0  # seconds between looks whether it is quiet
PATIENCE = 60.0  # seconds that garbage waits on a worker that is never quiet, at least
SHARE = 0.001  # of such a worker's time, at most


class QuietCollector:
    """Full garbage collections, moved to where nobody waits for them.

    A full collection stops the event loop for as long as it takes to visit what is in flight, 10 milliseconds with 500
    streams, and all of them feel it. Python starts one when enough is alive that was not before: when it is busy. This
    does it when nothing is under way. On a worker that is never quiet it does so after ``PATIENCE`` none the less, and
    less often where one takes longer than ``SHARE`` allows. The young generations are collected as ever.

    Args:
        is_quiet: whether nothing is under way.
        clock: seconds, monotonic.
    """

    def __init__(self, is_quiet: Callable[[], bool], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._is_quiet = is_quiet
        self._clock = clock
        self._last = clock()
        self._wait = PATIENCE
        self._before = gc.get_threshold()

    def take_over(self) -> None:
        """Call once what start-up made is complete: it lives as long as the process, so none looks at it again."""
        gc.collect()
        gc.freeze()
        # A request leaves no cycle behind, but those in flight look like growth to the collector: at its default of
        # 700 it ran again and again for nothing: 6,656 requests a second became 7,170 with 5,000, no more beyond.
        gc.set_threshold(10_000, 10, 1_000_000)
        self._last = self._clock()

    def hand_back(self) -> None:
        """Leave collecting to Python again."""
        gc.set_threshold(*self._before)
        gc.unfreeze()

    def look(self) -> bool:
        """Collect if it is time to; whether it did. Call it every ``LOOK`` seconds."""
        survived = gc.get_count()[2]  # collections of the middle generation since the last of all
        if not survived or (self._clock() - self._last < self._wait and not self._is_quiet()):
            return False
        began = self._clock()
        gc.collect()
        self._last = self._clock()
        self._wait = max(PATIENCE, (self._last - began) / SHARE)
        return True
