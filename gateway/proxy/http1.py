"""One HTTP/1.1 connection to a replica of a service: a request goes out, its answer streams back, then the next."""

import asyncio
from collections.abc import Callable
from typing import cast

from gateway.context import Cause
from gateway.outbox import Outbox
from gateway.policies.framing import ChunkedBody, MalformedError
from gateway.problems import ForwardingError
from gateway.proxy.answers import CHUNKED, UNTIL_CLOSE, read_head, refuse_early
from gateway.proxy.headers import Header

HIGH_WATER = 64 * 1024  # bytes of an answer held here before the service is made to wait
MAX_INFORMATIONAL = 8  # EDGE.md, 37
BODILESS = frozenset({204, 304})


class Http1Connection(asyncio.Protocol):
    """A connection to a replica, carrying one exchange at a time.

    It is an ``UpstreamConnection``, which says how it is used.
    """

    __slots__ = (
        "_body",
        "_chunks",
        "_drained",
        "_expects_body",
        "_framing",
        "_goes_on",
        "_held",
        "_informational",
        "_loop",
        "_outbox",
        "_partial",
        "_reading_paused",
        "_remaining",
        "_waiter",
        "awaited",
        "complete",
        "content_length",
        "error",
        "head_complete",
        "headers",
        "idle_since",
        "is_closing",
        "on_lost",
        "reusable",
        "served",
        "status",
        "transport",
    )

    status: int
    headers: list[Header]
    content_length: int | None

    def __init__(self, loop: asyncio.AbstractEventLoop, outbox: Outbox) -> None:
        self._loop = loop
        self._outbox = outbox
        self._held = b""  # the head of a request, and what there is of its body, until it leaves, if it ever does
        self.transport: asyncio.Transport | None = None
        self.is_closing = True  # the connection is closed, or about to be
        self.on_lost: Callable[[Http1Connection], None] | None = None
        self.served = 0
        self.idle_since = 0.0
        self.awaited = False  # an answer is: between `request` and its last byte
        self.head_complete = self.complete = self.reusable = False
        self._goes_on = False  # both sides want another exchange after this one
        self.error: ForwardingError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._partial = b""  # what came of a head that is not whole yet
        self._informational = 0
        self._chunks: ChunkedBody | None = None  # decodes the answer's body
        self._remaining = 0  # bytes of it still to come; or CHUNKED, UNTIL_CLOSE
        self._body = b""  # what came of it since it was last taken
        self._reading_paused = False
        self._expects_body = True
        self._framing = b""  # of the request's body

    # An exchange

    def request(self, method: bytes, target: bytes, host: bytes, fields: bytes, framing: bytes, body: bytes) -> None:
        """Open an exchange: send a request's head, and what there is of its body."""
        self.awaited = True
        self.head_complete = self.complete = self.reusable = False
        self._expects_body = method != b"HEAD"
        self._framing = framing
        self._body = b""  # what nobody wanted of the answer before
        form = b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n%b"
        data = form % (method, target, host, fields, framing, body)
        if self.is_closing:
            self._held = data
            self._fail(Cause.RESET, "The service closed the connection without an answer")
        elif self._outbox.holds(self, self._outbox.under_way):
            self._held = data
        else:
            assert self.transport is not None
            self.transport.write(data)

    def write(self, part: bytes) -> None:
        """Send a further part of the request's body."""
        if part:  # an empty chunk would end it
            self._send(b"%x\r\n%b\r\n" % (len(part), part) if self._sends_chunks else part)

    def end_body(self) -> None:
        """The request's body is whole."""
        if self._sends_chunks:
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
        data, self._body = self._body, b""
        if self._reading_paused and self.transport is not None:
            self._reading_paused = False
            self.transport.resume_reading()
        return data

    @property
    def silent(self) -> bool:
        """No byte of an answer has come since ``request``."""
        return not (self.head_complete or self._partial or self._informational)

    @property
    def dispatched(self) -> bool:
        """Some byte of the request may have left."""
        return not self._held

    def flush(self) -> None:
        """Send what was held back of a request, unless the connection is lost."""
        if self._held and not self.is_closing:
            assert self.transport is not None
            data, self._held = self._held, b""
            self.transport.write(data)

    def abort(self) -> None:
        """Close at once, whatever is under way: the service sees its caller leave."""
        self.awaited = False
        self._close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # TCP_NODELAY is the event loop's default
        self.is_closing = False

    def data_received(self, data: bytes) -> None:
        if not self.awaited or self._held:  # nobody asked yet: what follows an answer is no other's (EDGE.md, 56)
            self._fail(Cause.GARBLED, "The service sent bytes that nobody asked for")
            return
        try:
            if not self.head_complete:
                data = self._take_head(data)
            if data or (self.head_complete and not self._remaining):
                self._take_body(data)
        except MalformedError as error:
            self._fail(Cause.GARBLED, f"The service's {error}")
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def eof_received(self) -> bool:
        self.is_closing = True
        self.reusable = False
        return False  # closes the transport; connection_lost tells what that means

    def connection_lost(self, exc: Exception | None) -> None:
        if self.awaited:
            if self._remaining == UNTIL_CLOSE and self.head_complete and exc is None:
                self.complete, self.awaited = True, False
            elif self.head_complete:
                self._fail(Cause.CUT_SHORT, "The service broke off its answer")
            elif not self.silent:
                self._fail(Cause.GARBLED, "The service broke off within the head of its answer")
            else:
                self._fail(Cause.RESET, "The service closed the connection without an answer")
        self.is_closing = True
        self.reusable = False
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

    # Within

    def _take_head(self, data: bytes) -> bytes:
        """Take in what came of a head; what of it follows the head."""
        if self._partial:
            data = self._partial + data
            self._partial = b""
        while True:
            head, ending, behind = data.partition(b"\r\n\r\n")
            if not ending:
                self._partial = data
                refuse_early(data)
                return b""
            status, headers, length, goes_on = read_head(head)
            if status >= 200:
                break
            self._pass_over(status)
            data = behind
        self.status = status
        self.headers = headers.copy()
        self.content_length = length if length >= 0 else None
        self._goes_on = goes_on and length != UNTIL_CLOSE
        self._informational = 0
        self.head_complete = True
        if status in BODILESS or not self._expects_body:
            self._goes_on = goes_on
            length = 0
        elif length == CHUNKED:
            self._chunks = ChunkedBody()
        self._remaining = length
        return behind

    def _pass_over(self, status: int) -> None:
        """An informational answer ends here (EDGE.md, 60); that there are too many, or another protocol, is garbled."""
        if status == 101:
            raise MalformedError("answer switches protocols without having been asked to")
        self._informational += 1
        if self._informational > MAX_INFORMATIONAL:
            raise MalformedError("answer does not come, only informational ones")

    def _take_body(self, data: bytes) -> None:
        """Take in what came of a body, which may be its end, or nothing where there is none."""
        length = self._remaining
        behind: bytes | None
        if length == len(data):
            behind = b""
        elif length == UNTIL_CLOSE:
            behind = None
        elif length == CHUNKED:
            assert self._chunks is not None
            data, behind = self._chunks.feed(data)
        else:
            behind = data[length:] if len(data) > length else None
            data = data[:length]
            self._remaining = length - len(data)
        self._body = self._body + data if self._body else data
        if behind is not None:
            self.complete, self.awaited = True, False
            self.reusable = self._goes_on and self._drained is None  # else it has yet to take the request's body
            self.served += 1
            self.idle_since = self._loop.time()
            if behind:  # the answer itself was whole; the garbage behind it ends the connection only
                self._close()
        elif len(self._body) > HIGH_WATER and not self._reading_paused:
            self._reading_paused = True
            assert self.transport is not None
            self.transport.pause_reading()

    @property
    def _sends_chunks(self) -> bool:
        return self._framing.startswith(b"transfer-encoding")

    def _send(self, data: bytes) -> None:
        if self._held:
            self.flush()
        if not self.is_closing:  # where it is, the head may never have left, and what follows it would pass for one
            assert self.transport is not None
            self.transport.write(data)

    def _fail(self, cause: Cause, message: str) -> None:
        if self.error is None:
            self.error = ForwardingError(cause, message)
        self.awaited = False
        self._close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _close(self) -> None:
        self.is_closing = True
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()
