"""One request on a client's connection: what the application receives of it, and the answer that it sends."""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from http import HTTPStatus
from os import urandom
from time import monotonic
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Scope

from gateway.context import KEY, RequestContext, unheard
from gateway.server.http1 import TOKEN, Header, Special, correlation_id_of

if TYPE_CHECKING:
    from gateway.server.protocol import GatewayProtocol

logger = logging.getLogger("gateway.server")

WINDOW = 64 * 1024  # bytes of a body, or of requests to come, that are kept while nobody asks for them
SMALL = 16 * 1024  # up to here copying a body behind its head is cheaper than a second buffer

GONE: Message = {"type": "http.disconnect"}
CR, LF, NUL = b"\r\n\0"  # numbers: `b"\r" in data` raises and swallows an exception within CPython
CONTENT_LENGTH = b"\r\ncontent-length: "

BY_LENGTH, NO_BODY, CHUNKED, BY_END = range(4)
"""How the body of an answer is framed: by its length, not at all for there is none, in chunks, by the connection's end;
of the last, only a reset can say that it is not whole."""


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}".encode()


# How a field of an answer begins, with the end of the line before it, by its name; None where it is about framing.
FIELD_STARTS: dict[bytes, bytes | None] = dict.fromkeys(
    (b"connection", b"content-length", b"keep-alive", b"transfer-encoding")
)
STATUS_LINES = {status: _status_line(status) for status in range(200, 1000)}


def _field_start(name: bytes) -> bytes | None:
    """How a field of that name begins, remembered for the next one.

    Raises:
        RuntimeError: it is not a name.
    """
    if not name or name.translate(None, TOKEN):
        raise RuntimeError(f"{name!r} is not the name of a header")
    lowered = name.lower()
    start = FIELD_STARTS.get(lowered, b"\r\n%b: " % lowered)
    if len(FIELD_STARTS) < 1024 and len(name) < 48:
        FIELD_STARTS[name] = start
    return start


class RequestCycle:
    """One request and its answer: the ``receive`` and ``send`` that the application is called with."""

    __slots__ = (
        "_body",
        "_comes_next",
        "_connection",
        "_continue_is_due",
        "_expected",
        "_framing",
        "_head",
        "_keep_alive",
        "_more_body",
        "_waiters",
        "context",
        "farewell",
        "response_started",
        "scope",
        "task",
    )

    def __init__(
        self, connection: "GatewayProtocol", scope: Scope, special: Special | None, body: bytes | None
    ) -> None:
        self._connection = connection
        self.scope = scope
        # Here, to learn from it how the application names the request, and to note in it what passes.
        self.context = context = scope[KEY] = RequestContext()
        context.watched = True
        context.on_left = unheard
        self.task: asyncio.Task[None]
        self.farewell: Message | None = None  # there is nobody any more to answer
        self._waiters: list[asyncio.Future[None]] | None = None
        # Of the request's body
        self._body = body  # what was received and not yet asked for; None: the application is owed nothing
        self._more_body = body is None
        # Of the answer
        self._comes_next = "http.response.start"  # the message that the application may send; empty after the last
        self._head: list[bytes]  # its pieces, until they leave with the first piece of the body
        self._framing = NO_BODY if scope["method"] == "HEAD" else BY_LENGTH
        self._expected: int | None = None  # bytes of body still to come, if a Content-Length says so
        self.response_started = False
        if special is None:
            self._keep_alive = True
            self._continue_is_due = False
        else:
            self._keep_alive = special.keep_alive
            self._continue_is_due = special.expects_continue

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer; what it fails to do, do for it."""
        connection = self._connection
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:  # the server leaves
            self._give_up(503, "The gateway is shutting down", (b"retry-after", b"1"))
            raise
        except ConnectionAbortedError:
            if self._comes_next == "http.response.start":
                logger.exception("The application failed at %s", self._path)
                self._give_up(500, "An unexpected error occurred")
            else:
                self._cut()
        except Exception:
            logger.exception("The application failed at %s", self._path)
            self._give_up(500, "An unexpected error occurred")
        else:
            if self._comes_next and self.farewell is None:
                logger.error("The application returned without a whole answer at %s", self._path)
                self._give_up(500, "An unexpected error occurred")
        finally:
            connection.tasks.discard(self.task)

    def _give_up(self, status: int, message: str, header: Header | None = None) -> None:
        """Answer in the application's place, if nothing has left yet."""
        connection = self._connection
        if self.response_started:
            self._cut()
        elif self.farewell is None and connection.is_open:
            self.disconnect()
            connection.write_error(status, message, self.name(), header)
            connection.answered(False)

    def _cut(self) -> None:
        """End within the answer, so that its reader can tell."""
        if self._comes_next and self.farewell is None:
            self.disconnect()
            self._connection.cut(self._framing != BY_END)

    @property
    def _path(self) -> str:
        """As it was sent: decoded it could forge a line of the log."""
        raw_path: bytes = self.scope["raw_path"]
        return raw_path.decode("latin-1")

    def name(self) -> str:
        """The correlation ID that the application has given the request, or will: one that came with it, or a new one.

        (It gives none before its task first runs, and a body may turn out to be unsound before that.)
        """
        headers = self.scope["headers"]
        chosen = self.context.correlation_id or correlation_id_of(headers)
        if not chosen:
            chosen = urandom(16).hex()
            others = [field for field in headers if field[0] != b"x-correlation-id"]
            self.scope["headers"] = [*others, (b"x-correlation-id", chosen.encode())]
        return chosen

    @property
    def is_waiting(self) -> bool:
        """The application waits for more of the body."""
        return bool(self._waiters)

    # The request

    def feed(self, data: bytes, more_body: bool) -> None:
        """Take a piece of the request's body off the connection."""
        self._more_body = more_body
        if data or not more_body:
            self._body = body = self._body + data if self._body else data
            if more_body and len(body) > WINDOW:
                self._connection.pause_reading()
        if self._waiters:
            self._connection.stop_waiting()
            wake(self._waiters)

    def disconnect(self, reason: str = "", status: int = 0) -> None:
        """There is nobody any more to answer. (See ``receive`` for the arguments.)"""
        if self.farewell is None:
            self.farewell = GONE
        if reason and self.farewell is GONE:
            self.farewell = {**GONE, "reason": reason, "status": status} if status else {**GONE, "reason": reason}
        context = self.context
        if context.on_left is not None and context.on_left is not unheard:
            context.lose_client(self.farewell, monotonic())
            context.on_left(self.farewell)
        if self._waiters:
            wake(self._waiters)

    async def receive(self) -> Message:
        """The next piece of the request's body, as soon as there is one; then, when it comes, the client's leaving.

        That message has a ``reason``, ``client_too_slow`` or ``bad_body``, where it was the server that cut the client
        off, and a ``status`` where the server has answered it, with that one.
        """
        connection = self._connection
        if self._continue_is_due and self.farewell is None:
            self._continue_is_due = False
            if not self.response_started:
                connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while self._comes_next and self.farewell is None:
            body = self._body
            if body is not None:
                self._body = None
                more_body = self._more_body
                if more_body:
                    connection.resume_reading()
                context = self.context
                context.received += len(body)
                if not more_body:
                    context.request_whole_at = monotonic()
                return {"type": "http.request", "body": body, "more_body": more_body}
            if self._more_body:
                connection.wait_for_body()
            if self._waiters is None:
                self._waiters = []
            await wait(connection.loop, self._waiters)
        farewell = self.farewell or GONE
        self.context.lose_client(farewell, monotonic())
        return dict(farewell)

    # The answer

    async def send(self, message: Message) -> None:
        """Write the answer. Its head waits for the first piece of the body, so that both leave together.

        Raises:
            RuntimeError: the message may not come now, or the head or the length of the body is wrong.
        """
        connection = self._connection
        if connection.writing_paused and self.farewell is None:
            await connection.writable()
        is_gone = self.farewell is not None
        kind = message["type"]
        if kind != self._comes_next:
            if is_gone:
                return
            raise RuntimeError(f"{kind} can't come now")
        context = self.context
        if kind == "http.response.start":
            context.status = status = message["status"]
            context.answered_at = context.first_byte_at or monotonic()
            if not is_gone:
                headers = message.get("headers", ())
                self._take_head(status, context.unreplaced(headers) if context.added else headers)
            self._comes_next = "http.response.body"
        else:
            body = message.get("body", b"")
            more_body = message.get("more_body", False)
            if not is_gone:
                self._write_body(body, more_body)
            context.sent += len(body)
            if not more_body:
                context.whole = True

    def _take_head(self, status: int, headers: Iterable[Iterable[bytes]]) -> None:
        """Check the head and keep it."""
        status_line = STATUS_LINES.get(status)
        if status_line is None:
            raise RuntimeError(f"{status} is not the status of an answer")
        starts = FIELD_STARTS
        pieces = [status_line]
        for name, value in headers:
            try:
                start = starts[name]  # half as dear as `get`, where it is found
            except KeyError:
                start = _field_start(name)
            if start is None:  # it is about framing
                if name != b"content-length" and name.lower() != b"content-length":  # the connection is the server's
                    if name.lower() == b"connection" and b"close" in value.lower():
                        self._keep_alive = False
                    continue
                if self._expected is not None or not value.isdigit():
                    raise RuntimeError("The answer's Content-Length is malformed")
                self._expected = int(value)
                start = CONTENT_LENGTH
            pieces.append(start)
            pieces.append(value)
        values = b"".join(pieces[2::2])
        if CR in values or LF in values or NUL in values:
            raise RuntimeError("A header of the answer has a line end or a NUL in it")
        if status == 204 or status == 304:
            self._framing = NO_BODY
        pieces.append(self.context.added)
        self._head = pieces

    def _write_body(self, body: bytes, more_body: bool) -> None:
        connection = self._connection
        size = len(body)
        framing = self._framing
        if framing == NO_BODY:
            body, size = b"", 0
        elif (expected := self._expected) is not None:
            if size != expected and (size > expected or not more_body):
                raise RuntimeError("The answer's body is not as long as its Content-Length")
            self._expected = expected - size
        elif not self.response_started:
            framing = self._frame(size, more_body)

        if self.response_started:
            pieces = []
        else:
            pieces = self._head
            self.response_started = True
            if connection.edge.draining or self._continue_is_due or not connection.is_nearly_read():
                self._keep_alive = self._continue_is_due = False
            pieces.append(b"\r\n\r\n" if self._keep_alive else b"\r\nconnection: close\r\n\r\n")
        after = b""
        if framing == CHUNKED:
            if size:
                pieces.append(b"%x\r\n" % size)
                after = b"\r\n"
            if not more_body:
                after += b"0\r\n\r\n"
        if size > SMALL:
            connection.write_all([piece for piece in (b"".join(pieces), body, after) if piece])
        else:
            pieces.append(body)
            pieces.append(after)
            if data := b"".join(pieces):
                connection.write(data)
        if not more_body:
            self._comes_next = ""
            if self._waiters:
                wake(self._waiters)
            connection.answered(self._keep_alive)
        elif self._head:
            self._head = []  # a stream may be long

    def _frame(self, size: int, more_body: bool) -> int:
        """Say in the head how long the body is, whose first piece, so long, has come; the application does not."""
        if not more_body:
            self._head += (CONTENT_LENGTH, b"%d" % size)
        elif self.scope["http_version"] == "1.1":
            self._framing = CHUNKED
            self._head.append(b"\r\ntransfer-encoding: chunked")
        else:
            self._framing = BY_END
        return self._framing


async def wait(loop: asyncio.AbstractEventLoop, waiters: list[asyncio.Future[None]]) -> None:
    """Wait until ``wake`` is called with the same list."""
    waiter = loop.create_future()
    waiters.append(waiter)
    try:
        await waiter
    except asyncio.CancelledError:
        with suppress(ValueError):
            waiters.remove(waiter)
        raise


def wake(waiters: list[asyncio.Future[None]]) -> None:
    for waiter in waiters:
        if not waiter.done():  # cancelled with its task
            waiter.set_result(None)
    waiters.clear()
