"""Correlation IDs: one name for a request, shared by its caller, our logs and the upstream."""

import os
from collections.abc import Callable, Iterable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import KEY, RequestContext
from gateway.watch import Watch

SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")  # in a header, a log line, a URL

_drawn: list[bytes] = []  # IDs for requests to come: many at once cost a tenth of as many singly
os.register_at_fork(after_in_child=_drawn.clear)  # lest two processes give out the same


def random_id() -> bytes:
    """32 hexadecimal digits that no two requests share. (To name is not to authorise: they need not be secret.)"""
    try:
        return _drawn.pop()
    except IndexError:
        first, *others = os.urandom(4096).hex(" ", 16).encode().split()
        _drawn.extend(others)
        return first


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
        self._names = frozenset({header})
        self._start = b"\r\n" + header + b": "
        self.new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # lifespan, and whatever ASGI adds next
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        if context is None or not context.watched:
            context, scope, receive, send = Watch.over(scope, receive, send)
        header = self.header
        headers = scope["headers"]
        chosen = b""
        for name, _ in headers:
            if name == header:
                chosen, headers = self._take(headers)
                break
        if not chosen:
            chosen = self.new_id()
        context.correlation_id = chosen.decode()
        context.add(self._start + chosen, self._names)

        # A copy: outer layers keep the request they were given (ASGI specification, "Middleware").
        scope = {**scope}
        scope["headers"] = [*headers, (header, chosen)]
        await self.app(scope, receive, send)

    def _take(self, headers: Iterable[Sequence[bytes]]) -> tuple[bytes, list[Sequence[bytes]]]:
        """The ID among these headers, empty unless it is one and well formed, and the others."""
        received = [value for name, value in headers if name == self.header]
        chosen = received[0] if len(received) == 1 and is_well_formed(received[0]) else b""
        return chosen, [field for field in headers if field[0] != self.header]
