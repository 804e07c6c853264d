"""WebSockets byte by byte: frames as no library would send them, a client and a service that send them."""

import asyncio
import struct
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha1
from typing import NamedTuple

from tests.wire import Handler, Reader, Request, Writer

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
MASK = b"\1\2\3\4"


def handshake(target: str = "/api/ws", *lines: str) -> bytes:
    extra = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    return (
        b"GET %b HTTP/1.1\r\nHost: gateway.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n%b\r\n" % (target.encode(), KEY, extra)
    )


def accepted(request: Request, *lines: str) -> bytes:
    """The answer that lets a handshake in."""
    (key,) = request.values(b"sec-websocket-key")
    digest = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())
    extra = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n%b\r\n" % (digest, extra)
    )


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """One frame, as a client sends it; ``masked=False`` as a service does."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = masked << 7
    size = len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += struct.pack("!BH", bit | 126, size)
    else:
        head += struct.pack("!BQ", bit | 127, size)
    if not masked:
        return head + payload
    key = int.from_bytes((MASK * (size // 4 + 1))[:size])
    return head + MASK + (int.from_bytes(payload) ^ key).to_bytes(size)


def goodbye(code: int, reason: bytes = b"", *, masked: bool = True) -> bytes:
    return frame(CLOSE, code.to_bytes(2) + reason, masked=masked)


class Frame(NamedTuple):
    opcode: int
    payload: bytes
    fin: bool = True

    @property
    def code(self) -> int:
        """Of a close frame; 1005 where it has none."""
        assert self.opcode == CLOSE, self
        return int.from_bytes(self.payload[:2]) if self.payload else 1005

    @property
    def reason(self) -> str:
        return self.payload[2:].decode()


class Raw:
    """One end of a WebSocket, after the handshake; masks as a client or does not as a service."""

    def __init__(self, reader: Reader, writer: Writer, *, masks: bool) -> None:
        self.reader, self.writer, self.masks = reader, writer, masks

    def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> None:
        self.writer.write(frame(opcode, payload, fin=fin, rsv=rsv, masked=self.masks))

    def close(self, code: int, reason: bytes = b"") -> None:
        self.writer.write(goodbye(code, reason, masked=self.masks))

    async def read(self, timeout: float = 5.0) -> Frame:
        """The next frame; on a goodbye a service hangs up. An ``IncompleteReadError`` at the connection's end."""
        async with asyncio.timeout(timeout):
            first, second = await self.reader.readexactly(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8))
            assert bool(second & 128) is not self.masks, "a client masks, a service does not"
            mask = await self.reader.readexactly(4) if second & 128 else b""
            payload = await self.reader.readexactly(size)
        assert not first & 0x70, "no extension was agreed to"
        if mask:
            key = int.from_bytes((mask * (size // 4 + 1))[:size])
            payload = (int.from_bytes(payload) ^ key).to_bytes(size)
        if first & 15 == CLOSE and not self.masks:
            self.writer.close()
        return Frame(first & 15, payload, bool(first & 128))

    async def ended(self, timeout: float = 5.0) -> bool:
        """Whether the other end closes, and sends nothing before that."""
        async with asyncio.timeout(timeout):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def client(port: int, target: str = "/api/ws", *lines: str) -> AsyncIterator[Raw]:
    """A client whose handshake was accepted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 17)
    try:
        writer.write(handshake(target, *lines))
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        yield Raw(reader, writer, masks=True)
    finally:
        writer.transport.abort()


def speaks(behaviour: Callable[[Raw], Awaitable[None]], *lines: str) -> Handler:
    """A handler for ``tests.wire.Service`` that accepts each handshake, and then behaves so."""

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(accepted(request, *lines))
        await behaviour(Raw(reader, writer, masks=False))
        writer.close()

    return handle
