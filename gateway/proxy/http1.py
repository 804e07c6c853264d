"""One HTTP/1.1 connection to a replica of a service: a request goes out, its answer streams back, then the next."""

import asyncio
from collections.abc import Callable
from typing import cast

import httptools

from gateway.context import Cause
from gateway.problems import ForwardingError

Header = tuple[bytes, bytes]
HIGH_WATER = 64 * 1024  # bytes of an answer held here before the service is made to wait
MAX_HEAD_BYTES = 64 * 1024  # EDGE.md, 36
MAX_FIELDS = 100
MAX_INFORMATIONAL = 8  # EDGE.md, 37
BODILESS = frozenset({204, 304})
# Field values in which a byte could end the line or the string for another reader (RFC 9110 5.5); a tab is allowed.
CONTROLS = bytes(byte for byte in range(32) if byte != 9) + b"\x7f"


class _UnfitAnswerError(Exception):
    """Raised within the parser's callbacks: what came parses, but may not be passed on."""


class Http1Connection(asyncio.Protocol):
    """A connection to a replica, carrying one exchange at a time.

    An exchange is ``begin``, any number of ``write`` and ``drain``, ``head``, then ``read`` until ``complete``. What
    goes wrong on the connection is raised as ``ForwardingError`` by whichever of them waits, or is called next.

    Attributes:
        status: of the answer, once ``head`` has returned.
        headers: of the answer as they came, names in lower case.
        content_length: of the answer's body, where it announced one.
        complete: the whole answer has come.
        answering: at least one byte has come since ``begin``.
        served: how many exchanges it has completed.
        idle_since: when the last ended, seconds on the event loop's clock.
    """

    __slots__ = (
        "_chunks",
        "_drained",
        "_error",
        "_expects_body",
        "_fed",
        "_held",
        "_informational",
        "_loop",
        "_parser",
        "_reading_paused",
        "_until_close",
        "_waiter",
        "answering",
        "busy",
        "complete",
        "content_length",
        "head_complete",
        "headers",
        "idle_since",
        "keep_alive",
        "on_lost",
        "served",
        "status",
        "transport",
    )

    status: int
    headers: list[Header]
    content_length: int | None
    keep_alive: bool
    head_complete: bool
    complete: bool
    answering: bool
    _chunks: list[bytes]
    _held: int  # bytes of them
    _fed: int  # bytes that came since `begin`
    _informational: int
    _until_close: bool
    _expects_body: bool

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.on_lost: Callable[[Http1Connection], None] | None = None
        self.busy = False
        self.served = 0
        self.idle_since = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._error: ForwardingError | None = None
        self._reading_paused = False
        self._reset(expects_body=True)

    # An exchange

    def begin(self, method: bytes) -> None:
        """Make ready for the answer to a request; its head and body then go through ``write``."""
        self.busy = True
        self._reset(expects_body=method != b"HEAD")
        if self.is_closing:
            self._fail(Cause.RESET, "The service closed the connection without an answer")

    def write(self, data: bytes) -> None:
        """Send a part of the request."""
        if self._error is None and self.transport is not None:
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until the service takes more of the request's body."""
        if self._drained is not None and self._error is None:
            await self._drained
        if self._error is not None:
            raise self._error

    async def head(self) -> None:
        """Wait for the head of the answer: ``status`` and ``headers``."""
        while not self.head_complete:
            if self._error is not None:
                raise self._error
            await self._progress()

    async def read(self) -> bytes:
        """What has come of the body since the last call, at least a byte, or nothing where the answer is complete."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._progress()
        return self.take()

    def take(self) -> bytes:
        """What has come of the body so far, without waiting."""
        chunks = self._chunks
        if not chunks:
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._held = 0
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()
        return data

    @property
    def reusable(self) -> bool:
        """The answer came whole, nothing came behind it, and both sides want another."""
        return self.complete and self.keep_alive and self._error is None and not self.is_closing

    @property
    def is_closing(self) -> bool:
        """The connection is closed, or about to be."""
        return self.transport is None or self.transport.is_closing()

    def end(self) -> None:
        """The exchange is over, and the connection goes back to its pool."""
        self.busy = False
        self.served += 1
        self.idle_since = self._loop.time()

    def abort(self) -> None:
        """Close at once, whatever is under way: the service sees its caller leave."""
        self.keep_alive = False
        self.busy = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # TCP_NODELAY is the event loop's default

    def data_received(self, data: bytes) -> None:
        if not self.busy or self.complete:  # nobody asked: what follows an answer is never another's (EDGE.md, 56)
            self._fail(Cause.GARBLED, "The service sent bytes that nobody asked for")
            return
        self.answering = True
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(Cause.GARBLED, "The service switched protocols without being asked to")
        except httptools.HttpParserError as error:
            unfit = error.__context__
            why = str(unfit) if isinstance(unfit, _UnfitAnswerError) else "The service's answer is not valid HTTP/1.1"
            if self.complete:  # the answer itself was whole; the garbage behind it ends the connection only
                self.keep_alive = False
                self._close()
            else:
                self._fail(Cause.GARBLED, why)
        else:
            if not self.head_complete and self._fed > MAX_HEAD_BYTES:
                self._fail(Cause.GARBLED, "The head of the service's answer is too large")
            elif self._held > HIGH_WATER and not self._reading_paused and not self.complete:
                self._reading_paused = True
                assert self.transport is not None
                self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        return False  # closes the transport; connection_lost tells what that means

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy and not self.complete and self._error is None:
            if self._until_close and self.head_complete and exc is None:
                self.complete, self.keep_alive = True, False
            elif self.head_complete:
                self._error = ForwardingError(Cause.CUT_SHORT, "The service broke off its answer")
            elif self.answering:
                self._error = ForwardingError(Cause.GARBLED, "The service broke off within the head of its answer")
            else:
                self._error = ForwardingError(Cause.RESET, "The service closed the connection without an answer")
        self.keep_alive = False
        self._wake()
        self.resume_writing()
        if self.on_lost is not None:
            self.on_lost(self)

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._loop.create_future()

    def resume_writing(self) -> None:
        drained, self._drained = self._drained, None
        if drained is not None and not drained.done():
            drained.set_result(None)

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self.complete:
            raise _UnfitAnswerError("The service sent a second answer")
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:
            return  # a trailer: it ends here and overrides nothing (EDGE.md, 15)
        if len(self.headers) >= MAX_FIELDS:
            raise _UnfitAnswerError("The service's answer has too many header fields")
        if len(value.translate(None, CONTROLS)) != len(value):
            raise _UnfitAnswerError("The service's answer has a control byte in a header field")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            if status == 101:
                raise _UnfitAnswerError("The service switched protocols without being asked to")
            self._informational += 1
            if status < 100 or self._informational > MAX_INFORMATIONAL or self._fed > MAX_HEAD_BYTES:
                raise _UnfitAnswerError("The service sent too many informational answers, or an impossible status")
            return
        if self._fed > MAX_HEAD_BYTES and sum(len(n) + len(v) + 4 for n, v in self.headers) > MAX_HEAD_BYTES:
            raise _UnfitAnswerError("The head of the service's answer is too large")
        self.status = status
        self._judge_framing()
        self.keep_alive = self._parser.should_keep_alive()
        self.head_complete = True
        if not self._expects_body or status in BODILESS:
            # The parser can't be told of a HEAD: it would wait for the body that Content-Length describes.
            self.complete = True
            self._parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        if self.complete:
            raise _UnfitAnswerError("The service sent a body where there is none")
        self._chunks.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        if self.head_complete:  # else an informational answer has ended
            self.complete = True

    # Within

    def _reset(self, *, expects_body: bool) -> None:
        self.status = 0
        self.headers = []
        self.content_length = None
        self.keep_alive = False
        self.head_complete = self.complete = self.answering = False
        self._chunks = []
        self._held = self._fed = self._informational = 0
        self._until_close = False
        self._expects_body = expects_body

    def _judge_framing(self) -> None:
        """How the body ends; whatever two readers could take differently is garbled (RFC 9112 6.3; EDGE.md, 53)."""
        lengths = [value for name, value in self.headers if name == b"content-length"]
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings:
            if lengths or len(codings) > 1 or codings[0].lower() != b"chunked":
                raise _UnfitAnswerError("The service's answer is framed in a way that is ambiguous or unknown")
            if self._parser.get_http_version() != "1.1":
                raise _UnfitAnswerError("The service sent chunks in HTTP/1.0")
        elif lengths:
            if len(lengths) > 1 or not lengths[0].isdigit():
                raise _UnfitAnswerError("The service's answer has more than one length, or none that is a number")
            self.content_length = int(lengths[0])
        else:
            self._until_close = True

    async def _progress(self) -> None:
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, cause: Cause, message: str) -> None:
        if self._error is None:
            self._error = ForwardingError(cause, message)
        self.keep_alive = False
        self._close()
        self._wake()

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
