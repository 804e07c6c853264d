"""Any httpx transport as the way to a service: HTTP/2, forward proxies, and applications or mocks in tests.

Transports are what httpx's clients are built on: one request goes out as it stands, one answer comes back. What a
client adds - redirects, cookies, authentication, header fields, log lines - takes no part.
"""

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import httpx

from gateway.context import Cause
from gateway.policies.framing import CONTROLS, MalformedError
from gateway.policies.services import Address, Service
from gateway.problems import ForwardingError
from gateway.proxy.answers import read_head
from gateway.proxy.headers import Header
from gateway.proxy.http1 import BODILESS, HIGH_WATER

UNREACHABLE = "The service can't be reached"
# What httpx raises, the first that fits: its cause before the head of an answer has come, after it, and in words.
CAUSES: tuple[tuple[type[httpx.HTTPError], Cause, Cause, str], ...] = (
    (httpx.ConnectTimeout, Cause.CONNECT_TIMEOUT, Cause.CONNECT_TIMEOUT, "The service could not be reached in time"),
    (httpx.PoolTimeout, Cause.NO_CONNECTION, Cause.NO_CONNECTION, "All connections to the service stayed in use"),
    (httpx.WriteTimeout, Cause.WRITE_TIMEOUT, Cause.STALLED, "The service stopped taking the request"),
    (httpx.TimeoutException, Cause.FIRST_BYTE_TIMEOUT, Cause.STALLED, "The service did not answer in time"),
    (httpx.ConnectError, Cause.CONNECT_FAILED, Cause.CONNECT_FAILED, UNREACHABLE),
    (httpx.ProxyError, Cause.CONNECT_FAILED, Cause.CONNECT_FAILED, f"{UNREACHABLE}: the proxy refused"),
    (httpx.UnsupportedProtocol, Cause.CONNECT_FAILED, Cause.CONNECT_FAILED, UNREACHABLE),
    (httpx.ProtocolError, Cause.GARBLED, Cause.CUT_SHORT, "The service's answer is not valid, or broke off"),
    (httpx.HTTPError, Cause.RESET, Cause.CUT_SHORT, "The service closed the connection"),
)
NOT_DISPATCHED = frozenset({Cause.CONNECT_FAILED, Cause.CONNECT_TIMEOUT})
logger = logging.getLogger("gateway.proxy")


class ExclusiveTransport(httpx.AsyncBaseTransport):
    """What the settings of a service ask for beyond HTTP/1.1 over a direct connection.

    Each connection carries one exchange at a time, so that giving an exchange up closes its connection. Over one that
    is shared, httpx never tells the service (it sends no RST_STREAM), and what still comes uses up the window that the
    others receive in.

    Over TLS the server chooses between HTTP/2 and HTTP/1.1; elsewhere it must know HTTP/2 (RFC 9113, 3.3).

    Args:
        service: says whether to speak HTTP/2, through which proxy, and whom to trust.
        address: of its replica.
        limit: exchanges at a time; a further one is refused at once.
        idle_timeout: seconds after which a connection is not used again.
        max_age: seconds after which even a busy one is not: then its name is looked up again.
    """

    def __init__(
        self, service: Service, address: Address, *, limit: int, idle_timeout: float = 4.0, max_age: float = 300.0
    ) -> None:
        self._limit = limit
        self._idle_timeout = idle_timeout
        self._max_age = max_age
        self._make = partial(
            httpx.AsyncHTTPTransport,
            # A context of its own, for httpx writes into it which protocols it offers.
            verify=ssl.create_default_context(cafile=service.ca_file),
            http1=address.tls or not service.http2,
            http2=service.http2,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=idle_timeout),
            proxy=service.proxy,
            uds=address.socket or None,
            trust_env=False,
        )
        self._idle: deque[tuple[float, httpx.AsyncHTTPTransport]] = deque()  # the last used is the first taken
        self._made_at: dict[httpx.AsyncHTTPTransport, float] = {}  # idle and busy ones
        self._busy = 0
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its answer must be closed."""
        if self._busy >= self._limit:
            raise httpx.PoolTimeout("All connections are in use")
        transport = self._idle.pop()[1] if self._idle else self._make()
        self._made_at.setdefault(transport, asyncio.get_running_loop().time())
        self._busy += 1
        try:
            response = await transport.handle_async_request(request)
        except BaseException:
            await self.give_back(transport, reusable=False)
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Exclusive(response.stream, self, transport)
        return response

    async def give_back(self, transport: httpx.AsyncHTTPTransport, *, reusable: bool) -> None:
        """The exchange over a transport has ended."""
        self._busy -= 1
        now = asyncio.get_running_loop().time()
        if reusable and not self._closed and now - self._made_at[transport] <= self._max_age:
            self._idle.append((now, transport))
            while self._idle and now - self._idle[0][0] > self._idle_timeout:
                await self._close(self._idle.popleft()[1])
        else:
            await self._close(transport)

    async def aclose(self) -> None:
        """Close what is idle; what is busy is closed when its exchange ends."""
        self._closed = True
        while self._idle:
            await self._close(self._idle.popleft()[1])

    async def _close(self, transport: httpx.AsyncHTTPTransport) -> None:
        del self._made_at[transport]
        await transport.aclose()


class _Exclusive(httpx.AsyncByteStream):
    """The body of an answer, which knows whether it came whole."""

    def __init__(
        self, stream: httpx.AsyncByteStream, owner: ExclusiveTransport, transport: httpx.AsyncHTTPTransport
    ) -> None:
        self._stream = stream
        self._owner = owner
        self._transport = transport
        self._whole = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part
        self._whole = True

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._owner.give_back(self._transport, reusable=self._whole)


class HttpxPool:
    """The exchanges with one replica through an httpx transport, which keeps the connections itself.

    Args:
        address: of the replica, which goes into the URL and into ``Host``.
        transport: a transport, or a client for the one it would use.
        connect_timeout: seconds to connect.
        pool_timeout: seconds to wait for a connection where the transport bounds their number.
    """

    idle = 0
    full = False

    def __init__(
        self,
        address: Address,
        transport: httpx.AsyncBaseTransport | httpx.AsyncClient,
        *,
        connect_timeout: float,
        pool_timeout: float,
    ) -> None:
        self.address = address
        self.origin = httpx.URL(scheme="https" if address.tls else "http", host=address.host, port=address.port)
        if isinstance(transport, httpx.AsyncClient):
            transport = transport._transport_for_url(self.origin)  # there is no public way to ask for it
        self.transport = transport
        # The times for writing and reading are the exchange's own.
        self.timeout = {"connect": connect_timeout, "pool": pool_timeout, "read": None, "write": None}
        self._busy: set[HttpxConnection] = set()

    @property
    def open(self) -> int:
        """Exchanges under way."""
        return len(self._busy)

    def take_idle(self, now: float) -> None:
        """None: each exchange begins anew, the transport finds a connection for it."""

    async def reserve(self) -> None:
        """None: the transport does the waiting."""

    async def connect(self) -> "HttpxConnection":
        """What one exchange goes through."""
        connection = HttpxConnection(self, self._busy.discard)
        self._busy.add(connection)
        return connection

    def give_back(self, connection: "HttpxConnection") -> None:
        """The exchange is over."""
        connection.abort()

    def close_idle(self) -> None:
        """Nothing to close here: the transport's connections are closed with it."""


class HttpxConnection:
    """One exchange through an httpx transport.

    It is an ``UpstreamConnection``, which says how it is used. A task of its own sends the request and reads the
    answer, no faster than both sides take it.
    """

    status: int
    headers: list[Header]
    content_length: int | None

    def __init__(self, pool: HttpxPool, ended: Callable[["HttpxConnection"], None]) -> None:
        self.error: ForwardingError | None = None
        self.head_complete = self.complete = False
        self.served, self.idle_since, self.reusable = 0, 0.0, False
        self._pool = pool
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._upload: _Upload | None = None
        self._expects_body = True
        self._chunks: list[bytes] = []
        self._held = 0  # bytes of them
        self._waiter: asyncio.Future[None] | None = None
        self._taken: asyncio.Future[None] | None = None

    @property
    def dispatched(self) -> bool:
        """Some byte of the request may have left, as far as httpx tells."""
        return self.error is None or self.error.cause not in NOT_DISPATCHED

    @property
    def silent(self) -> bool:
        """No answer has begun."""
        return not self.head_complete

    def request(self, method: bytes, target: bytes, host: bytes, fields: bytes, framing: bytes, body: bytes) -> None:
        """Open the exchange.

        Raises:
            ForwardingError: the target or a field is not what a transport can send.
        """
        headers = [(b"host", host)]
        for line in (fields + framing).split(b"\r\n")[:-1]:
            name, _, value = line.partition(b": ")
            headers.append((name, value))
        values = b"".join([value for _, value in headers])
        if len(values.translate(None, CONTROLS)) != len(values):
            message = "A header field has a control byte in it"
            raise ForwardingError(Cause.REFUSED, message, status=400, reason="bad_field")
        stream: httpx.AsyncByteStream = httpx.ByteStream(body)
        if framing and not body and framing.strip(b"0\r\n") != b"content-length: ":  # of nothing, it is whole
            stream = self._upload = _Upload(self._loop)
        self._expects_body = method != b"HEAD"
        extensions = {"timeout": self._pool.timeout}
        request = httpx.Request(method.decode(), "", headers=headers, stream=stream, extensions=extensions)
        request.url = _ExactURL(self._pool.origin, target)
        self._task = self._loop.create_task(self._exchange(request))
        self._task.add_done_callback(lambda _: self._ended(self))

    def write(self, part: bytes) -> None:
        """Send a further part of the request's body."""
        if self._upload is not None and part:
            self._upload.add(part)

    def end_body(self) -> None:
        """The request's body is whole."""
        if self._upload is not None:
            self._upload.end()

    async def drain(self) -> None:
        """Wait until the service takes more of the request's body."""
        if self._upload is not None and self.error is None and not self.complete:
            await self._upload.wanted()
        if self.error is not None:
            raise self.error

    def progress(self) -> Awaitable[None]:
        """To be awaited for more of the answer than there is."""
        if self.error is not None:
            raise self.error
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def take(self) -> bytes:
        """What has come of the body since the last call."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._held = 0
        _wake(self._taken)
        return data

    def abort(self) -> None:
        """End the exchange at once: the service sees its caller leave."""
        if self._task is None:
            self._ended(self)
        else:
            self._task.cancel()

    # The task

    async def _exchange(self, request: httpx.Request) -> None:
        try:
            await self._send_and_read(request)
        except ForwardingError as error:
            self.error = error
        except MalformedError as error:
            self.error = ForwardingError(Cause.GARBLED, f"The service's {error}")
        except httpx.HTTPError as error:
            self.error = self._in_our_words(error)
        except Exception:  # of a transport, or an application behind one, that is not httpx's own
            logger.exception("The transport to %s failed", request.url.host)
            self.error = ForwardingError(Cause.GATEWAY_FAULT, "An unexpected error occurred")
        finally:
            _wake(self._waiter)
            if self._upload is not None:
                self._upload.let_go()

    async def _send_and_read(self, request: httpx.Request) -> None:
        response = await self._pool.transport.handle_async_request(request)
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        try:
            self._take_head(response)
            bodiless = self.status in BODILESS or not self._expects_body
            left = None if bodiless else self.content_length
            _wake(self._waiter)
            async for part in stream:  # `Response.aiter_raw` would not give it where the response was made of bytes
                if not part or bodiless:
                    continue
                if left is not None:
                    left -= len(part)
                    if left < 0:
                        raise ForwardingError(Cause.CUT_SHORT, "The service sent more than the length it announced")
                self._chunks.append(part)
                self._held += len(part)
                _wake(self._waiter)
                if self._held > HIGH_WATER:
                    self._taken = self._loop.create_future()
                    await self._taken
            if left:
                raise ForwardingError(Cause.CUT_SHORT, "The service broke off its answer")
            network = response.extensions.get("network_stream")
            if network is not None and response.extensions.get("http_version") != b"HTTP/2":
                # What came behind an HTTP/1.1 answer httpx would take for the next one's beginning (EDGE.md, 56).
                await network.aclose()
        finally:
            await stream.aclose()
        self.complete = True

    def _take_head(self, response: httpx.Response) -> None:
        """Read the head as if it had come over HTTP/1.1, so that the same is refused (RFC 9110, 5.5 and 15.2)."""
        lines = [b": ".join(field) for field in response.headers.raw]
        if len(b"".join(lines).translate(None, CONTROLS)) != sum(map(len, lines)):  # a line end would make two of one
            raise MalformedError("answer has a control byte in a header field")
        status, headers, length, _ = read_head(b"\r\n".join([b"HTTP/1.1 %d" % response.status_code, *lines]))
        if status < 200:
            raise MalformedError("answer switches protocols without having been asked to")
        self.status, self.headers = status, headers.copy()
        self.content_length = length if length >= 0 else None
        self.head_complete = True

    def _in_our_words(self, error: httpx.HTTPError) -> ForwardingError:
        _, before, after, message = next(row for row in CAUSES if isinstance(error, row[0]))
        return ForwardingError(after if self.head_complete else before, message)


class _ExactURL(httpx.URL):
    """A URL whose path and query go out byte for byte as they came; httpx would resolve dots and escape more."""

    def __init__(self, origin: httpx.URL, target: bytes) -> None:
        try:
            super().__init__(origin, raw_path=target)
        except (httpx.InvalidURL, UnicodeDecodeError) as error:
            message = "The target is too long, or has bytes in it that a URL may not have"
            raise ForwardingError(Cause.REFUSED, message, status=400, reason="bad_target") from error
        self._target = target

    @property
    def raw_path(self) -> bytes:
        return self._target


class _Upload(httpx.AsyncByteStream):
    """A request's body that is still coming, part by part, as fast as the transport asks for it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._parts: deque[bytes] = deque()
        self._whole = False
        self._gone = False  # nobody will read it further
        self._added: asyncio.Future[None] | None = None
        self._wanted: asyncio.Future[None] | None = None

    def add(self, part: bytes) -> None:
        self._parts.append(part)
        _wake(self._added)

    def end(self) -> None:
        self._whole = True
        _wake(self._added)

    async def wanted(self) -> None:
        """Wait until all that was added has been sent, or nobody wants it any more."""
        if self._parts and not self._gone:
            self._wanted = self._loop.create_future()
            await self._wanted

    def let_go(self) -> None:
        """Nobody wants the rest."""
        self._gone = True
        self._parts.clear()
        _wake(self._wanted)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._parts:
                yield self._parts[0]
                if self._parts:
                    self._parts.popleft()  # only now it has been sent
            _wake(self._wanted)
            if self._whole:
                return
            self._added = self._loop.create_future()
            await self._added


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
