"""The floor: what any proxy in Python pays for uvicorn in front and one httptools connection behind, and no more.

Not a proxy to use: there are no limits, timeouts or errors, no body is streamed, and hop-by-hop headers cross. uvicorn
serves it; ``SERVICE_PORT`` in the environment says where requests go.
"""

import asyncio
import os
from typing import cast

import httptools
from starlette.types import Receive, Scope, Send

PORT = int(os.environ.get("SERVICE_PORT", "0"))
idle: list["Connection"] = []


class Connection(asyncio.Protocol):
    """A connection to the service, for one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def exchange(self, request: bytes) -> "asyncio.Future[int]":
        """Send a request; gives the status of its answer when ``headers`` and ``body`` are whole."""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.parser = httptools.HttpResponseParser(self)
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.answer.set_result(self.parser.get_status_code())


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if idle:
        connection = idle.pop()
    else:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", PORT)
    fields = b"".join([b"%b: %b\r\n" % field for field in scope["headers"]])
    request = b"%b %b HTTP/1.1\r\n%b\r\n%b" % (scope["method"].encode(), scope["raw_path"], fields, body)
    status = await connection.exchange(request)
    await send({"type": "http.response.start", "status": status, "headers": connection.headers})
    await send({"type": "http.response.body", "body": connection.body})
    idle.append(connection)
