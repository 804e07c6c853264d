"""One request's way through the proxy: choose a replica, send, stream the answer back, resend where that is safe."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.types import Message, Receive, Scope, Send

from gateway.context import OUTCOMES, Cause, RequestContext, is_failure, unheard
from gateway.policies.circuit_breaker import PATIENCE, Outcome
from gateway.policies.replicas import Place
from gateway.policies.retry import may_resend
from gateway.policies.services import Address
from gateway.problems import ForwardingError, answer, error_body
from gateway.proxy.headers import Header, RequestFields
from gateway.proxy.route import LISTEN_AFTER, Route, UpstreamConnection, UpstreamPool
from gateway.proxy.timers import Deadline

if TYPE_CHECKING:
    from gateway.proxy.app import ProxyApp

LOOK_AGAIN = 60.0  # seconds, at the latest
REPLAY_BYTES = 64 * 1024  # of a request's body, kept in case it is sent again (RESILIENCE.md, 3)
TAIL_BYTES = 4096  # of a stream of events: enough to see in its last one whether it says that the stream failed
NEVER = float("inf")
FIRST_ATTEMPT = b"x-gateway-attempt: 1\r\n"
MOST_DIGITS = 19  # of the largest number of 63 bits, by which some callers mean "for ever"
LONGEST_ALLOWED = 1_000_000_000  # ms, 11 days: longer than any answer may take, and 31 bits hold it

TOO_LATE = {
    Cause.NO_CONNECTION: "All connections to the service stayed in use",
    Cause.CONNECT_TIMEOUT: "The service could not be reached in time",
    Cause.WRITE_TIMEOUT: "The service stopped taking the request",
    Cause.FIRST_BYTE_TIMEOUT: "The service did not answer in time",
    Cause.STALLED: "The service stopped in the middle of its answer",
    Cause.ANSWER_TIMEOUT: "The service took too long over its answer",
    Cause.CLIENT_DEADLINE: "The time that the caller allowed ran out",
    Cause.CLIENT_TOO_SLOW: "The client was too slow",
    Cause.CLIENT_LEFT: "The client left",
    Cause.SHUTDOWN: "The gateway is shutting down",
    Cause.GATEWAY_FAULT: "An unexpected error occurred",
}
# Endings of an attempt after which another may be worth a try: a service that was slow once will be slow again.
RETRIABLE = frozenset({Cause.CONNECT_FAILED, Cause.CONNECT_TIMEOUT, Cause.RESET, Cause.GARBLED, Cause.CUT_SHORT})
BY_SERVER = {"client_too_slow": Cause.CLIENT_TOO_SLOW, "bad_body": Cause.REFUSED}  # its reasons in `http.disconnect`
# Looked up once: an enumeration's member costs ten times what a global does.
COMPLETED, CLIENT_TOO_SLOW, STALLED = Cause.COMPLETED, Cause.CLIENT_TOO_SLOW, Cause.STALLED
FIRST_BYTE_TIMEOUT = Cause.FIRST_BYTE_TIMEOUT
SUCCESS, FAILURE, NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL
logger = logging.getLogger("gateway.proxy")


class Exchange:
    """One HTTP request, from its first byte to its terminal cause.

    What ends it early - a timer, the client's leaving, the gateway's stopping - cancels its task with the reason set
    beforehand, so that it ends in one way wherever it waits.
    """

    def __init__(
        self,
        proxy: "ProxyApp",
        route: Route,
        task: asyncio.Task[Any],
        scope: Scope,
        receive: Receive,
        send: Send,
        context: RequestContext,
    ) -> None:
        self.proxy = proxy
        self.route = route
        self._task = task
        self.scope = scope
        self.receive = receive
        self.send = send
        self.context = context
        self._now = route.loop.time
        now = self._now()
        self._phase_ends = now + route.service.timeouts.client
        self.due = now + route.look_after
        self.slot: set[Deadline] | None = None
        self._fields = RequestFields(scope["headers"])
        self._aborted: ForwardingError | None = None
        self._told = context.on_left is unheard  # the server will tell us of the client's leaving
        self._listener: asyncio.Task[None] | None = None  # reads what the client still sends, and whether it leaves
        self._place: Place | None = None  # of the attempt under way
        self._connection: UpstreamConnection | None = None
        self._first_part = b""  # of the body
        self._uploaded = False  # the whole body came and was passed on
        self._kept: list[bytes] | None = None  # a streamed body so far, while it may have to be sent again
        self._kept_bytes = 0
        self._outcome = NEUTRAL  # of the last attempt that had an answer
        self._streamed = False  # the body went to a replica as it came
        self._over = False  # the client has its answer, or is told why not
        self._started = False  # something was sent to the client
        self._streams_events = False
        self._tail = b""  # of a stream of events
        self._phase = CLIENT_TOO_SLOW  # what it means if `_phase_ends` passes
        self._answer_ends = NEVER
        self._allowed_until = NEVER  # by the caller
        self._ends = NEVER  # the earlier of these two

    async def run(self) -> None:
        """Forward the request and answer the client.

        Raises:
            ConnectionAbortedError: the answer had begun and can't be had whole: the client's connection must be cut.
        """
        now, route, context = self._now, self.route, self.context
        route.wheel.add(self)
        route.outbox.under_way += 1
        if self._told:
            context.on_left = self._leave
        error = None
        try:
            self._refuse_unfit()
            self._take_first(await self.receive())
            head = self._head()
            began = now()
            route.budget.deposit(began)
            tried: tuple[str, ...] = ()
            while True:
                place = self._place = route.replicas.choose(began, tried, context.probe)
                context.replica = place.address
                context.attempts += 1
                failure, outcome = None, NEUTRAL
                try:
                    wait = await self._attempt(route.pools[place.address], head, began)
                    outcome = self._outcome
                except ForwardingError as raised:
                    failure = raised
                except asyncio.CancelledError as cancelled:
                    failure = self._own_abort(cancelled)
                finally:
                    if failure is not None:
                        outcome = FAILURE if self._tried_patience(failure) else OUTCOMES[failure.cause]
                        failure.__traceback__ = None  # it leads to frames that lead to it: a cycle, also below
                    place.finish(outcome, now())
                    used = self._let_go() if self._connection is not None else None
                if failure is not None:
                    wait = self._wait_to_resend(failure=failure, used=used)
                    if wait is None:
                        raise failure
                elif wait is None:
                    break
                tried += (place.address,)
                self._expect(Cause.CLIENT_DEADLINE, NEVER)
                if self.slot is None:  # it was a timer that ended the attempt, and so the wheel has let go of it
                    route.wheel.bring_forward(self, min(self._ends, now() + route.look_after))
                await asyncio.sleep(wait)
                began = now()
        except ForwardingError as raised:
            error = raised
        except asyncio.CancelledError as cancelled:
            context.cause = Cause.SHUTDOWN
            error = self._own_abort(cancelled)
        finally:
            self._over = True
            if self._told:
                context.on_left = unheard  # else each request would leave a cycle of references
            route.outbox.under_way -= 1
            route.wheel.remove(self)
            if self._listener is not None:
                self._listener.cancel()
        if error is not None:
            context.cause, context.reason = error.cause, error.reason
            error.__traceback__ = None
            await self._tell(error)

    def _tried_patience(self, failure: ForwardingError) -> bool:
        """The client gave a replica so long for its first byte that its leaving says something, as to the breaker."""
        if failure.cause is not Cause.CLIENT_LEFT or self._phase is not FIRST_BYTE_TIMEOUT:
            return False
        waits_since = self._phase_ends - self.route.service.timeouts.first_byte
        return self._now() - waits_since > PATIENCE

    def abort(self, error: ForwardingError) -> None:
        """End the request now, wherever it waits."""
        if self._aborted is None and not self._over:
            self._aborted = error
            self._task.cancel()

    def _leave(self, message: Message) -> None:
        """The server's call: the client is gone."""
        self.abort(departure(message))

    # The way there

    def _refuse_unfit(self) -> None:
        """What can be told from the head alone, before the body costs anything."""
        length = self._fields.length
        limit = self.route.service.max_body_bytes
        if length is not None and len(length) >= self.route.limit_digits and int(length) > limit:
            raise self._too_large()
        if self._fields.plain:
            return
        by_name = self._fields.by_name
        if b"x-request-timeout-ms" in by_name:
            self._allow(by_name[b"x-request-timeout-ms"])
        if self.proxy.via in by_name.get(b"via", b""):
            message = "The request has come through this gateway before"
            raise ForwardingError(Cause.REFUSED, message, status=508, reason="loop")

    def _allow(self, milliseconds: bytes) -> None:
        """Bound the time of the whole request, from its arrival, by what the caller allows (RESILIENCE.md, 4)."""
        milliseconds = milliseconds.strip(b" \t")  # not every server does
        if not milliseconds.isdigit() or len(milliseconds) > MOST_DIGITS:
            message = "X-Request-Timeout-Ms must be one whole number of milliseconds"
            raise ForwardingError(Cause.REFUSED, message, status=400, reason="bad_timeout")
        allowed = min(int(milliseconds), LONGEST_ALLOWED) / 1000
        if allowed == 0:
            raise ForwardingError(Cause.CLIENT_DEADLINE, TOO_LATE[Cause.CLIENT_DEADLINE])
        self._ends = self._allowed_until = self._now() - (monotonic() - self.context.started) + allowed
        if self._ends < self.due:
            self.route.wheel.bring_forward(self, self._ends)

    def _head(self) -> bytes:
        """The fields that are the same at each attempt: all but ``Host`` and the body's framing."""
        scope, proxy = self.scope, self.proxy
        client = scope.get("client")
        scheme = b"https" if scope.get("scheme") == "https" else b"http"
        return self._fields.block(client[0] if client else "", proxy.trusted.trusts, scheme, proxy.via)

    def _take_first(self, message: Message) -> None:
        """The first part of the body, which for most requests is all of it."""
        if message["type"] == "http.disconnect":
            raise departure(message)
        self._first_part = part = message.get("body", b"")
        if len(part) > self.route.service.max_body_bytes:
            raise self._too_large()
        self.context.bytes_in = len(part)
        if message.get("more_body", False):
            self._kept = []
            self._keep(part)
        else:
            self._uploaded = True

    def _keep(self, part: bytes) -> None:
        """Keep a part of a streamed body for as long as it may have to be sent again."""
        if self._kept is not None:
            self._kept_bytes += len(part)
            if self._kept_bytes > REPLAY_BYTES:
                self._kept = None
            else:
                self._kept.append(part)

    # One attempt

    async def _attempt(self, pool: UpstreamPool, head: bytes, now: float) -> float | None:
        """Send the request to a replica and stream its answer to the client.

        Returns:
            None where the client has its answer; seconds to wait where the service refused and it may be sent again.
        """
        context, send = self.context, self.send
        connection = self._connection = pool.take_idle(now) or await self._connect(pool)
        self._dispatch(connection, pool.address, head)
        while not connection.head_complete:
            await connection.progress()
        complete = connection.complete
        if connection.error is not None and not complete:  # nothing was sent: it can still be a whole error
            raise connection.error

        status = connection.status
        failed = status >= 500 and is_failure(status)
        self._outcome = FAILURE if failed else SUCCESS
        if failed or status == 429:
            wait = self._wait_to_resend(refusal=connection)
            if wait is not None:
                if complete:
                    self._give_back(pool)
                return wait

        headers, data = connection.headers, connection.take()
        if status == 304 and "gateway.server" not in (self.scope.get("extensions") or ()):
            headers = [header for header in headers if header[0] != b"content-length"]  # uvicorn would wait for a body
        if data:
            self._begin_body(not failed)
        events = False
        if not complete or connection.content_length is None:
            events = self._begin_stream(connection)
        else:  # known whole from its head: what takes time now is the client
            self._expect(CLIENT_TOO_SLOW, self.route.service.timeouts.client)
        if complete:
            self._give_back(pool)
        context.status = status
        self._started = True
        passed_at = self._now() if data and not complete and context.streamed else NEVER  # the last part of a stream
        await send({"type": "http.response.start", "status": status, "headers": headers})
        while True:
            context.bytes_out += len(data)
            if events:
                self._tail = (self._tail + data)[-TAIL_BYTES:]
            await send({"type": "http.response.body", "body": data, "more_body": not complete})
            if complete:
                break
            self._expect(STALLED, self.route.service.timeouts.between_bytes)
            while not (data := connection.take()) and not connection.complete:
                await connection.progress()
            if context.first_byte_at is None:
                self._begin_body(not failed)
            complete = connection.complete
            if complete:
                self._give_back(pool)
            passes_at = self._expect(CLIENT_TOO_SLOW, self.route.service.timeouts.client)
            if data and context.streamed:
                if passed_at != NEVER:
                    self.route.gaps.add(passes_at - passed_at)
                passed_at = passes_at
        context.cause = COMPLETED
        if events and ends_in_error(self._tail):
            context.cause, self._outcome = Cause.ERROR_EVENT, FAILURE
        return None

    async def _connect(self, pool: UpstreamPool) -> UpstreamConnection:
        """A connection where none was idle: a new one, or one that another request gives back."""
        timeouts = self.route.service.timeouts
        if pool.full:
            self._expect(Cause.NO_CONNECTION, timeouts.pool)
        connection = await pool.reserve()
        if connection is None:
            self._expect(Cause.CONNECT_TIMEOUT, timeouts.connect)
            connection = await pool.connect()
        return connection

    def _dispatch(self, connection: UpstreamConnection, address: Address, head: bytes) -> None:
        scope, service, fields = self.scope, self.route.service, self._fields
        target = address.path + (scope.get("raw_path") or quote(scope["path"]).encode())
        if scope.get("query_string"):
            target += b"?" + scope["query_string"]
        host = fields.host if service.preserve_host and fields.host else address.authority
        if not fields.plain and self._allowed_until != NEVER:
            left = int((self._allowed_until - self._now()) * 1000)
            if left <= 0:
                raise ForwardingError(Cause.CLIENT_DEADLINE, TOO_LATE[Cause.CLIENT_DEADLINE])
            head += b"x-request-timeout-ms: %d\r\n" % left
        attempts = self.context.attempts
        head += FIRST_ATTEMPT if attempts == 1 else b"x-gateway-attempt: %d\r\n" % attempts
        if not self._uploaded:
            length = fields.length
            framing = b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % int(length)
            connection.request(scope["method"].encode(), target, host, head, framing, b"")
            self._streamed = True
            self._listen(partial(self._upload, connection))
            return
        body = self._first_part if self._kept is None else b"".join(self._kept)
        has_body = body or fields.length is not None or (not fields.plain and b"transfer-encoding" in fields.by_name)
        framing = b"content-length: %d\r\n" % len(body) if has_body else b""
        connection.request(scope["method"].encode(), target, host, head, framing, body)
        self._expect(FIRST_BYTE_TIMEOUT, service.timeouts.first_byte)

    def _wait_to_resend(
        self,
        *,
        failure: ForwardingError | None = None,
        refusal: UpstreamConnection | None = None,
        used: UpstreamConnection | None = None,
    ) -> float | None:
        """Seconds after which the request is sent again, or None where the client gets what there is.

        Args:
            failure: what broke the attempt.
            refusal: a connection on which an answer began that may call for another attempt.
            used: the connection of that attempt, where there was one.
        """
        now, service, context = self._now(), self.route.service, self.context
        if service.retries < context.attempts:
            return None
        if failure is not None and failure.cause not in RETRIABLE:
            return None
        wait = may_resend(
            method=self.scope["method"],
            retried=context.attempts - 1,
            retries=service.retries,
            time_left=self._allowed_until - now,
            random=self.route.random,
            dispatched=failure is None or (used is not None and used.dispatched),
            reused_and_silent=used is not None and used.served > 0 and used.silent,
            status=None if refusal is None else refusal.status,
            retry_after=None if refusal is None else retry_after(refusal.headers),
            keyed=self._fields.keyed,
            all_methods=service.retry_all_methods,
            replayable=not self._streamed or (self._uploaded and self._kept is not None),
            sent_to_client=self._started,
            probe=context.probe,
        )
        if wait is not None and not self.route.budget.take(now):
            context.retry_denied = True
            return None
        return wait

    def _begin_stream(self, connection: UpstreamConnection) -> bool:
        """Bound the time of an answer that is not known whole from its head; whether it is a stream of events."""
        timeouts = self.route.service.timeouts
        unbounded = connection.content_length is None
        self.context.streamed = unbounded
        self._streams_events = unbounded and is_event_stream(connection.headers)
        self._answer_ends = self._now() + (timeouts.stream if unbounded else timeouts.answer)
        self._ends = ends = min(self._answer_ends, self._allowed_until)
        if ends < self.due:
            self.route.wheel.bring_forward(self, ends)
        self._expect(CLIENT_TOO_SLOW, timeouts.client)
        return self._streams_events

    def _begin_body(self, well: bool) -> None:
        """The first of the answer's body is here."""
        self.context.first_byte_at = monotonic()
        place = self._place
        if well and place is not None and place.trial:
            place.succeed_so_far(self._now())

    def _give_back(self, pool: UpstreamPool) -> None:
        """The answer has come whole: another request may have the connection while the client still reads."""
        connection, self._connection = self._connection, None
        assert connection is not None
        if self._uploaded:
            pool.give_back(connection)
        else:  # the service answered before the body was up: the rest of it is not sent
            connection.abort()

    def _let_go(self) -> UpstreamConnection:
        """End what is still under way with a replica; on which connection."""
        connection, self._connection = self._connection, None
        assert connection is not None
        connection.abort()
        return connection

    # Beside it

    def _listen(self, listen: Callable[[], Awaitable[None]]) -> None:
        self._listener = self.route.loop.create_task(self._guarded(listen))

    async def _guarded(self, listen: Callable[[], Awaitable[None]]) -> None:
        try:
            await listen()
        except ForwardingError as error:
            self.abort(error)
        except Exception:
            logger.exception("Reading from the client failed")
            self._abort(Cause.GATEWAY_FAULT)

    async def _upload(self, connection: UpstreamConnection) -> None:
        """Pass the body on as it comes, as fast as the service takes it; what it does not take is read and dropped.

        Then watch whether the client leaves, where the server does not tell.
        """
        timeouts = self.route.service.timeouts
        part = self._first_part
        while True:
            if part:
                connection.write(part)
                if not connection.head_complete:
                    self._expect(Cause.WRITE_TIMEOUT, timeouts.write)
            if self._uploaded:  # before it waits: an answer may end the exchange meanwhile
                connection.end_body()
            try:
                await connection.drain()
            except ForwardingError:
                break  # the request's own task hears of it as well
            if self._uploaded:
                if not connection.head_complete:
                    self._expect(FIRST_BYTE_TIMEOUT, timeouts.first_byte)
                break
            if not connection.head_complete:
                self._expect(CLIENT_TOO_SLOW, timeouts.client)
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise departure(message)
            part = message.get("body", b"")
            self.context.bytes_in += len(part)
            if self.context.bytes_in > self.route.service.max_body_bytes:
                raise self._too_large()
            self._keep(part)
            self._uploaded = not message.get("more_body", False)
        if self._must_watch or not self._uploaded:
            await self._watch_client()

    @property
    def _must_watch(self) -> bool:
        """``receive`` has something to say that the server does not: it is another's, or a layer's in between."""
        return not self._told or getattr(getattr(self.receive, "__self__", None), "context", None) is not self.context

    async def _watch_client(self) -> None:
        while (message := await self.receive())["type"] != "http.disconnect":
            pass
        raise departure(message)

    # Time

    def _expect(self, cause: Cause, seconds: float) -> float:
        """From now on, ``seconds`` without another call of this means that ``cause`` ended the request. Returns now."""
        now: float = self._now()
        self._phase = cause
        self._phase_ends = ends = now + seconds
        if ends < self.due:
            self.route.wheel.bring_forward(self, ends)
        return now

    def expire(self) -> None:
        """The wheel's call: has a deadline passed, or is it only time to watch the client?"""
        now = self._now()
        if now >= self._allowed_until:
            self._abort(Cause.CLIENT_DEADLINE)
        elif now >= self._phase_ends:
            self._abort(self._phase)
        elif now >= self._answer_ends:
            self._abort(Cause.ANSWER_TIMEOUT)
        else:
            again = LOOK_AGAIN
            if self._listener is None and self._must_watch:
                if self._uploaded:
                    self._listen(self._watch_client)
                else:  # the body is still awaited
                    again = LISTEN_AFTER
            self.route.wheel.bring_forward(self, min(self._phase_ends, self._ends, now + again))

    def _abort(self, cause: Cause) -> None:
        self.abort(ForwardingError(cause, TOO_LATE[cause]))

    def _own_abort(self, cancelled: asyncio.CancelledError) -> ForwardingError:
        """What ``abort`` was called with, where the cancellation is its own; else that is raised again."""
        error = self._aborted
        if error is None or self._task.uncancel() > 0:
            raise cancelled
        self._aborted = None
        return error

    # The answer where there is none

    async def _tell(self, error: ForwardingError) -> None:
        """Tell the client what went wrong, in the way that the state of its answer still allows."""
        cause = error.cause
        if cause is Cause.CLIENT_LEFT or error.reason in BY_SERVER:  # gone, or answered already
            return
        if not self._started:
            retry_after = 1 if error.status == 503 else None
            reason = error.reason or cause.value
            await answer(self.scope, self.send, error.status, error.message, retry_after=retry_after, reason=reason)
            return
        if self._streams_events and is_between_events(self._tail) and cause is not CLIENT_TOO_SLOW:
            body = error_body(error.status, error.message, self.context.correlation_id)
            event = b"event: error\ndata: " + body + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": True})
        raise ConnectionAbortedError(error.message)

    def _too_large(self) -> ForwardingError:
        message = f"The body is larger than the {self.route.service.max_body_bytes} bytes allowed"
        return ForwardingError(Cause.REFUSED, message, status=413, reason="body_too_large")


def departure(message: Message) -> ForwardingError:
    """Why the client is gone: by itself, or because our server has turned it away in the middle of its body."""
    reason = message.get("reason", "")
    cause = BY_SERVER.get(reason)
    if cause is None:
        return ForwardingError(Cause.CLIENT_LEFT, TOO_LATE[Cause.CLIENT_LEFT])
    return ForwardingError(cause, "The client's body could not be read", reason=reason)


def retry_after(headers: list[Header]) -> float | None:
    """The seconds that ``Retry-After`` asks to wait; None without one, and where it is a date (RFC 9110 10.2.3)."""
    for name, value in headers:
        if name == b"retry-after" and value.isdigit() and len(value) < 10:
            return float(value)
    return None


def is_event_stream(headers: list[Header]) -> bool:
    """Server-sent events, in a form that an event of ours can be put between."""
    found = False
    for name, value in headers:
        if name == b"content-type":
            found = value.lower().startswith(b"text/event-stream")
        elif name == b"content-encoding" and value.lower() != b"identity":
            return False
    return found


def is_between_events(tail: bytes) -> bool:
    """A stream of events, of which this is the end so far, has not begun or has just ended one."""
    return not tail or tail.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))


def ends_in_error(tail: bytes) -> bool:
    """The last event of a stream that ended so is of the type ``error``: the service says that it failed."""
    last = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n").rstrip(b"\n").rpartition(b"\n\n")[2]
    return any(line in (b"event: error", b"event:error") for line in last.split(b"\n"))
