"""Who is calling, as far as it can be believed: trusted networks, the client's address, the name it counts under."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

UNIX = "unix"  # the peer of a unix socket, which has no address
LOCAL_PEERS = ("127.0.0.0/8", "::1", UNIX)

Header = Sequence[bytes]  # name and value: some servers give lists
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_MENTIONS_CALLER = frozenset({b"x-user-id", b"x-forwarded-for", b"forwarded"})
_REMEMBERED = 8192  # answers kept per set of networks, so that a flood of addresses can't fill memory
_PLAIN_BYTES = 64  # a longer ID is counted by its hash
_LONGEST_USER_ID = 1024
_LONGEST_REMEMBERED = 256  # bytes of headers


class Networks:
    """A set of addresses and networks, and of unix sockets where it has the word ``unix``.

    Args:
        entries: ``192.0.2.7``, ``10.0.0.0/8``, ``2001:db8::/32``, ``unix``.

    Raises:
        ValueError: an entry is none of these; the message names it.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        words = [entry.strip() for entry in entries]
        self._known: dict[str | None, bool] = {}
        self._has_unix = UNIX in words
        self._networks = [_network(word) for word in words if word != UNIX]

    def contains(self, host: str | None) -> bool:
        """Whether a peer is in the set; None or an empty host is the peer of a unix socket, a name is in no network."""
        known = self._known.get(host)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            known = self._known[host] = self._look_up(host)
        return known

    def _look_up(self, host: str | None) -> bool:
        if not host or host == UNIX:
            return self._has_unix
        address = _address(host)
        return address is not None and any(address in network for network in self._networks)


class TrustedProxies:
    """The peers whose word on who is calling counts.

    Args:
        entries: as for ``Networks``; by default loopback and unix sockets.

    Raises:
        ValueError: an entry is malformed; the message names it.
    """

    def __init__(self, entries: Iterable[str] = LOCAL_PEERS) -> None:
        self.trusts = Networks(entries).contains
        self.identities: dict[tuple[str | bytes | None, ...], Identity] = {}  # by peer and what it said: `identify`

    def client_address(self, peer: str | None, headers: Iterable[Header]) -> str:
        """The address of the client itself, as far as trusted proxies vouch for it.

        Walks ``X-Forwarded-For`` (or, where there is none, ``Forwarded``, RFC 7239) from its right end for as long
        as the hop before was trusted. What is no address ends the walk at the last hop that was one. A unix socket
        that nobody speaks for is ``unix``.
        """
        client = _canonical(peer or UNIX)
        if not self.trusts(peer):
            return client
        headers = list(headers)
        hops = _entries(headers, b"x-forwarded-for")
        read: Callable[[bytes], str | None] = _hop
        if not hops:
            hops = _entries(headers, b"forwarded")
            read = _forwarded_hop
        while hops and self.trusts(client):
            address = read(hops.pop())
            if address is None:
                break
            client = address
        return client


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a request counts for, and what of its headers is not to be believed.

    Attributes:
        caller: ``user:...`` or ``ip:...``.
        address: of the client itself.
        user_id_is_false: there is an ``X-User-ID`` that must not be passed on.
        ignored: a header that is the word of a peer not trusted, or nothing.
    """

    caller: str
    address: str
    user_id_is_false: bool
    ignored: bytes


def identify(headers: Sequence[Header], peer: str | None, trusted: TrustedProxies) -> Identity:
    """Who a request counts for: the user where a trusted peer gives one well-formed ``X-User-ID``, else the address.

    An IPv6 address counts by its /64. A user ID beyond 64 bytes, or with other than visible ASCII in it, counts by its
    SHA-256, ``user:sha256:...``; an empty one, one beyond 1,024 bytes or with control bytes is not well-formed.
    """
    said: tuple[bytes, ...] = ()
    for header in headers:
        if header[0] in _MENTIONS_CALLER:
            said += tuple(header)
    identity = trusted.identities.get((peer, *said))
    if identity is None:
        identity = _identity(headers, peer, trusted)
        if len(b"".join(said)) <= _LONGEST_REMEMBERED:
            if len(trusted.identities) >= _REMEMBERED:
                trusted.identities.clear()
            trusted.identities[peer, *said] = identity
    return identity


def _identity(headers: Sequence[Header], peer: str | None, trusted: TrustedProxies) -> Identity:
    user_ids = [value for name, value in headers if name == b"x-user-id"]
    forwarding = [name for name, _ in headers if name in _MENTIONS_CALLER and name != b"x-user-id"]
    if not trusted.trusts(peer):
        address = _canonical(peer or UNIX)
        ignored = b"x-user-id" if user_ids else forwarding[-1] if forwarding else b""
        return Identity(_address_key(address), address, bool(user_ids), ignored)

    address = trusted.client_address(peer, headers) if forwarding else _canonical(peer or UNIX)
    user = _user_key(user_ids[0]) if len(user_ids) == 1 else None  # of two, one could be the client's own
    return Identity(user or _address_key(address), address, bool(user_ids) and user is None, b"")


def _user_key(user_id: bytes) -> str | None:
    """The key of a user, or None where that is no ID."""
    if user_id.isascii():
        name = user_id.decode("ascii")
        if not name or not name.isprintable():
            return None
        if len(name) <= _PLAIN_BYTES and " " not in name:
            return "user:" + name
    elif min(user_id) < 0x20 or 0x7F in user_id:
        return None
    return None if len(user_id) > _LONGEST_USER_ID else "user:sha256:" + sha256(user_id).hexdigest()


@lru_cache(maxsize=_REMEMBERED)
def _address_key(client: str) -> str:
    address = _address(client)
    if isinstance(address, IPv6Address):
        return f"ip:{IPv6Network((int(address) >> 64 << 64, 64))}"
    if address is None and len(client.encode()) > _PLAIN_BYTES:
        return "ip:sha256:" + sha256(client.encode()).hexdigest()
    return f"ip:{client}"


@lru_cache(maxsize=_REMEMBERED)
def _canonical(host: str) -> str:
    """One spelling of an address; what is none stays as it is."""
    address = _address(host)
    return host if address is None else str(address)


@lru_cache(maxsize=_REMEMBERED)
def _hop(entry: bytes) -> str | None:
    """The address in one entry of a forwarding header, which may have a port: ``1.2.3.4:80``, ``[2001:db8::1]:80``."""
    text = entry.decode("latin-1").strip(' \t"')
    if text.startswith("["):
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not _is_port(port[1:], port[0])):
            return None
    elif text.count(":") == 1:
        text, colon, port = text.partition(":")
        if not _is_port(port, colon):
            return None
    address = _address(text)
    return None if address is None else str(address)


def _is_port(port: str, colon: str) -> bool:
    # RFC 7239 allows an obfuscated port, "_" and a name
    return colon == ":" and (port.isdecimal() or port.startswith("_"))


def _entries(headers: Iterable[Header], name: bytes) -> list[bytes]:
    """The entries of all lines of one header, as one list."""
    lines = [value for found, value in headers if found == name]
    return b",".join(lines).split(b",") if lines else []


def _forwarded_hop(element: bytes) -> str | None:
    """The address in the ``for`` of one element of ``Forwarded``.

    Elements are split at every comma, quoted or not: else an open quote sent by a client would swallow what the
    proxies wrote behind it. An address has no comma.
    """
    for pair in element.split(b";"):
        name, _, value = pair.partition(b"=")
        if name.strip(b" \t").lower() == b"for":
            return _hop(value)
    return None


def _address(host: str) -> Address | None:
    """The address that ``host`` spells, an IPv4 one where it is mapped into IPv6, and without its zone."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _network(entry: str) -> Network:
    try:
        network = ip_network(entry)
    except ValueError as error:
        raise ValueError(f"{entry!r} is not an address, a network such as 10.0.0.0/8, or 'unix': {error}") from None
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped  # peers are compared by the address within, too
        if mapped is not None:
            return IPv4Network((int(mapped), network.prefixlen - 96))
    return network
