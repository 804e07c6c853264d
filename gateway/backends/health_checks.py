"""What looks after the optional parts, so that a health report is answered at once from what was last seen."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from gateway.policies.health import Health

logger = logging.getLogger("gateway.health")
Ask = Callable[[], bool | Awaitable[bool]]


class HealthChecks:
    """Ask every part in turn of a second whether it is well; one that is stuck or raises is not.

    Args:
        health: told of every answer.
        checks: how to ask, by part: a plain function that answers at once, or one to await, which keeps time by itself.
        interval: seconds between the end of a round and the next.
        deadline: seconds after which an answer that is awaited is taken for "no", and waited for no longer.
        each_round: called once a round; for what else wants doing every second or so.
    """

    def __init__(
        self,
        health: Health,
        checks: Mapping[str, Ask],
        *,
        interval: float = 0.5,
        deadline: float = 0.5,
        each_round: Iterable[Callable[[], None]] = (),
    ) -> None:
        self.health = health
        self.checks = dict(checks)
        self.interval = interval
        self.deadline = deadline
        self.each_round = tuple(each_round)
        self._asked: dict[str, asyncio.Future[bool]] = {}
        self._told: dict[str, bool] = {}
        self._rounds: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin, without waiting for an answer; a second call changes nothing."""
        if self._rounds is None:
            self._rounds = asyncio.create_task(self._run(), name="health-checks")

    async def aclose(self) -> None:
        """Stop asking."""
        rounds, self._rounds = self._rounds, None
        tasks = [task for task in (rounds, *self._asked.values()) if task is not None]
        self._asked.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self.round()
            await asyncio.sleep(self.interval)

    async def round(self) -> None:
        """Ask every part once. One that has not answered the last question yet is not asked again."""
        for also in self.each_round:
            try:
                also()
            except Exception:
                logger.exception("%r failed", also)
        for part, ask in self.checks.items():
            if part not in self._asked:
                self._ask(part, ask)
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=self.deadline)
        for part, task in tuple(self._asked.items()):
            if not task.done():
                self.health.saw(part, False)
                if part in self._told:  # else it may still be loading
                    self._tell(part, False, "no answer in time")
            else:
                del self._asked[part]
                error = asyncio.CancelledError() if task.cancelled() else task.exception()
                self._note(part, error is None and task.result(), type(error).__name__ if error else "")

    def _ask(self, part: str, ask: Ask) -> None:
        try:
            answer = ask()
        except Exception as error:
            self._note(part, False, type(error).__name__)
            return
        if isinstance(answer, bool):
            self._note(part, answer)
        else:
            self._asked[part] = asyncio.ensure_future(answer)

    def _note(self, part: str, well: bool, why: str = "") -> None:
        self.health.saw(part, well)
        self._tell(part, well, why)

    def _tell(self, part: str, well: bool, why: str) -> None:
        if self._told.get(part) is well:
            return
        self._told[part] = well
        if well:
            logger.info("%s is well", part)
        else:
            logger.warning("%s is not well%s; the gateway goes on without it", part, f" ({why})" if why else "")
