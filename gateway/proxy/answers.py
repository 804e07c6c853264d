"""Reading the heads of HTTP/1.1 answers strictly: what two readers could read differently is refused (RFC 9112)."""

from collections.abc import Callable
from typing import TypeVar

from gateway.policies.framing import CONTROLS, DIGITS, TOKEN, MalformedError
from gateway.proxy.headers import Header, answer_fields, joined

MAX_HEAD_BYTES = 64 * 1024  # EDGE.md, 36
MAX_FIELDS = 100
CHUNKED = -1  # in place of a body's length
UNTIL_CLOSE = -2

REMEMBERED = 512  # of each kind, of at most so many bytes each
REMEMBERED_HEAD_BYTES = 1024
REMEMBERED_LINE_BYTES = 128
# Fields that most answers have, that say much the same in each, and that hold no secret.
OFTEN_THE_SAME = frozenset(
    b"accept-ranges access-control-allow-credentials access-control-allow-headers access-control-allow-methods "
    b"access-control-allow-origin access-control-expose-headers access-control-max-age age cache-control connection "
    b"content-encoding content-language content-length content-type date keep-alive pragma referrer-policy server "
    b"strict-transport-security transfer-encoding vary x-content-type-options x-frame-options x-xss-protection".split()
)
LENGTH = b"\r\nContent-Length: "  # as nearly all spell it; other spellings are read as well, if not as quickly
HTTP_1 = (b"HTTP/1.1", b"HTTP/1.0")

AnswerHead = tuple[int, list[Header], int, bool]
"""Of an answer: its status; the fields that cross, names in lower case; the length of its body, or ``CHUNKED``, or
``UNTIL_CLOSE``; whether the connection goes on after it."""

T = TypeVar("T")


class _Memory(dict[bytes, T]):
    """What ``read`` makes of bytes, which is done once where it says that they may be remembered.

    A service can't fill memory with them: long ones are not kept, and all are forgotten when there are too many.
    """

    def __init__(self, read: Callable[[bytes], tuple[T, bool]], longest: int) -> None:
        super().__init__()
        self.read = read
        self.longest = longest

    def __missing__(self, data: bytes) -> T:
        made, may_be_kept = self.read(data)
        if may_be_kept and len(data) <= self.longest:
            if len(self) >= REMEMBERED:
                self.clear()
            self[data] = made
        return made


def _status_line(line: bytes) -> tuple[tuple[int, bool], bool]:
    version, status = line[:8], line[9:12]
    if (
        version not in HTTP_1
        or line[8:9] != b" "
        or len(status) != 3
        or status.translate(None, DIGITS)
        or status < b"100"
        or line[12:13] not in (b" ", b"")  # some send no reason at all
        or line.translate(None, CONTROLS) != line
    ):
        raise MalformedError("answer is not valid HTTP/1.1")
    return (int(status), version == b"HTTP/1.1"), True


def _name(raw: bytes) -> tuple[bytes, bool]:
    if not raw or raw.translate(None, TOKEN):  # spaces too, before the name or the colon
        raise MalformedError("answer has a malformed header field")
    return raw.lower(), True


def _field_line(line: bytes) -> tuple[Header, bool]:
    raw_name, colon, value = line.partition(b":")
    if not colon:
        raise MalformedError("answer has a malformed header field")
    if line.translate(None, CONTROLS) != line:
        raise MalformedError("answer has a control byte in a header field")
    name = read_name(raw_name)
    return (name, value.strip()), name in OFTEN_THE_SAME


def _connection(value: bytes) -> tuple[frozenset[bytes], bool]:
    return frozenset(option.strip() for option in value.lower().split(b",")), True


def _whole_head(head: bytes) -> tuple[AnswerHead, bool]:
    if len(head) > MAX_HEAD_BYTES:
        raise _too_large()
    lines = head.split(b"\r\n")
    if len(lines) > MAX_FIELDS + 1:
        raise _too_many_fields()
    status, is_1_1 = read_status_line(lines[0])
    del lines[0]
    headers = list(map(read_field_line, lines))
    by_name = dict(headers)
    if len(by_name) < len(headers):
        by_name = joined(headers)

    # How the body ends (RFC 9112 6.3; EDGE.md, 53). Two lengths are joined by now, and so no number.
    length = UNTIL_CLOSE
    if b"transfer-encoding" in by_name:
        if by_name[b"transfer-encoding"].lower() != b"chunked" or b"content-length" in by_name:
            raise MalformedError("answer is framed in a way that is ambiguous or unknown")
        if not is_1_1:
            raise MalformedError("answer has chunks in HTTP/1.0")
        length = CHUNKED
    elif b"content-length" in by_name:
        digits = by_name[b"content-length"]
        if not digits.isdigit() or len(digits) > 18:
            raise MalformedError("answer has more than one length, or none that is a number")
        length = int(digits)

    goes_on = is_1_1
    if b"connection" in by_name:
        options = read_connection(by_name[b"connection"])
        goes_on = b"close" not in options and (is_1_1 or b"keep-alive" in options)
    return (status, answer_fields(headers, by_name), length, goes_on), OFTEN_THE_SAME.issuperset(by_name)


def _head(head: bytes) -> tuple[AnswerHead, bool]:
    start = head.find(LENGTH) + len(LENGTH)
    if start < len(LENGTH):
        return _whole_head(head)
    end = head.find(b"\r\n", start)
    if end < 0:
        end = len(head)
    digits = head[start:end]
    if not 0 < len(digits) <= 18 or not digits.isdigit():
        return _whole_head(head)  # it is not a number, or is in need of stripping
    (status, fields, _, goes_on), place, may_be_kept = _read_apart(head[:start] + head[end:])
    fields = fields.copy()
    fields[place] = (b"content-length", digits)
    return (status, fields, int(digits), goes_on), may_be_kept


def _head_apart(head: bytes) -> tuple[tuple[AnswerHead, int, bool], bool]:
    """Of a head that lacks the number in its ``Content-Length``: the same with 0, and the place of that field."""
    end = head.find(LENGTH) + len(LENGTH)
    read, may_be_kept = _whole_head(head[:end] + b"0" + head[end:])
    return (read, read[1].index((b"content-length", b"0")), may_be_kept), may_be_kept


# Methods of the dictionaries themselves, so that what is known costs no step of Python's.
read_status_line = _Memory(_status_line, REMEMBERED_LINE_BYTES).__getitem__
read_name = _Memory(_name, REMEMBERED_LINE_BYTES).__getitem__
read_field_line = _Memory(_field_line, REMEMBERED_LINE_BYTES).__getitem__
read_connection = _Memory(_connection, REMEMBERED_LINE_BYTES).__getitem__
_read_apart = _Memory(_head_apart, REMEMBERED_HEAD_BYTES).__getitem__
read_head = _Memory(_head, REMEMBERED_HEAD_BYTES).__getitem__
"""Read a whole head, given without the empty line that ended it. The list of fields is not the caller's to change.

A busy service sends the same one again, at least but for the length, until its clock has moved on by a second.

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
    if len(head) > MAX_HEAD_BYTES + 3:  # the last may be all but one of the bytes that end it
        raise _too_large()
    *lines, _ = head.split(b"\r\n")
    if len(lines) > MAX_FIELDS + 1:
        raise _too_many_fields()
    complete = head[:-1] if head.endswith(b"\r") else head
    if len(complete) - len(complete.translate(None, CONTROLS)) != 2 * len(lines):
        raise MalformedError("answer has a control byte in its head")
    if lines:
        read_status_line(lines[0])
        for line in lines[1:]:
            read_field_line(line)


def _too_large() -> MalformedError:
    return MalformedError("answer has too large a head")


def _too_many_fields() -> MalformedError:
    return MalformedError("answer has too many header fields")
