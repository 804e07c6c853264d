"""What both sides of the gateway hold of HTTP/1.1 framing, a client's and a service's (RFC 9112; EDGE.md)."""

MAX_CHUNK_OVERHEAD = 4096  # bytes of chunk extensions and trailers in one body ...
ALLOWED_PER_CHUNK = 16  # ... beyond so many for each chunk

DIGITS = b"0123456789"
HEX_DIGITS = b"0123456789abcdefABCDEF"
ALPHANUMERIC = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
TOKEN = ALPHANUMERIC + b"!#$%&'*+-.^_`|~"  # RFC 9110, 5.6.2
# In a field one could end the line or the string for another reader (RFC 9110 5.5); a tab is allowed.
CONTROLS = bytes([*range(9), *range(10, 32), 127])


class MalformedError(ValueError):
    """A message that two readers could read differently; the words go on from "The request's" or "The service's"."""


class ChunkedBody:
    """A chunked body, decoded as it comes; extensions and trailers are read over and forgotten.

    Trailers never become headers: an ``Authorization`` among them would be one that nobody has checked.
    """

    __slots__ = ("_overhead", "_partial", "_reading", "_remaining")

    def __init__(self) -> None:
        self._reading = _SIZE
        self._partial = b""  # what came of a line that is not whole yet
        self._remaining = 0  # bytes of the current chunk
        self._overhead = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Take bytes off the connection.

        Returns:
            The bytes of the body among them, and what follows the body: None until it has ended.

        Raises:
            MalformedError: the framing is unsound, or too much of it.
        """
        pieces: list[bytes] = []
        data = self._partial + data
        at = 0
        while True:
            if self._reading == _CHUNK:
                piece = data[at : at + self._remaining]
                pieces.append(piece)
                at += len(piece)
                self._remaining -= len(piece)
                if self._remaining:
                    break
                self._reading = _CHUNK_END
            end = data.find(b"\r\n", at)
            if end < 0:
                self._look_at_partial(data[at:])
                break
            line = data[at:end]
            at = end + 2
            if self._reading == _TRAILERS and not line:
                return b"".join(pieces), data[at:]
            self._read_line(line)
        self._partial = data[at:]
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), None

    def _read_line(self, line: bytes) -> None:
        if self._reading == _CHUNK_END:
            if line:
                raise MalformedError("body has a chunk that does not end where it should")
            self._reading = _SIZE
            return
        self._overhead = self._overhead_with(line)
        if len(line.translate(None, CONTROLS)) != len(line):
            raise MalformedError("body has a control character in its framing")
        if self._reading == _SIZE:
            size = _size(line)
            if not size:
                raise MalformedError("body has a chunk without a size")
            self._remaining = int(size, 16)
            self._reading = _CHUNK if self._remaining else _TRAILERS
        else:
            name, colon, _ = line.partition(b":")
            if not colon or not name or name.translate(None, TOKEN):
                raise MalformedError("body has a malformed trailer")
        if self._overhead > MAX_CHUNK_OVERHEAD:
            raise MalformedError("body has too much framing")

    def _overhead_with(self, line: bytes) -> int:
        size = len(line) + 2
        return self._overhead + (max(0, size - ALLOWED_PER_CHUNK) if self._reading == _SIZE else size)

    def _look_at_partial(self, line: bytes) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if not line:
            return
        if self._reading == _CHUNK_END or len(line.translate(None, CONTROLS)) != len(line):
            raise MalformedError("body has malformed framing")
        if self._overhead_with(line) > MAX_CHUNK_OVERHEAD:
            raise MalformedError("body has too much framing")
        if self._reading == _SIZE:
            _size(line)


def _size(line: bytes) -> bytes:
    """The size of a chunk, in hexadecimal digits, by the line before it or the beginning of that line."""
    size = line.partition(b";")[0]
    if len(size) > 15 or size.translate(None, HEX_DIGITS):
        raise MalformedError("body has a chunk with a malformed size")
    return size


_SIZE, _CHUNK, _CHUNK_END, _TRAILERS = range(4)
