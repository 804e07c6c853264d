"""One request to an ASGI application without a server: what it sent, what it raised, and who is to answer for it."""

import asyncio
from collections.abc import Iterable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Scope

Header = tuple[bytes, bytes]


def http(path: str = "/", method: str = "GET", **extra: Any) -> Scope:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": b"",
        "headers": [],
        "client": ("192.0.2.7", 1234),
        "extensions": {},
        **extra,
    }


def websocket(path: str = "/", **extra: Any) -> Scope:
    scope = http(path, extensions={"websocket.http.response": {}}, **extra)
    del scope["method"]
    return {**scope, "type": "websocket", "subprotocols": []}


class Answer:
    """What came of it."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.error: BaseException | None = None

    @property
    def status(self) -> int:
        starts = [message for message in self.sent if message["type"].endswith("response.start")]
        assert len(starts) == 1
        status: int = starts[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(next(message["headers"] for message in self.sent if "headers" in message))

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent if message["type"].endswith("response.body"))

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def whole(self) -> bool:
        last = self.sent[-1]
        return bool(last["type"].endswith("response.body")) and not last.get("more_body", False)


async def call(app: ASGIApp, scope: Scope, received: Iterable[Message] | None = None) -> Answer:
    """Call an application with these messages, after which it hears nothing more; its exception is kept."""
    if received is None:
        opening: Message = {"type": "http.request", "body": b"", "more_body": False}
        received = [opening if scope["type"] == "http" else {"type": "websocket.connect"}]
    coming = iter(received)
    answer = Answer()
    given = {name: list(value) if isinstance(value, list) else value for name, value in scope.items()}

    async def receive() -> Message:
        message = next(coming, None)
        if message is None:
            await asyncio.Event().wait()
            raise AssertionError
        return message

    async def send(message: Message) -> None:
        answer.sent.append(message)

    try:
        await app(scope, receive, send)
    except BaseException as error:
        answer.error = error
    assert scope == given, "an outer layer's scope is not to be changed"
    return answer
