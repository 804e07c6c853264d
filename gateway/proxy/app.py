"""ProxyApp: the end of the stack, which forwards each request to its service and streams the answer back."""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2s
from threading import get_ident
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.outbox import Outbox
from gateway.policies.callers import TrustedProxies
from gateway.policies.replicas import Replicas
from gateway.policies.retry import RetryBudget
from gateway.policies.services import Service, ServiceTable, UnsafePathError
from gateway.problems import ForwardingError, answer
from gateway.proxy.exchange import Exchange
from gateway.proxy.route import Route
from gateway.proxy.timers import TimerWheel

if TYPE_CHECKING:
    from gateway.proxy.route import Upstream

UNSAFE_METHODS = frozenset({"CONNECT", "TRACE"})


class ProxyApp:
    """Forward HTTP requests and WebSockets to the services behind their path prefixes.

    Bodies stream both ways with back-pressure, nothing is gathered; a client that leaves ends its upstream request at
    once. What a service does wrong becomes 502 or 504 in the gateway's error form, or cuts the connection where the
    answer has begun.

    Args:
        services: the services, or addresses by prefix: ``{"/api": "http://127.0.0.1:9000"}``; several replicas of one
            are separated by commas. The path is passed on whole, prefix included.
        trusted_proxies: peers whose ``X-Forwarded-*`` are believed: addresses, networks, ``unix``.
        max_connections: to each replica.
        upstreams: by the name of a service, an httpx transport (or client, for the transport it would use) to reach it
            through: HTTP/2, a forward proxy, an application or a mock. It stays its owner's to close.
        random: what choices among replicas and back-off draw from: numbers from 0 up to 1.

    Raises:
        ValueError: ``upstreams`` names a service that is not there.
    """

    def __init__(
        self,
        services: Iterable[Service] | Mapping[str, str],
        *,
        trusted_proxies: Iterable[str] = ("127.0.0.0/8", "::1", "unix"),
        max_connections: int = 1000,
        upstreams: "Mapping[str, Upstream] | None" = None,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.services = ServiceTable(_services(services))
        self.trusted = TrustedProxies(trusted_proxies)
        self.max_connections = max_connections
        self.upstreams = dict(upstreams or {})
        unknown = self.upstreams.keys() - {service.name for service in self.services.services}
        if unknown:
            raise ValueError(f"No service is called {', '.join(sorted(unknown))}")
        # The same for all workers and pods of one configuration, another for a gateway before or behind this one.
        digest = blake2s(repr(self.services.services).encode(), digest_size=4).hexdigest()
        self.via = b"ai-gateway-" + digest.encode()
        self._loop: asyncio.AbstractEventLoop | None = None  # where all the following is at home
        self._home_thread = 0  # in which that loop runs
        self._wheel: TimerWheel | None = None
        self._outbox: Outbox | None = None
        self._random = random
        self._routes: dict[str, Route] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in ("http", "websocket"):
            if kind != "lifespan":
                raise RuntimeError(f"ProxyApp does not know what to do with {kind!r}")
            await self._lifespan(receive, send)
            return
        context = RequestContext.of(scope)
        if context.service is None and not await self._find_service(scope, send, context):
            return
        assert context.service is not None
        # There is one where our connections are at home. The loop is named, lest the kernel be asked for it.
        task = asyncio.current_task(self._loop) if get_ident() == self._home_thread else None
        if task is None:
            task = self._settle()
        route = self._routes.get(context.service.name) or self._add_route(context.service)
        if kind == "http":
            await Exchange(self, route, task, scope, receive, send, context).run()
        else:
            from gateway.proxy.websocket import relay  # loads `websockets`, which few embedders need

            await relay(self, route, scope, receive, send, context)

    async def _find_service(self, scope: Scope, send: Send, context: RequestContext) -> bool:
        """Where no outer layer has: find the service of a path, or refuse the request."""
        if scope.get("method") in UNSAFE_METHODS:
            await _refuse(scope, send, context, 405, "The gateway does not forward this method", "method")
            return False
        try:
            context.service = self.services.match(scope.get("raw_path") or quote(scope["path"]).encode())
        except UnsafePathError as unsafe:
            await _refuse(scope, send, context, 400, str(unsafe), "unsafe_path")
            return False
        if context.service is None:
            await _refuse(scope, send, context, 404, "No route for this path", "no_route")
        return context.service is not None

    @property
    def exchanges(self) -> list[Exchange]:
        """The HTTP requests under way."""
        watched = () if self._wheel is None else self._wheel.watched()
        return [deadline for deadline in watched if isinstance(deadline, Exchange)]

    @property
    def routes(self) -> list[Route]:
        """The services that were asked for so far."""
        return [*self._routes.values()]

    @property
    def open_connections(self) -> int:
        """To all services."""
        return sum(route.open_connections for route in self._routes.values())

    def replicas(self) -> dict[str, list[dict[str, Any]]]:
        """By service, what this process knows of each replica; ``Replicas.status`` says what that is."""
        now = self._loop.time() if self._loop is not None else 0.0
        routes = self._routes
        return {
            service.name: (
                routes[service.name].replicas if service.name in routes else Replicas(service.replicas)
            ).status(now)
            for service in self.services.services
        }

    @property
    def retries_left(self) -> dict[str, int]:
        """By service, how many retries its budget has now."""
        left = dict.fromkeys((service.name for service in self.services.services), int(RetryBudget.RESERVE))
        if self._loop is not None:
            now = self._loop.time()
            left.update({name: route.budget.left(now) for name, route in self._routes.items()})
        return left

    def cut(self) -> None:
        """End every answer that still runs: with an ``error`` event where that is possible (RESILIENCE.md, 6)."""
        for exchange in self.exchanges:
            exchange.abort(ForwardingError(Cause.SHUTDOWN, "The gateway is shutting down"))

    async def aclose(self) -> None:
        """Close the connections that wait for a request."""
        for route in self._routes.values():
            await route.aclose()
        self._routes.clear()
        if self._wheel is not None:
            self._wheel.close()
        self._wheel, self._outbox, self._home_thread = None, None, 0

    def _settle(self) -> "asyncio.Task[Any]":
        """Start afresh in the loop that runs here: connections belong to one. The task that asks is given back."""
        loop = asyncio.get_running_loop()
        self._loop, self._home_thread = loop, get_ident()
        self._wheel, self._outbox = TimerWheel(loop), Outbox(loop)
        self._routes.clear()
        task = asyncio.current_task(loop)
        assert task is not None
        return task

    def _add_route(self, service: Service) -> Route:
        assert self._wheel is not None
        assert self._outbox is not None
        route = Route(
            service,
            wheel=self._wheel,
            outbox=self._outbox,
            max_connections=self.max_connections,
            random=self._random,
            upstream=self.upstreams.get(service.name),
        )
        self._routes[service.name] = route
        return route

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


def _services(given: Iterable[Service] | Mapping[str, str]) -> Iterable[Service]:
    if not isinstance(given, Mapping):
        return given
    return [
        Service(name=prefix.strip("/") or "root", prefix=prefix, replicas=tuple(urls.replace(" ", "").split(",")))
        for prefix, urls in given.items()
    ]


async def _refuse(scope: Scope, send: Send, context: RequestContext, status: int, message: str, reason: str) -> None:
    context.cause, context.reason = Cause.REFUSED, reason
    await answer(scope, send, status, message, reason=reason)
