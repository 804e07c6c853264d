"""What the layers tell one another about one request: a single object in place of many dictionaries."""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from functools import lru_cache
from math import inf
from operator import itemgetter
from time import monotonic

from starlette.types import Message, Scope

from gateway.policies.circuit_breaker import Outcome
from gateway.policies.services import Service

KEY = "gateway"  # where the context lives in an ASGI scope
Header = tuple[bytes, bytes]
NAME = itemgetter(0)  # of a header


class Cause(StrEnum):
    """Why a request ended: exactly one a request, the same in log, metric, breaker and replica (RESILIENCE.md, 4)."""

    COMPLETED = "completed"  # a whole answer, of whatever status (a 5xx other than 501 is a failure)

    CONNECT_FAILED = "connect_failed"  # refused, unreachable, no such name, TLS failure
    CONNECT_TIMEOUT = "connect_timeout"
    WRITE_TIMEOUT = "write_timeout"  # the service stopped taking the request's body
    RESET = "reset"  # the connection broke before the answer began
    GARBLED = "garbled"  # what came is not an HTTP/1.1 answer
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    STALLED = "stalled"  # too long between two bytes of an answer
    ANSWER_TIMEOUT = "answer_timeout"  # the whole answer took too long
    CUT_SHORT = "cut_short"  # the connection broke within the answer
    ERROR_EVENT = "error_event"  # a stream that ended by saying so
    DROPPED = "dropped"  # a WebSocket that the service let go within seconds

    NO_CONNECTION = "no_connection"  # all connections to the service were in use for too long
    CLIENT_LEFT = "client_left"
    CLIENT_TOO_SLOW = "client_too_slow"  # in sending its body or in reading the answer
    CLIENT_DEADLINE = "client_deadline"  # what the caller allowed in X-Request-Timeout-Ms ran out
    REFUSED = "refused"  # by the gateway itself: `RequestContext.reason` says why
    SHUTDOWN = "shutdown"
    GATEWAY_FAULT = "gateway_fault"


SUCCESS, FAILURE, NEUTRAL = Outcome.SUCCESS, Outcome.FAILURE, Outcome.NEUTRAL
OUTCOMES = {
    Cause.COMPLETED: SUCCESS,  # unless its status is a failure: `is_failure`
    Cause.NO_CONNECTION: NEUTRAL,
    Cause.CONNECT_FAILED: FAILURE,
    Cause.CONNECT_TIMEOUT: FAILURE,
    Cause.WRITE_TIMEOUT: FAILURE,
    Cause.RESET: FAILURE,
    Cause.GARBLED: FAILURE,
    Cause.FIRST_BYTE_TIMEOUT: FAILURE,
    Cause.STALLED: FAILURE,
    Cause.ANSWER_TIMEOUT: FAILURE,
    Cause.CUT_SHORT: FAILURE,
    Cause.ERROR_EVENT: FAILURE,
    Cause.DROPPED: FAILURE,
    Cause.CLIENT_LEFT: NEUTRAL,  # unless it waited long: `Permit.finish_abandoned`
    Cause.CLIENT_TOO_SLOW: NEUTRAL,
    Cause.CLIENT_DEADLINE: NEUTRAL,
    Cause.REFUSED: NEUTRAL,
    Cause.SHUTDOWN: NEUTRAL,
    Cause.GATEWAY_FAULT: NEUTRAL,
}
# Codes by which a service says of a WebSocket that it can't go on (RFC 6455, 7.4.1, and IANA's registry). The others it
# may have been given cause for by the client, who must not be able to open the breaker.
DROP_CODES = frozenset({1006, 1011, 1012, 1013, 1014, 1015})


def is_failure(status: int) -> bool:
    """Whether an answer's status says that the service failed: 5xx, but not 501, which says what it never could."""
    return status >= 500 and status != 501


NONE: frozenset[bytes] = frozenset()


def unheard(message: Message) -> None:
    """What a server calls for a client that left, where nobody asked to be told."""


class RequestContext:
    """One request's facts, from its arrival to its log line.

    Inner layers write what they decide; the outermost read it when the request has ended. What passed is noted in one
    place, so that the log line, the metrics and the breaker can't disagree: by our server, which makes the context of
    each HTTP request, else by the ``gateway.watch.Watch`` of the first layer that needs to know.

    Attributes:
        correlation_id: the request's name across systems (SPEC.md, 3).
        started: when it arrived, seconds on the monotonic clock.
        endpoint: its bounded name in metrics: a route's prefix, a path of the gateway's own, or ``other``.
        service: where it goes; None until routed, and for the gateway's own paths.
        caller: who the limiter counts it for, ``user:...`` or ``ip:...``; empty before the limiter.
        client_address: the address of the client itself, as far as trusted proxies vouch for it.
        probe: the breaker is half-open and this request is one of its probes: it is never retried.
        status: the status sent to the client; 0 before one was. A WebSocket that was accepted has 101.
        attempts: how often it was sent to a replica of the service.
        retry_denied: it would have been sent once more, had its service's budget for retries had one left.
        replica: the address of the last replica tried.
        bytes_in: bytes of body that the proxy read from the client; in the end, all that was read.
        bytes_out: bytes of body that the proxy gave to the client; in the end, all that was given.
        first_byte_at: when the first byte of the service's body came, monotonic seconds.
        streamed: the service's answer announced no length (RESILIENCE.md, 4).
        cause: why it ended.
        reason: where the gateway refused it, a word saying why: ``rate_limited``, ``breaker_open``, ``full`` ...
        added: header fields that layers put on whatever answer there will be, as on the wire: see ``add``.
        replaced: the names of the fields that these take the place of.
        watched: the attributes below are being noted, and ``added`` will be put on.
        answered_at: when the answer started, monotonic seconds; None before.
        request_whole_at: when the last of the request's body came, monotonic seconds; infinity before.
        received: bytes of body, or of a WebSocket's messages, that came from the client.
        sent: the same the other way.
        whole: the last byte of the answer was given to the server, or the WebSocket was closed in good order.
        client_left: the client went before that.
        on_left: called with the ``http.disconnect`` as soon as the client goes, whatever is being waited for; must not
            raise. ``unheard`` until somebody sets it, who then puts that back. None where the server does not call it,
            and ``receive`` is the only way to hear of that.
        ended: all is settled (``gateway.watch.end``), the attributes below too.
        final_status: the answer's status, and never 0: where there was none, what tells why.
        cut_short: the client got less than a whole answer, or a whole one that says that it is not.
        seconds: how long it took, never below 0.
    """

    # Defaults on the class, not slots: a request then sets only what it has.
    correlation_id = ""
    endpoint = "other"
    service: Service | None = None
    caller = ""
    client_address = ""
    probe = False
    status = 0
    attempts = 0
    retry_denied = False
    replica = ""
    bytes_in = 0
    bytes_out = 0
    first_byte_at: float | None = None
    streamed = False
    cause: Cause | None = None
    reason = ""
    added = b""
    replaced: frozenset[bytes]
    watched = False
    answered_at: float | None = None
    request_whole_at = inf
    received = 0
    sent = 0
    whole = False
    client_left = False
    on_left: Callable[[Message], None] | None = None
    ended = False
    final_status = 0
    cut_short = False
    seconds = 0.0

    def __init__(self) -> None:
        self.started = monotonic()
        self.replaced = NONE

    @staticmethod
    def of(scope: Scope) -> "RequestContext":
        """The context an outer layer made for this request, else a new one (which the caller puts in its scope)."""
        context: RequestContext | None = scope.get(KEY)
        return RequestContext() if context is None else context

    def lose_client(self, message: Message, now: float) -> None:
        """Note an ``http.disconnect``, where our server says what it has answered a body that it could not read on."""
        if not self.whole:
            self.client_left = True
        if self.answered_at is None and "status" in message:
            self.status = message["status"]
            self.answered_at = now
            self.whole = True

    def add(self, lines: bytes, names: frozenset[bytes]) -> None:
        """Put header fields on the answer, whoever gives it.

        Args:
            lines: the fields as on the wire, each begun, not ended, by CRLF, and their names in lower case.
            names: of the fields they take the place of, in the spellings to expect.
        """
        if self.replaced:
            if not names.isdisjoint(self.replaced):  # the same layer, met twice
                self.added = field_lines([field for field in fields_of(self.added) if field[0] not in names])
            names = _union(names, self.replaced)
        self.replaced = names
        self.added += lines

    def unreplaced(self, headers: Iterable[Sequence[bytes]]) -> Iterable[Sequence[bytes]]:
        """Of an answer's header fields those that none of ``added`` takes the place of."""
        fields = [*headers]
        if self.replaced.isdisjoint(map(NAME, fields)):
            return fields
        return [field for field in fields if field[0].lower() not in self.replaced]


def field_lines(fields: Iterable[Header]) -> bytes:
    """Header fields as on the wire, each begun by CRLF."""
    return b"".join([b"\r\n%b: %b" % field for field in fields])


def fields_of(lines: bytes) -> list[Header]:
    """The header fields of such lines."""
    return [(name, value) for name, _, value in [line.partition(b": ") for line in lines.split(b"\r\n")[1:]]]


@lru_cache(maxsize=64)
def _union(names: frozenset[bytes], others: frozenset[bytes]) -> frozenset[bytes]:
    return names | others
