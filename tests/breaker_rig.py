"""A breaker layer around applications that answer, crash and leave as they are told."""

import asyncio
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.circuit_breaker import CircuitBreakerConfig
from gateway.context import KEY, Cause, RequestContext
from gateway.middleware.breaker import BreakerASGI
from tests.clocks import FakeClock

DISCONNECT = {"type": "http.disconnect"}
WS_DENIAL: dict[str, Any] = {"extensions": {"websocket.http.response": {}}}


class Answer:
    """What a request was answered, as far as it was."""

    def __init__(self, sent: list[Message]) -> None:
        self.sent = sent
        start: Message = next((message for message in sent if message["type"].endswith("response.start")), {})
        self.status: int | None = start.get("status")
        self.headers = dict(start.get("headers", ()))
        self.body = b"".join(message.get("body", b"") for message in sent)


async def ask(app: ASGIApp, *incoming: Message, send: Send | None = None, **scope: Any) -> Answer:
    """Send a request, or a WebSocket's messages, through ``app``; once they are read it waits for ever."""
    sent: list[Message] = []
    kind = scope.setdefault("type", "http")
    first = (
        {"type": "http.request", "body": b"", "more_body": False} if kind == "http" else {"type": "websocket.connect"}
    )
    messages = list(incoming or (first,))

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def keep(message: Message) -> None:
        sent.append(message)

    usual = {"method": "POST", "path": "/", "headers": [], "query_string": b"", "client": ("127.0.0.1", 5000)}
    with suppress(Crash):
        await app({**usual, **scope}, receive, send or keep)
    return Answer(sent)


class Crash(Exception):  # noqa: N818  it is the application's, not ours
    """An application's mishap."""


def answering(*messages: Message, crash: BaseException | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if crash is not None:
            raise crash

    return app


def start(status: int = 200, kind: str = "http.response") -> Message:
    return {"type": f"{kind}.start", "status": status, "headers": []}


def body(content: bytes = b"", *, more: bool = False, kind: str = "http.response") -> Message:
    return {"type": f"{kind}.body", "body": content, "more_body": more}


def ok(status: int = 200) -> ASGIApp:
    return answering(start(status), body(b"done"))


def saying(cause: Cause | None, app: ASGIApp, **facts: Any) -> ASGIApp:
    """An application that knows why the request ended, as the proxy does."""

    async def knowing(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            context: RequestContext = scope[KEY]
            context.cause = cause
            for name, value in facts.items():
                setattr(context, name, value)

    return knowing


class Watched:
    """A breaker layer whose application can be exchanged, and whose outcomes can be counted."""

    def __init__(self, clock: FakeClock, config: CircuitBreakerConfig | None = None) -> None:
        self.clock = clock
        self.app: ASGIApp = ok()
        self.layer = BreakerASGI(self._call, config=config, clock=clock)
        assert self.layer.breaker is not None
        self.breaker = self.layer.breaker
        self.asked = 0

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        await self.app(scope, receive, send)

    async def ask(self, app: ASGIApp | None = None, *incoming: Message, **scope: Any) -> Answer:
        self.app = app or self.app
        return await ask(self.layer, *incoming, **scope)

    async def fail(self, times: int = 5) -> None:
        for _ in range(times):
            await self.ask(ok(500))

    async def half_open(self) -> None:
        await self.fail()
        self.clock.advance(60)

    @property
    def state(self) -> str:
        return str(self.breaker.status(self.clock())["state"])

    @property
    def outcomes(self) -> tuple[int, int]:
        """Successes and failures in the window."""
        status = self.breaker.status(self.clock())
        return status["recent_calls"] - status["recent_failures"], status["recent_failures"]


def attempting(app: ASGIApp) -> ASGIApp:
    async def attempts(scope: Scope, receive: Receive, send: Send) -> None:
        scope[KEY].attempts += 1
        await app(scope, receive, send)

    return attempts
