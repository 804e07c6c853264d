"""Correlation IDs: one name for a request, shared by its caller, our logs and the upstream."""

from collections.abc import Awaitable, Callable
from operator import itemgetter
from random import getrandbits

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import KEY, RequestContext

SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")  # in a header, a log line, a URL
NAME = itemgetter(0)  # of a header
Sent = Awaitable[None]  # subscribed once, not at every request
OPENS_RESPONSE = frozenset({"http.response.start", "websocket.accept", "websocket.http.response.start"})


def random_id() -> bytes:
    """32 hexadecimal digits that no two requests share. (To name is not to authorise: they need not be secret.)"""
    return b"%032x" % getrandbits(128)


def is_well_formed(correlation_id: bytes) -> bool:
    """1 to 128 of ``A-Za-z0-9._-`` (SPEC.md, 3)."""
    return 0 < len(correlation_id) <= 128 and SAFE.issuperset(correlation_id)


class CorrelationASGI:
    """Name every HTTP request and WebSocket; keep the caller's ID where it is well formed.

    The name is on the request passed on, on its answer or denial, and in the request's context.

    Args:
        app: the ASGI application to wrap.
        header: the header that carries the ID, both ways, in lower case.
        new_id: makes a fresh ID, which must itself be well formed.
    """

    def __init__(
        self, app: ASGIApp, *, header: bytes = b"x-correlation-id", new_id: Callable[[], bytes] = random_id
    ) -> None:
        self.app = app
        self.header = header
        self.new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # lifespan, and whatever ASGI adds next
            await self.app(scope, receive, send)
            return

        header = self.header
        headers = scope["headers"]
        chosen = b""
        if header in map(NAME, headers):  # a loop in C: most requests and answers bring none
            received = [value for name, value in headers if name == header]
            headers = [field for field in headers if field[0] != header]
            if len(received) == 1 and is_well_formed(received[0]):
                chosen = received[0]
        if not chosen:
            chosen = self.new_id()
        named = (header, chosen)
        context: RequestContext | None = scope.get(KEY)
        if context is None:
            context = RequestContext()
        context.correlation_id = chosen.decode()

        def send_named(message: Message) -> Sent:
            if message["type"] in OPENS_RESPONSE:
                fields = [*message.get("headers", ())]
                if header in map(NAME, fields):
                    fields = [field for field in fields if field[0] != header]
                fields.append(named)
                message = {**message, "headers": fields}
            return send(message)

        # A copy: outer layers keep the request they were given (ASGI specification, "Middleware").
        scope = dict(scope)
        scope["headers"] = [*headers, named]
        scope[KEY] = context
        await self.app(scope, receive, send_named)
