"""The gateway's own paths, and the way of every other request to its service."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hmac import compare_digest
from time import time
from typing import Any, Protocol
from urllib.parse import quote

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.circuit_breaker import check_reason
from gateway.context import KEY, Cause, RequestContext
from gateway.policies.health import Health
from gateway.policies.services import Service, UnsafePathError
from gateway.problems import answer, answer_json

BREAKERS = "/circuit-breakers"
RESET = "/circuit-breakers/{service}/reset"
READS = ("GET", "HEAD")
ALLOWED = {  # by endpoint
    "/health": READS,
    "/health/live": READS,
    "/health/ready": READS,
    "/metrics": READS,
    BREAKERS: READS,
    RESET: ("POST",),
}
ENDPOINTS = {endpoint.encode(): endpoint for endpoint in ALLOWED if endpoint is not RESET}
NEVER_FORWARDED = frozenset({"CONNECT", "TRACE"})
FORWARDED = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
MOST_REMEMBERED = 2048  # paths and where they lead; at most 512 KiB of them
LONGEST_REMEMBERED = 256
QUESTION_MARK = ord("?")  # a search for a byte by its number is many times faster than by a string of one
LONGEST_REASON = 4096  # bytes of a reset's body: 200 characters of a reason, however they are written


class Routes(Protocol):
    """The services by path; where one leads never changes."""

    def match(self, raw_path: bytes) -> Service | None: ...


class Breakers(Protocol):
    """The circuit breakers of this worker."""

    def status(self) -> Mapping[str, Mapping[str, Any]]: ...

    def reset_breaker(self, name: str, *, by: str, reason: str) -> object: ...


class Fleet(Protocol):
    """Those of all workers: with ``workers`` in each status, and returned by a reset, in words."""

    async def status(self) -> Mapping[str, Mapping[str, Any]]: ...

    async def reset_breaker(self, service: str, *, by: str, reason: str) -> str:
        """Raises LookupError where no worker has such a breaker."""


class Peers(Protocol):
    """A set of addresses; None is the peer of a unix socket."""

    def contains(self, host: str | None) -> bool: ...


def _nothing() -> None: ...


class SystemASGI:
    """Answer health, metrics and circuit breakers here; find the service of every other path, or refuse it.

    Embedded alone, without services, it passes on whatever is not its own.

    Args:
        app: the ASGI application to wrap, which is told the service and the endpoint in the request's context.
        services: where paths lead.
        health: what the health paths report; without one, that all is well.
        breakers: what ``/circuit-breakers`` shows and resets.
        fleet: the same over all workers, shown and reset in place of those of this one.
        replicas: what is known of each service's replicas, shown there with ``?replicas=1``.
        allowed: who may ask for the gateway's own paths; None: everyone.
        admin_token: what a reset must bring as its bearer token; None: no reset over HTTP.
        workers: for how many workers this one speaks without a fleet, in words.
        before_metrics: called before each answer of ``/metrics``, to bring it up to date.
        now: seconds since 1970.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        services: Routes | None = None,
        health: Health | None = None,
        breakers: Breakers | None = None,
        fleet: Fleet | None = None,
        replicas: Callable[[], Mapping[str, Sequence[Mapping[str, Any]]]] = dict,
        allowed: Peers | None = None,
        admin_token: str | None = None,
        workers: str = "1 of 1",
        before_metrics: Callable[[], None] = _nothing,
        now: Callable[[], float] = time,
    ) -> None:
        if health is None:
            health = Health()
            health.serve()
        self.app = app
        self.health = health
        self.breakers = breakers
        self.fleet = fleet
        self.replicas = replicas
        self.allowed = allowed
        self.admin_token = admin_token.encode() if admin_token else None
        self.workers = workers
        self.before_metrics = before_metrics
        self.now = now
        self.services = services
        self._remembered: dict[bytes, Service] = {}  # where the paths of late led

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        if context is None:
            context = RequestContext()
            scope = {**scope, KEY: context}
        service = self._remembered.get(scope.get("raw_path", b""))
        if service is None or scope.get("method") in NEVER_FORWARDED:
            await self._find(context, scope, receive, send)
            return
        context.service = service
        context.endpoint = service.prefix
        await self.app(scope, receive, send)

    async def _find(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a path of the gateway's own; look up another's service, or refuse it."""
        raw_path = _raw_path(scope)
        endpoint = ENDPOINTS.get(raw_path)
        name = b""
        if endpoint is None and raw_path.startswith(b"/circuit-breakers/"):
            name, slash, verb = raw_path.removeprefix(b"/circuit-breakers/").partition(b"/")
            endpoint = RESET if name and slash and verb == b"reset" else None
        if endpoint is not None:
            context.endpoint = endpoint
            await self._answer(endpoint, name.decode("ascii", "replace"), scope, receive, send)
            return

        if (method := scope.get("method", "GET")) in NEVER_FORWARDED or raw_path == b"*":
            message = f"{method} is not forwarded" if raw_path != b"*" else "Nothing is at '*'"
            await self._refuse(scope, send, 405, message, "method_not_allowed", (b"allow", FORWARDED.encode()))
            return
        if self.services is not None:
            try:
                service = self.services.match(raw_path)
            except UnsafePathError as error:
                await self._refuse(scope, send, 400, str(error), "unsafe_path")
                return
            if service is None:
                await self._refuse(scope, send, 404, "No route for this path", "no_route")
                return
            context.service = service
            context.endpoint = service.prefix
            self._remember(raw_path, service)
        await self.app(scope, receive, send)

    def _remember(self, raw_path: bytes, service: Service) -> None:
        if len(raw_path) <= LONGEST_REMEMBERED:  # long ones, which a stranger may make up, are not worth it
            if len(self._remembered) >= MOST_REMEMBERED:
                self._remembered.clear()
            self._remembered[raw_path] = service

    async def _answer(self, endpoint: str, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if self.allowed is not None and not self.allowed.contains(client[0] if client else None):
            await self._refuse(scope, send, 403, "This path is not open to your address", "system_from")
            return
        if scope["type"] == "websocket":
            await self._refuse(scope, send, 404, "No WebSocket is at this path", "no_route")
            return
        allowed = ALLOWED[endpoint]
        method = scope["method"]
        if method not in allowed:
            message = f"{method} is not allowed here"
            await self._refuse(scope, send, 405, message, "method_not_allowed", (b"allow", ", ".join(allowed).encode()))
            return
        if method == "HEAD":
            send = _without_body(send)

        if endpoint == RESET:
            await self._reset(name, scope, receive, send)
        elif endpoint == BREAKERS:
            await self._show_breakers(scope, send)
        elif endpoint == "/metrics":
            self.before_metrics()
            response = await asyncio.to_thread(_metrics, scope)  # many series take a while: requests go on meanwhile
            await response(scope, receive, send)
        else:
            judge = self.health.liveness if endpoint == "/health/live" else self.health.report
            status, body = judge(self.now())
            await self._tell(scope, send, body, status)

    async def _tell(self, scope: Scope, send: Send, body: Mapping[str, Any], status: int = 200) -> None:
        await answer_json(scope, send, status, body, [(b"cache-control", b"no-store")])

    async def _show_breakers(self, scope: Scope, send: Send) -> None:
        shown: dict[str, Mapping[str, Any]] = {}
        if self.fleet is not None:
            shown.update(await self.fleet.status())
        elif self.breakers is not None:
            shown = {name: {**status, "workers": self.workers} for name, status in self.breakers.status().items()}
        if b"replicas=1" in scope.get("query_string", b"").split(b"&"):
            replicas = self.replicas()
            shown = {name: {**status, "replicas": replicas.get(name, ())} for name, status in shown.items()}
        await self._tell(scope, send, shown)

    async def _reset(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        if self.admin_token is None:
            message = "Resetting over HTTP is switched off: no ADMIN_TOKEN is set"
            await self._refuse(scope, send, 403, message, "no_admin_token")
            return
        if not _bears(scope, self.admin_token):
            message = "Resetting needs the header Authorization: Bearer, with the admin token"
            await self._refuse(scope, send, 401, message, "unauthorized", (b"www-authenticate", b"Bearer"))
            return
        try:
            reason = await _read_reason(receive)
        except OverflowError:
            await self._refuse(scope, send, 413, f"A reason takes at most {LONGEST_REASON} bytes", "body_too_large")
            return
        except ValueError as error:
            await self._refuse(scope, send, 400, f'The body may be {{"reason": "..."}}: {error}', "bad_reason")
            return
        if reason is None:  # its client left
            return
        client = scope.get("client")
        by = client[0] if client else "the peer of a unix socket"
        workers = self.workers
        try:
            if self.fleet is not None:
                workers = await self.fleet.reset_breaker(name, by=by, reason=reason)
            elif self.breakers is None or name not in self.breakers.status():  # else it might look for it elsewhere
                raise LookupError(name)
            else:
                self.breakers.reset_breaker(name, by=by, reason=reason)
        except LookupError:
            await self._refuse(scope, send, 404, f"No circuit breaker is called '{name[:100]}'", "unknown_service")
            return
        await self._tell(scope, send, {"service": name, "state": "closed", "workers": workers})

    async def _refuse(
        self, scope: Scope, send: Send, status: int, message: str, reason: str, *headers: tuple[bytes, bytes]
    ) -> None:
        context = RequestContext.of(scope)
        context.cause, context.reason = Cause.REFUSED, reason
        await answer(scope, send, status, message, headers=headers, reason=reason)


def _raw_path(scope: Scope) -> bytes:
    """The path as on the request line; some servers do not tell, and some leave the query on."""
    raw: bytes | None = scope.get("raw_path")
    if raw is None:
        return quote(scope["path"], safe="/:@!$&'()*+,;=~", errors="surrogatepass").encode()
    return raw.partition(b"?")[0] if QUESTION_MARK in raw else raw


def _bears(scope: Scope, token: bytes) -> bool:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return False
    scheme, _, credentials = given[0].partition(b" ")
    return compare_digest(credentials.strip(), token) and scheme.lower() == b"bearer"


async def _read_reason(receive: Receive) -> str | None:
    """Why a breaker is reset, from a request's body, which may be empty; None where it does not come whole.

    Raises:
        OverflowError: the body is too large.
        ValueError: it is not what it may be.
    """
    body, more_body = b"", True
    while more_body:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more_body = message.get("more_body", False)
        if len(body) > LONGEST_REASON:
            raise OverflowError
    if not body:
        return ""
    given = orjson.loads(body)
    if not isinstance(given, dict) or given.keys() - {"reason"} or not isinstance(given.get("reason", ""), str):
        raise ValueError("nothing else, and a text")
    return check_reason(given.get("reason", ""))


def _without_body(send: Send) -> Send:
    def send_head(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        return send(message)

    return send_head


def _metrics(scope: Scope) -> ASGIApp:
    from gateway.backends.prometheus import exposition  # 150 ms, at the first scrape

    return exposition(scope)
