"""ProxyApp alone under uvicorn with one service behind it, and what became of each request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from tests.wire import Answer, Handler, Reader, Request, Service, Writer, call, service, serving, until

QUICK = Timeouts(connect=1, pool=0.05, write=0.3, first_byte=0.3, between_bytes=0.3, answer=1, stream=1, client=0.3)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CLIENT = ContextVar("CLIENT", default="http1")  # what the proxy reaches its services with


with_either_client = pytest.mark.usefixtures("either_client")


class Seen:
    """The layer around the proxy in these tests: keeps each request's context, as a log would read it."""

    def __init__(self, app: ProxyApp) -> None:
        self.app = app
        self.contexts: list[RequestContext] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            context = RequestContext()
            self.contexts.append(context)
            scope = {**scope, "gateway": context}
        await self.app(scope, receive, send)

    @property
    def last(self) -> RequestContext:
        return self.contexts[-1]

    async def cause(self) -> Cause | None:
        """How the last request ended, once it has."""
        await until(lambda: self.contexts and self.last.cause is not None)
        return self.last.cause


class Rig:
    """A proxy under uvicorn with one service behind it."""

    def __init__(self, port: int, upstream: Service, proxy: ProxyApp, seen: Seen) -> None:
        self.port, self.upstream, self.proxy, self.seen = port, upstream, proxy, seen

    async def call(self, target: str = "/api/x", method: str = "GET", **more: Any) -> Answer:
        return await call(self.port, target, method, **more)

    async def cause(self) -> Cause | None:
        return await self.seen.cause()

    async def settle(self) -> None:
        """Nothing is left of any request."""
        await until(lambda: not self.proxy.exchanges and self.proxy.open_connections == self.idle)

    @property
    def idle(self) -> int:
        return sum(pool.idle for route in self.proxy._routes.values() for pool in route.pools.values())


@asynccontextmanager
async def rig(handler: Handler | None = None, **options: Any) -> AsyncIterator[Rig]:
    async with service(handler) as upstream:
        options.setdefault("timeouts", QUICK)
        connections = options.pop("max_connections", 1000)
        path = options.pop("path", "")
        more = options.pop("replicas", ())
        chance = options.pop("random", lambda: 0.0)
        target = Target(name="api", prefix="/api", replicas=(upstream.url + path, *more), **options)
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=connections))
        upstreams = {"api": transport} if CLIENT.get() == "httpx" else {}
        proxy = ProxyApp([target], max_connections=connections, upstreams=upstreams, random=chance)
        seen = Seen(proxy)
        async with serving(seen) as port, transport:
            yield Rig(port, upstream, proxy, seen)


async def silent(request: Request, reader: Reader, writer: Writer) -> None:
    await reader.read(-1)
    raise ConnectionError
