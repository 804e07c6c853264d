"""One request's way through the proxy: choose a replica, send, stream the answer back, resend where that is safe."""

import asyncio
import logging
from collections.abc import Coroutine
from time import monotonic
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from gateway.context import OUTCOMES, Cause, RequestContext, is_failure
from gateway.policies.circuit_breaker import Outcome
from gateway.policies.retry import may_resend
from gateway.problems import ForwardingError, answer, error_body
from gateway.proxy.headers import Header, RequestFields, answer_fields, forwarding_fields
from gateway.proxy.http1 import Http1Connection
from gateway.proxy.pool import ConnectionPool
from gateway.proxy.route import Route
from gateway.proxy.timers import Deadline

if TYPE_CHECKING:
    from gateway.proxy.app import ProxyApp

LISTEN_AFTER = 0.05  # seconds: only a request that takes longer is worth a task that watches its client
LOOK_AGAIN = 60.0  # seconds, at the latest
REPLAY_BYTES = 64 * 1024  # of a request's body, kept in case it is sent again (RESILIENCE.md, 3)
NEVER = float("inf")

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
NOT_DISPATCHED = frozenset({Cause.CONNECT_FAILED, Cause.CONNECT_TIMEOUT})
logger = logging.getLogger("gateway.proxy")


class Exchange(Deadline):
    """One HTTP request, from its first byte to its terminal cause.

    What ends it early - a timer, the client's leaving, the gateway's stopping - cancels its task with the reason set
    beforehand, so that it ends in one way wherever it waits.
    """

    def __init__(
        self, proxy: "ProxyApp", route: Route, scope: Scope, receive: Receive, send: Send, context: RequestContext
    ) -> None:
        super().__init__(route.loop.time() + LISTEN_AFTER)
        self.proxy = proxy
        self.route = route
        self.scope = scope
        self.receive = receive
        self.send = send
        self.context = context
        self._loop = route.loop
        self._aborted: ForwardingError | None = None
        self._listener: asyncio.Task[None] | None = None
        self._connection: Http1Connection | None = None
        self._method = scope["method"].encode()
        self._first_part = b""  # of the body
        self._uploaded = False  # the whole body came and was passed on
        self._kept: list[bytes] | None = []  # the body so far, while it may have to be sent again
        self._kept_bytes = 0
        self._started = False  # something was sent to the client
        self._answered_badly = False
        self._streams_events = False
        self._between_events = True
        self._phase = Cause.CLIENT_TOO_SLOW  # what it means if `_phase_ends` passes
        self._phase_ends = NEVER
        self._answer_ends = NEVER
        self._allowed_until = NEVER  # by the caller
        self._ends = NEVER  # the earlier of these two

    async def run(self) -> None:
        """Forward the request and answer the client.

        Raises:
            ConnectionAbortedError: the answer had begun and can't be had whole: the client's connection must be cut.
        """
        proxy, context = self.proxy, self.context
        task = asyncio.current_task(self._loop)  # told which, it need not ask the kernel
        assert task is not None
        self._task = task
        self.route.wheel.add(self)
        proxy.exchanges.add(self)
        error = None
        try:
            await self._forward()
            context.cause = Cause.COMPLETED
        except ForwardingError as raised:
            error = raised
        except asyncio.CancelledError as cancelled:
            context.cause = Cause.SHUTDOWN
            error = self._own_abort(cancelled)
        finally:
            self.route.wheel.remove(self)
            proxy.exchanges.discard(self)
            if self._listener is not None:
                self._listener.cancel()
        if error is not None:
            context.cause, context.reason = error.cause, error.reason
            await self._tell(error)

    def abort(self, error: ForwardingError) -> None:
        """End the request now, wherever it waits."""
        if self._aborted is None and self in self.proxy.exchanges:
            self._aborted = error
            self._task.cancel()

    # The way there

    async def _forward(self) -> None:
        fields = RequestFields(self.scope["headers"])
        self._refuse_unfit(fields)
        await self._receive_first()
        head = self._head(fields)
        loop, route, context = self._loop, self.route, self.context
        tried: list[str] = []
        route.budget.deposit(loop.time())
        while True:
            place = route.replicas.choose(loop.time(), tried)
            tried.append(place.address)
            context.attempts += 1
            context.replica = place.address
            failure, wait, outcome = None, None, Outcome.NEUTRAL
            try:
                wait = await self._attempt(route.pool(place.address), head, fields)
                outcome = Outcome.FAILURE if self._answered_badly else Outcome.SUCCESS
            except ForwardingError as error:
                failure = error
            except asyncio.CancelledError as cancelled:
                failure = self._own_abort(cancelled)
            finally:
                if failure is not None:
                    outcome = OUTCOMES[failure.cause]
                place.finish(outcome, loop.time())
                silent = self._let_go()
            if failure is not None:
                wait = self._wait_to_resend(fields, failure=failure, silent=silent)
                if wait is None:
                    raise failure
            elif wait is None:
                return
            self._expect(Cause.CLIENT_DEADLINE, NEVER)
            await asyncio.sleep(wait)

    def _refuse_unfit(self, fields: RequestFields) -> None:
        """What can be told from the head alone, before the body costs anything."""
        allowed = fields.named.get(b"x-request-timeout-ms")
        if allowed is not None:
            if len(allowed) != 1 or not allowed[0].isdigit() or len(allowed[0]) > 9:
                message = "X-Request-Timeout-Ms must be one whole number of milliseconds"
                raise ForwardingError(Cause.REFUSED, message, status=400, reason="bad_timeout")
            if int(allowed[0]) == 0:
                raise ForwardingError(Cause.CLIENT_DEADLINE, TOO_LATE[Cause.CLIENT_DEADLINE])
            self._ends = self._allowed_until = self._loop.time() + int(allowed[0]) / 1000
            self._expect(Cause.CLIENT_TOO_SLOW, NEVER)
        if fields.length is not None and int(fields.length) > self.route.service.max_body_bytes:
            raise self._too_large()
        via = fields.named.get(b"via")
        if via is not None and any(self.proxy.via in line for line in via):
            message = "The request has come through this gateway before"
            raise ForwardingError(Cause.REFUSED, message, status=508, reason="loop")

    def _head(self, fields: RequestFields) -> bytes:
        """The request line and the fields that are the same at each attempt, less ``Host`` and what ends the head."""
        scope, proxy = self.scope, self.proxy
        client = scope.get("client")
        peer = client[0] if client else ""
        trusted = proxy.trusted.trusts(peer)
        scheme = scope.get("scheme", "http").encode()
        return fields.kept + forwarding_fields(
            fields, peer=peer.encode(), trusted=trusted, scheme=scheme, via=proxy.via
        )

    async def _receive_first(self) -> None:
        """The first part of the body, which for most requests is all of it."""
        self._expect(Cause.CLIENT_TOO_SLOW, self.route.service.timeouts.client)
        message = await self.receive()
        if message["type"] == "http.disconnect":
            raise ForwardingError(Cause.CLIENT_LEFT, TOO_LATE[Cause.CLIENT_LEFT])
        self._first_part = message.get("body", b"")
        self._uploaded = not message.get("more_body", False)
        self._keep(self._first_part)

    def _keep(self, part: bytes) -> None:
        """Count a part of the body, and keep it for as long as it may have to be sent again."""
        self.context.bytes_in += len(part)
        if self.context.bytes_in > self.route.service.max_body_bytes:
            raise self._too_large()
        if self._kept is not None:
            self._kept_bytes += len(part)
            if self._kept_bytes > REPLAY_BYTES:
                self._kept = None
            else:
                self._kept.append(part)

    # One attempt

    async def _attempt(self, pool: ConnectionPool, head: bytes, fields: RequestFields) -> float | None:
        """Send the request to a replica and stream its answer to the client.

        Returns:
            None where the client has its answer; seconds to wait where the service refused and it may be sent again.
        """
        timeouts = self.route.service.timeouts
        connection = pool.take_idle(self._loop.time())
        if connection is None:
            if pool.full:
                self._expect(Cause.NO_CONNECTION, timeouts.pool)
            connection = await pool.reserve()
            if connection is None:
                self._expect(Cause.CONNECT_TIMEOUT, timeouts.connect)
                connection = await pool.connect()
        self._connection = connection
        self._dispatch(connection, pool, head, fields)
        await connection.head()

        self._answered_badly = is_failure(connection.status)
        if self._answered_badly or connection.status == 429:
            wait = self._wait_to_resend(fields, refusal=connection)
            if wait is not None:
                if connection.complete:
                    self._give_back(pool)
                return wait
        await self._stream_back(connection, pool)
        return None

    def _dispatch(self, connection: Http1Connection, pool: ConnectionPool, head: bytes, fields: RequestFields) -> None:
        address, scope, timeouts = pool.address, self.scope, self.route.service.timeouts
        path = scope.get("raw_path") or quote(scope["path"]).encode()
        query = scope.get("query_string", b"")
        host = fields.host if self.route.service.preserve_host and fields.host else address.authority
        lines = [self._method, b" ", address.path, path]
        if query:
            lines += (b"?", query)
        lines += (b" HTTP/1.1\r\nhost: ", host, b"\r\n", head)
        if self._allowed_until is not NEVER:
            left = int((self._allowed_until - self._loop.time()) * 1000)
            lines.append(b"x-request-timeout-ms: %d\r\n" % max(1, left))
        if self.context.attempts > 1:
            lines.append(b"x-gateway-attempt: %d\r\n" % self.context.attempts)
        connection.begin(self._method)
        if self._uploaded:
            body = self._first_part if self._kept is None else b"".join(self._kept)
            if body or fields.length is not None or b"transfer-encoding" in fields.named:
                lines.append(b"content-length: %d\r\n" % len(body))
            lines += (b"\r\n", body)
            connection.write(b"".join(lines))
            self._expect(Cause.FIRST_BYTE_TIMEOUT, timeouts.first_byte)
        else:
            length = fields.length
            lines += (b"content-length: ", length) if length is not None else (b"transfer-encoding: chunked",)
            lines.append(b"\r\n\r\n")
            connection.write(b"".join(lines))
            self._listen(self._upload(connection, chunked=length is None))

    def _wait_to_resend(
        self,
        fields: RequestFields,
        *,
        failure: ForwardingError | None = None,
        refusal: Http1Connection | None = None,
        silent: bool = False,
    ) -> float | None:
        """Seconds after which the request is sent again, or None where the client gets what there is.

        Args:
            fields: of the request.
            failure: what broke the attempt.
            refusal: a connection on which an answer began that may call for another attempt.
            silent: the connection had been used before, and closed before a byte of the answer.
        """
        now, service, context = self._loop.time(), self.route.service, self.context
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
            dispatched=failure is None or failure.cause not in NOT_DISPATCHED,
            reused_and_silent=silent,
            status=None if refusal is None else refusal.status,
            retry_after=None if refusal is None else retry_after(refusal.headers),
            keyed=fields.keyed,
            all_methods=service.retry_all_methods,
            replayable=self._listener is None or (self._uploaded and self._kept is not None),
            sent_to_client=self._started,
            probe=context.probe,
        )
        return wait if wait is not None and self.route.budget.take(now) else None

    async def _stream_back(self, connection: Http1Connection, pool: ConnectionPool) -> None:
        context, send, timeouts = self.context, self.send, self.route.service.timeouts
        headers = answer_fields(connection.headers)
        if connection.status == 304 and "gateway.server" not in (self.scope.get("extensions") or ()):
            headers = [header for header in headers if header[0] != b"content-length"]  # uvicorn would wait for a body
        self._streams_events = connection.content_length is None and is_event_stream(headers)
        whole = timeouts.stream if connection.content_length is None else timeouts.answer
        self._answer_ends = self._loop.time() + whole
        self._ends = min(self._answer_ends, self._allowed_until)
        context.status = connection.status
        start = {"type": "http.response.start", "status": connection.status, "headers": headers}

        data = connection.take()
        if data:
            context.first_byte_at = monotonic()
        complete = connection.complete
        if complete:
            self._give_back(pool)
        self._expect(Cause.CLIENT_TOO_SLOW, timeouts.client)
        self._started = True
        await send(start)
        while True:
            if data:
                context.bytes_out += len(data)
                if self._streams_events:
                    self._between_events = data.endswith((b"\n\n", b"\r\n\r\n", b"\r\r"))
            await send({"type": "http.response.body", "body": data, "more_body": not complete})
            if complete:
                return
            self._expect(Cause.STALLED, timeouts.between_bytes)
            data = await connection.read()
            if context.first_byte_at is None:
                context.first_byte_at = monotonic()
            complete = connection.complete
            if complete:
                data += connection.take()
                self._give_back(pool)
            self._expect(Cause.CLIENT_TOO_SLOW, timeouts.client)

    def _give_back(self, pool: ConnectionPool) -> None:
        """The answer has come whole: another request may have the connection while the client still reads."""
        connection, self._connection = self._connection, None
        assert connection is not None
        if self._uploaded:
            pool.give_back(connection)
        else:  # the service answered before the body was up: the rest of it is not sent
            connection.abort()

    def _let_go(self) -> bool:
        """End what is still under way with a replica; whether its connection was an old one that stayed silent."""
        connection, self._connection = self._connection, None
        if connection is None:
            return False
        connection.abort()
        return connection.served > 0 and not connection.answering

    # Beside it

    def _listen(self, listening: Coroutine[None, None, None]) -> None:
        self._listener = self._loop.create_task(self._guarded(listening))

    async def _guarded(self, listening: Coroutine[None, None, None]) -> None:
        try:
            await listening
        except ForwardingError as error:
            self.abort(error)
        except Exception:
            logger.exception("Reading from the client failed")
            self._abort(Cause.GATEWAY_FAULT)

    async def _upload(self, connection: Http1Connection, *, chunked: bool) -> None:
        """Pass the body on as it comes, as fast as the service takes it, then watch whether the client leaves."""
        timeouts = self.route.service.timeouts
        part = self._first_part
        while True:
            if part:
                connection.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                if not connection.head_complete:
                    self._expect(Cause.WRITE_TIMEOUT, timeouts.write)
                try:
                    await connection.drain()
                except ForwardingError:
                    break  # the request's own task hears of it as well
            if self._uploaded:
                if chunked:
                    connection.write(b"0\r\n\r\n")
                if not connection.head_complete:
                    self._expect(Cause.FIRST_BYTE_TIMEOUT, timeouts.first_byte)
                break
            if not connection.head_complete:
                self._expect(Cause.CLIENT_TOO_SLOW, timeouts.client)
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ForwardingError(Cause.CLIENT_LEFT, TOO_LATE[Cause.CLIENT_LEFT])
            part = message.get("body", b"")
            self._uploaded = not message.get("more_body", False)
            self._keep(part)
        await self._watch_client()

    async def _watch_client(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        raise ForwardingError(Cause.CLIENT_LEFT, TOO_LATE[Cause.CLIENT_LEFT])

    # Time

    def _expect(self, cause: Cause, seconds: float) -> None:
        """From now on, ``seconds`` without another call of this means that ``cause`` ended the request."""
        ends = self._loop.time() + seconds
        self._phase, self._phase_ends = cause, ends
        if ends > self._ends:
            ends = self._ends
        if ends < self.due:
            self.route.wheel.bring_forward(self, ends)

    def expire(self) -> None:
        """The wheel's call: has a deadline passed, or is it only time to watch the client?"""
        now = self._loop.time()
        if now >= self._allowed_until:
            self._abort(Cause.CLIENT_DEADLINE)
        elif now >= self._phase_ends:
            self._abort(self._phase)
        elif now >= self._answer_ends:
            self._abort(Cause.ANSWER_TIMEOUT)
        else:
            if self._listener is None and self._uploaded:
                self._listen(self._watch_client())
            again = LOOK_AGAIN if self._listener is not None else LISTEN_AFTER  # the body may still be awaited
            self.due = min(self._phase_ends, self._ends, now + again)
            self.route.wheel.add(self)

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
        if cause is Cause.CLIENT_LEFT:
            return
        if not self._started:
            retry_after = 1 if error.status == 503 else None
            reason = error.reason or cause.value
            await answer(self.scope, self.send, error.status, error.message, retry_after=retry_after, reason=reason)
            return
        if self._streams_events and self._between_events and cause is not Cause.CLIENT_TOO_SLOW:
            body = error_body(error.status, error.message, self.context.correlation_id)
            event = b"event: error\ndata: " + body + b"\n\n"
            await self.send({"type": "http.response.body", "body": event, "more_body": True})
        raise ConnectionAbortedError(error.message)

    def _too_large(self) -> ForwardingError:
        message = f"The body is larger than the {self.route.service.max_body_bytes} bytes allowed"
        return ForwardingError(Cause.REFUSED, message, status=413, reason="body_too_large")


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
