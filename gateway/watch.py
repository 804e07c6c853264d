"""What passed between a request and its answer, seen once, so that the log line and the metrics can't disagree."""

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from math import inf
from time import monotonic

from starlette.types import Message, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext

WATCH = "gateway.watch"  # where the watch lives in an ASGI scope
FAILED_UNSEEN = 500  # what a server answers for an application that raised, or that never answered
COMPLETED = Cause.COMPLETED  # looked up once: an enumeration's member costs more than a global
LEFT_UNANSWERED = 499  # nothing was answered: the client left first, or the gateway went (the number nginx uses)


class Watch:
    """One request's traffic and, in the end, how it went.

    The outermost layer that needs one makes it and lays its ``receive`` and ``send`` around those of the server; a
    layer within finds it in the scope, so that each message is looked at once.

    Attributes:
        context: the request's; its ``status`` is set as the answer starts, its byte counts and cause at the end.
        status: the answer's; 0 before it starts, and at the end never 0 (see the two numbers above).
        answered_at: monotonic seconds at which the answer started; None before.
        request_whole_at: monotonic seconds at which the last of the request's body came; infinity before.
        whole: the last byte of the answer was given to the server, or the WebSocket was closed in good order.
        client_left: the client went before that.
        cut_short: once it has ended: the client got less than a whole answer, or a whole one that says that it is not.
        seconds: once it has ended: how long it took, never below 0.
    """

    # Defaults on the class, not slots: a request then sets only what it has.
    status = 0
    answered_at: float | None = None
    request_whole_at = inf
    bytes_in = 0
    bytes_out = 0
    whole = False
    client_left = False
    cut_short = False
    seconds = 0.0
    _ended = False

    def __init__(self, context: RequestContext, receive: Receive, send: Send, clock: Callable[[], float]) -> None:
        self.context = context
        self._receive = receive
        self._send = send
        self._clock = clock

    @staticmethod
    def over(
        scope: Scope, receive: Receive, send: Send, clock: Callable[[], float] = monotonic
    ) -> tuple["Watch", Scope, Receive, Send]:
        """The request's watch, and what to call the next application with."""
        watch: Watch | None = scope.get(WATCH)
        if watch is not None:
            return watch, scope, receive, send
        context: RequestContext | None = scope.get(KEY)
        if context is None:
            context = RequestContext()
            context.started = clock()
        watch = Watch(context, receive, send, clock)
        scope = dict(scope)
        scope[KEY] = context
        scope[WATCH] = watch
        return watch, scope, watch.receive, watch.send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.bytes_in += len(message.get("body", b""))
            if not message.get("more_body", False) and self.request_whole_at == inf:
                self.request_whole_at = self._clock()
        else:
            self._receives_rarely(message)
        return message

    def _receives_rarely(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.disconnect":
            self.client_left = not self.whole
            if self.status == 0 and "status" in message:  # our server has answered a body it could not read on
                self._answers(message["status"])
                self.whole = True
        elif kind == "websocket.receive":
            self.bytes_in += _size(message)
        elif kind == "websocket.disconnect":
            # 1000 and 1001 are a goodbye, 1005 one without a code (RFC 6455, 7.4.1).
            self.whole = self.whole or (self.status == 101 and message.get("code", 1005) in (1000, 1001, 1005))
            self.client_left = not self.whole

    def send(self, message: Message) -> Awaitable[None]:  # no coroutine of its own: it runs for every message
        kind = message["type"]
        if kind == "http.response.body":
            self.bytes_out += len(message.get("body", b""))
            if not message.get("more_body"):
                self.whole = True
        elif kind == "http.response.start":
            self.status = self.context.status = message["status"]
            self.answered_at = self._clock()
        elif kind == "websocket.send":
            self.bytes_out += _size(message)
        else:
            self._sends_rarely(kind, message)
        return self._send(message)

    def _sends_rarely(self, kind: str, message: Message) -> None:
        if kind == "websocket.accept":
            self._answers(101)
        elif kind == "websocket.close":
            if self.status == 0:
                self._answers(403)  # what a server makes of a close before the accept
            self.whole = True
        elif kind == "websocket.http.response.start":
            self._answers(message["status"])
        elif kind == "websocket.http.response.body":
            self.bytes_out += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        elif kind in ("http.response.pathsend", "http.response.zerocopysend"):
            self.whole = not message.get("more_body", False)

    def _answers(self, status: int) -> None:
        self.status = self.context.status = status
        self.answered_at = self._clock()

    def ended(self, error: BaseException | None = None) -> None:
        """Settle how it went, from what inner layers wrote and what was seen; a second call changes nothing.

        Args:
            error: what the application raised, if it did.
        """
        if self._ended:
            return
        self._ended = True
        context = self.context
        context.bytes_in = self.bytes_in
        context.bytes_out = self.bytes_out
        seconds = self._clock() - context.started
        if seconds > 0:
            self.seconds = seconds
        if context.cause is None:
            context.cause = self._cause(error)
        if self.status == 0:
            gone = self.client_left or isinstance(error, CancelledError)
            self.status = LEFT_UNANSWERED if gone else FAILED_UNSEEN
        if context.cause is not COMPLETED:
            self.cut_short = self.status < 400 or not self.whole  # a WebSocket too, its 101
        elif not self.whole:
            self.cut_short = self.status != 101

    def _cause(self, error: BaseException | None) -> Cause:
        if self.whole:
            return COMPLETED
        if self.client_left:
            return Cause.CLIENT_LEFT
        if isinstance(error, CancelledError):
            return Cause.SHUTDOWN  # a server cancels requests when it stops, not when a client leaves
        if isinstance(error, ConnectionAbortedError):
            return Cause.CUT_SHORT  # how an application asks for the connection to be cut
        if error is None and self.status == 101:
            return COMPLETED  # the application was done with its WebSocket, and the server closes it
        return Cause.GATEWAY_FAULT


def _size(message: Message) -> int:
    data: bytes | None = message.get("bytes")
    if data is not None:
        return len(data)
    text: str = message.get("text") or ""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
