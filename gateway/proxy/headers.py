"""Which header fields cross the gateway, and in which form (RFC 9110 7.6; EDGE.md, 1 to 4, 11, 29 to 34)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter

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
# What a request is looked at for in a place of its own, because few have it.
SELDOM = FORWARDING | {b"transfer-encoding", b"x-request-timeout-ms"}
SAID_BY_US = frozenset({b"", b"close", b"keep-alive", b"x-correlation-id", b"x-user-id"})
ALONE = frozenset({b"keep-alive", b"close", b"Keep-Alive", b"Close"})  # what Connection mostly says: it names no field
REMEMBERED = 256  # shapes of requests, of at most so many fields and bytes of names each; and as many hosts
REMEMBERED_FIELDS = 32
REMEMBERED_BYTES = 1024

Values = tuple[bytes, ...]


class _Shape:
    """What the names of a request's fields tell, whatever their values.

    Attributes:
        lines: those that cross, each a line with a place for its value.
        pick: gives the values for these places, of all values.
        host, length: where ``Host`` and ``Content-Length`` stand, None where they don't.
        has_options: there is a ``Connection``.
        plain: there is nothing of ``SELDOM``, and nothing twice.
    """

    __slots__ = ("has_options", "host", "length", "lines", "pick", "plain")

    def __init__(self, names: tuple[bytes, ...], options: frozenset[bytes] = frozenset()) -> None:
        dropped = (
            NOT_COPIED | options | {name for name in names if name.replace(b"_", b"-") in SHADOWED and b"_" in name}
        )
        crossing = [at for at, name in enumerate(names) if name not in dropped]
        self.lines = b"".join([names[at].replace(b"%", b"%%") + b": %b\r\n" for at in crossing])
        self.pick = _picker(crossing)
        self.host = names.index(b"host") if b"host" in names else None
        self.length = names.index(b"content-length") if b"content-length" in names else None
        self.has_options = b"connection" in names
        self.plain = len(set(names)) == len(names) and SELDOM.isdisjoint(names)


def _picker(places: list[int]) -> Callable[[Values], Values]:
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[at] for at in places])  # `itemgetter` would not give a tuple


class _Shapes(dict[tuple[bytes, ...], _Shape]):
    """Shapes by names: a client sends the same fields in the same order each time.

    Strangers may think of as many as they like: all are forgotten when there are too many.
    """

    def __missing__(self, names: tuple[bytes, ...]) -> _Shape:
        shape = _Shape(names)
        if len(names) <= REMEMBERED_FIELDS and sum(map(len, names)) <= REMEMBERED_BYTES:
            if len(self) >= REMEMBERED:
                self.clear()
            self[names] = shape
        return shape


_shapes = _Shapes()


class RequestFields:
    """A request's header fields, sorted once: those that cross as they are, and those the gateway speaks for.

    Attributes:
        plain: none tells of the way here, of the time allowed or of a coding, and none is there twice.
        host: the client's ``Host``, empty where it sent none.
        length: its ``Content-Length`` as it spelt it, None where it sent none.
    """

    __slots__ = ("_headers", "_shape", "_values", "host", "length", "plain")

    def __init__(self, headers: Sequence[Sequence[bytes]]) -> None:
        names, values = zip(*headers) if headers else ((), ())  # noqa: B905 - an argument more, and they are pairs
        shape = _shapes[names]
        self._headers = headers
        self._values: Values = values
        self.plain = shape.plain
        if shape.plain:
            self.host = b"" if shape.host is None else values[shape.host]
            self.length = None if shape.length is None else values[shape.length]
        else:
            by_name = self.by_name
            self.host = by_name.get(b"host", b"")
            self.length = by_name.get(b"content-length")
        if shape.has_options:
            options = connection_named(self.by_name[b"connection"])
            if options:
                shape = _Shape(names, options)
        self._shape = shape

    def block(self, peer: str, trusts: Callable[[str], bool], scheme: bytes, via: bytes) -> bytes:
        """The lines that a service gets of these fields and, through ``forwarding_fields``, about the way here.

        Args:
            peer: the address of whoever is connected to us; empty on a unix socket.
            trusts: whether a peer may speak for others.
            scheme: ``http`` or ``https``, of the connection to us.
            via: our pseudonym.
        """
        host, shape = self.host, self._shape
        if self.plain and len(host) <= REMEMBERED_BYTES:  # as most requests come
            forwarding = _first_forwarding(peer, scheme, host, via)
        else:
            forwarding = forwarding_fields(self, peer=peer.encode(), trusted=trusts(peer), scheme=scheme, via=via)
        return shape.lines % shape.pick(self._values) + forwarding

    @property
    def kept(self) -> bytes:
        """The fields that cross, as a block of lines."""
        return self._shape.lines % self._shape.pick(self._values)

    @property
    def by_name(self) -> dict[bytes, bytes]:
        """All values by name; several lines of a name are one list (RFC 9110 5.3)."""
        return joined(self._headers)

    @property
    def keyed(self) -> bool:
        """It carries an ``Idempotency-Key``, so sending it twice does no harm."""
        return b"idempotency-key" in self.by_name


def joined(headers: Iterable[Sequence[bytes]]) -> dict[bytes, bytes]:
    """Values by name; several lines of a name are one list (RFC 9110 5.3)."""
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


@lru_cache(maxsize=REMEMBERED)
def _first_forwarding(peer: str, scheme: bytes, host: bytes, via: bytes) -> bytes:
    """These lines for a client that says nothing of itself but its ``Host``: it has us to speak for it."""
    fields = RequestFields([(b"host", host)])
    return forwarding_fields(fields, peer=peer.encode(), trusted=False, scheme=scheme, via=via)


def answer_fields(headers: list[Header], by_name: Mapping[bytes, bytes]) -> list[Header]:
    """The fields of a service's answer that reach the client: order and repeats kept, hop-by-hop ones gone.

    Args:
        headers: as they came.
        by_name: the same, ``joined``.
    """
    if HOP_BY_HOP.isdisjoint(by_name):
        return headers
    dropped = HOP_BY_HOP
    if by_name.get(b"connection", b"close") not in ALONE:
        dropped = HOP_BY_HOP | connection_named(by_name[b"connection"]) - {b"content-length"}
    return [header for header in headers if header[0] not in dropped]
