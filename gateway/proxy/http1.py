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

TOO_MANY_FIELDS = "The service's answer has too many header fields"


class _UnfitAnswerError(Exception):
    """Raised within the parser's callbacks: what came parses, but may not be passed on."""


class Http1Connection(asyncio.Protocol):
    """A connection to a replica, carrying one exchange at a time.

    It is an ``UpstreamConnection``, which says how it is used.
    """

    __slots__ = (
        "_chunked",
        "_chunks",
        "_drained",
        "_expects_body",
        "_fed",
        "_held",
        "_informational",
        "_loop",
        "_parser",
        "_reading",
        "_reading_paused",
        "_until_close",
        "_waiter",
        "awaited",
        "complete",
        "content_length",
        "error",
        "fields",
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
    fields: dict[bytes, bytes]
    content_length: int | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport | None = None
        self.on_lost: Callable[[Http1Connection], None] | None = None
        self.served = 0
        self.idle_since = 0.0
        self.awaited = False  # an answer is: between `request` and its last byte
        self.head_complete = self.complete = self.keep_alive = False
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self.error: ForwardingError | None = None
        self._reading_paused = self._until_close = False
        self._reading: list[Header] = []  # fields as they are parsed, of the head and then of trailers
        self._chunks: list[bytes] = []
        self._held = 0  # bytes of them
        self._fed = 0  # bytes of an unfinished head
        self._informational = 0
        self._expects_body = True
        self._chunked = False  # the request's body is

    # An exchange

    def request(self, method: bytes, target: bytes, host: bytes, fields: bytes, framing: bytes, body: bytes) -> None:
        """Open an exchange: send a request's head, and what there is of its body."""
        self.awaited = True
        self.head_complete = self.complete = False
        self._expects_body = method != b"HEAD"
        if self._chunks:  # of an answer that nobody wanted to the end
            self._chunks, self._held = [], 0
        if self.is_closing:
            self._fail(Cause.RESET, "The service closed the connection without an answer")
        self._chunked = framing.startswith(b"transfer-encoding")
        head = (method, b" ", target, b" HTTP/1.1\r\nhost: ", host, b"\r\n", fields, framing, b"\r\n", body)
        self._send(b"".join(head))

    def write(self, part: bytes) -> None:
        """Send a further part of the request's body."""
        if part:  # an empty chunk would end it
            self._send(b"%x\r\n%b\r\n" % (len(part), part) if self._chunked else part)

    def end_body(self) -> None:
        """The request's body is whole."""
        if self._chunked:
            self._send(b"0\r\n\r\n")

    async def drain(self) -> None:
        """Wait until the service takes more of the request's body."""
        if self._drained is not None and self.error is None:
            await self._drained
        if self.error is not None:
            raise self.error

    def progress(self) -> "asyncio.Future[None]":
        """To be awaited for more of the answer than there is."""
        if self.error is not None:
            raise self.error
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def take(self) -> bytes:
        """What has come of the body since the last call."""
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
        return self.keep_alive and self.complete and self.error is None and not self.is_closing

    @property
    def silent(self) -> bool:
        """No byte of an answer has come since ``request``."""
        return not self.head_complete and not self._fed

    @property
    def is_closing(self) -> bool:
        """The connection is closed, or about to be."""
        return self.transport is None or self.transport.is_closing()

    def end(self) -> None:
        """The exchange is over, and the connection goes back to its pool."""
        self.served += 1
        self.idle_since = self._loop.time()

    def abort(self) -> None:
        """Close at once, whatever is under way: the service sees its caller leave."""
        self.keep_alive = self.awaited = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # TCP_NODELAY is the event loop's default

    def data_received(self, data: bytes) -> None:
        if not self.awaited:  # nobody asked: what follows an answer is never another's (EDGE.md, 56)
            self._fail(Cause.GARBLED, "The service sent bytes that nobody asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(Cause.GARBLED, "The service switched protocols without being asked to")
        except httptools.HttpParserError as error:
            if self.complete:  # the answer itself was whole; the garbage behind it ends the connection only
                self.keep_alive = False
                self._close()
            else:
                unfit = error.__context__
                why = "The service's answer is not valid HTTP/1.1"
                self._fail(Cause.GARBLED, str(unfit) if isinstance(unfit, _UnfitAnswerError) else why)
        else:
            if not self.head_complete:
                self._fed += len(data)
                if self._fed > MAX_HEAD_BYTES:
                    self._fail(Cause.GARBLED, "The head of the service's answer is too large")
            elif len(self._reading) > MAX_FIELDS:  # trailers without end
                self._fail(Cause.GARBLED, TOO_MANY_FIELDS)
            elif self._held > HIGH_WATER and not self._reading_paused and not self.complete:
                self._reading_paused = True
                assert self.transport is not None
                self.transport.pause_reading()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def eof_received(self) -> bool:
        return False  # closes the transport; connection_lost tells what that means

    def connection_lost(self, exc: Exception | None) -> None:
        if self.awaited and self.error is None:
            if self._until_close and self.head_complete and exc is None:
                self.complete = True
            elif self.head_complete:
                self._fail(Cause.CUT_SHORT, "The service broke off its answer")
            elif self._fed:
                self._fail(Cause.GARBLED, "The service broke off within the head of its answer")
            else:
                self._fail(Cause.RESET, "The service closed the connection without an answer")
        self.keep_alive = self.awaited = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
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
        if self._reading:  # trailers of the answer before
            self._reading = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._reading.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        headers, self._reading = self._reading, []  # what follows is a trailer: it overrides nothing (EDGE.md, 15)
        status = self._parser.get_status_code()
        if status < 200:
            self._pass_over(status)
            return
        fields = dict(headers)
        repeated = len(fields) != len(headers)
        values = b"".join([header[1] for header in headers] if repeated else fields.values())
        if len(values.translate(None, CONTROLS)) != len(values):
            raise _UnfitAnswerError("The service's answer has a control byte in a header field")
        if len(headers) > MAX_FIELDS:
            raise _UnfitAnswerError(TOO_MANY_FIELDS)
        if len(values) > MAX_HEAD_BYTES or self._fed > MAX_HEAD_BYTES:
            raise _UnfitAnswerError("The head of the service's answer is too large")
        self.status, self.headers, self.fields = status, headers, fields

        # How the body ends; what two readers could take differently is garbled (RFC 9112 6.3; EDGE.md, 53).
        length = fields.get(b"content-length")
        if b"transfer-encoding" in fields:
            self._judge_coding(headers, length)
            self.content_length, self._until_close = None, False
        elif length is not None:
            if not length.isdigit() or (repeated and _count(headers, b"content-length") > 1):
                raise _UnfitAnswerError("The service's answer has more than one length, or none that is a number")
            self.content_length, self._until_close = int(length), False
        else:
            self.content_length, self._until_close = None, True
        self.keep_alive = self._parser.should_keep_alive()
        self.head_complete = True
        self._fed = self._informational = 0
        if status in BODILESS or not self._expects_body:
            # The parser can't be told of a HEAD: it would wait for the body that Content-Length describes.
            self.complete, self.awaited = True, False
            self._parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        if self.complete:
            raise _UnfitAnswerError("The service sent a body where there is none")
        self._chunks.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        if self.head_complete:  # else an informational answer has ended
            self.complete, self.awaited = True, False

    # Within

    def _pass_over(self, status: int) -> None:
        """An informational answer ends here (EDGE.md, 60); that there are too many, or another protocol, is garbled."""
        if status == 101:
            raise _UnfitAnswerError("The service switched protocols without being asked to")
        self._informational += 1
        if status < 100 or self._informational > MAX_INFORMATIONAL:
            raise _UnfitAnswerError("The service sent too many informational answers, or an impossible status")

    def _judge_coding(self, headers: list[Header], length: bytes | None) -> None:
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        if length is not None or codings != [b"chunked"]:
            raise _UnfitAnswerError("The service's answer is framed in a way that is ambiguous or unknown")
        if self._parser.get_http_version() != "1.1":
            raise _UnfitAnswerError("The service sent chunks in HTTP/1.0")

    def _send(self, data: bytes) -> None:
        if self.error is None and self.transport is not None:
            self.transport.write(data)

    def _fail(self, cause: Cause, message: str) -> None:
        if self.error is None:
            self.error = ForwardingError(cause, message)
        self.keep_alive = self.awaited = False
        self._close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


def _count(headers: list[Header], name: bytes) -> int:
    return sum(header[0] == name for header in headers)
