"""The connections to one replica: kept alive and used again, bounded in number, shared out in the order of asking."""

import asyncio
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from gateway.context import Cause
from gateway.outbox import Outbox
from gateway.policies.services import Address
from gateway.problems import ForwardingError
from gateway.proxy.http1 import Http1Connection

HEAD_START = 0.25  # seconds that each address of a name gets before the next is tried (RFC 8305, 5)
Made = TypeVar("Made", bound=asyncio.BaseProtocol)
Dialling = asyncio.Task[socket.socket]


async def connect(address: Address, make: Callable[[], Made], tls: ssl.SSLContext | None) -> Made:
    """A new connection to a replica, read by what ``make`` makes; the caller sets a bound.

    A name is looked up anew each time, so that a changed answer is followed; its addresses are tried in turn. What TLS
    verifies is that name, and the server is told it (SNI).

    Raises:
        OSError: the replica can't be reached; TLS errors are among them.
    """
    loop = asyncio.get_running_loop()
    if address.socket:
        return (await loop.create_unix_connection(make, address.socket))[1]
    connected = await _connected_socket(loop, address)
    name = address.host if address.tls else None
    return (await loop.create_connection(make, sock=connected, ssl=tls if name else None, server_hostname=name))[1]


async def _connected_socket(loop: asyncio.AbstractEventLoop, address: Address) -> socket.socket:
    host, port, kind = address.host, address.port, socket.SOCK_STREAM
    try:  # an IP address needs no resolver, and so no thread in which others may wait for a name server
        found = socket.getaddrinfo(host, port, type=kind, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        found = await loop.getaddrinfo(host, port, type=kind)
    if len(found) == 1:
        ((family, _, _, _, to),) = found
        return await _dial(loop, family, to)
    return await _first_to_answer(loop, [(family, to) for family, _, _, _, to in found])


async def _first_to_answer(loop: asyncio.AbstractEventLoop, places: list[tuple[int, tuple[Any, ...]]]) -> socket.socket:
    """Dial one place after another, each beside those that take their time; an error where none answers."""
    dialling: set[Dialling] = set()
    left = places[::-1]
    try:
        while True:
            if left:
                dialling.add(loop.create_task(_dial(loop, *left.pop())))
            head_start = HEAD_START if left else None
            done, _ = await asyncio.wait(dialling, timeout=head_start, return_when=asyncio.FIRST_COMPLETED)
            refused = {each for each in done if each.exception() is not None}
            dialling -= refused
            done -= refused
            if done:
                dialling.remove(answered := done.pop())
                return answered.result()
            if not dialling and not left:
                return refused.pop().result()  # raises; nothing here holds on to what it raises, which would be a cycle
    finally:
        _hang_up(dialling)


def _hang_up(dialling: "set[Dialling]") -> None:
    for each in dialling:
        if not each.cancel() and each.exception() is None:  # it got through in the same moment as another
            each.result().close()


async def _dial(loop: asyncio.AbstractEventLoop, family: int, to: tuple[Any, ...]) -> socket.socket:
    dialled = socket.socket(family, socket.SOCK_STREAM)
    try:
        dialled.setblocking(False)
        dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # not every event loop does
        await _connect(loop, dialled, to)
    except BaseException:
        dialled.close()
        raise
    return dialled


async def _connect(loop: asyncio.AbstractEventLoop, dialled: socket.socket, to: tuple[Any, ...]) -> None:
    """The loop's own ``sock_connect``, were it not that uvloop's has a thread look up what is an address already."""
    try:
        dialled.connect(to)
        return
    except BlockingIOError:
        pass
    decided: asyncio.Future[None] = loop.create_future()

    def decide() -> None:
        if not decided.done():  # it is called again until it is removed
            decided.set_result(None)

    loop.add_writer(dialled, decide)
    try:
        await decided
    finally:
        loop.remove_writer(dialled)
    if error := dialled.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(error, os.strerror(error))


class ConnectionPool:
    """The connections to one replica.

    Args:
        address: where it listens.
        limit: connections at a time.
        max_waiting: requests that may wait for one; a further one is refused at once.
        idle_timeout: seconds after which a connection is not used again: less than services keep theirs.
        max_age: seconds after which even a busy one is not: then its name is looked up again.
        tls: how to speak TLS, where the address asks for it.
        outbox: of the running event loop, if requests share one.
    """

    def __init__(
        self,
        address: Address,
        *,
        limit: int = 1000,
        max_waiting: int = 1000,
        idle_timeout: float = 4.0,
        max_age: float = 300.0,
        tls: ssl.SSLContext | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self.address = address
        self.limit = limit
        self.max_waiting = max_waiting
        self.idle_timeout = idle_timeout
        self.max_age = max_age
        self._tls = tls
        self._outbox = outbox
        self._idle: list[Http1Connection] = []  # the last given back is the first taken: the others may go stale
        self._open = 0  # connecting, busy and idle
        self._made_at: dict[Http1Connection, float] = {}  # of each busy and idle one, seconds on the loop's clock
        self._waiting: deque[asyncio.Future[Http1Connection | None]] = deque()

    @property
    def open(self) -> int:
        """Connections there are, those being made included."""
        return self._open

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    def take_idle(self, now: float) -> Http1Connection | None:
        """A connection that is there and can be used at once."""
        idle = self._idle
        while idle:
            connection = idle.pop()  # one that was lost is no longer among them
            if now - connection.idle_since <= self.idle_timeout and connection.reusable:
                return connection
            connection.abort()
        return None

    @property
    def full(self) -> bool:
        """As many connections are open as may be: the next request waits for one."""
        return self._open >= self.limit

    async def reserve(self) -> Http1Connection | None:
        """Wait one's turn: for a connection given back, or (None) the right to ``connect``; the caller sets a bound.

        Raises:
            ForwardingError: too many wait already.
        """
        if self._open < self.limit:
            self._open += 1
            return None
        if len(self._waiting) >= self.max_waiting:
            raise ForwardingError(Cause.NO_CONNECTION, "All connections to the service are in use")
        waiting: asyncio.Future[Http1Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            if waiting.done() and not waiting.cancelled():  # it was given what it no longer wants: pass it on
                connection = waiting.result()
                if connection is None:
                    self._place_freed()
                else:
                    self.give_back(connection)
            raise

    async def connect(self) -> Http1Connection:
        """A new connection, in the place that ``reserve`` gave; the caller sets a bound.

        Raises:
            ForwardingError: the replica can't be reached.
        """
        loop = asyncio.get_running_loop()
        outbox = self._outbox or Outbox(loop)
        made = False
        try:
            connection = await connect(self.address, lambda: Http1Connection(loop, outbox), self._tls)
            made = True
        except OSError as error:  # TLS errors are among them
            raise ForwardingError(Cause.CONNECT_FAILED, f"The service can't be reached: {_in_words(error)}") from error
        finally:
            if not made:
                self._place_freed()
        if connection.is_closing:  # it was gone before it was ours
            self._place_freed()
            raise ForwardingError(Cause.CONNECT_FAILED, "The service closed the connection at once")
        connection.on_lost = self._lost
        self._made_at[connection] = loop.time()
        return connection

    def give_back(self, connection: Http1Connection) -> None:
        """Return a connection after its exchange: kept where it can be used again, closed elsewhere."""
        if not connection.reusable:
            connection.abort()  # its place is freed when it is lost
            return
        if connection.idle_since - self._made_at[connection] > self.max_age:
            connection.abort()
            return
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(connection)
                return
        self._idle.append(connection)

    def close_idle(self) -> None:
        """Close the connections that wait for a request."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.abort()

    def _lost(self, connection: Http1Connection) -> None:
        connection.on_lost = None
        self._made_at.pop(connection, None)
        if connection in self._idle:
            self._idle.remove(connection)
        self._place_freed()

    def _place_freed(self) -> None:
        """One connection fewer: its place goes to the first that waits."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)
                return
        self._open -= 1


def _in_words(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    if isinstance(error, socket.gaierror):
        return "no such name" if error.errno == socket.EAI_NONAME else "its name could not be looked up"
    return os.strerror(error.errno).lower() if error.errno else "the connection broke"
