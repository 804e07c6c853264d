"""WebSockets: uvicorn's implementation, given a connection that has already read the handshake."""

import asyncio
import logging

from starlette.types import Message, Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

logger = logging.getLogger("gateway.server.websocket")
logger.setLevel(logging.WARNING)  # whatever the others': below, uvicorn tells query strings, and websockets messages
WINDOW = 64 * 1024  # bytes that are kept of a client that sends before it was let in
MAX_LINE = 8000  # bytes; the limit of the implementation's own parser is 8192
OF_HANDSHAKE = frozenset((b"connection", b"host", b"upgrade"))


class GatewayWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that begins with a scope, and whose frames wait until the application has accepted it.

    (On a malformed frame before that, uvicorn's would fail an assertion.)
    """

    early = b""

    def take_over(self, transport: asyncio.Transport, scope: Scope, data: bytes) -> bool:
        """Go on with a connection whose handshake was found sound.

        Args:
            transport: the connection.
            scope: the handshake, as an HTTP scope.
            data: what came behind it.

        Returns:
            False, and nothing has happened, if the handshake is not sound after all.
        """
        self.logger = self.conn.logger = logger
        self.conn.debug = False
        # Its own parser has other caps: it is given the fields of the handshake, and the application all of them.
        lines = [b"%b: %b" % field for field in scope["headers"] if is_of_handshake(field[0])]
        self.conn.receive_data(b"\r\n".join((b"GET / HTTP/1.1", *lines, b"", b"")))
        request = next(iter(self.conn.events_received()), None)
        # Accepted twice, here to see whether it will be: of one that is not, uvicorn's would make no scope.
        if not isinstance(request, Request) or self.conn.accept(request).status_code != 101:
            return False
        self.connection_made(transport)
        self.handle_connect(request)
        for key in ("path", "raw_path", "query_string", "headers"):
            self.scope[key] = scope[key]  # read later, by the task just made
        self.scope["extensions"] = {**scope["extensions"], "websocket.http.response": {}}
        transport.set_protocol(self)
        if data:
            self.data_received(data)
        return True

    def data_received(self, data: bytes) -> None:
        if self.handshake_complete:
            super().data_received(data)
            return
        self.early += data
        if len(self.early) > WINDOW and not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    async def send(self, message: Message) -> None:  # type: ignore[override]
        await super().send(message)  # type: ignore[arg-type]
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # by a denial: uvicorn would log an error for each
        if self.early and self.handshake_complete:
            early, self.early = self.early, b""
            if not self.close_sent:
                super().data_received(early)


def is_of_handshake(name: bytes) -> bool:
    return name in OF_HANDSHAKE or name.startswith(b"sec-websocket")
