"""Which service a path belongs to, and how requests to it are to be treated."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

ADDRESS_FORM = "http(s)://host[:port][/path] or unix:/socket[:/path]"
LONGEST_SOCKET = 107  # bytes of a unix socket's path (unix(7): 108 with the NUL that ends it)
BACKSLASH, PERCENT = b"\\%"  # a search for a byte by its number is many times faster than by a string of one

REMEMBERED = 1024  # paths, of at most so many bytes each
REMEMBERED_BYTES = 128


class UnsafePathError(ValueError):
    """A path that two parsers could read differently, or that would leave its prefix. Says why in plain words."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens.

    Attributes:
        host: a name or an IP address; ``localhost`` where it listens on a unix socket.
        port: of TCP.
        tls: whether to speak TLS.
        authority: as the ``Host`` field gives it.
        path: a prefix that goes before every path, without a trailing slash.
        socket: the path of the unix socket that it listens on, empty where it listens on TCP.
    """

    host: str
    port: int
    tls: bool
    authority: bytes
    path: bytes
    socket: str = ""

    @classmethod
    def parse(cls, url: str) -> "Address":
        """An address from ``http://host[:port][/path]``, ``https://...`` or ``unix:/run/name.sock[:/path]``.

        Raises:
            ValueError: it is not of that form.
        """
        if not all("!" <= character <= "~" for character in url) or set(url) & set("@?#%\\,"):
            raise ValueError(f"{url!r} is not {ADDRESS_FORM}")
        if url.startswith("unix:"):
            socket, colon, path = url.removeprefix("unix:").partition(":")
            if not socket or has_odd_segments(socket) or len(socket) > LONGEST_SOCKET or bool(colon) != bool(path):
                raise ValueError(f"{url!r} is not unix:/socket[:/path]")
            host, port, tls, authority = "localhost", 80, False, b"localhost"
        else:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.netloc.endswith(":"):
                raise ValueError(f"{url!r} is not {ADDRESS_FORM}")
            tls = parts.scheme == "https"
            socket, host, port = "", parts.hostname, (443 if tls else 80) if parts.port is None else parts.port
            host.encode("idna")  # a name that no resolver could take raises
            authority, path = parts.netloc.encode(), parts.path
        path = path.rstrip("/")
        if port == 0 or has_odd_segments(path):
            raise ValueError(f"{url!r} is not {ADDRESS_FORM}")
        return cls(host, port, tls, authority, path.encode(), socket)


def has_odd_segments(path: str) -> bool:
    """Whether two readers could differ on a path: it begins without a slash, or has empty segments or dots."""
    return path != "" and (path[0] != "/" or any(segment in ("", ".", "..") for segment in path[1:].split("/")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long each phase of a request to a service may take, seconds (RESILIENCE.md, 4)."""

    connect: float = 2.0
    pool: float = 1.0  # waiting for a free connection
    write: float = 30.0  # the service not taking a byte of the body
    first_byte: float = 120.0
    between_bytes: float = 60.0
    answer: float = 300.0  # an answer that announced its length
    stream: float = 900.0  # one that did not
    client: float = 30.0  # the client not reading, or not sending, a byte
    websocket_ping: float = 20.0
    websocket_idle: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One service behind the gateway.

    Attributes:
        name: as breakers, logs and metrics call it, ``recommendation-service``.
        prefix: the path prefix that leads to it, ``/api/v1/recommendations``.
        replicas: its addresses, each as ``Address.parse`` reads it.
        preserve_host: send the client's ``Host`` on, rather than the replica's own.
        max_body_bytes: the largest request body it is sent.
        max_in_flight: requests it may be working on at a time, over this worker; None: no bound of its own.
        retries: how often a request that is safe to send again is sent again (RESILIENCE.md, 3).
        retry_all_methods: a POST to this service is safe to send again.
        ca_file: certificates to verify it by, in place of the system's.
        http2: speak HTTP/2 to it, where it is reached through TLS and can; elsewhere it must.
        proxy: the forward proxy to reach it through, ``http://[user:password@]host[:port]``.
    """

    name: str
    prefix: str
    replicas: tuple[str, ...]
    preserve_host: bool = False
    max_body_bytes: int = 10 * 1024 * 1024
    max_in_flight: int | None = None
    retries: int = 1
    retry_all_methods: bool = False
    ca_file: str | None = None
    http2: bool = False
    proxy: str | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)


class ServiceTable:
    """The services by prefix; the longest prefix wins, and a prefix matches whole segments of the raw path only."""

    def __init__(self, services: Iterable[Service]) -> None:
        self.services = tuple(services)
        self._by_prefix = {service.prefix.encode().rstrip(b"/"): service for service in self.services}
        self._depths = sorted({prefix.count(b"/") for prefix in self._by_prefix}, reverse=True)
        self._matched: dict[bytes, Service] = {}  # what paths lead to; strangers can't fill memory with it

    def match(self, raw_path: bytes) -> Service | None:
        """The service that ``raw_path`` (as on the request line, without the query) leads to.

        Raises:
            UnsafePathError: it may not be passed on, whatever it leads to.
        """
        matched = self._matched.get(raw_path)
        if matched is not None:
            return matched
        if BACKSLASH in raw_path or 0 in raw_path:
            raise UnsafePathError("The path has a backslash or a NUL in it")
        for depth in self._depths:
            prefix = _segments(raw_path, depth)
            if prefix is not None and (service := self._by_prefix.get(prefix)) is not None:
                rest = raw_path[len(prefix) :]
                if PERCENT in rest or rest.find(b"/.") >= 0:
                    _refuse_leaving(rest)
                if len(raw_path) <= REMEMBERED_BYTES:
                    if len(self._matched) >= REMEMBERED:
                        self._matched.clear()
                    self._matched[raw_path] = service
                return service
        return None


def _refuse_leaving(rest: bytes) -> None:
    """Refuse what any reader could take to lead out of the prefix that ``rest`` follows.

    Some services decode twice, take ``\\`` for ``/``, strip what follows a semicolon, or merge slashes.
    """
    for _ in range(4):
        depth = 0
        for segment in rest.replace(b"\\", b"/").split(b"/"):
            name = segment.split(b";", 1)[0]
            if name == b"..":
                depth -= 1
                if depth < 0:
                    raise UnsafePathError("The path leaves the prefix of its service")
            elif segment and name != b".":
                depth += 1
        decoded = unquote_to_bytes(rest)
        if decoded == rest:
            return
        if b"\0" in decoded:
            raise UnsafePathError("The path has a NUL in it")
        rest = decoded
    raise UnsafePathError("The path is percent-encoded too many times over")


def _segments(path: bytes, count: int) -> bytes | None:
    """The first ``count`` segments of a path, or None where it has fewer."""
    end = 0
    for _ in range(count):
        if path[end : end + 1] != b"/":
            return None
        end = path.find(b"/", end + 1)
        if end < 0:
            return path if path.count(b"/") == count else None
    return path[:end]
