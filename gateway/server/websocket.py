"""WebSockets: uvicorn's implementation, given a connection that has already read the handshake."""

import asyncio

from starlette.types import Message, Scope
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

WINDOW = 64 * 1024  # bytes that are kept of a client that sends before it was let in
MAX_LINE = 8000  # bytes; the limit of the implementation's own parser is 8192
OF_HANDSHAKE = frozenset((b"connection", b"host", b"upgrade"))


class GatewayWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that begins with a scope, and whose frames wait until the application has accepted it.

    (On a malformed frame before that, uvicorn's would fail an assertion.)
    """

    early = b""

    def take_over(self, transport: asyncio.Transport, scope: Scope, data: bytes) -> None:
        """Go on with a connection whose handshake was found sound.

        Args:
            transport: the connection.
            scope: the handshake, as an HTTP scope.
            data: what came behind it.
        """
        self.connection_made(transport)
        # Its own parser has other caps: it is given the fields of the handshake, and the application all of them.
        lines = [b"%b: %b" % field for field in scope["headers"] if is_of_handshake(field[0])]
        super().data_received(b"\r\n".join((b"GET / HTTP/1.1", *lines, b"", b"")))
        for key in ("path", "raw_path", "query_string", "headers"):
            self.scope[key] = scope[key]  # read later, by the task just made
        self.scope["extensions"] = {**scope["extensions"], "websocket.http.response": {}}
        transport.set_protocol(self)
        if data:
            self.data_received(data)

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
        if self.early and self.handshake_complete:
            early, self.early = self.early, b""
            if not self.close_sent:
                super().data_received(early)


def is_of_handshake(name: bytes) -> bool:
    return name in OF_HANDSHAKE or name.startswith(b"sec-websocket")
