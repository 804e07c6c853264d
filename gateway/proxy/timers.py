"""One coarse clock for all deadlines: a timer of the event loop's own per request would cost more than the request."""

import asyncio
from heapq import heappop, heappush
from typing import Protocol

TICK = 0.01  # seconds


class Deadline(Protocol):
    """Something whose ``expire`` is called once ``due`` has passed; moving ``due`` later costs an assignment.

    Attributes:
        due: seconds on the event loop's clock.
        slot: where the wheel keeps it, None outside.
    """

    due: float
    slot: "set[Deadline] | None"

    def expire(self) -> None:
        """What happens then."""


class TimerWheel:
    """Deadlines by the tick they fall in; the event loop holds one timer, for the earliest.

    A deadline fires at most one tick late, and never early.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._slots: dict[int, set[Deadline]] = {}
        self._ticks: list[int] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_tick = 0

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def watched(self) -> list[Deadline]:
        """All deadlines that it watches."""
        return [deadline for slot in self._slots.values() for deadline in slot]

    def add(self, deadline: Deadline) -> None:
        """Watch a deadline until it fires or is removed."""
        tick = int(deadline.due / TICK) + 1
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._open(tick)
        slot.add(deadline)
        deadline.slot = slot

    def remove(self, deadline: Deadline) -> None:
        """Stop watching; nothing happens where it has fired or was never added."""
        if deadline.slot is not None:
            deadline.slot.discard(deadline)
            deadline.slot = None

    def bring_forward(self, deadline: Deadline, due: float) -> None:
        """Move ``due``, to any time. (To a later one needs no call: the wheel looks again when it fires.)"""
        self.remove(deadline)
        deadline.due = due
        self.add(deadline)

    def close(self) -> None:
        """Forget all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slots.clear()
        self._ticks.clear()

    def _open(self, tick: int) -> set[Deadline]:
        """A slot for a tick that had none."""
        slot = self._slots[tick] = set()
        heappush(self._ticks, tick)
        self._arm_by(tick)
        return slot

    def _arm_by(self, tick: int) -> None:
        """See to it that the timer rings by this tick."""
        if self._timer is not None:
            if self._timer_tick <= tick:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(tick * TICK, self._fire)
        self._timer_tick = tick

    def _fire(self) -> None:
        self._timer = None
        now = self.loop.time()
        current = int(now / TICK)
        due: list[Deadline] = []
        while self._ticks and self._ticks[0] <= current:
            for deadline in self._slots.pop(heappop(self._ticks)):
                deadline.slot = None
                due.append(deadline)
        for deadline in due:
            if deadline.due > now:
                self.add(deadline)
            else:
                deadline.expire()
        while self._ticks and not self._slots[self._ticks[0]]:  # all of them ended in time
            del self._slots[heappop(self._ticks)]
        if self._ticks:
            self._arm_by(self._ticks[0])
