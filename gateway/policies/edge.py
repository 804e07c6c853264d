"""What a client connection may take and how long it may take it: the caps and deadlines of the gateway's own server."""

from dataclasses import dataclass

MAX_MESSAGE_BYTES = 10 * 1024 * 1024  # of one WebSocket message, from either side; beyond: closed with 1009


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeLimits:
    """Caps in bytes and deadlines in seconds (EDGE.md, lines 35 to 41; RESILIENCE.md, 6)."""

    max_request_line_bytes: int = 16 * 1024  # beyond: 414
    max_field_bytes: int = 16 * 1024  # a header field's name and value; beyond: 431
    max_head_bytes: int = 64 * 1024  # beyond: 431
    max_fields: int = 100  # beyond: 431
    head_timeout: float = 10.0  # from the first byte of a head, or the connect, to a whole head: 408
    body_timeout: float = 30.0  # without a byte of a body that is waited for: 408
    client_timeout: float = 30.0  # without the client reading a byte of its answer: cut
    keep_alive_timeout: float = 75.0  # idle between requests: closed silently
    max_connections: int = 16384  # at a time and worker; beyond: 503 and closed
    discard_timeout: float = 2.0  # reading on after a refusal, so that the client sees it
    drain_delay: float = 5.0  # saying `draining` before the listener closes
    drain_timeout: float = 30.0  # for answers in flight after that
