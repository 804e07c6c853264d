"""What passed between a request and its answer, seen once, so that the log line and the metrics can't disagree."""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from math import inf
from time import monotonic

from starlette.types import Message, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext, fields_of

FAILED_UNSEEN = 500  # what a server answers for an application that raised, or that never answered
COMPLETED = Cause.COMPLETED  # looked up once: an enumeration's member costs more than a global
LEFT_UNANSWERED = 499  # nothing was answered: the client left first, or the gateway went (the number nginx uses)


class Watch:
    """Notes in a request's context what passes, and puts on its answer what layers add to it.

    Our own server does that itself. Elsewhere, and for WebSockets, the outermost layer that needs it lays a watch's
    ``receive`` and ``send`` around those of the server; a layer within then finds the context watched already.
    """

    __slots__ = ("_clock", "_context", "_receive", "_send")

    def __init__(self, context: RequestContext, receive: Receive, send: Send, clock: Callable[[], float]) -> None:
        self._context = context
        self._receive = receive
        self._send = send
        self._clock = clock

    @staticmethod
    def over(
        scope: Scope, receive: Receive, send: Send, clock: Callable[[], float] = monotonic
    ) -> tuple[RequestContext, Scope, Receive, Send]:
        """The request's context, watched from here on if it was not, and what to call the next application with."""
        context: RequestContext | None = scope.get(KEY)
        if context is None:
            context = RequestContext()
            context.started = clock()
            scope = {**scope, KEY: context}
        if context.watched:
            return context, scope, receive, send
        context.watched = True
        watch = Watch(context, receive, send, clock)
        return context, scope, watch.receive, watch.send

    async def receive(self) -> Message:
        message = await self._receive()
        kind = message["type"]
        context = self._context
        if kind == "http.request":
            context.received += len(message.get("body", b""))
            if not message.get("more_body", False) and context.request_whole_at == inf:
                context.request_whole_at = self._clock()
        elif kind == "http.disconnect":
            context.lose_client(message, self._clock())
        elif kind == "websocket.receive":
            context.received += _size(message)
        elif kind == "websocket.disconnect":
            # 1000 and 1001 are a goodbye, 1005 one without a code (RFC 6455, 7.4.1).
            goodbye = context.status == 101 and message.get("code", 1005) in (1000, 1001, 1005)
            context.whole = context.whole or goodbye
            context.client_left = not context.whole
        return message

    def send(self, message: Message) -> Awaitable[None]:  # no coroutine of its own: it runs for every message
        kind = message["type"]
        context = self._context
        if kind == "http.response.body":
            context.sent += len(message.get("body", b""))
            if not message.get("more_body"):
                context.whole = True
        elif kind == "http.response.start":
            message = self._answer(message, message["status"])
        elif kind == "websocket.send":
            context.sent += _size(message)
        else:
            message = self._send_rarely(kind, message)
        return self._send(message)

    def _send_rarely(self, kind: str, message: Message) -> Message:
        context = self._context
        if kind == "websocket.accept":
            message = self._answer(message, 101)
        elif kind == "websocket.close":
            if context.answered_at is None:
                context.status = 403  # what a server makes of a close before the accept
                context.answered_at = self._clock()
            context.whole = True
        elif kind == "websocket.http.response.start":
            message = self._answer(message, message["status"])
        elif kind == "websocket.http.response.body":
            context.sent += len(message.get("body", b""))
            context.whole = not message.get("more_body", False)
        elif kind in ("http.response.pathsend", "http.response.zerocopysend"):
            context.whole = not message.get("more_body", False)
        return message

    def _answer(self, message: Message, status: int) -> Message:
        context = self._context
        context.status = status
        context.answered_at = self._clock()
        if not context.added:
            return message
        return {**message, "headers": [*context.unreplaced(message.get("headers", ())), *fields_of(context.added)]}


def end(context: RequestContext, now: float, error: BaseException | None = None) -> None:
    """Settle how a request went, from what inner layers wrote and what was seen; a second call changes nothing.

    Args:
        context: of the request.
        now: monotonic seconds.
        error: what the application raised, if it did.
    """
    if context.ended:
        return
    context.ended = True
    context.bytes_in = context.received
    context.bytes_out = context.sent
    seconds = now - context.started
    if seconds > 0:
        context.seconds = seconds
    cause = context.cause
    if cause is None:
        context.cause = cause = _cause(context, error)
    status = context.status
    if context.answered_at is None:
        gone = context.client_left or isinstance(error, CancelledError)
        status = LEFT_UNANSWERED if gone else FAILED_UNSEEN
    context.final_status = status
    if cause is COMPLETED:
        context.cut_short = not context.whole and status != 101
    else:
        context.cut_short = status < 400 or not context.whole  # a WebSocket too, its 101


def _cause(context: RequestContext, error: BaseException | None) -> Cause:
    if context.whole:
        return COMPLETED
    if context.client_left:
        return Cause.CLIENT_LEFT
    if isinstance(error, CancelledError):
        return Cause.SHUTDOWN  # a server cancels requests when it stops, not when a client leaves
    if isinstance(error, ConnectionAbortedError):
        return Cause.CUT_SHORT  # how an application asks for the connection to be cut
    if error is None and context.answered_at is not None and context.status == 101:
        return COMPLETED  # the application was done with its WebSocket, and the server closes it
    return Cause.GATEWAY_FAULT


def _size(message: Message) -> int:
    data: bytes | None = message.get("bytes")
    if data is not None:
        return len(data)
    text: str = message.get("text") or ""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
