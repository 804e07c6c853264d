"""Reading the heads of HTTP/1.1 answers strictly: what two readers could read differently is refused (RFC 9112)."""

from collections.abc import Callable

from gateway.policies.framing import CONTROLS, DIGITS, TOKEN, MalformedError
from gateway.proxy.headers import Header, answer_fields

MAX_HEAD_BYTES = 64 * 1024  # EDGE.md, 36
MAX_FIELDS = 100
CHUNKED = -1  # in place of a body's length
UNTIL_CLOSE = -2

REMEMBERED = 512  # heads and lines of at most so many bytes each
REMEMBERED_HEAD_BYTES = 1024
REMEMBERED_LINE_BYTES = 128
# Fields that most answers have, that say much the same in each, and that hold no secret.
OFTEN_THE_SAME = frozenset(
    b"accept-ranges access-control-allow-credentials access-control-allow-headers access-control-allow-methods "
    b"access-control-allow-origin access-control-expose-headers access-control-max-age age cache-control connection "
    b"content-encoding content-language content-length content-type date keep-alive pragma referrer-policy server "
    b"strict-transport-security transfer-encoding vary x-content-type-options x-frame-options x-xss-protection".split()
)
HTTP_1 = (b"HTTP/1.1", b"HTTP/1.0")

AnswerHead = tuple[int, list[Header], int, bool]
"""Of an answer: its status; the fields that cross, names in lower case; the length of its body, or ``CHUNKED``, or
``UNTIL_CLOSE``; whether the connection goes on after it."""


class _FieldLines(dict[bytes, Header]):
    """Field lines, read: those that come with every answer are read once, and then looked up.

    A service can't fill memory with them: all are forgotten when there are too many.
    """

    def __missing__(self, line: bytes) -> Header:
        raw_name, colon, value = line.partition(b":")
        if not colon or not raw_name or raw_name.translate(None, TOKEN):  # spaces too, before the name or the colon
            raise MalformedError("answer has a malformed header field")
        if len(line.translate(None, CONTROLS)) != len(line):
            raise MalformedError("answer has a control byte in a header field")
        field = (raw_name.lower(), value.strip())
        if field[0] in OFTEN_THE_SAME and len(line) <= REMEMBERED_LINE_BYTES:
            if len(self) >= REMEMBERED:
                self.clear()
            self[line] = field
        return field


class _Heads(dict[bytes, AnswerHead]):
    """Whole heads, read, in the same way: a busy service sends one again before its clock has moved on by a second."""

    def __missing__(self, head: bytes) -> AnswerHead:
        if len(head) > MAX_HEAD_BYTES:
            raise _too_large()
        lines = head.split(b"\r\n")
        if len(lines) > MAX_FIELDS + 1:
            raise MalformedError("answer has too many header fields")
        status, is_1_1 = _read_status_line(lines[0])
        del lines[0]
        headers = list(map(_read_field, lines))
        names = {name for name, _ in headers}
        length = (
            _length(headers, is_1_1) if b"content-length" in names or b"transfer-encoding" in names else UNTIL_CLOSE
        )
        goes_on = is_1_1
        if b"connection" in names:
            values = b",".join([value for name, value in headers if name == b"connection"])
            options = [option.strip() for option in values.lower().split(b",")]
            goes_on = b"close" not in options and (is_1_1 or b"keep-alive" in options)
        read = (status, answer_fields(headers), length, goes_on)
        if len(head) <= REMEMBERED_HEAD_BYTES and names <= OFTEN_THE_SAME:
            if len(self) >= REMEMBERED:
                self.clear()
            self[head] = read
        return read


def _read_status_line(line: bytes) -> tuple[int, bool]:
    """The status, and whether the version is 1.1."""
    version, status = line[:8], line[9:12]
    if (
        version not in HTTP_1
        or line[8:9] != b" "
        or len(status) != 3
        or status.translate(None, DIGITS)
        or status < b"100"
        or line[12:13] not in (b" ", b"")  # some send no reason at all
        or len(line.translate(None, CONTROLS)) != len(line)
    ):
        raise MalformedError("answer is not valid HTTP/1.1")
    return int(status), version == b"HTTP/1.1"


def _length(headers: list[Header], is_1_1: bool) -> int:
    """How the body ends; what two readers could take differently is refused (RFC 9112 6.3; EDGE.md, 53)."""
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if codings != [b"chunked"] or lengths:
            raise MalformedError("answer is framed in a way that is ambiguous or unknown")
        if not is_1_1:
            raise MalformedError("answer has chunks in HTTP/1.0")
        return CHUNKED
    length = lengths[0]
    if len(lengths) > 1 or not length.isdigit() or len(length) > 18:
        raise MalformedError("answer has more than one length, or none that is a number")
    return int(length)


# Methods of the dictionaries themselves, so that what is known costs no step of Python's.
_read_field = _FieldLines().__getitem__
read_head: Callable[[bytes], AnswerHead] = _Heads().__getitem__
"""Read a whole head, given without the empty line that ended it. The list of fields is not the caller's to change.

Raises:
    MalformedError: it is no answer, too large, or two readers could read it differently.
"""


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
