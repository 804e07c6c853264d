"""The whole gateway before one service, from its settings to its sockets, and what became of each request."""

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway.app import Gateway, create_app
from gateway.circuit_breaker import circuit_breaker_registry
from gateway.context import KEY, RequestContext
from gateway.settings import Settings
from tests.wire import Answer, Reader, Request, Writer, call, serving_at_the_edge, until

PATH = "/api/v1/chat"
NAME = "chatbot-service"
UNLIMITED = {"RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off"}
NO_BREAKER = {"CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000", "CIRCUIT_BREAKER_WINDOW_SIZE": "10"}  # never reached


class Rig:
    """A gateway; ``contexts`` are of the requests to its service, in the order of their arrival."""

    def __init__(self, port: int, app: Gateway) -> None:
        self.port, self.app = port, app
        self.contexts: list[RequestContext] = []

    async def call(self, target: str = PATH, method: str = "GET", **more: Any) -> Answer:
        return await call(self.port, target, method, **more)

    async def ended(self) -> RequestContext:
        """The last request, once it is over."""
        await until(lambda: self.contexts and self.contexts[-1].ended)
        return self.contexts[-1]

    @property
    def judged(self) -> str:
        """What the breaker of the service made of the last request."""
        breaker = circuit_breaker_registry.get(NAME)
        assert breaker is not None
        status = breaker.status(monotonic())
        if status["failure_count"]:
            return "failure"
        return "success" if status["recent_calls"] else "neutral"


@asynccontextmanager
async def gateway(
    url: str, variables: Mapping[str, str] | None = None, *, max_connections: int = 1000, **more: str
) -> AsyncIterator[Rig]:
    """A gateway under its own server whose chat service has these addresses, with so many connections to each."""
    app = create_app(Settings.load({"CHATBOT_SERVICE_URL": url, **UNLIMITED, **(variables or {}), **more}))
    app.proxy.max_connections = max_connections  # by settings alone, admission would come first
    stack = app.app

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/api/"):
            context = scope.setdefault(KEY, RequestContext())  # of an HTTP request our server has made one
            rig.contexts.append(context)
        await stack(scope, receive, send)

    app.app = watched
    async with serving_at_the_edge(app) as port:
        rig = Rig(port, app)
        yield rig


async def hangs(request: Request, reader: Reader, writer: Writer) -> None:
    """A service that says nothing until its client has left."""
    await reader.read(-1)
    raise ConnectionError


async def timed(answer: Awaitable[Answer]) -> tuple[float, Answer]:
    """How many seconds an answer takes, and the answer."""
    began = monotonic()
    got = await answer
    return monotonic() - began, got
