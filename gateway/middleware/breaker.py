"""The circuit breaker as a layer: a service that keeps failing is not asked for a while, and callers learn at once."""

import time
from collections.abc import Awaitable, Callable, Mapping
from math import ceil, inf

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import problems
from gateway.circuit_breaker import circuit_breaker_registry
from gateway.context import DROP_CODES, KEY, OUTCOMES, Cause, RequestContext, is_failure
from gateway.policies.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, Outcome, Permit, Refusal

COMPLETED, CLIENT_LEFT = Cause.COMPLETED, Cause.CLIENT_LEFT
SUCCESS, FAILURE, NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL

# In both kinds of answer; a `pathsend` is a whole body in one message.
STARTS = frozenset({"http.response.start", "websocket.http.response.start"})
BODIES = frozenset(
    {"http.response.body", "http.response.zerocopysend", "http.response.pathsend", "websocket.http.response.body"}
)
LEAVING = frozenset({"http.disconnect", "websocket.disconnect"})

DROP_WITHIN = 5.0  # seconds from a WebSocket's accept in which the service's giving it up is a failure


class BreakerASGI:
    """Fail fast: after repeated failures, answer 503 for a while, without asking the application.

    An answer below 500, or 501, is a success once it is complete. An exception, another 5xx and an answer that breaks
    off are failures. A caller who leaves, or a refusal by an inner layer, is neither.

    Args:
        app: the ASGI application to wrap.
        name: of its breaker, where it has one only; it is entered in ``circuit_breaker_registry`` under this name.
        config: of that breaker; its defaults if None.
        breakers: in place of that one a breaker for each service, by its name. A request goes by the breaker of the
            service it was routed to; one that was routed to none passes.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        name: str = "app",
        config: CircuitBreakerConfig | None = None,
        breakers: Mapping[str, CircuitBreaker] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.clock = clock
        self.breakers = breakers
        self.breaker: CircuitBreaker | None = None
        if breakers is None:
            self.breaker = CircuitBreaker(name, config)
            circuit_breaker_registry.register(self.breaker)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        if context is None:
            context = RequestContext()
            scope = {**scope, KEY: context}
        breaker: CircuitBreaker | None
        if self.breakers is None:
            breaker = self.breaker
        else:
            service = context.service
            breaker = None if service is None else self.breakers.get(service.name)
        if breaker is None:
            await self.app(scope, receive, send)
            return

        clock = self.clock
        permit = breaker.acquire(clock())
        if not isinstance(permit, Permit):
            await self._refuse(scope, send, context, breaker.name, permit)
            return

        if kind != "http" or not context.watched or self.breakers is None or permit.probe:
            context.probe = permit.probe
            call = (_Exchange if kind == "http" else _Session)(permit, context, receive, send, clock)
            try:
                await self.app(scope, call.receive, call.send)
            except BaseException as error:
                call.failed(error)
                raise
            finally:
                call.conclude(scope)
            return

        # What passes is watched already: no message need be looked at twice. Where an attempt was made, the application
        # says why the request ended, as `ProxyApp` does; what it raises beyond that is not the service's doing.
        left = False
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            left = context.attempts > 0 or not isinstance(error, Exception)
            raise
        finally:
            cause = context.cause or _cause(context, context.whole, not context.whole and (left or context.client_left))
            if cause is CLIENT_LEFT and not context.status:
                _abandon(permit, context, scope, context.request_whole_at, clock())
            else:
                permit.finish(_outcome(cause, context.status), clock())

    async def _refuse(self, scope: Scope, send: Send, context: RequestContext, name: str, refusal: Refusal) -> None:
        context.cause = Cause.REFUSED
        context.reason = "breaker_open"
        await problems.answer(
            scope,
            send,
            503,
            f"Circuit breaker '{name}' is {refusal.state.name}",
            retry_after=max(1, ceil(refusal.retry_after)),
            reason=context.reason,
        )


def _cause(context: RequestContext, whole: bool, client_left: bool) -> Cause:
    """Why a request ended, where the application did not say."""
    if context.reason:
        return Cause.REFUSED
    if client_left:
        return CLIENT_LEFT
    return COMPLETED if whole else Cause.CUT_SHORT


def _outcome(cause: Cause, status: int) -> Outcome:
    if cause is COMPLETED:
        return FAILURE if status >= 500 and is_failure(status) else SUCCESS
    return OUTCOMES[cause]


def _abandon(permit: Permit, context: RequestContext, scope: Scope, service_has_it_since: float, now: float) -> None:
    """Finish the permit of a request whose client left before any byte of the answer."""
    caller = context.caller or context.client_address or (scope.get("client") or ("",))[0]
    permit.finish_abandoned(now, caller=caller, waited=now - service_has_it_since)


class _Exchange:
    """One HTTP request and its answer, watched as they pass, to say in the end how the service did."""

    # Defaults on the class, not slots: a request then sets only what it comes to.
    _request_complete = False
    _answer_complete = False
    _client_left = False  # before the answer was complete
    _status = 0

    def __init__(
        self, permit: Permit, context: RequestContext, receive: Receive, send: Send, clock: Callable[[], float]
    ) -> None:
        self._permit: Permit | None = permit
        self._context = context
        self._receive = receive
        self._send = send
        self._clock = clock
        self._service_has_it_since = permit.began  # infinity from when it waits for the client's body

    async def receive(self) -> Message:
        waits_for_body = not self._request_complete
        if waits_for_body:
            self._service_has_it_since = inf
        try:
            message = await self._receive()
        except Exception:  # but an application may well cancel a `receive` that it waits in
            self.lose_client()
            raise
        if message["type"] in LEAVING:
            self.lose_client()
        elif waits_for_body and not message.get("more_body"):
            self._request_complete = True
            self._service_has_it_since = self._clock()
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] in BODIES and not message.get("more_body", False):
            # Before it is sent: then a server may at once tell a waiting `receive` that the client is gone.
            self._answer_complete = True
            return self._send(message)  # whatever becomes of that, the service has done its part
        return self._send_part(message)

    async def _send_part(self, message: Message) -> None:
        kind = message["type"]
        if kind in STARTS:
            self._status = message["status"]
        elif kind in BODIES and message.get("body") and not is_failure(self._status):
            self._judge_probe_early()
        try:
            await self._send(message)
        except BaseException:  # not the service's doing
            self.lose_client()
            raise

    def failed(self, error: BaseException) -> None:
        """Take note of what the application raised."""
        if not isinstance(error, Exception):  # cancelled: nobody wants the answer any more
            self.lose_client()

    def lose_client(self) -> None:
        """Take note that nobody waits for the answer any more."""
        if not self._answer_complete:
            self._client_left = True

    def conclude(self, scope: Scope) -> None:
        """Finish the permit by why the request ended: as the context has it, else as it looked from here."""
        permit, context = self._permit, self._context
        if permit is None:
            return
        now = self._clock()
        cause = context.cause or self._cause(now)
        if cause is CLIENT_LEFT and not (self._status or context.status):
            _abandon(permit, context, scope, self._service_has_it_since, now)
        else:
            permit.finish(self._outcome(cause, now), now)

    def _cause(self, now: float) -> Cause:
        return _cause(self._context, self._answer_complete, self._client_left)

    def _outcome(self, cause: Cause, now: float) -> Outcome:
        return _outcome(cause, self._context.status or self._status)

    def _judge_probe_early(self) -> None:
        """A probe's answer has begun: that will do, for its end may be a minute of tokens away."""
        if self._permit is not None and self._permit.probe and not self._context.reason:
            self._permit = self._permit.succeed_so_far(self._clock())


class _Session(_Exchange):
    """One WebSocket. It succeeds when it is accepted, and fails when the service drops it within five seconds of that.

    A handshake that is denied is judged like an answer.
    """

    _request_complete = True  # a handshake has no body
    _accepted_at: float | None = None
    _close_code = 0

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.accept":
            self._status = 101
            self._accepted_at = now = self._clock()
            if self._permit is not None:
                self._permit = self._permit.succeed_so_far(now)
        elif kind == "websocket.close":
            self._status = self._status or 403  # what the server makes of it before the accept
            self._close_code = message.get("code", 1000)
            self._answer_complete = True
        await super().send(message)

    def _cause(self, now: float) -> Cause:
        if self._accepted_at is None:
            return super()._cause(now)
        if self._client_left:
            return CLIENT_LEFT
        if self._answer_complete and self._close_code not in DROP_CODES:
            return COMPLETED
        return Cause.DROPPED if now - self._accepted_at < DROP_WITHIN else Cause.CUT_SHORT

    def _outcome(self, cause: Cause, now: float) -> Outcome:
        if self._accepted_at is None:
            return super()._outcome(cause, now)
        if cause is Cause.DROPPED:
            return FAILURE
        fails_at_once = OUTCOMES[cause] is FAILURE and now - self._accepted_at < DROP_WITHIN
        return FAILURE if fails_at_once else NEUTRAL  # its success was counted at the accept
