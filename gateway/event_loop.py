"""Which event loop one is in, without asking the kernel at every request; and how late it is."""

import asyncio
from threading import get_ident
from time import monotonic

from gateway.tally import LAGS, Tally

BEAT = 0.1  # seconds between two looks whether the loop is late


class SettledLoop:
    """The event loop in which this was made, and whether that is still the one that runs here.

    Before Python 3.12 ``asyncio.get_running_loop`` asks the kernel for the process ID at each call. Here that took 0.11
    microseconds against 0.04 for this; under a tracer or a sandbox that intercepts system calls it takes far more.

    Raises:
        RuntimeError: no event loop is running.
    """

    __slots__ = ("_thread", "loop")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread = get_ident()

    def is_here(self) -> bool:
        """False in another thread, and once the loop has stopped: then what belongs to it has to be made anew."""
        return self._thread == get_ident() and self.loop.is_running()


class LagMeter:
    """How late the event loop is for what is due: for as long as a callback takes, all others wait.

    Attributes:
        lags: seconds, one a beat; for whoever takes them.
    """

    def __init__(self) -> None:
        self.lags = Tally(LAGS)
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Measure the loop that runs here."""
        self._wait(asyncio.get_running_loop())

    def stop(self) -> None:
        """Measure no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = monotonic() + BEAT  # not the loop's time, which uvloop reads once a turn
        self._timer = loop.call_later(BEAT, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lags.add(max(0.0, monotonic() - self._due))
        self._wait(loop)
