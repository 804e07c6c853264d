"""Reading the heads of HTTP/1.1 answers strictly: what two readers could read differently is refused (RFC 9112)."""

from gateway.policies.framing import CONTROLS, DIGITS, TOKEN, MalformedError

Header = tuple[bytes, bytes]

MAX_HEAD_BYTES = 64 * 1024  # EDGE.md, 36
MAX_FIELDS = 100
CHUNKED = -1  # in place of a body's length
UNTIL_CLOSE = -2

REMEMBERED = 512  # lines, of at most so many bytes each
REMEMBERED_BYTES = 128
# Fields that most answers have, that say much the same in each, and that hold no secret.
OFTEN_THE_SAME = frozenset(
    b"accept-ranges access-control-allow-credentials access-control-allow-headers access-control-allow-methods "
    b"access-control-allow-origin access-control-expose-headers access-control-max-age age cache-control connection "
    b"content-encoding content-language content-length content-type date keep-alive pragma referrer-policy server "
    b"strict-transport-security transfer-encoding vary x-content-type-options x-frame-options x-xss-protection".split()
)
HTTP_1 = (b"HTTP/1.1", b"HTTP/1.0")


class _FieldLines(dict[bytes, Header]):
    """Field lines, read: those that come with every answer are read once, and then looked up.

    A service can't fill memory with it: it forgets all when it is full.
    """

    def __missing__(self, line: bytes) -> Header:
        raw_name, colon, value = line.partition(b":")
        if not colon or not raw_name or raw_name.translate(None, TOKEN):  # spaces too, before the name or the colon
            raise MalformedError("answer has a malformed header field")
        if len(line.translate(None, CONTROLS)) != len(line):
            raise MalformedError("answer has a control byte in a header field")
        field = (raw_name.lower(), value.strip())
        if field[0] in OFTEN_THE_SAME and len(line) <= REMEMBERED_BYTES:
            if len(self) >= REMEMBERED:
                self.clear()
            self[line] = field
        return field


class _StatusLines(dict[bytes, tuple[int, bool]]):
    """Status lines, read: the status, and whether the version is 1.1."""

    def __missing__(self, line: bytes) -> tuple[int, bool]:
        version, status = line[:8], line[9:12]
        if (
            version not in HTTP_1
            or line[8:9] != b" "
            or len(status) != 3
            or status.translate(None, DIGITS)
            or line[12:13] not in (b" ", b"")  # no reason at all is read by everyone
            or len(line.translate(None, CONTROLS)) != len(line)
            or status < b"100"
        ):
            raise MalformedError("answer is not valid HTTP/1.1")
        read = (int(status), version == b"HTTP/1.1")
        if len(line) <= REMEMBERED_BYTES:
            if len(self) >= REMEMBERED:
                self.clear()
            self[line] = read
        return read


class _Lengths(dict[bytes, int]):
    """Values of ``Content-Length``, read."""

    def __missing__(self, value: bytes) -> int:
        if not value.isdigit() or len(value) > 18:
            raise MalformedError("answer has more than one length, or none that is a number")
        if len(self) >= REMEMBERED:
            self.clear()
        self[value] = length = int(value)
        return length


# Methods of the dictionaries themselves, so that reading a line that is known takes no step of Python's.
_read_field = _FieldLines().__getitem__
_read_status_line = _StatusLines().__getitem__
_read_length = _Lengths().__getitem__


AnswerHead = tuple[int, list[Header], dict[bytes, bytes], int, bool]
"""Of an answer: status; fields as they came, names in lower case; the last of each name; the length of its body or
``CHUNKED`` or ``UNTIL_CLOSE``; whether the connection goes on after it."""


def read_head(head: bytes) -> AnswerHead:
    """Read a whole head, given without the empty line that ended it.

    Raises:
        MalformedError: it is no answer, too large, or two readers could read it differently.
    """
    if len(head) > MAX_HEAD_BYTES:
        raise _too_large()
    lines = head.split(b"\r\n")
    if len(lines) > MAX_FIELDS + 1:
        raise MalformedError("answer has too many header fields")
    status, goes_on = _read_status_line(lines[0])
    del lines[0]
    headers = list(map(_read_field, lines))
    fields = dict(headers)
    repeated = len(fields) < len(headers)
    length = UNTIL_CLOSE
    if b"transfer-encoding" in fields:
        codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
        if codings != [b"chunked"] or b"content-length" in fields:
            raise MalformedError("answer is framed in a way that is ambiguous or unknown")
        if not goes_on:
            raise MalformedError("answer has chunks in HTTP/1.0")
        length = CHUNKED
    elif b"content-length" in fields:
        if repeated and sum(name == b"content-length" for name, _ in headers) > 1:
            raise MalformedError("answer has more than one length, or none that is a number")
        length = _read_length(fields[b"content-length"])
    if b"connection" in fields:
        values = [value for name, value in headers if name == b"connection"] if repeated else [fields[b"connection"]]
        options = [option.strip() for option in b",".join(values).lower().split(b",")]
        goes_on = b"close" not in options and (goes_on or b"keep-alive" in options)
    return status, headers, fields, length, goes_on


def refuse_early(head: bytes) -> None:
    """Look at a head that is not whole yet, so that what can't become one needs no deadline to be refused.

    Raises:
        MalformedError: whatever came after, it would not be an answer.
    """
    if not head.startswith(tuple(version[: len(head)] for version in HTTP_1)):
        raise MalformedError("answer is not valid HTTP/1.1")
    if len(head) > MAX_HEAD_BYTES:
        raise _too_large()
    complete = head[:-1] if head.endswith(b"\r") else head
    ends = complete.count(b"\r\n")
    if ends > MAX_FIELDS + 1:
        raise MalformedError("answer has too many header fields")
    if len(complete) - len(complete.translate(None, CONTROLS)) != 2 * ends:
        raise MalformedError("answer has a control byte in a header field")


def _too_large() -> MalformedError:
    return MalformedError("answer has too large a head")
