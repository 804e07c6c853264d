"""Which header fields cross the gateway, and in which form (RFC 9110 7.6; EDGE.md, 1 to 4, 11, 29 to 34)."""

from collections.abc import Container, Iterable, Mapping, Sequence

Header = tuple[bytes, bytes]

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# Of a request, what the gateway says itself: read where it helps, never copied as it came.
OURS = frozenset(
    {
        b"content-length",
        b"expect",
        b"forwarded",
        b"host",
        b"http2-settings",
        b"via",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-server",
        b"x-gateway-attempt",
        b"x-real-ip",
        b"x-request-timeout-ms",
    }
)
NOT_COPIED = HOP_BY_HOP | OURS
# Some services read `content_length` as `content-length`: a look-alike of what they believe from us is dropped.
SHADOWED = NOT_COPIED | {b"x-user-id", b"x-correlation-id", b"authorization", b"cookie"}


FORWARDING = frozenset(name for name in OURS if name.startswith(b"x-forwarded")) | {b"forwarded", b"via", b"x-real-ip"}
UNDERSCORE = ord("_")  # a search for a byte by its number is many times faster than by a string of one
SAID_BY_US = frozenset({b"", b"close", b"keep-alive", b"x-correlation-id", b"x-user-id"})
ALONE = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})  # what Connection mostly says: it names no field


class RequestFields:
    """A request's header fields, sorted once: those that cross as they are, and those the gateway speaks for.

    Attributes:
        kept: the fields that cross, as a block of lines.
        host: the client's ``Host``, empty where it sent none.
        length: its ``Content-Length`` as it spelt it, None where it sent none.
        by_name: all values by name; several lines of a name are one list (RFC 9110 5.3).
    """

    __slots__ = ("by_name", "host", "kept", "length")

    def __init__(self, headers: Sequence[Header]) -> None:
        by_name = dict(headers)
        if len(by_name) < len(headers):
            by_name = _joined(headers)
        dropped: Container[bytes] = NOT_COPIED
        connection = by_name.get(b"connection")
        if (connection is not None and connection not in ALONE) or UNDERSCORE in b"".join(by_name):
            shadowing = {name for name in by_name if b"_" in name and name.replace(b"_", b"-") in SHADOWED}
            dropped = NOT_COPIED | connection_named(connection or b"") | shadowing
        lines = [b": ".join(header) for header in headers if header[0] not in dropped]
        lines.append(b"")
        self.kept = b"\r\n".join(lines)
        self.by_name = by_name
        self.host = by_name.get(b"host", b"")
        self.length = by_name.get(b"content-length")

    @property
    def keyed(self) -> bool:
        """It carries an ``Idempotency-Key``, so sending it twice does no harm."""
        return b"idempotency-key" in self.by_name


def _joined(headers: Iterable[Header]) -> dict[bytes, bytes]:
    lines: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        lines.setdefault(name, []).append(value)
    return {name: b", ".join(values) for name, values in lines.items()}


def connection_named(value: bytes) -> frozenset[bytes]:
    """The field names that ``Connection`` names, all its lines joined, less those that carry what the gateway says."""
    names = {name.strip().lower() for name in value.split(b",")}
    return frozenset(names - SAID_BY_US)


def forwarding_fields(fields: RequestFields, *, peer: bytes, trusted: bool, scheme: bytes, via: bytes) -> bytes:
    """The lines that tell a service who its client is, and that the request came through us.

    What a client says of itself counts only where its peer is trusted; there it is continued, elsewhere replaced.

    Args:
        fields: of the request.
        peer: the address of whoever is connected to us; empty on a unix socket.
        trusted: whether that peer may speak for others.
        scheme: ``http`` or ``https``, of the connection to us.
        via: our pseudonym.
    """
    by_name = fields.by_name
    if peer and fields.host and FORWARDING.isdisjoint(by_name):  # as most requests come
        form = b"x-forwarded-for: %b\r\nx-forwarded-proto: %b\r\nx-forwarded-host: %b\r\nvia: 1.1 %b\r\n"
        return form % (peer, scheme, fields.host, via)
    said = by_name if trusted else {}
    seen = by_name.get(b"via")  # a stranger's too: it only tells of loops
    lines = {
        b"x-forwarded-for": b", ".join(filter(None, (said.get(b"x-forwarded-for"), peer))),
        b"x-forwarded-proto": said.get(b"x-forwarded-proto") or scheme,
        b"x-forwarded-host": said.get(b"x-forwarded-host") or fields.host,
        b"x-forwarded-port": said.get(b"x-forwarded-port", b""),
        b"x-forwarded-prefix": said.get(b"x-forwarded-prefix", b""),
        b"x-real-ip": said.get(b"x-real-ip") or (peer if b"x-real-ip" in by_name else b""),
        b"via": seen + b", 1.1 " + via if seen else b"1.1 " + via,
    }
    if b"forwarded" in said:
        hop = b'for="[%b]"' % peer if b":" in peer else b"for=%b" % (peer or b"unknown")
        lines[b"forwarded"] = said[b"forwarded"] + b", " + hop
    return b"".join([b"%b: %b\r\n" % line for line in lines.items() if line[1]])


def answer_fields(headers: list[Header], by_name: Mapping[bytes, bytes]) -> list[Header]:
    """The fields of a service's answer that reach the client: order and repeats kept, hop-by-hop ones gone.

    Args:
        headers: as they came.
        by_name: the same by name.
    """
    if HOP_BY_HOP.isdisjoint(by_name):
        return headers
    dropped = HOP_BY_HOP
    if by_name.get(b"connection", b"close") not in ALONE:
        lines = [value for name, value in headers if name == b"connection"]
        dropped = HOP_BY_HOP | connection_named(b",".join(lines)) - {b"content-length"}
    return [header for header in headers if header[0] not in dropped]
