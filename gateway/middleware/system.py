"""The gateway's own paths, and the way of every other request to its service."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from hmac import compare_digest
from time import time
from typing import Any, Protocol
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
OPENMETRICS = b"application/openmetrics-text"


class Routes(Protocol):
    """The services by path; where one leads never changes."""

    def match(self, raw_path: bytes) -> Service | None: ...


class Breakers(Protocol):
    """The circuit breakers; an unknown name is a KeyError (or another LookupError)."""

    def status(self) -> Mapping[str, Mapping[str, Any]]: ...

    def reset_breaker(self, name: str) -> object: ...


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
        allowed: who may ask for the gateway's own paths; None: everyone.
        admin_token: what a reset must bring as its bearer token; None: no reset over HTTP.
        workers: how many workers a reset reaches, in words.
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
            await self._reset(name, scope, send)
        elif endpoint == BREAKERS:
            await self._tell(scope, send, {} if self.breakers is None else self.breakers.status())
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

    async def _reset(self, name: str, scope: Scope, send: Send) -> None:
        if self.admin_token is None:
            message = "Resetting over HTTP is switched off: no ADMIN_TOKEN is set"
            await self._refuse(scope, send, 403, message, "no_admin_token")
            return
        if not _bears(scope, self.admin_token):
            message = "Resetting needs the header Authorization: Bearer, with the admin token"
            await self._refuse(scope, send, 401, message, "unauthorized", (b"www-authenticate", b"Bearer"))
            return
        try:
            if self.breakers is None:
                raise LookupError(name)
            self.breakers.reset_breaker(name)
        except LookupError:
            await self._refuse(scope, send, 404, f"No circuit breaker is called '{name[:100]}'", "unknown_service")
            return
        await self._tell(scope, send, {"service": name, "state": "closed", "workers": self.workers})

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


def _without_body(send: Send) -> Send:
    def send_head(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        return send(message)

    return send_head


def _metrics(scope: Scope) -> ASGIApp:
    from starlette.requests import Request
    from starlette_exporter import handle_metrics, handle_openmetrics  # 150 ms, at the first scrape

    accepts_openmetrics = any(name == b"accept" and OPENMETRICS in value for name, value in scope["headers"])
    handle = handle_openmetrics if accepts_openmetrics else handle_metrics
    response: ASGIApp = handle(Request(scope))
    return response
