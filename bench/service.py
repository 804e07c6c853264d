"""The stand-in AI service of a benchmark: as little as can answer, so that what is measured is what stands before it.

    python -m bench.service PORT

To a path that ends in ``/stream?frames=64&every=0.02`` it answers with so many server-sent events at that interval in
seconds, in ``/idle`` with one event and then silence, in anything else with 911 bytes of JSON. An event reads ``data:
NUMBER SENT FILLING``, SENT being nanoseconds of the monotonic clock, which all processes of a machine share.
"""

import asyncio
import sys
import time
from typing import Any, cast
from urllib.parse import parse_qsl

import httptools
import uvloop

BODY = b'{"items":[%s]}' % b",".join(b'{"id":%d,"score":0.%d}' % (number, number) for number in range(40))
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
FILLING = b"x" * 40  # a token and what usually stands around it
BACKLOG = 4096


def event(number: int) -> bytes:
    """An event in a chunk of its own."""
    text = b"data: %d %d %b\n\n" % (number, time.monotonic_ns(), FILLING)
    return b"%x\r\n%b\r\n" % (len(text), text)


class Conversation(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_message_complete(self) -> None:
        path, _, query = self.url.partition(b"?")
        self.url = b""
        if path.endswith(b"/stream"):
            options = dict(parse_qsl(query.decode()))
            self.transport.write(STREAM)
            self.stream(0, int(options["frames"]), float(options["every"]), asyncio.get_running_loop().time())
        elif path.endswith(b"/idle"):
            self.transport.write(STREAM + event(0))
        else:
            self.transport.write(ANSWER)

    def stream(self, number: int, frames: int, every: float, due: float) -> None:
        """Write one event and see to the next; what is late does not delay those after it."""
        if self.transport.is_closing():
            return
        if number == frames:
            self.transport.write(b"0\r\n\r\n")
            return
        self.transport.write(event(number))
        due += every
        asyncio.get_running_loop().call_at(due, self.stream, number + 1, frames, every, due)


async def main(port: int) -> None:
    options: dict[str, Any] = {"backlog": BACKLOG}
    server = await asyncio.get_running_loop().create_server(Conversation, "127.0.0.1", port, **options)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
