"""Which header fields cross the gateway, and in which form (RFC 9110 7.6; EDGE.md, 1 to 4, 11, 29 to 34)."""

from collections.abc import Iterable, Sequence

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


class RequestFields:
    """A request's header fields, sorted once: those that cross as they are, and those the gateway speaks for.

    Attributes:
        kept: the fields that cross, as a block of lines.
        host: the client's ``Host``, empty where it sent none.
        length: its ``Content-Length`` as it spelt it, None where it sent none.
        keyed: it carries an ``Idempotency-Key``.
        named: values of what the gateway says itself, by name, in the order they came.
    """

    __slots__ = ("host", "kept", "keyed", "length", "named")

    def __init__(self, headers: Iterable[Header]) -> None:
        named: dict[bytes, list[bytes]] = {}
        kept: list[bytes] = []
        for name, value in headers:
            if name in NOT_COPIED:
                named.setdefault(name, []).append(value)
            elif b"_" not in name or name.replace(b"_", b"-") not in SHADOWED:
                kept += (name, b": ", value, b"\r\n")
        connection = named.get(b"connection")
        if connection is not None:
            dropped = connection_named(connection) - NOT_COPIED
            if dropped:
                fields = (kept[i : i + 4] for i in range(0, len(kept), 4))
                kept = [part for field in fields if field[0] not in dropped for part in field]
        self.kept = b"".join(kept)
        self.keyed = b"\nidempotency-key: " in self.kept or self.kept.startswith(b"idempotency-key: ")
        self.named = named
        hosts = named.get(b"host")
        self.host = hosts[0] if hosts else b""
        lengths = named.get(b"content-length")
        self.length = lengths[0] if lengths else None

    def joined(self, name: bytes) -> bytes:
        """All lines of a list field as one; empty where it did not come."""
        values = self.named.get(name)
        return b", ".join(values) if values else b""


def connection_named(values: Sequence[bytes]) -> frozenset[bytes]:
    """The field names that ``Connection`` lines name, over all its lines; a request may not drop its framing so."""
    if len(values) == 1 and values[0].lower() in (b"keep-alive", b"close"):
        return frozenset()
    names = (name.strip().lower() for value in values for name in value.split(b","))
    return frozenset(name for name in names if name not in (b"", b"close", b"keep-alive"))


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
    seen = fields.joined(b"via")
    via_line = seen + b", 1.1 " + via if seen else b"1.1 " + via
    host = fields.host
    if not trusted:
        lines = [b"x-forwarded-proto: ", scheme, b"\r\nvia: ", via_line, b"\r\n"]
        if peer:
            lines += (b"x-forwarded-for: ", peer, b"\r\n")
            if b"x-real-ip" in fields.named:
                lines += (b"x-real-ip: ", peer, b"\r\n")
        if host:
            lines += (b"x-forwarded-host: ", host, b"\r\n")
        return b"".join(lines)

    chain = fields.joined(b"x-forwarded-for")
    chain = chain + b", " + peer if chain and peer else chain or peer
    lines = [b"x-forwarded-proto: ", fields.joined(b"x-forwarded-proto") or scheme, b"\r\nvia: ", via_line, b"\r\n"]
    if chain:
        lines += (b"x-forwarded-for: ", chain, b"\r\n")
    host = fields.joined(b"x-forwarded-host") or host
    if host:
        lines += (b"x-forwarded-host: ", host, b"\r\n")
    for name in (b"x-forwarded-port", b"x-forwarded-prefix", b"x-real-ip"):
        if name in fields.named:
            lines += (name, b": ", fields.joined(name), b"\r\n")
    forwarded = fields.joined(b"forwarded")
    if forwarded:
        hop = b'for="[%s]"' % peer if b":" in peer else b"for=%s" % (peer or b"unknown")
        lines += (b"forwarded: ", forwarded, b", ", hop, b"\r\n")
    return b"".join(lines)


def answer_fields(headers: list[Header]) -> list[Header]:
    """The fields of a service's answer that reach the client: order and repeats kept, hop-by-hop ones gone."""
    kept = [header for header in headers if header[0] not in HOP_BY_HOP]
    if len(kept) != len(headers):
        connection = [value for name, value in headers if name == b"connection"]
        dropped = connection_named(connection) - {b"content-length"} if connection else None
        if dropped:
            kept = [header for header in kept if header[0] not in dropped]
    return kept
