"""What the circuit breakers of all workers and pods tell one another through Redis (RESILIENCE.md, 1, "Fleet").

Nothing is stored: every worker listens to one channel for all and one of its own, to which what it asked is answered.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import aclosing, suppress
from contextvars import Context
from itertools import count
from os import urandom
from random import random
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from gateway.backends.redis import HostLookup
from gateway.circuit_breaker import UnknownBreakerError, check_reason, reset_by_hand
from gateway.policies.circuit_breaker import CircuitBreaker, Event, State

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub

VERSION = 1  # of the messages; others are not understood, and ignored
PATIENCE = 1.0  # seconds Redis has for a connection to be made, and for each answer
BEAT = 1.0  # seconds between two messages to oneself, by which a lost connection is found out
MISSED_BEATS = 2  # that may be on their way: one more, and what is published does not arrive
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 2.0  # seconds before Redis is tried again: doubled each time, and up to so long
ANSWERS_WITHIN = 0.25  # seconds that peers have to tell their status
RESET_WITHIN = 1.0  # seconds that they have to say that they have reset theirs
SEEN_FOR = 0.1  # seconds for which an answer about peers' status serves again: whoever asks can't keep them all busy
STALE = 5.0  # seconds after which what could not be told yet is told no more
MOST_UNTOLD = 1000

TOLD = {Event.TRIPPED: "alarm", Event.PROBE_FAILED: "alarm", Event.RECOVERED: "closing"}  # evidence of one's own
SEVERITY = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}

logger = logging.getLogger("gateway.fleet")
Status = Mapping[str, Any]  # of one breaker


class Fleet:
    """The breakers of this worker among those of all workers that have the same Redis and prefix.

    They hear of one another's openings, closings and resets, and are shown and reset together. A request never waits
    for any of it: what is to be told waits in a queue for Redis. While Redis is gone each worker decides for itself.

    Args:
        url: of Redis, as ``RedisLimiter`` takes it.
        breakers: this worker's, by service.
        prefix: of the channels.
        workers: of this pod: how many there are at least, as long as Redis has not told.
    """

    def __init__(
        self, url: str, breakers: Mapping[str, CircuitBreaker], *, prefix: str = "gateway:1:", workers: int = 1
    ) -> None:
        self.url = url
        self.breakers = breakers
        self.name = urandom(8).hex()
        self.channel = _channel(prefix)
        self.own_channel = _channel(prefix, self.name)
        self.prefix = prefix
        self.size = workers  # when Redis was last heard
        self.connected = False
        self._told_lost = False
        self._untold: deque[_Telling] = deque(maxlen=MOST_UNTOLD)
        self._questions: dict[int, _Question] = {}
        self._numbers = count(1)
        self._beat = self._beat_heard = 0
        self._seen: tuple[float, _Question] | None = None
        self._asking: asyncio.Task[_Question] | None = None
        self._keeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, in the running loop, without waiting for Redis; a second call changes nothing."""
        if self._keeper is None or self._keeper.done():
            self._loop = asyncio.get_running_loop()
            self._something_to_tell = asyncio.Event()
            # of no request's context: it outlives the one that happened to start it
            self._keeper = self._loop.create_task(self._keep(), name="fleet", context=Context())

    async def aclose(self) -> None:
        """Leave: peers count without this worker at once."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])

    # What is told

    def changed(self, service: str, why: Event) -> None:
        """Take note of a breaker's change of state; peers are told where it was by its own evidence."""
        self._seen = None
        if why in TOLD:
            self._tell(TOLD[why], service=service)

    def tell_reset(self, service: str, *, by: str, reason: str) -> None:
        """Have peers reset theirs, too. It may be called in any thread."""
        self._tell("reset", service=service, by=by, reason=reason)

    async def reset_breaker(self, service: str, *, by: str, reason: str) -> str:
        """Reset a service's breaker here and at all peers.

        Returns:
            How many workers have done so, ``"4 of 4"``, after a second at most.

        Raises:
            LookupError: no worker has such a breaker.
        """
        breaker = self.breakers.get(service)
        reached = 0
        if breaker is not None:
            reset_by_hand(breaker, monotonic(), by=by, reason=reason)
            reached = 1
        self._seen = None
        if self._hears_peers():
            question = await self._ask("reset", RESET_WITHIN, service=service, by=by, reason=reason)
            reached += sum(answer.get("known") is True for answer in question.answers.values())
        if reached == 0:
            raise LookupError(service)
        return f"{reached} of {max(reached, self.size)}"

    async def status(self) -> dict[str, dict[str, Any]]:
        """Every breaker over all workers that answer within 250 ms: the worst state, the sums, and ``workers``."""
        peers = await self._peers()
        now = monotonic()
        found: dict[str, list[Status]] = {name: [breaker.status(now)] for name, breaker in self.breakers.items()}
        for answer in peers:
            for name, status in answer["status"].items():
                found.setdefault(name, []).append(status)
        size = max(1 + len(peers), self.size)
        return {name: {**_together(each), "workers": f"{len(each)} of {size}"} for name, each in found.items()}

    def _hears_peers(self) -> bool:
        """In the loop where this runs; in another, in a thread of its own, a worker speaks for itself alone."""
        return self.connected and asyncio.get_running_loop() is self._loop

    async def _peers(self) -> list[dict[str, Any]]:
        if not self._hears_peers():
            return []
        if self._seen is None or monotonic() - self._seen[0] > SEEN_FOR:
            if self._asking is None or self._asking.done():
                self._asking = self._loop.create_task(self._ask("status", ANSWERS_WITHIN), context=Context())
            question = await asyncio.shield(self._asking)
            self._seen = (monotonic(), question)
        return [answer for answer in self._seen[1].answers.values() if "status" in answer]

    async def _ask(self, kind: str, within: float, **fields: Any) -> "_Question":
        """Ask all peers; return when all have answered, or after so many seconds."""
        number = next(self._numbers)
        question = self._questions[number] = _Question(monotonic() + within)
        self._tell(kind, question, number=number, **fields)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    await question.complete.wait()
        finally:
            del self._questions[number]
        return question

    def _tell(self, kind: str, question: "_Question | None" = None, to: str = "", **fields: Any) -> None:
        """Put a message into the queue: to one peer, or to all."""
        channel = _channel(self.prefix, to) if to else self.channel
        self._untold.append(_Telling(channel, _message(kind, self.name, **fields), question))
        if self._keeper is not None:
            with suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(self._something_to_tell.set)

    # What is heard

    def _hear(self, data: Any) -> None:
        try:
            message = orjson.loads(data)
            kind, sender = message["kind"], message["from"]
            if message["v"] != VERSION or not isinstance(sender, str):
                raise ValueError("of another version")
            if sender == self.name:
                if kind == "beat":
                    self._hear_beat(message["number"])
            elif kind == "answer":
                question = self._questions.get(message["number"])
                if question is not None and _is_status(message.get("status", {})):
                    question.answer(sender, message)
            elif kind == "status":
                now = monotonic()
                status = {name: breaker.status(now) for name, breaker in self.breakers.items()}
                self._tell("answer", to=sender, number=message["number"], status=status)
            else:
                self._heed(kind, self.breakers.get(message["service"]), message)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.debug("Ignored a message of another kind: %r (%s)", data[:200], error)

    def _heed(self, kind: str, breaker: CircuitBreaker | None, message: dict[str, Any]) -> None:
        """Do what a peer's message asks of a breaker, if there is one of that name here."""
        self._seen = None
        if kind == "reset":
            if breaker is not None:
                by, reason = check_reason(message["by"]), check_reason(message["reason"])
                reset_by_hand(breaker, monotonic(), by=by, reason=reason)
            if "number" in message:  # it waits for an answer
                known, names = breaker is not None, list(self.breakers)
                self._tell("answer", to=message["from"], number=message["number"], known=known, names=names)
        elif breaker is None:
            raise KeyError(message["service"])
        elif kind == "alarm":
            breaker.heard_alarm(monotonic())
        elif kind == "closing":
            breaker.heard_closing(monotonic())
        else:
            raise ValueError(kind)

    def _hear_beat(self, number: int) -> None:
        if number > self._beat_heard:
            self._beat_heard = number
            if not self.connected:
                self.connected = True
                self._told_lost = False
                logger.info("Circuit breakers share what they see in Redis")

    # The connections: one listens, one speaks

    async def _keep(self) -> None:
        """Hold them, and make them again for ever."""
        from redis.exceptions import RedisError

        client = self._client()
        lookup = HostLookup(client.connection_pool.connection_kwargs.get("host"))
        pause = FIRST_PAUSE
        try:
            while True:
                try:
                    await self._converse(client, lookup)
                except Exception as error:
                    if not self._told_lost:
                        self._told_lost = True
                        cause = _first(error)
                        fault = None if isinstance(cause, RedisError | OSError) else error  # one of ours is shown whole
                        late = f"no answer within {PATIENCE:g} s" if isinstance(cause, TimeoutError) else repr(cause)
                        why = str(cause) or late
                        logger.warning("Circuit breakers see each worker's calls alone: %s", why, exc_info=fault)
                pause = FIRST_PAUSE if self.connected else min(2 * pause, LONGEST_PAUSE)
                self.connected = False
                self._seen = None
                await asyncio.sleep(pause * (0.5 + random() / 2))  # lest all workers come back in one moment
        finally:
            self.connected = False
            lookup.cancel()

    def _client(self) -> "Redis":
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        # With a timeout of its own, redis-py writes by way of `asyncio.wait_for`, which before Python 3.12 may swallow
        # a cancellation. And it would connect anew by itself, however long a lookup takes.
        retry = Retry(NoBackoff(), 0, supported_errors=())
        return Redis.from_url(self.url, retry=retry, **_OPTIONS, socket_timeout=None)

    async def _converse(self, client: "Redis", lookup: HostLookup) -> None:
        """Connect, then listen and speak until either fails."""
        try:
            async with aclosing(client.pubsub(ignore_subscribe_messages=True)) as pubsub:
                async with asyncio.timeout(PATIENCE):
                    await lookup.succeed()
                    await pubsub.subscribe(self.channel, self.own_channel)
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._listen(pubsub))
                    both.create_task(self._speak(client))
        finally:
            await client.connection_pool.disconnect()

    async def _listen(self, pubsub: "PubSub") -> None:
        while True:
            message = await pubsub.get_message(timeout=None)
            if message is not None:
                self._hear(message["data"])

    async def _speak(self, client: "Redis") -> None:
        """Tell what waits to be told, and beat."""
        self._beat_heard = self._beat
        beat_at = self._loop.time()
        while True:
            self._something_to_tell.clear()
            while self._untold:
                await self._publish(client, self._untold.popleft())
            if self._loop.time() >= beat_at:
                beat_at = self._loop.time() + BEAT
                if self._beat - self._beat_heard > MISSED_BEATS:
                    raise ConnectionError("what is published does not arrive")
                self._beat += 1
                async with asyncio.timeout(PATIENCE):
                    await client.publish(self.own_channel, _message("beat", self.name, number=self._beat))
                    ((_, self.size),) = await client.pubsub_numsub(self.channel)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(beat_at):
                    await self._something_to_tell.wait()

    async def _publish(self, client: "Redis", telling: "_Telling") -> None:
        if monotonic() > telling.until:
            return
        try:
            async with asyncio.timeout(PATIENCE):
                receivers = await client.publish(telling.channel, telling.data)
        except BaseException:
            self._untold.appendleft(telling)  # a second time does no harm
            raise
        if telling.channel == self.channel:
            self.size = receivers
        if telling.question is not None:
            telling.question.was_put_to(receivers - 1)  # one of them is this worker


class _Telling:
    """A message on its way, and until when it is worth telling."""

    __slots__ = ("channel", "data", "question", "until")

    def __init__(self, channel: str, data: bytes, question: "_Question | None") -> None:
        self.channel = channel
        self.data = data
        self.question = question
        self.until = monotonic() + STALE if question is None else question.until


class _Question:
    """A question to all peers, until when it is waited for answers, and what each has answered."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.answers: dict[str, dict[str, Any]] = {}
        self.complete = asyncio.Event()
        self._expected: int | None = None

    def was_put_to(self, peers: int) -> None:
        self._expected = peers
        self._look()

    def answer(self, peer: str, answer: dict[str, Any]) -> None:
        self.answers[peer] = answer
        self._look()

    def _look(self) -> None:
        if self._expected is not None and len(self.answers) >= self._expected:
            self.complete.set()


def reset_through_redis(url: str, prefix: str, service: str, *, by: str, reason: str = "") -> str:
    """Reset a service's breaker in every worker that has this Redis and prefix, from a process that is none of them.

    It blocks, for a few seconds at most.

    Returns:
        How many workers have done so, ``"4 of 4"``.

    Raises:
        UnknownBreakerError: no worker has such a breaker, or there is no worker.
        ConnectionError: Redis, or every worker, did not answer.
    """
    from redis import Redis
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError
    from redis.retry import Retry

    name = urandom(8).hex()
    answers: dict[str, dict[str, Any]] = {}
    try:
        with (
            Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_OPTIONS, socket_timeout=PATIENCE) as client,
            client.pubsub() as pubsub,
        ):
            pubsub.subscribe(_channel(prefix, name))
            pubsub.get_message(timeout=PATIENCE)  # that we are: or an answer might come before
            question = _message("reset", name, number=1, service=service, by=by, reason=check_reason(reason))
            workers: int = client.publish(_channel(prefix), question)
            until = monotonic() + RESET_WITHIN
            while len(answers) < workers and (left := until - monotonic()) > 0:
                heard = pubsub.get_message(ignore_subscribe_messages=True, timeout=left)
                if heard is not None:
                    answer = orjson.loads(heard["data"])
                    answers[answer["from"]] = answer
    except (RedisError, OSError) as error:
        raise ConnectionError(f"the gateway's Redis does not do its part: {error}") from None
    if workers == 0:
        raise UnknownBreakerError(f"no gateway listens in Redis under the prefix {prefix!r}")
    if not answers:
        raise ConnectionError(f"none of {workers} workers answered within {RESET_WITHIN:g} s")
    reached = sum(answer["known"] for answer in answers.values())
    if reached == 0:
        names = dict.fromkeys(each for answer in answers.values() for each in answer["names"])
        raise UnknownBreakerError(f"there is no circuit breaker {service!r}; there are {', '.join(names)}")
    return f"{reached} of {workers}"


_OPTIONS: dict[str, Any] = {
    "protocol": 2,
    "driver_info": None,  # no CLIENT SETINFO, which a restricted user may not be allowed
    "socket_connect_timeout": PATIENCE,
}


def _channel(prefix: str, worker: str = "") -> str:
    return f"{prefix}breakers:{worker}" if worker else f"{prefix}breakers"


def _message(kind: str, sender: str, **fields: Any) -> bytes:
    return orjson.dumps({"v": VERSION, "kind": kind, "from": sender, **fields})


def _is_status(given: Any) -> bool:
    """It is what a worker of this version tells: by service a state and numbers."""
    return isinstance(given, dict) and all(
        isinstance(status, dict)
        and all(status[name] in SEVERITY if name == "state" else _is_number(status[name]) for name in status)
        and "state" in status
        for status in given.values()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _together(each: list[Status]) -> dict[str, Any]:
    """The worst state, the longest wait, and of all else the sum."""
    whole = {name: sum(status.get(name, 0) for status in each) for name in each[0] if name != "state"}
    return {
        "state": max((status["state"] for status in each), key=lambda state: SEVERITY[state]),
        **whole,
        "retry_after": max(status.get("retry_after", 0) for status in each),
    }


def _first(error: BaseException) -> BaseException:
    """What went wrong first, of a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
