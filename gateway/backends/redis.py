"""The limiter on Redis: buckets that all workers share, and this worker's own while Redis is slow or gone."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from hashlib import sha1
from itertools import chain
from pathlib import Path
from socket import AI_NUMERICHOST, SOCK_STREAM, gaierror, getaddrinfo
from time import monotonic
from typing import TYPE_CHECKING, Any

from gateway.backends.memory import MemoryLimiter, unix_microseconds
from gateway.event_loop import SettledLoop
from gateway.policies.token_bucket import CLOSED, LOCAL, OPEN, Decision, Figures, Limits, describe
from gateway.tally import WAITS, Tally

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

HEARTBEAT = 0.25  # seconds between two
PATIENCE = 0.5  # seconds for a connection to be made, or to give an answer it owes, before a new one is tried
HELD_BACK = 0.125  # of the deadline: how long a check waits for company at most; Redis has the rest
READY_WITHIN = 1.0  # seconds
DENIAL_REMEMBERED = 1.0  # seconds at most
DENIALS = 10_000
HEARTBEAT_LIMITS = Limits.of(1_000_000, None)  # never refused: a refusal writes nothing, and so would not try writing

_SCRIPT = Path(__file__).with_name("token_bucket.lua").read_bytes()
_EVAL = b"*9\r\n$4\r\nEVAL\r\n$%d\r\n%b\r\n$1\r\n1\r\n" % (len(_SCRIPT), _SCRIPT)
_EVALSHA = b"*9\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n1\r\n" % sha1(_SCRIPT).hexdigest().encode()  # noqa: S324  its name
_NOT_YET = object()
_Known = tuple[int, int, Limits, float]  # debts by the minute and the hour, of which buckets, monotonic seconds

# One question to Redis: who waits for its answer; as it is sent, but for the command; what `take` was asked; when, on
# the loop's clock, which is the monotonic one; and whether it is asked again. (Plain: a class costs ten times as much.)
_Check = tuple["asyncio.Future[Decision]", bytes, str, Limits, int, str, float, bool]


class RedisLimiter:
    """Token buckets in Redis.

    All checks that arrive in one turn of the loop, or while others are under way, leave together: one write, one read.
    Where answers take long, it is not waited for them.
    The first error or missed deadline switches to this worker's own buckets, begun from what was last known; a
    heartbeat finds the way back. It starts by itself at the first check, if ``start`` did not; ``aclose`` ends it.
    One event loop at a time is served by Redis; another, in a thread of its own, has the own buckets alone.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``, with what redis-py reads in it.
        prefix: of every key.
        deadline: seconds that a check waits for Redis at most.
        workers: how many processes share a limit while Redis is gone.
        capacity: callers whose buckets are kept in this process for then.
        on_change: told at each change whether the buckets are shared from now on, and why.
        clock: Unix microseconds, for this worker's own buckets.

    Attributes:
        decided: how many decisions were Redis's (``redis``), a denial of Redis's that was ``remembered``, or made
            without it: ``local``, ``open``, ``closed``. For whoever sets them back to 0.
        waits: seconds that Redis's took; for whoever takes them.

    Raises:
        ValueError: the URL is none of Redis's.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "gateway:1:",
        deadline: float = 0.025,
        workers: int = 1,
        capacity: int = 100_000,
        on_change: Callable[[bool, str], None] = lambda shared, reason: None,
        clock: Callable[[], int] = unix_microseconds,
    ) -> None:
        self._connection = _connection(url)  # loads redis-py now rather than at the first request
        self._prefix = prefix
        self._deadline = deadline
        self._held_back = deadline * HELD_BACK
        self._time_to_answer = deadline - self._held_back
        self._on_change = on_change
        self._clock = clock
        self._own = MemoryLimiter(workers=workers, capacity=capacity, clock=clock)
        self.decided = {"redis": 0, "remembered": 0, LOCAL: 0, OPEN: 0, CLOSED: 0}
        self.waits = Tally(WAITS)
        # What the own buckets begin from: whose turn was of late, and before that. Both together keep to the capacity.
        self._known: dict[str, _Known] = {}
        self._known_before: dict[str, _Known] = {}
        self._half_capacity = max(1, capacity // 2)
        self._denied: dict[str, tuple[float, Decision]] = {}  # by Redis, while that decides
        self._heartbeat = "heartbeat"
        self._openings: dict[int, bytes] = {}  # of a question, by the length of its key
        self._arguments: dict[int, dict[Figures, bytes]] = {}  # by cost and limits
        self._settled: SettledLoop | None = None  # where this runs; None: it does not
        self._closed = False
        self._shared: bool | None = None  # None: no answer yet, nor a failure
        self._forget()

    @property
    def shared(self) -> bool:
        """Whether Redis decides. If not, each worker does by itself."""
        return self._shared is True

    async def start(self) -> None:
        """Connect; return after the first answer or the first failure, and after a second in any case."""
        self._closed = False
        if self._is_elsewhere():
            return
        if not self._is_here():
            self._begin()
        await asyncio.wait([self._ready], timeout=READY_WITHIN)

    async def aclose(self) -> None:
        """Close the connection. Checks that still come are decided as without Redis."""
        self._closed = True
        if self._is_here():
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    def take(self, key: str, limits: Limits, cost: int = 1, on_failure: str = LOCAL) -> "asyncio.Future[Decision]":
        """Take ``cost`` tokens for a caller; 0 only looks.

        Args:
            key: of the caller's buckets.
            limits: of the buckets.
            cost: in tokens.
            on_failure: without Redis decide by this worker's own buckets (``local``), pass (``open``), or refuse
                (``closed``).
        """
        settled = self._settled
        if (settled is None or not settled.is_here()) and not self._closed:
            if self._is_elsewhere():
                return _decided(self._without_redis(key, limits, cost, on_failure))
            self._begin()
        if key in self._denied and cost:
            until, decision = self._denied[key]
            if monotonic() < until:
                self.decided["remembered"] += 1
                return _decided(decision)
            del self._denied[key]
        if self._shared is False or self._closed:
            return _decided(self._without_redis(key, limits, cost, on_failure))
        return self._ask(key, limits, cost, on_failure)

    def _without_redis(self, key: str, limits: Limits, cost: int, on_failure: str) -> Decision:
        if limits is not HEARTBEAT_LIMITS:
            self.decided[on_failure] += 1
        if on_failure == LOCAL:
            before, known = self._known_before.pop(key, None), self._known.pop(key, None)
            if (known := known or before) is not None:
                debt_minute, debt_hour, whole, at = known
                age = max(0.0, monotonic() - at)
                self._own.remember(key, whole, (debt_minute, debt_hour, 0), int(age * 1_000_000))
            return self._own.take(key, limits, cost)._replace(mode=on_failure)
        now_us = self._clock()
        decision = describe(True, (0, 0, now_us), limits, now_us)._replace(mode=on_failure)
        if on_failure == CLOSED:
            decision = decision._replace(
                admitted=False,
                remaining_minute=0,
                remaining_hour=0,
                wait_us=1_000_000,  # the heartbeat looks four times by then
            )
        return decision

    # One connection, and the checks on their way

    def _forget(self) -> None:
        self._link: _Link | None = None
        self._waiting: list[_Check] = []  # to leave with the next flight
        self._again: list[_Check] = []  # before them, for Redis had forgotten the script
        self._under_way: deque[_Check] = deque()  # in the order of their answers
        self._departed_at = 0.0
        self._boarding = False
        self._alarm: asyncio.Handle | None = None

    def _is_here(self) -> bool:
        return self._settled is not None and self._settled.is_here()

    def _is_elsewhere(self) -> bool:
        """Whether a loop that runs in another thread has the connection."""
        return self._settled is not None and not self._settled.is_here() and self._settled.loop.is_running()

    def _begin(self) -> None:
        """Start in this loop; what belongs to one that has ended is left to it."""
        self._forget()
        self._settled = SettledLoop()
        self._loop = loop = self._settled.loop
        self._shared = None
        self._lookup = HostLookup(getattr(self._connection, "host", None))
        self._ready: asyncio.Future[None] = loop.create_future()
        # of no request's context: it outlives the one that happened to start it
        self._keeper = loop.create_task(self._keep(self._settled), context=Context())

    async def _keep(self, settled: SettledLoop) -> None:
        """Hold a connection, and try it with the script itself at every beat."""
        loop = settled.loop
        try:
            while True:
                began = loop.time()
                try:
                    if self._link is None:
                        async with asyncio.timeout(PATIENCE):
                            await self._lookup.succeed()
                            self._link = _Link(await _connect(self._connection), self._answered, self._broke)
                    heard = (await self._ask(self._heartbeat, HEARTBEAT_LIMITS, 1, OPEN)).mode != OPEN
                    if not heard and self._under_way and loop.time() - self._under_way[0][6] > PATIENCE:
                        self._drop()
                except TimeoutError:
                    self._lose(f"no connection within {PATIENCE * 1000:.0f} ms")
                except Exception as error:
                    self._lose(str(error) or repr(error))
                await asyncio.sleep(max(0.0, began + HEARTBEAT - loop.time()))
        finally:
            if self._settled is settled:
                self._settled = self._shared = None
                self._drop()
                self._lookup.cancel()
                if self._alarm is not None:
                    self._alarm.cancel()
                if not self._ready.done():
                    self._ready.set_result(None)

    def _ask(self, key: str, limits: Limits, cost: int, on_failure: str) -> "asyncio.Future[Decision]":
        """Ask Redis; decide without it where it does not answer in time, or not with a decision."""
        loop = self._loop
        name = key.encode("utf-8", "backslashreplace")  # no key may hold up the others
        try:
            question = b"".join((self._openings[len(name)], name, self._arguments[cost][limits.figures]))
        except KeyError:
            question = b"".join((self._open(len(name)), name, self._argue(limits, cost)))
        answer: asyncio.Future[Decision] = loop.create_future()
        self._waiting.append((answer, question, key, limits, cost, on_failure, loop.time(), False))
        if not self._boarding and not self._under_way:
            self._boarding = True
            loop.call_soon(self._depart)
        if self._alarm is None:
            self._alarm = loop.call_later(self._held_back, self._look)
        return answer

    def _open(self, length: int) -> bytes:
        prefix = self._prefix.encode()
        opening = self._openings[length] = b"$%d\r\n%b" % (len(prefix) + length, prefix)
        return opening

    def _argue(self, limits: Limits, cost: int) -> bytes:
        numbers: list[int] = []
        for limit in (limits.minute, limits.hour):
            numbers += (-1, 0) if limit is None else (limit.tokens, limit.period_us)
        packed = b"\r\n" + b"".join(b"$%d\r\n%d\r\n" % (len(str(number)), number) for number in (*numbers, cost))
        self._arguments.setdefault(cost, {})[limits.figures] = packed
        return packed

    def _depart(self) -> None:
        """Send all that wait, in the order of arrival: nothing overtakes a check for which Redis had no script."""
        self._boarding = False
        if self._link is None or (self._again and self._under_way):
            return
        first = _EVAL if self._again else _EVALSHA  # the first one teaches Redis the script
        # a request given up while it waited is left behind: it costs no token
        flight = [check for check in self._again + self._waiting if not check[0].done()]
        self._again, self._waiting = [], []
        if flight:
            self._under_way.extend(flight)
            self._departed_at = self._loop.time()
            self._link.send(first + _EVALSHA.join([check[1] for check in flight]))

    def _answered(self, next_reply: Callable[[], Any]) -> None:
        """Give each reply, up to ``_NOT_YET``, to the check that has waited longest."""
        under_way = self._under_way
        now = self._loop.time()
        while (reply := next_reply()) is not _NOT_YET:
            if not under_way:
                raise ConnectionError(str(reply))  # such as having too many clients
            answer, _, key, limits, _, _, arrived, is_again = check = under_way[0]
            if isinstance(reply, list):
                admitted, debt_minute, debt_hour, reached_us, now_us = reply
                decision = describe(admitted == 1, (debt_minute, debt_hour, reached_us), limits, now_us)
                in_time = not answer.done()
                if in_time:
                    answer.set_result(decision)
                if limits is HEARTBEAT_LIMITS:
                    # Back only where a check that is held back would be in time too: else limits would come and go.
                    if in_time and (self._shared is not False or now - arrived <= self._time_to_answer):
                        self._switch(True, "Redis answers")
                else:
                    if in_time:
                        self.decided["redis"] += 1
                        self.waits.add(now - arrived)
                    if self._shared is not False:  # by now the own buckets may hold more than this late answer knows of
                        self._known[key] = (debt_minute, debt_hour, limits, arrived)
                        if len(self._known) >= self._half_capacity:
                            self._known_before, self._known = self._known, {}
                        if not admitted:
                            self._remember_denial(key, decision)
            elif str(reply).startswith("NOSCRIPT") and not is_again:
                self._again.append((*check[:-1], True))
            else:
                if limits is not HEARTBEAT_LIMITS:  # of a cluster some nodes may be well: try the one of this key
                    self._heartbeat = f"heartbeat{{{self._prefix}{key}}}"
                self._lose(f"Redis does not run the limiter's script: {reply}")
            under_way.popleft()
            if not under_way and (self._again or self._waiting):
                self._depart()

    def _remember_denial(self, key: str, decision: Decision) -> None:
        if len(self._denied) >= DENIALS:
            self._denied.clear()
        wait = DENIAL_REMEMBERED if decision.wait_us is None else decision.wait_us / 1_000_000
        self._denied[key] = (monotonic() + min(wait, DENIAL_REMEMBERED), decision)

    # The deadline: one timer for all checks, and two more turns of the loop, for it may be we who were late

    def _look(self) -> None:
        loop = self._loop
        due = self._due()
        if due is None:
            self._alarm = None
            return
        now = loop.time()
        if now >= due:
            self._alarm = loop.call_soon(self._look_again)
            return
        since = self._waiting[0][6] if self._waiting else now
        if now >= since + self._held_back:
            self._depart()
            since = now
        self._alarm = loop.call_at(min(due, since + self._held_back), self._look)

    def _look_again(self) -> None:
        # what the socket holds is read in this turn, after this call; the next call is after that
        self._alarm = self._loop.call_soon(self._give_up)

    def _give_up(self) -> None:
        due = self._due()
        if due is not None and self._loop.time() >= due:
            self._alarm = None
            self._lose(f"no answer within {self._deadline * 1000:.0f} ms")
        else:
            self._look()

    def _due(self) -> float | None:
        """When patience ends: a deadline after the oldest arrival. None: nobody waits."""
        under_way = self._under_way
        for answer, _, _, _, _, _, arrived, _ in chain(self._again, under_way, self._waiting):
            if not answer.done():
                due = arrived + self._deadline
                # All leave before they are held back for so long, unless we were late ourselves: Redis still gets time.
                if under_way and not under_way[0][7] and self._departed_at - under_way[-1][6] > 2 * self._held_back:
                    due = max(due, self._departed_at + self._held_back)
                return due
        return None

    # The two modes

    def _switch(self, shared: bool, reason: str) -> None:
        if shared is not self._shared:
            self._shared = shared
            self._denied.clear()
            self._on_change(shared, reason)
        if not self._ready.done():
            self._ready.set_result(None)

    def _lose(self, reason: str) -> None:
        self._release()
        self._switch(False, reason)

    def _release(self) -> None:
        """Decide every check without Redis; those under way are still owed an answer by the connection."""
        for answer, _, key, limits, cost, on_failure, _, _ in (*self._under_way, *self._again, *self._waiting):
            if not answer.done():
                answer.set_result(self._without_redis(key, limits, cost, on_failure))
        self._again, self._waiting = [], []

    def _broke(self, link: "_Link", reason: str) -> None:
        if link is self._link:
            self._drop()
            self._lose(reason)

    def _drop(self) -> None:
        if self._link is not None:
            self._link.abort()
            self._link = None
        self._release()
        self._under_way.clear()


class HostLookup:
    """Looks up Redis's host, at most once at a time.

    A lookup that hangs can't be ended, and keeps one of the few threads in which services' names are looked up.

    Args:
        host: a name, or an address, for which no thread is needed; None: there is none to look up, as of a unix socket.
    """

    __slots__ = ("_host", "_under_way")

    def __init__(self, host: str | None) -> None:
        self._host = host
        self._under_way: asyncio.Task[Any] | None = None

    async def succeed(self) -> None:
        """Return once there is an answer; one that is given up goes on, and the next waits for it.

        Raises:
            OSError: there is no such name.
        """
        if self._host is None:
            return
        with suppress(gaierror):
            getaddrinfo(self._host, None, flags=AI_NUMERICHOST)
            return
        if self._under_way is None:
            loop = asyncio.get_running_loop()
            self._under_way = loop.create_task(loop.getaddrinfo(self._host, None, type=SOCK_STREAM))
        await asyncio.wait([self._under_way])
        done, self._under_way = self._under_way, None
        done.result()

    def cancel(self) -> None:
        """Wait for it no longer."""
        if self._under_way is not None:
            self._under_way.cancel()
            self._under_way = None


class _Link(asyncio.Protocol):
    """A connection that redis-py has made and logged in to, its bytes read here: a fifth of the time a command."""

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        answered: Callable[[Callable[[], Any]], None],
        broke: Callable[["_Link", str], None],
    ) -> None:
        import hiredis

        self._writer = writer  # which would close the transport if it were let go of
        self._transport = writer.transport
        reader = hiredis.Reader(notEnoughData=_NOT_YET)
        self._feed, self._gets = reader.feed, reader.gets
        self._answered = answered
        self._broke = broke
        self._transport.set_protocol(self)
        if self._transport.is_closing():
            raise ConnectionError("Redis closed the connection")

    def send(self, data: bytes) -> None:
        self._transport.write(data)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._feed(data)
            self._answered(self._gets)
        except Exception as error:  # what came is not the protocol, or not what was asked for
            self._broke(self, f"Redis sent something unexpected: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        self._broke(self, f"the connection to Redis broke: {error}" if error else "Redis closed the connection")


def _decided(decision: Decision) -> "asyncio.Future[Decision]":
    decided = asyncio.get_running_loop().create_future()
    decided.set_result(decision)
    return decided


def _connection(url: str) -> "AbstractConnection":
    """A connection of redis-py's, not yet made; it can be made again and again, and reads certificates but once.

    Raises:
        ValueError: the URL is none of Redis's, or has an option that redis-py does not know.
    """
    from redis.asyncio.connection import Connection, parse_url

    options: dict[str, Any] = {
        **parse_url(url),
        "protocol": 2,  # no pushes between the answers
        "driver_info": None,  # no CLIENT SETINFO, which a restricted user may not be allowed
        "retry_on_timeout": False,
    }
    for of_a_pool in ("max_connections", "timeout"):
        options.pop(of_a_pool, None)
    kind: type[AbstractConnection] = options.pop("connection_class", Connection)
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"an option in the URL of Redis is not known: {error}") from None


async def _connect(connection: "AbstractConnection") -> asyncio.StreamWriter:
    """Connect and log in; the stream is the caller's."""
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        writer: asyncio.StreamWriter = connection._writer  # type: ignore[assignment]
        connection._reader = connection._writer = None  # redis-py has no way to say: it is mine now
        return writer
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
