"""WebSockets: uvicorn's implementation, given a connection that has already read the handshake, and made strict.

Beyond uvicorn's: what a client may have in memory is bounded in every direction, one that does not read or that has
left is noticed though nothing can be read from it, and what a stranger does wrong is answered, not logged.
"""

import asyncio
import logging
import socket
import struct
from contextlib import suppress
from os import urandom
from typing import Any, cast

from starlette.types import Message, Scope
from uvicorn.config import Config
from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import STATUS_PHRASES, WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.protocol import State

from gateway.policies.edge import MAX_MESSAGE_BYTES, EdgeLimits
from gateway.problems import error_body
from gateway.server.http1 import correlation_id_of, path_to_tell

logger = logging.getLogger("gateway.server.websocket")
logger.setLevel(logging.WARNING)  # whatever the others': below, uvicorn tells query strings, and websockets messages
WINDOW = 64 * 1024  # bytes that are kept of a client that sends before it was let in, or faster than it is read
BITE = 8 * 1024  # bytes read of those at a time: 1,300 messages of nothing, which take a hundred times their size
MAX_PONGS = 1000  # that wait for a client which sends pings and reads nothing, before it is read no further
MAX_LINE = 8000  # bytes; the limit of the implementation's own parser is 8192
LOOK_AGAIN = 0.1  # seconds between looks at a client that is not read from, or that does not read
LAST_WORDS = 1.0  # seconds that a client whose answers to pings stay out has to read why it is let go
NO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER on, for no time: closing resets
TCP_CLOSED, TCP_CLOSE_WAIT = 7, 8  # the kernel's names for: the peer has reset the connection, or has closed its side
OF_HANDSHAKE = frozenset((b"connection", b"host", b"upgrade"))
INVALID_DATA = 1007
INTERNAL_ERROR = 1011


class GatewayWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that begins with a scope, and whose frames wait until the application has accepted it.

    (On a malformed frame before that, uvicorn's would fail an assertion.)

    The extension ``gateway.server`` of its scope holds ``left``, a future: done when the client is gone without a
    goodbye, at once, where ``receive`` tells it only after all that the client had sent. Such a loss is told with code
    1006. Compression is never agreed to: a message that is small may not become a large one.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        edge: Any = getattr(server_state, "edge", None)
        limits: EdgeLimits = EdgeLimits() if edge is None else edge.limits
        self.client_timeout = limits.client_timeout
        self.conn.max_message_size = MAX_MESSAGE_BYTES
        self.logger = self.conn.logger = logger
        self.conn.debug = False
        self.left: asyncio.Future[None] = self.loop.create_future()
        self.unread: bytes | bytearray = b""  # what came and waits, before the accept or behind an earlier message
        self.pongs = 0  # written since the client last read
        self.looking: asyncio.TimerHandle | None = None
        self.unsent = 0  # bytes, when last looked
        self.read_at = 0.0  # when the client was last seen to read
        self.asked = False  # whether it is still there

    def take_over(self, transport: asyncio.Transport, scope: Scope, data: bytes) -> bool:
        """Go on with a connection whose handshake was found sound.

        Args:
            transport: the connection.
            scope: the handshake, as an HTTP scope.
            data: what came behind it.

        Returns:
            False, and nothing has happened, if the handshake is not sound after all.
        """
        # Its own parser has other caps: it is given the fields of the handshake, and the application all of them.
        lines = [b"%b: %b" % field for field in scope["headers"] if is_of_handshake(field[0])]
        self.conn.receive_data(b"\r\n".join((b"GET / HTTP/1.1", *lines, b"", b"")))
        request = next(iter(self.conn.events_received()), None)
        # Accepted twice, here to see whether it will be: of one that is not, uvicorn's would make no scope.
        if not isinstance(request, Request) or self.conn.accept(request).status_code != 101:
            return False
        self.conn.available_extensions = None  # from here on: malformed offers were to be refused
        self.connection_made(transport)
        self.handle_connect(request)
        for key in ("path", "raw_path", "query_string", "headers"):
            self.scope[key] = scope[key]  # read later, by the task just made
        extensions: dict[str, dict[object, object]] = {"gateway.server": {"left": self.left}}
        self.scope["extensions"] = {**scope["extensions"], "websocket.http.response": {}, **extensions}
        transport.set_protocol(self)
        if data:
            self.data_received(data)
        return True

    # What the client sends

    def data_received(self, data: bytes) -> None:
        if self.unread or self.read_paused or not self.handshake_complete:
            self.unread += data
            if len(self.unread) > WINDOW:
                self._pause_reading()
        else:
            self.unread = data
            self._read()

    def _read(self) -> None:
        """Take in what came, up to a message for the application, which more may not overtake."""
        data, at = self.unread, 0
        self.unread = b""
        while at < len(data) and not self.read_paused:
            self.conn.receive_data(data[at : at + BITE])
            at += BITE
            self.handle_events()
            if self.conn.parser_exc is not None:
                self.handle_parser_exception()
                return
        if at < len(data):
            self.unread = bytearray(data[at:])

    def handle_cont(self, event: Frame) -> None:
        # Joined at once: a list of small fragments takes many times their size.
        if not isinstance(self.frames[0], bytearray):
            self.frames[0] = bytearray(self.frames[0])  # type: ignore[call-overload]
        self.frames[0] += event.data
        if event.fin:
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        (data,) = self.frames
        self.frames = []
        if self.close_sent:
            return
        message: Message = {"type": "websocket.receive"}
        if self.curr_msg_data_type == "bytes":
            message["bytes"] = bytes(data)
        else:
            try:
                message["text"] = data.decode()
            except UnicodeDecodeError as error:
                self.conn.fail(INVALID_DATA, f"{error.reason} at position {error.start}")
                self.conn.parser_exc = error
                self.close_sent = True  # what came along with it is not for the application
                return
        self.queue.put_nowait(cast("Any", message))
        self._pause_reading()

    def handle_parser_exception(self) -> None:
        """The client has broken the rules: it is told how, and the application hears the same code and reason."""
        super().handle_parser_exception()
        self.disconnected = True

    def handle_ping(self) -> None:
        super().handle_ping()
        if not self.writable.is_set():
            self.pongs += 1
            if self.pongs > MAX_PONGS:
                self._pause_reading()

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.queue.empty() and self.handshake_complete:
            self._resume_reading()
        return message

    def _pause_reading(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()
            self._look_later()

    def _resume_reading(self) -> None:
        """Go on with what waits; only when all of it is taken in does the client get to send more."""
        if self.read_paused:
            self.read_paused = False
            if self.unread:
                self._read()
            if not self.read_paused:
                self.transport.resume_reading()

    # What it is sent

    async def send(self, message: Message) -> None:  # type: ignore[override]
        if message["type"] == "websocket.http.response.body" and self.initial_response is not None:
            await self._deny(message)
            return
        await super().send(message)  # type: ignore[arg-type]
        if message["type"] == "websocket.accept" and self.handshake_complete:
            if not self.read_paused:
                self.read_paused = bool(self.unread)
            self._resume_reading()
        elif self.close_sent and self.conn.state is State.CONNECTING:
            self.unread = b""
        elif self.close_sent:
            self._read()  # the client's goodbye may be among it

    async def _deny(self, message: Message) -> None:
        """Gather the body of an answer to the handshake, and send it with its head as they are: nothing is added."""
        assert self.initial_response is not None
        status, headers, body = self.initial_response
        if self.disconnected:
            raise ClientDisconnected
        body += message.get("body", b"")
        self.initial_response = (status, headers, body)
        if not message.get("more_body", False) and not self.close_sent:
            self._answer(status, headers, body)
            self.queue.put_nowait({"type": "websocket.disconnect", "code": 1006})

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """Answer the handshake with no WebSocket."""
        fields = Headers([field for field in headers if field[0].lower() != "connection"])
        fields.setdefault("content-length", str(len(body)))
        fields["connection"] = "close"
        self.conn.send_response(Response(status, STATUS_PHRASES[status], fields, body))
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.handshake_complete = self.close_sent = True
        self.unread = b""
        self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer the handshake in the application's place, if it is not answered."""
        if self.handshake_complete or self.initial_response is not None or self.transport.is_closing():
            return
        correlation_id = correlation_id_of(self.scope["headers"]) or urandom(16).hex()
        headers = [("content-type", "application/json"), ("x-correlation-id", correlation_id)]
        retry = {"retry_after": 1} if status == 503 else {}
        headers += [("retry-after", "1")] if retry else []
        self._answer(status, headers, error_body(status, message, correlation_id, **retry))

    async def run_asgi(self) -> None:
        """Let the application have the WebSocket; what it fails to answer is answered for it."""
        try:
            await self.app(self.scope, cast("Any", self.receive), cast("Any", self.send))
            if not self.handshake_complete and not self.disconnected:
                logger.error("The application returned without answering the handshake at %s", self._path)
                self._refuse(500, "An unexpected error occurred")
        except ClientDisconnected:
            pass
        except asyncio.CancelledError:  # the server leaves
            self._refuse(503, "The gateway is shutting down")
            raise
        except Exception:
            logger.exception("The application failed at %s", self._path)
            self._refuse(500, "An unexpected error occurred")
            if self.conn.state is State.OPEN and not self.close_sent:
                self.conn.fail(INTERNAL_ERROR)
                self.transport.write(b"".join(self.conn.data_to_send()))
        finally:
            if self.close_timer is None:
                self.transport.close()
            self._look_later()

    @property
    def _path(self) -> str:
        return path_to_tell(self.scope["raw_path"])

    def shutdown(self) -> None:
        """Close it, for the server leaves: with 1012, or with a refusal where it was not accepted yet."""
        self._refuse(503, "The gateway is shutting down")
        if self.conn.state is State.CLOSING:
            self.stop_keepalive()
            self.transport.close()
        else:
            super().shutdown()

    # Clients that leave, and clients that are slow

    def eof_received(self) -> None:
        """The client has closed its side: without a goodbye before that, it has left."""
        if self.conn.close_rcvd is None and not self.close_sent:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.looking is not None:
            self.looking.cancel()
        self.unread = b""
        if self.conn.close_rcvd is None:
            self.handshake_complete = False  # for uvicorn to say 1006: 1005 would be a goodbye
            if not self.left.done():
                self.left.set_result(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.read_at = self.loop.time()
        self.pongs = 0
        if self.queue.empty():
            self._resume_reading()

    def keepalive_timeout(self) -> None:
        if self.read_paused:  # its pong may be behind what the application has not asked for yet
            self.pong_timer = self.loop.call_later(self.client_timeout, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.disconnected = True
        self.loop.call_later(LAST_WORDS, self.transport.abort)

    def _look_later(self) -> None:
        if self.looking is None and self in self.connections:
            self.unsent = self.transport.get_write_buffer_size()
            self.read_at = self.loop.time()
            self.looking = self.loop.call_later(LOOK_AGAIN, self._look)

    def _look(self) -> None:
        """See whether a client that is not read from is there, and whether one that is written to reads."""
        self.looking = None
        unsent, now = self.transport.get_write_buffer_size(), self.loop.time()
        if unsent < self.unsent or not unsent:
            self.read_at = now
        self.unsent = unsent
        if self.read_paused and self._is_gone():
            self.transport.abort()
        elif now - self.read_at > self.client_timeout:
            connection: socket.socket | None = self.transport.get_extra_info("socket")
            if connection is not None:
                with suppress(OSError):  # so that the kernel, too, lets go of what it holds for the client
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            self.transport.abort()
        elif unsent or self.read_paused:
            self.looking = self.loop.call_later(LOOK_AGAIN, self._look)

    def _is_gone(self) -> bool:
        """Whether the client has left, as far as the kernel knows; one that has closed its side is asked first."""
        state = tcp_state(self.transport)
        if state != TCP_CLOSE_WAIT or self.close_sent:
            return state == TCP_CLOSED
        if not self.handshake_complete:
            return True
        if not self.asked and self.conn.state is State.OPEN:
            self.asked = True  # a kernel with nobody to read it answers by a reset; to the others it means nothing
            self.conn.send_pong(b"")
            self.transport.write(b"".join(self.conn.data_to_send()))
        return False


def tcp_state(transport: asyncio.Transport) -> int | None:
    """What the kernel says of a connection; None where it does not."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None and hasattr(socket, "TCP_INFO"):
        with suppress(OSError):
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return None


def is_of_handshake(name: bytes) -> bool:
    return name in OF_HANDSHAKE or name.startswith(b"sec-websocket")
