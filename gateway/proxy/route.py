"""What the gateway keeps for one service while it runs: connections to its replicas, and what is known of them."""

import ssl
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from gateway.outbox import Outbox
from gateway.policies.replicas import Replicas
from gateway.policies.retry import RetryBudget
from gateway.policies.services import Address, Service
from gateway.problems import ForwardingError
from gateway.proxy.headers import Header
from gateway.proxy.pool import ConnectionPool
from gateway.proxy.timers import TimerWheel
from gateway.tally import GAPS, Tally

if TYPE_CHECKING:
    from httpx import AsyncBaseTransport, AsyncClient

    Upstream = AsyncBaseTransport | AsyncClient

LISTEN_AFTER = 0.05  # seconds: only a longer request is worth a task that watches its client, where the server does not


class UpstreamConnection(Protocol):
    """A connection to a replica, carrying one exchange at a time.

    An exchange is ``request``; where that did not take the whole body, any number of ``write`` and ``drain``, then
    ``end_body``; and ``progress`` as often as it takes: until ``head_complete``, then, taking what has come with
    ``take``, until ``complete``. What goes wrong on the connection is raised as ``ForwardingError`` by ``drain`` and
    ``progress``.

    Attributes:
        status: of the answer, once ``head_complete``, as the next two. Informational answers are passed over.
        headers: of the answer, names in lower case, without those that are for this connection only
            (``answer_fields``); the caller may change them.
        content_length: of the answer's body, where it announced one.
        complete: the whole answer has come.
        error: what went wrong on the connection.
        dispatched: some byte of the request may have reached the service.
        served: how many exchanges it has completed.
        idle_since: when the last ended, seconds on the event loop's clock.
    """

    status: int
    headers: list[Header]
    content_length: int | None
    head_complete: bool
    complete: bool
    error: ForwardingError | None
    served: int
    idle_since: float

    @property
    def dispatched(self) -> bool: ...
    @property
    def silent(self) -> bool:
        """No byte of an answer has come since ``request``."""

    @property
    def reusable(self) -> bool:
        """The answer came whole, nothing came behind it, and both sides want another."""

    def request(self, method: bytes, target: bytes, host: bytes, fields: bytes, framing: bytes, body: bytes) -> None:
        """Open an exchange.

        Args:
            method: of the request.
            target: as it goes into the request line.
            host: the value of ``Host``.
            fields: the other fields that are sent, as a block of ``name: value`` lines, each with its line end.
            framing: ``content-length: N`` or ``transfer-encoding: chunked`` as such a line; empty without a body.
            body: all of it, or nothing where it is still coming.
        """

    def write(self, part: bytes) -> None:
        """Send a further part of the request's body."""

    def end_body(self) -> None:
        """The request's body is whole; to be called where it came through ``write``."""

    async def drain(self) -> None:
        """Wait until the service takes more of the request's body."""

    def progress(self) -> Awaitable[None]:
        """To be awaited for more of the answer than there is."""

    def take(self) -> bytes:
        """What has come of the answer's body since the last call."""

    def abort(self) -> None:
        """Close at once, whatever is under way: the service sees its caller leave."""


class UpstreamPool(Protocol):
    """The connections to one replica; ``ConnectionPool`` says what each method does."""

    address: Address

    @property
    def open(self) -> int: ...
    @property
    def idle(self) -> int: ...
    @property
    def full(self) -> bool: ...
    def take_idle(self, now: float) -> UpstreamConnection | None: ...
    async def reserve(self) -> UpstreamConnection | None: ...
    async def connect(self) -> UpstreamConnection: ...
    def give_back(self, connection: Any) -> None: ...  # one of its own
    def close_idle(self) -> None: ...


class Route:
    """One service's replicas, the connections to each, and its budget for retries.

    Args:
        service: the service.
        wheel: the deadlines of all requests on the running event loop.
        outbox: what they have to send.
        max_connections: to each replica.
        random: what the choice among replicas and the back-off draw from: numbers from 0 up to 1.
        upstream: the httpx transport or client to reach it through, in place of connections of our own.

    Attributes:
        gaps: seconds between two parts of a stream, as they pass; for whoever takes them.
        direct: nobody stands between us and the replicas, so that a WebSocket can have a connection of its own.
    """

    def __init__(
        self,
        service: Service,
        *,
        wheel: TimerWheel,
        outbox: Outbox,
        max_connections: int,
        random: Callable[[], float],
        upstream: "Upstream | None" = None,
    ) -> None:
        self.service = service
        self.wheel = wheel
        self.outbox = outbox
        self.loop = wheel.loop
        self.random = random
        self.look_after = min(LISTEN_AFTER, service.timeouts.client)  # seconds, at a request that is not over by then
        self.limit_digits = len(str(service.max_body_bytes))  # a body's length of fewer is none too large
        self.replicas = Replicas(service.replicas, random)
        self.budget = RetryBudget()
        self.gaps = Tally(GAPS)
        self.tls = tls_context(service.ca_file) if any(url.startswith("https:") for url in service.replicas) else None
        self.direct = upstream is None and service.proxy is None
        self._upstream = upstream
        self._limit = min(max_connections, service.max_in_flight or max_connections)
        self._transports: list[AsyncBaseTransport] = []
        self.pools: Mapping[str, UpstreamPool] = {url: self._pool(Address.parse(url)) for url in service.replicas}

    @property
    def open_connections(self) -> int:
        """Over all replicas."""
        return sum(pool.open for pool in self.pools.values())

    async def aclose(self) -> None:
        """Close the connections that wait for a request, but none of an ``upstream`` that was handed to us."""
        for pool in self.pools.values():
            pool.close_idle()
        for transport in self._transports:
            await transport.aclose()

    def _pool(self, address: Address) -> UpstreamPool:
        service, upstream = self.service, self._upstream
        if upstream is None and service.proxy is None and not service.http2:
            return ConnectionPool(address, limit=self._limit, tls=self.tls, outbox=self.outbox)
        from gateway.proxy.httpx_upstream import ExclusiveTransport, HttpxPool  # loads httpx, which few services need

        if upstream is None:
            upstream = ExclusiveTransport(service, address, limit=self._limit)
            self._transports.append(upstream)
        timeouts = service.timeouts
        return HttpxPool(address, upstream, connect_timeout=timeouts.connect, pool_timeout=timeouts.pool)


@cache
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """TLS as it should be: verified against the system's certificates, or those in ``ca_file``."""
    return ssl.create_default_context(cafile=ca_file)
