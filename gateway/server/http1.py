"""Reading HTTP/1.1 requests strictly: what two parsers could read differently is refused (RFC 9112; EDGE.md).

Bytes in, facts out: nothing here waits, writes or knows a connection.
"""

import binascii
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from gateway.policies import framing
from gateway.policies.edge import EdgeLimits
from gateway.policies.framing import ALPHANUMERIC, CONTROLS, DIGITS, HEX_DIGITS

Header = tuple[bytes, bytes]

LONGEST_PATH = 512  # characters told of a refused one; they may take six times as much in a line of at most 4,096

# What the reference parser, llhttp, knows; any other method is malformed to it, and so to us.
_METHODS = """
    DELETE GET HEAD POST PUT CONNECT OPTIONS TRACE COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH UNLOCK BIND REBIND
    UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE UNSUBSCRIBE PATCH PURGE MKCALENDAR LINK UNLINK
    SOURCE QUERY
"""
METHODS = {name.encode(): name for name in _METHODS.split()}
VERSIONS = {b"HTTP/1.1": "1.1", b"HTTP/1.0": "1.0"}

TOKEN = framing.TOKEN
IN_HOST = ALPHANUMERIC + b"-._~%!$&'()*+;=:[]"  # RFC 3986, 3.2.2, without the comma, which would join two fields
IN_ID = ALPHANUMERIC + b"._-"
NOT_IN_TARGET = bytes([*range(33), 127]) + b"#"  # bytes above 127 pass: they are some clients' UTF-8

# Fields that decide how a message is read or whom it is from: some services take `_` for `-`, so that
# `Content_Length` or `X_User_ID` would slip past whoever vouches for the real one.
SHADOWED = frozenset(
    b"authorization connection content-encoding content-length content-type cookie expect forwarded host "
    b"idempotency-key keep-alive proxy-authorization te traceparent tracestate trailer transfer-encoding upgrade via "
    b"x-api-key x-correlation-id x-forwarded-for x-forwarded-host x-forwarded-port x-forwarded-proto x-real-ip "
    b"x-request-timeout-ms x-user-id".split()
)
UNDERSTOOD = frozenset(
    b"connection content-length expect host sec-websocket-key sec-websocket-version transfer-encoding upgrade".split()
)

QUESTION_MARK = 0x3F  # looked for as a number: `b"?" in line` raises and swallows an exception within CPython
WEIGHTY_OPTIONS = frozenset((b"close", b"upgrade"))  # of a Connection field
REPEATED = frozenset(
    b"accept accept-charset accept-encoding accept-language cache-control connection content-encoding content-length "
    b"content-type expect host origin pragma te upgrade user-agent x-forwarded-host x-forwarded-port "
    b"x-forwarded-proto".split()
)

Field = tuple[Header, int | None]
"""A header field and what it means for the framing: a Content-Length's value, one of those below, or nothing."""
IS_HOST, IS_OTHER, IS_LOOK_ALIKE = -1, -2, -3
VISIBLE = bytes(QUESTION_MARK if byte in CONTROLS else byte for byte in range(256))  # changes nothing but controls

# Clients say much the same in each request: what was read once need not be read again. Lines that can't be secrets,
# so many and so long at most. A stranger may push them out, and thereby make others' requests a little dearer.
_REQUEST_LINES: dict[bytes, "RequestLine"] = {}
_FIELDS: dict[bytes, Field] = {}
REMEMBERED = 256  # bytes of a request line at most

# A few names make up nearly all fields. Looked up they cost a third, and come out as the same objects each time, whose
# hash is known: every layer that compares names gains. Strangers can't fill memory with it: only so many short ones.
_PLAIN_NAMES: dict[bytes, bytes] = {}  # of those whose lines aren't remembered, and mean nothing here


class RefusedError(Exception):
    """A request that is not let in.

    Attributes:
        status: of the answer.
        reason: a word for logs and metrics.
        message: a sentence for the client.
        header: one more header for the answer.
    """

    def __init__(self, status: int, reason: str, message: str, header: Header | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.header = header


class Special:
    """What is out of the ordinary in a sound head.

    Attributes:
        keep_alive: the client would go on after this request.
        expects_continue: it waits for a 100 before it sends the body.
        websocket: it asks for a WebSocket, soundly.
    """

    __slots__ = ("expects_continue", "keep_alive", "websocket")

    def __init__(self, keep_alive: bool) -> None:
        self.keep_alive = keep_alive
        self.expects_continue = False
        self.websocket = False


RequestLine = tuple[str, bytes, str, bytes, str, bytes | None]
"""Of a request: method, raw_path, path (percent-decoded), query, version (``"1.1"``), and what the target names as the
host, where it is a whole URL."""

RequestHead = tuple[RequestLine, list[Header], int | None, Special | None]
"""A request line, its header fields (names in lower case; without look-alikes of fields that matter), the bytes of body
to come (None for a chunked one), and what is special about them; most have nothing, and are an HTTP/1.1 request that
keeps the connection."""


def read_head(head: bytes, limits: EdgeLimits) -> RequestHead:
    """Read a whole head, given without the empty line that ended it.

    Raises:
        RefusedError: with 400, 405, 414, 417, 431, 501 or 505.
    """
    size = len(head)
    lines = head.split(b"\r\n")
    first = lines.pop(0)
    request_line = _REQUEST_LINES.get(first)
    if request_line is None or size > limits.max_request_line_bytes:
        request_line = read_request_line(first, limits)
    if size > limits.max_head_bytes:
        raise _too_large()
    if len(lines) > limits.max_fields:
        raise RefusedError(431, "too_many_fields", "The request has too many header fields")
    if size > limits.max_field_bytes and max(map(len, lines), default=0) > limits.max_field_bytes:
        raise RefusedError(431, "field_too_large", "A header field of the request is too large")

    headers: list[Header] = []
    host: bytes | None = None
    length: int | None = None
    others: list[Header] | None = None
    remembered = _FIELDS.get
    for line in lines:
        known = remembered(line)
        if known is None:
            if line.translate(VISIBLE) != line:
                raise _malformed("The request's header has a control character in it")
            raw_name, colon, value = line.partition(b":")
            name = _PLAIN_NAMES.get(raw_name)
            if name is not None and colon:
                headers.append((name, value.strip()))  # of spaces and tabs: there is no other control character
                continue
            if not colon:
                raise _malformed("A header field of the request has no colon")
            known = _read_field(line, raw_name, value.strip())
        field, meaning = known
        if meaning is not None:
            if meaning >= 0:
                if length is not None:
                    raise _malformed("The request's Content-Length is malformed")
                length = meaning
            elif meaning == IS_HOST:
                if host is not None:
                    raise _malformed("The request has two Host fields")
                host = field[1]
            elif meaning == IS_LOOK_ALIKE:
                continue
            elif others is None:
                others = [field]
            else:
                others.append(field)
        headers.append(field)
    if others is None and host is not None and request_line[5] is None and request_line[4] == "1.1":
        return request_line, headers, 0 if length is None else length, None
    return _understand(request_line, headers, host, length, others or [])


def read_request_line(line: bytes, limits: EdgeLimits) -> RequestLine:
    """Read the line that opens a request.

    Raises:
        RefusedError: with 400, 405, 414 or 505.
    """
    size = len(line)
    if size > limits.max_request_line_bytes:
        raise too_long_a_line()
    request_line = _read_line(line)
    if size <= REMEMBERED and QUESTION_MARK not in line:  # a query seldom comes back, and may be a secret
        if len(_REQUEST_LINES) >= 256:
            _REQUEST_LINES.clear()
        _REQUEST_LINES[line] = request_line
    return request_line


def _read_line(line: bytes) -> RequestLine:
    parts = line.split(b" ")
    if len(parts) != 3:
        raise _malformed("The request line is malformed")
    raw_method, target, raw_version = parts
    version = VERSIONS.get(raw_version)
    if version is None:
        if raw_version.startswith(b"HTTP/") and not raw_version[5:].translate(None, DIGITS + b"."):
            raise RefusedError(505, "http_version", "This is an HTTP/1.1 server")
        raise _malformed("The request line is malformed")
    method = METHODS.get(raw_method)
    if method is None:
        raise _malformed("The request's method is not known")
    if method in ("CONNECT", "TRACE") or (target == b"*" and method == "OPTIONS"):
        allow = (b"allow", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
        raise RefusedError(405, "method_not_allowed", f"{method} is not allowed here", allow)
    if not target or target.translate(None, NOT_IN_TARGET) != target:
        raise _malformed("The request's target has a character in it that must be escaped")
    authority = None
    if not target.startswith(b"/"):
        authority, target = _split_absolute(target)
    raw_path, _, query = target.partition(b"?")
    path = unquote_to_bytes(raw_path) if b"%" in raw_path else raw_path
    return method, raw_path, path.decode("utf-8", "replace"), query, version, authority


def _read_field(line: bytes, raw_name: bytes, value: bytes) -> Field:
    name = field_name(raw_name)
    if name is None:
        return (b"", b""), IS_LOOK_ALIKE
    meaning = _meaning(name, value) if name in UNDERSTOOD else None
    if name in REPEATED:
        if len(line) <= 128:
            if len(_FIELDS) >= 512:
                _FIELDS.clear()
            _FIELDS[line] = (name, value), meaning
    elif meaning is None and len(_PLAIN_NAMES) < 1024 and len(name) < 48:
        _PLAIN_NAMES[raw_name] = name
    return (name, value), meaning


def _meaning(name: bytes, value: bytes) -> int | None:
    if name == b"host":
        if not _is_authority(value):
            raise _malformed("The request's Host field is malformed")
        return IS_HOST
    if name == b"content-length":
        if len(value) > 18 or not value.isdigit():
            raise _malformed("The request's Content-Length is malformed")
        return int(value)
    if name == b"connection" and not WEIGHTY_OPTIONS.intersection(_options(value)):
        return None
    return IS_OTHER


def _options(value: bytes) -> list[bytes]:
    return [option.strip() for option in value.lower().split(b",")]


def field_name(raw: bytes) -> bytes | None:
    """A header field's name in lower case, or None for a look-alike to drop.

    Raises:
        RefusedError: it is not a name.
    """
    if not raw or raw.translate(None, TOKEN):
        raise _malformed("A header field of the request has a malformed name")
    name = raw.lower()
    if b"_" in name and name.replace(b"_", b"-") in SHADOWED:
        return None
    return name


def refuse_early(head: bytes | bytearray, limits: EdgeLimits) -> None:
    """Look at a head that is not whole yet, so that what can't become one needs no deadline to be refused.

    Raises:
        RefusedError: whatever came after, ``read_head`` would refuse it too.
    """
    line_end = head.find(b"\r\n")
    if line_end < 0:
        if len(head) > limits.max_request_line_bytes + 1:  # the last one may be a CR
            raise too_long_a_line()
    else:
        read_request_line(bytes(head[:line_end]), limits)
    if len(head) > limits.max_head_bytes + 3:
        raise _too_large()
    if head.count(b"\r\n") - 1 > limits.max_fields:
        raise RefusedError(431, "too_many_fields", "The request has too many header fields")
    if len(head) > limits.max_field_bytes:
        last = head.rfind(b"\r\n") + 2
        if last >= 2 and len(head) - last > limits.max_field_bytes + 1:
            raise RefusedError(431, "field_too_large", "A header field of the request is too large")
    complete = head[:-1] if head.endswith(b"\r") else head
    if len(complete) - len(complete.translate(None, CONTROLS)) != 2 * complete.count(b"\r\n"):
        raise _malformed("The request's header has a control character in it")


def glimpse(head: bytes | bytearray, whole: bool) -> tuple[str, str, str]:
    """What can be told of a head that was refused: correlation ID, method, path; each empty where it can't be.

    Args:
        head: what came of it.
        whole: its last line is not one that may still grow.
    """
    line, *lines = bytes(head).split(b"\r\n")
    if not whole and lines:
        del lines[-1]
    fields = [(name.lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
    parts = line.split(b" ")
    method = METHODS.get(parts[0], "")
    path = ""
    if method and len(parts) == 3 and parts[1].startswith(b"/"):  # a whole URL may have a password in it
        path = path_to_tell(parts[1].partition(b"?")[0])
    return correlation_id_of(fields), method, path


def path_to_tell(raw_path: bytes) -> str:
    return raw_path[:LONGEST_PATH].decode("ascii", "backslashreplace")[:LONGEST_PATH]


def correlation_id_of(fields: Iterable[Header]) -> str:
    """The one that a request came with, if it is well formed (SPEC.md, 3)."""
    found = [value for name, value in fields if name == b"x-correlation-id"]
    if len(found) == 1 and 0 < len(found[0]) <= 128 and not found[0].translate(None, IN_ID):
        return found[0].decode()
    return ""


def too_long_a_line() -> RefusedError:
    return RefusedError(414, "uri_too_long", "The request line is too long")


class ChunkedBody(framing.ChunkedBody):
    """A request's chunked body, decoded as it comes."""

    __slots__ = ()

    def feed(self, data: bytes) -> tuple[bytes, bytes | None]:
        """Take bytes off the connection.

        Returns:
            The bytes of the body among them, and what follows the body: None until it has ended.

        Raises:
            RefusedError: with 400; the framing is unsound, or too much of it.
        """
        try:
            return super().feed(data)
        except framing.MalformedError as error:
            raise _malformed(f"The request's {error}") from None


def _understand(
    line: RequestLine, headers: list[Header], host: bytes | None, length: int | None, others: list[Header]
) -> RequestHead:
    """Draw from a head that is not the usual one what it says of how to read it and how to answer it."""
    method, raw_path, _, query, version, authority = line
    special = Special(keep_alive=version == "1.1")
    upgrade = key = websocket_version = b""
    options: list[bytes] = []
    codings: list[bytes] = []
    for name, value in others:
        if name == b"transfer-encoding":
            codings.append(value)
        elif name == b"connection":
            options += _options(value)
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise RefusedError(417, "expectation_failed", "The only expectation met here is 100-continue")
            special.expects_continue = version == "1.1"
        elif name == b"upgrade":
            upgrade = value.lower()
        elif name == b"sec-websocket-key":
            key = value
        else:
            websocket_version = value

    if host is None and version == "1.1":
        raise _malformed("The request has no Host field")
    if authority is not None:
        _settle_host(headers, host, authority)
    if codings:
        if length is not None:
            raise _malformed("The request has both Content-Length and Transfer-Encoding")
        if version == "1.0":
            raise _malformed("An HTTP/1.0 request can't have Transfer-Encoding")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise RefusedError(501, "transfer_encoding", "The only transfer coding understood here is chunked")
    elif length is None:
        length = 0
    if b"close" in options:
        special.keep_alive = False
    if length == 0:
        special.expects_continue = False  # there is nothing to wait with
    if upgrade == b"websocket" and b"upgrade" in options and method == "GET" and version == "1.1":
        if length != 0:
            raise _malformed("A WebSocket's handshake can't have a body")
        if not (raw_path.isascii() and query.isascii()):  # uvicorn's implementation would fail at it
            raise _malformed("The target of the WebSocket's handshake has a character in it that must be escaped")
        _check_handshake(key, websocket_version)
        special.websocket = True
    return line, headers, length, special


def _settle_host(headers: list[Header], host: bytes | None, authority: bytes) -> None:
    if not _is_authority(authority):
        raise _malformed("The request's target is malformed")
    if host is None:
        headers.insert(0, (b"host", authority))
    elif host.lower() != authority.lower():
        raise _malformed("The request's Host field and its target name different hosts")


def _check_handshake(key: bytes, version: bytes) -> None:
    """RFC 6455, 4.2.1."""
    if version != b"13":
        header = (b"sec-websocket-version", b"13")
        raise RefusedError(400, "websocket_version", "The only version of WebSockets spoken here is 13", header)
    try:
        nonce = binascii.a2b_base64(key, strict_mode=True)
    except binascii.Error:
        nonce = b""
    if len(nonce) != 16:
        raise _malformed("The key of the WebSocket's handshake is malformed")


def _split_absolute(target: bytes) -> tuple[bytes, bytes]:
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        raise _malformed("The request's target must begin with a slash")
    path_at = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    path = rest[path_at:]
    return rest[:path_at], path if path.startswith(b"/") else b"/" + path


@lru_cache(maxsize=256)
def _is_authority(host: bytes) -> bool:
    if not host or host.translate(None, IN_HOST):
        return False
    if host[0] == 0x5B:  # "[": an IPv6 address
        address, bracket, port = host[1:].partition(b"]")
        if not bracket or not address or address.translate(None, HEX_DIGITS + b":.") or b"[" in port or b"]" in port:
            return False
        return not port or (port[0] == 0x3A and not port[1:].translate(None, DIGITS))
    name, _, port = host.partition(b":")
    return bool(name) and b"[" not in name and b"]" not in name and not port.translate(None, DIGITS)


def _malformed(message: str) -> RefusedError:
    return RefusedError(400, "malformed", message)


def _too_large() -> RefusedError:
    return RefusedError(431, "head_too_large", "The request's header is too large")
