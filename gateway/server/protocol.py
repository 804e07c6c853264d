"""One client's connection: HTTP/1.1 requests in, answers out, with caps and deadlines on all of it.

A replacement for uvicorn's HTTP protocols, chosen by ``uvicorn.Config(app, http=GatewayProtocol)``. It is stricter
(EDGE.md says how, line by line), bounds what a client may take in bytes and in seconds, and is faster: an answer that
comes whole leaves as one write, and deadlines are checked by one sweep over all connections, not by timers.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from os import urandom
from time import monotonic
from typing import Any, cast

from starlette.types import ASGIApp, Scope
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from gateway.context import KEY
from gateway.outbox import Outbox
from gateway.policies.edge import EdgeLimits
from gateway.problems import error_body
from gateway.server.cycle import STATUS_LINES, WINDOW, RequestCycle, wait, wake
from gateway.server.http1 import (
    ChunkedBody,
    Header,
    RefusedError,
    RequestLine,
    correlation_id_of,
    glimpse,
    path_to_tell,
    read_head,
    refuse_early,
)
from gateway.server.websocket import MAX_LINE, NO_LINGER, TCP_CLOSED, GatewayWebSocket, is_of_handshake, tcp_state

logger = logging.getLogger("gateway.server")

GRACE = 1.0  # seconds that an idle connection has for one more request when the server leaves
PROBE_AFTER = 0.1  # seconds from a client's half-close until it is asked whether it is still there
SWEEP_INTERVAL = 0.2  # seconds; within 250 ms a client that left is noticed

Refusal = Callable[[str, int, str, str, str, str], object]
ASGI = {"version": "3.0", "spec_version": "2.3"}
EXTENSIONS: dict[str, dict[str, Any]] = {"gateway.server": {}}  # read-only: shared by all requests
ENDLESS = float("inf")
CR = ord("\r")

IDLE, BODY, ANSWERING, DISCARDING, LINGERING, CLOSED = range(6)
"""What a connection is doing: awaiting a head, reading a body, awaiting the answer to a whole request, reading over the
rest of a body that was answered, reading over what comes after the last answer; done."""


class Edge:
    """What the connections of one server share.

    Attributes:
        limits: the caps and deadlines.
        idle_timeout: seconds that an idle connection has for one more request.
        outbox: what they have to send.
        connections: all that are open, but WebSockets.
        draining: answers close their connection.
        has_task_factory: the event loop lets somebody else make its tasks.
        leaving: nothing new is accepted, and an idle connection has a second for one more request.
        on_refusal: called with the peer's address, the status, a word for the reason, and then, as far as they are
            known, the correlation ID, method and path (without query) of a request that is refused here, so that the
            application never hears of it; an application's attribute of that name is taken.
    """

    def __init__(self, config: Config, limits: EdgeLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.app: ASGIApp = cast("ASGIApp", config.loaded_app)
        self.limits = limits
        self.idle_timeout = limits.keep_alive_timeout
        self.loop = loop
        self.has_task_factory = loop.get_task_factory() is not None
        self.outbox = Outbox(loop)
        self.connections: set[GatewayProtocol] = set()
        self.draining = False
        self.leaving = False
        self.on_refusal: Refusal = getattr(self.app, "on_refusal", None) or _nothing
        deadlines = (limits.head_timeout, limits.body_timeout, limits.client_timeout, limits.keep_alive_timeout)
        self._interval = max(0.01, min(SWEEP_INTERVAL, *(deadline / 4 for deadline in deadlines)))
        self._sweeping: asyncio.TimerHandle | None = None

    @staticmethod
    def of(config: Config, server_state: ServerState, limits: EdgeLimits, loop: asyncio.AbstractEventLoop) -> "Edge":
        """The one of this server, made with its first connection."""
        edge: Edge | None = getattr(server_state, "edge", None)
        if edge is None:
            edge = Edge(config, limits, loop)
            server_state.edge = edge  # type: ignore[attr-defined]
        return edge

    def add(self, connection: "GatewayProtocol") -> None:
        self.connections.add(connection)
        if self._sweeping is None:
            self._sweeping = self.loop.call_later(self._interval, self._sweep)

    def leave(self) -> None:
        """Close what is idle, though not at once: its client may be about to send."""
        self.draining = self.leaving = True
        self.idle_timeout = min(self.idle_timeout, GRACE)
        due = self.loop.time() + GRACE
        for connection in self.connections:
            if connection.state == IDLE:
                connection.due = min(connection.due, due)

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            connection.check(now)
        self._sweeping = self.loop.call_later(self._interval, self._sweep) if self.connections else None


class GatewayProtocol(asyncio.Protocol):
    """A client's connection under uvicorn.

    Args:
        config, server_state, app_state, _loop: what uvicorn hands to a protocol.
        limits: caps and deadlines; those of the server's first connection hold for all of them.
    """

    __slots__ = (
        "app_state",
        "buffer",
        "chunks",
        "client",
        "config",
        "cycle",
        "due",
        "edge",
        "held",
        "line",
        "loop",
        "peer_is_done",
        "reading_paused",
        "remaining",
        "requests",
        "scope",
        "seen",
        "seen_at",
        "server_state",
        "state",
        "tasks",
        "transport",
        "writable_waiters",
        "writing_paused",
        "written",
    )

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: EdgeLimits = EdgeLimits(),  # noqa: B008  frozen
    ) -> None:
        if not config.loaded:
            config.load()
        self.config = config
        self.loop = _loop or asyncio.get_running_loop()
        self.server_state = server_state
        self.app_state = app_state
        self.edge = Edge.of(config, server_state, limits, self.loop)
        self.tasks = server_state.tasks

        self.state = IDLE
        self.due = 0.0  # when patience with the client ends, on the loop's clock
        self.requests = 0
        self.cycle: RequestCycle | None = None
        self.buffer: bytes | bytearray = b""  # what came of a head, or while a request was being answered
        self.remaining = 0  # bytes of the body still to come, unless it is chunked
        self.chunks: ChunkedBody | None = None
        self.reading_paused = False
        self.peer_is_done = False  # the client has half-closed, or left
        self.writing_paused = False
        self.writable_waiters: list[asyncio.Future[None]] = []
        self.written = 0
        self.held = b""  # what of it waits in the outbox
        self.seen = -1  # bytes of ``written`` that had left when the sweep last saw progress, at ``seen_at``
        self.seen_at = 0.0

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.client = get_remote_addr(self.transport)
        # Copied for each request, which is far quicker than to make one; hence all keys are there. It says what the
        # latest ``line`` did, that often is the next one's too.
        self.line: RequestLine | None = None
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": ASGI,
            "http_version": "",
            "server": get_local_addr(self.transport),
            "client": self.client,
            "scheme": "https" if is_ssl(self.transport) else "http",
            "root_path": self.config.root_path,
            "method": "",
            "path": "",
            "raw_path": b"",
            "query_string": b"",
            "headers": [],
            "state": {},
            "extensions": EXTENSIONS,
            KEY: None,
        }
        edge = self.edge
        self.due = self.loop.time() + (GRACE if edge.leaving else edge.limits.head_timeout)
        edge.add(self)
        connections = self.server_state.connections
        connections.add(self)  # type: ignore[arg-type]
        most = edge.limits.max_connections
        if len(connections) > most + most // 8 + 8:
            self.abort()
        elif len(connections) > most:
            message = "The gateway has too many connections"
            self._refuse(RefusedError(503, "too_many_connections", message, (b"retry-after", b"1")))

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._lose()

    def eof_received(self) -> bool:
        """The client sends no more: it waits for its answer, or has left. (True keeps the connection open.)"""
        if self.peer_is_done:
            return True
        self.peer_is_done = True
        self.flush()  # first, for the transport may close
        cycle = self.cycle
        if cycle is None or self.state != ANSWERING or self.scope["scheme"] == "https":
            self._lose()
            return False
        if not cycle.response_started:
            self.loop.call_later(PROBE_AFTER, self._probe)
        elif monotonic() - cycle.context.started > PROBE_AFTER:
            # Who half-closes on purpose does so along with the request. Others have left, and to go on costs money.
            self._lose()
            return False
        return True

    def pause_writing(self) -> None:
        self.writing_paused = True

    def resume_writing(self) -> None:
        self.writing_paused = False
        wake(self.writable_waiters)

    def data_received(self, data: bytes) -> None:
        if self.state != IDLE or self.buffer:
            self._go_on_reading(data)
            return
        while data[0] == CR and data.startswith(b"\r\n"):  # some clients end a body with one too many (RFC 9112, 2.2)
            data = data[2:]
            if not data:
                return
        head, end, rest = data.partition(b"\r\n\r\n")
        if not end:
            self._await_head(data)
            return
        try:
            line, headers, length, special = read_head(head, self.edge.limits)
        except RefusedError as refusal:
            self._refuse(refusal, *glimpse(head, whole=True))
            return
        self.requests += 1
        self.due = ENDLESS
        scope = self.scope.copy()
        if line is not self.line:
            self._tell(scope, line)
        scope["headers"] = headers
        scope["state"] = self.app_state.copy() if self.app_state else {}
        if special is not None and special.websocket and self.config.ws_protocol_class is not None:
            self._hand_over(scope, rest)
            return
        whole = length == len(rest)  # all of the body has come along, or there is none
        self.cycle = cycle = RequestCycle(self, scope, special, rest if whole else None)
        edge = self.edge
        if edge.has_task_factory:
            task = self.loop.create_task(cycle.run(edge.app))
        else:  # what that does, but for a number and a name to each task, which cost more than making it
            task = asyncio.Task(cycle.run(edge.app), loop=self.loop, name="request")
        cycle.task = task
        self.tasks.add(task)
        if whole:
            self.state = ANSWERING
        elif length == 0:
            self.state = ANSWERING
            self.buffer = rest
            cycle.feed(b"", False)
        else:
            self.state = BODY
            if length is None:
                self.chunks = ChunkedBody()
            else:
                self.chunks = None
                self.remaining = length
            if rest:
                self._read_body(rest)

    # Reading

    def _go_on_reading(self, data: bytes) -> None:
        """Take bytes with which no request begins."""
        state = self.state
        if state == IDLE:
            self._continue_head(data)
        elif state in (BODY, DISCARDING):
            self._read_body(data)
        elif state == ANSWERING:
            self.buffer = data if not self.buffer else self.buffer + data
            if len(self.buffer) > WINDOW:
                self.pause_reading()

    def _await_head(self, data: bytes) -> None:
        """Keep what came of a head that is not whole yet."""
        if self.requests:  # else the time runs from the connect
            self._wait_for_client(self.edge.limits.head_timeout)
        self.buffer = bytearray(data)
        self._look_early()

    def _tell(self, scope: dict[str, Any], line: RequestLine) -> None:
        """Say in a request's scope what its line says, and remember that for the next one."""
        scope["method"], raw_path, path, query, scope["http_version"], _ = line
        root_path = self.config.root_path
        scope["path"] = root_path + path
        scope["raw_path"] = root_path.encode() + raw_path
        scope["query_string"] = query
        if not query:  # it may be a secret
            self.line = line
            self.scope = scope.copy()

    def _continue_head(self, data: bytes) -> None:
        buffer = self.buffer
        searched = max(0, len(buffer) - 3)
        buffer += data
        self.buffer = buffer
        if buffer.find(b"\r\n\r\n", searched) >= 0 or (searched == 0 and buffer.startswith(b"\r\n")):
            self.buffer = b""
            self.data_received(bytes(buffer))
        elif len(buffer) < 1024 or b"\n" in data or len(data) > 1000 or len(buffer) % 1024 == 0:
            self._look_early()  # and not at each of 64,000 single bytes

    def _look_early(self) -> None:
        try:
            refuse_early(self.buffer, self.edge.limits)
        except RefusedError as refusal:
            self._refuse(refusal, *glimpse(self.buffer, whole=False))

    def _read_body(self, data: bytes) -> None:
        rest: bytes | None = None
        if self.chunks is not None:
            try:
                data, rest = self.chunks.feed(data)
            except RefusedError as refusal:
                self._refuse_body(refusal, "bad_body")
                return
        elif len(data) < self.remaining:
            self.remaining -= len(data)
        else:
            data, rest = data[: self.remaining], data[self.remaining :]
            self.remaining = 0
        if self.state == DISCARDING:
            if rest is not None:
                self.buffer = rest
                self._next()
            return
        if rest is not None:
            self.state = ANSWERING
            self.buffer = rest
        if (cycle := self.cycle) is not None:
            cycle.feed(data, rest is None)

    @property
    def is_open(self) -> bool:
        """More can be written."""
        return self.state != CLOSED

    def is_nearly_read(self) -> bool:
        """The rest of the request's body is none or so little that it may be read over for the next request's sake."""
        return self.state == ANSWERING or (self.state == BODY and self.chunks is None and self.remaining <= WINDOW)

    def answered(self, keep_alive: bool) -> None:
        """The request's answer has been written: on to the next request, if there may be one."""
        self.server_state.total_requests += 1
        self.cycle = None
        if keep_alive and self.state == ANSWERING:
            if self.buffer or self.peer_is_done or self.reading_paused:
                self._next()
            else:
                self.state = IDLE
                self.due = self.loop.time() + self.edge.idle_timeout
        elif keep_alive and self.state == BODY:
            self.state = DISCARDING
            self._wait_for_client(self.edge.limits.discard_timeout)
            self.resume_reading()
        elif self.state == ANSWERING and not self.buffer:
            self.close()
        elif self.state != CLOSED:
            self._linger()

    def _next(self) -> None:
        self.state = IDLE
        if self.reading_paused:
            self.resume_reading()
        if self.buffer:
            data, self.buffer = bytes(self.buffer), b""
            self._wait_for_client(self.edge.limits.head_timeout)
            self.data_received(data)
            if self.state == ANSWERING and len(self.buffer) > WINDOW:
                self.pause_reading()  # else each request answered would bring in more than it took out
            if self.state != IDLE:
                return
        if self.peer_is_done:
            self.close()
        elif not self.buffer:
            self.due = self.loop.time() + self.edge.idle_timeout

    def _hand_over(self, scope: Scope, rest: bytes) -> None:
        """Let the WebSocket have the connection."""
        if self.peer_is_done:  # it would not be told again
            self.close()
            return
        self.flush()
        self.resume_reading()  # first, for the WebSocket may pause it
        websocket = GatewayWebSocket(self.config, self.server_state, self.app_state, self.loop)
        if any(len(name) + len(value) > MAX_LINE for name, value in scope["headers"] if is_of_handshake(name)):
            refusal = RefusedError(431, "field_too_large", "A header field of the handshake is too large")
        elif not websocket.take_over(self.transport, scope, rest):
            refusal = RefusedError(400, "malformed", "A header field of the WebSocket's handshake is malformed")
        else:
            self._forget()
            self.state = CLOSED
            return
        self._refuse(refusal, correlation_id_of(scope["headers"]), scope["method"], path_to_tell(scope["raw_path"]))

    # Writing

    def write(self, data: bytes) -> None:
        self.written += len(data)
        if self.held:
            self.flush()
        elif self.edge.outbox.holds(self, len(self.tasks)):
            self.held = data
            return
        self.transport.write(data)

    def write_all(self, pieces: list[bytes]) -> None:
        self.written += sum(map(len, pieces))
        if self.held:
            self.flush()
        self.transport.writelines(pieces)

    def flush(self) -> None:
        """Send what was held back."""
        data, self.held = self.held, b""
        if data and not self.transport.is_closing():
            self.transport.write(data)

    async def writable(self) -> None:
        """Wait until the client has read most of what was written, or has left."""
        while self.writing_paused:
            await wait(self.loop, self.writable_waiters)

    def _refuse(self, refusal: RefusedError, correlation_id: str = "", method: str = "", path: str = "") -> None:
        """Answer a request that the application won't hear of with an error, the connection's last answer."""
        correlation_id = correlation_id or urandom(16).hex()
        self.write_error(refusal.status, refusal.message, correlation_id, refusal.header)
        self._linger()
        peer = self.client[0] if self.client else ""
        self.edge.on_refusal(peer, refusal.status, refusal.reason, correlation_id, method, path)

    def _refuse_body(self, refusal: RefusedError, reason: str) -> None:
        """End a request that the application has, and tells of, with an error; cut an answer that has begun."""
        cycle, self.cycle = self.cycle, None
        assert cycle is not None  # it is while its body is read
        if cycle.response_started:
            cycle.disconnect(reason)
            self.close()
        else:
            cycle.disconnect(reason, refusal.status)
            self.write_error(refusal.status, refusal.message, cycle.name(), refusal.header)
            self._linger()

    def write_error(self, status: int, message: str, correlation_id: str, header: Header | None = None) -> None:
        fields = {"retry_after": int(header[1])} if header is not None and header[0] == b"retry-after" else {}
        body = error_body(status, message, correlation_id, **fields)
        more = b"" if header is None else b"%b: %b\r\n" % header
        self.write(
            b"%b\r\ncontent-type: application/json\r\ncontent-length: %d\r\nx-correlation-id: %b\r\n%b%b\r\n%b"
            % (STATUS_LINES[status], len(body), correlation_id.encode(), more, b"connection: close\r\n", body)
        )

    # Deadlines and the end

    def _wait_for_client(self, seconds: float) -> None:
        self.due = self.loop.time() + (min(seconds, GRACE) if self.edge.leaving and self.state == IDLE else seconds)

    def check(self, now: float) -> None:
        """Called by the sweep: whatever is overdue is ended."""
        if self.due <= now:
            self._overdue()
        if (self.peer_is_done or self.reading_paused) and self.state != CLOSED and self._is_reset():
            self.abort()  # what is not read does not tell that nobody is there any more
        unsent = self.transport.get_write_buffer_size() + len(self.held)
        left = self.written - unsent
        if not unsent or left != self.seen:
            self.seen, self.seen_at = left, now
        elif now - self.seen_at > self.edge.limits.client_timeout:
            if self.cycle is not None:
                self.cycle.disconnect("client_too_slow")
            self.abort()

    def _overdue(self) -> None:
        if self.state == IDLE and (self.edge.leaving or (self.requests and not self.buffer)):
            self.close()
        elif self.state == IDLE:
            refusal = RefusedError(408, "head_timeout", "The request's header took too long to come")
            self._refuse(refusal, *glimpse(self.buffer, whole=False))
        elif self.state == BODY and (cycle := self.cycle) is not None:
            if cycle.is_waiting and not cycle.response_started:
                refusal = RefusedError(408, "body_timeout", "The request's body stopped coming")
                self._refuse_body(refusal, "client_too_slow")
            else:
                self.due = ENDLESS
        elif self.state != CLOSED:
            self.close()

    def wait_for_body(self) -> None:
        self._wait_for_client(self.edge.limits.body_timeout)
        self.resume_reading()

    def stop_waiting(self) -> None:
        """More of the body has come, or nobody asks for it any more."""
        self.due = ENDLESS

    def close(self) -> None:
        """Close once what was written has been sent."""
        self.state = CLOSED
        self.due = ENDLESS
        self.flush()
        self.transport.close()

    def abort(self) -> None:
        """Close by a reset, which also frees what the kernel still holds for a client that does not read."""
        self.state = CLOSED
        self.due = ENDLESS
        connection: socket.socket | None = self.transport.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.transport.abort()

    def cut(self, reader_can_tell: bool) -> None:
        """End within an answer; by a reset where its reader could not tell otherwise."""
        if self.state != CLOSED:
            if reader_can_tell:
                self.close()
            else:
                self.flush()
                self.abort()

    def _linger(self) -> None:
        """Read and forget for a while: closing over unread bytes resets, and may take the answer from the client."""
        self.buffer = b""
        if self.peer_is_done:
            self.close()
            return
        self.state = LINGERING
        self._wait_for_client(self.edge.limits.discard_timeout)
        self.resume_reading()
        self.flush()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def shutdown(self) -> None:
        """What uvicorn's own server calls when it leaves."""
        self.edge.leave()

    def _lose(self) -> None:
        """The client is gone."""
        self.state = CLOSED
        self.due = ENDLESS
        self.buffer = b""
        cycle, self.cycle = self.cycle, None
        if cycle is not None:
            cycle.disconnect()
        self.resume_writing()

    def _forget(self) -> None:
        self.edge.connections.discard(self)
        self.server_state.connections.discard(self)

    def _probe(self) -> None:
        """Ask a client that has half-closed whether it is there; one that has closed answers with a reset.

        Only data is answered so, and an interim response is the only data that may go before the answer.
        """
        cycle = self.cycle
        if self.state == ANSWERING and cycle is not None and not cycle.response_started:
            if cycle.scope["http_version"] == "1.1":
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.loop.call_later(PROBE_AFTER / 4, self._look_again)

    def _look_again(self) -> None:
        if self.state == ANSWERING and self._is_reset():
            self.abort()

    def _is_reset(self) -> bool:
        return tcp_state(self.transport) == TCP_CLOSED

    def pause_reading(self) -> None:
        if not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused and not self.peer_is_done:
            self.reading_paused = False
            self.transport.resume_reading()


def _nothing(*_: object) -> None: ...
