"""Writes held back for two turns of the event loop where much is under way: then peers are awake when they come."""

import asyncio
from typing import Protocol

FEW = 8  # requests under way up to which nothing is held back: there is nobody to share a turn with
RUN = 64  # writes that are held back even so after there were more: a busy loop has its moments


class Sender(Protocol):
    """A connection with something to send."""

    def flush(self) -> None:
        """Send what was held back, if the connection can still send."""

    def abort(self) -> None:
        """Close at once: what ``flush`` was to send is lost, so nothing may follow it."""


class Outbox:
    """Lets the connections of one event loop send together, at the end of the next turn but one.

    A busy loop works in step: it reads all that has come, then writes to all of one kind of peer. A peer that is as
    fast as the writer goes to sleep after each message, and to wake it each time costs more than to write does
    (docs/decisions/0010). Writes that wait two turns leave among those of other requests, which were a step behind.
    Nothing waits for a clock: a turn without work takes some microseconds.

    Args:
        loop: the event loop of the connections.

    Attributes:
        under_way: how many requests are, where the connections don't know it themselves; its users keep the count.
    """

    __slots__ = ("_held", "_loop", "_run", "under_way")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: list[Sender] = []
        self._run = 0
        self.under_way = 0

    def holds(self, sender: Sender, under_way: int) -> bool:
        """Whether ``sender`` is to keep what it has; then its ``flush`` is called soon. It may flush before."""
        if under_way > FEW:
            self._run = RUN
        elif self._run:
            self._run -= 1
        else:
            return False
        held = self._held
        if not held:
            self._loop.call_soon(self._pass_a_turn)
        held.append(sender)
        return True

    def _pass_a_turn(self) -> None:
        self._loop.call_soon(self._release)

    def _release(self) -> None:
        held, self._held = self._held, []
        for sender in held:
            try:
                sender.flush()
            except Exception as error:  # the others' turn comes none the less
                sender.abort()
                self._loop.call_exception_handler({"message": "A connection failed to send", "exception": error})
