"""Each layer alone, around a Starlette application and around a bare one: HTTP, WebSocket, lifespan, a stream."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from asgi_lifespan import LifespanManager
from httpx import ASGITransport, AsyncClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import gateway
from gateway import (
    AdmissionASGI,
    BreakerASGI,
    CorrelationASGI,
    ErrorsASGI,
    LoggingASGI,
    MetricsASGI,
    ProxyApp,
    RateLimitASGI,
    SystemASGI,
)
from tests.asgi_call import call, http, websocket
from tests.wire import service

LAYERS: dict[str, Callable[[ASGIApp], ASGIApp]] = {
    "correlation": CorrelationASGI,
    "logging": lambda app: LoggingASGI(app, sink=lambda line: None),
    "metrics": MetricsASGI,
    "errors": ErrorsASGI,
    "system": SystemASGI,
    "admission": AdmissionASGI,
    "rate_limit": lambda app: RateLimitASGI(app, per_minute=60, per_hour=1000),
    "breaker": lambda app: BreakerASGI(app, name="my-app"),
}


@pytest.fixture(params=sorted(LAYERS))
def layer(request: pytest.FixtureRequest) -> Callable[[ASGIApp], ASGIApp]:
    name: str = request.param
    return LAYERS[name]


def starlette_app(events: list[str]) -> Starlette:
    async def hello(request: Request) -> JSONResponse:
        return JSONResponse({"body": (await request.body()).decode()}, headers={"X-Own": "1"})

    async def stream(request: Request) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            for number in range(3):
                yield b"%d" % number

        return StreamingResponse(parts())

    async def broken(request: Request) -> JSONResponse:
        raise KeyError("secret")

    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        events.append("started")
        yield
        events.append("stopped")

    from contextlib import asynccontextmanager

    return Starlette(
        routes=[
            Route("/hello", hello, methods=["POST"]),
            Route("/stream", stream),
            Route("/broken", broken),
        ],
        lifespan=asynccontextmanager(lifespan),
    )


async def test_around_starlette_answers_streams_and_lifespan_pass(layer: Callable[[ASGIApp], ASGIApp]) -> None:
    events: list[str] = []
    app = layer(starlette_app(events))
    async with LifespanManager(app), AsyncClient(transport=ASGITransport(app), base_url="http://t") as client:
        assert events == ["started"]
        answer = await client.post("/hello", content=b"hi")
        assert (answer.status_code, answer.json(), answer.headers["x-own"]) == (200, {"body": "hi"}, "1")
        assert (await client.get("/stream")).content == b"012"
        assert (await client.get("/missing")).status_code == 404
    assert events == ["started", "stopped"]


async def test_mounted_without_a_lifespan_it_works_too(layer: Callable[[ASGIApp], ASGIApp]) -> None:
    outer = Starlette(routes=[Mount("/inner", layer(starlette_app([])))])
    async with AsyncClient(transport=ASGITransport(outer), base_url="http://t") as client:
        assert (await client.post("/inner/hello", content=b"hi")).json() == {"body": "hi"}


async def bare(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "hello"})
        await send({"type": "websocket.close", "code": 1000})
    elif scope["type"] == "http":
        if scope["path"] == "/broken":
            raise KeyError("secret")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})
    else:
        await send({"type": "seen"})


async def test_around_a_bare_application(layer: Callable[[ASGIApp], ASGIApp]) -> None:
    app = layer(bare)
    answer = await call(app, http("/x"))
    assert (answer.status, answer.body, answer.headers[b"x-own"]) == (200, b"one two", b"1")
    answer = await call(app, websocket("/x"))
    assert [message["type"] for message in answer.sent] == ["websocket.accept", "websocket.send", "websocket.close"]
    answer = await call(app, {"type": "whatever.comes"}, [])
    assert answer.sent == [{"type": "seen"}]


async def test_what_a_layer_does_not_handle_it_raises_on(layer: Callable[[ASGIApp], ASGIApp]) -> None:
    app = layer(bare)
    answer = await call(app, http("/broken"))
    if isinstance(app, ErrorsASGI):
        assert answer.status == 500
        assert b"secret" not in answer.body
    else:
        assert isinstance(answer.error, KeyError)


async def test_the_proxy_alone_forwards_to_addresses_by_prefix() -> None:
    async with service() as upstream:
        app = Starlette(routes=[Mount("/", ProxyApp({"/api": upstream.url}))])
        async with AsyncClient(transport=ASGITransport(app), base_url="http://t") as client:
            assert (await client.get("/api/x?y=1")).text == "ok"
            assert (await client.post("/api/x", content=b"body")).text == "ok"
            assert (await client.get("/other")).status_code == 404
        assert [request.target for request in upstream.requests] == [b"/api/x?y=1", b"/api/x"]
        assert upstream.requests[1].body == b"body"


async def test_layers_nest_in_any_order() -> None:
    app: ASGIApp = bare
    for make in LAYERS.values():
        app = make(app)
    answer = await call(app, http("/x"))
    assert (answer.status, answer.body) == (200, b"one two")
    assert b"x-correlation-id" in answer.headers
    assert b"x-ratelimit-limit-minute" in answer.headers


async def test_admission_refuses_the_request_that_is_one_too_many() -> None:
    passing: list[Any] = []

    async def outer(scope: Scope, receive: Receive, send: Send) -> None:
        passing.append(await call(app, http("/second")))
        await bare(scope, receive, send)

    app = AdmissionASGI(outer, max_in_flight=1)
    assert (await call(app, http("/first"))).status == 200
    (second,) = passing
    assert (second.status, second.json["error"]["reason"]) == (503, "full")
    assert second.headers[b"retry-after"] == b"1"
    assert app.in_flight == 0


def test_every_public_name_can_be_had_and_no_other() -> None:
    for name in gateway.__all__:
        assert getattr(gateway, name) is not None
    with pytest.raises(AttributeError, match="NoSuchLayer"):
        _ = gateway.NoSuchLayer


async def test_a_correlation_id_is_on_denials_and_acceptances_of_websockets() -> None:
    headers = [(b"x-correlation-id", b"abc")]
    answer = await call(CorrelationASGI(bare), websocket("/x", headers=headers))
    assert dict(answer.sent[0]["headers"])[b"x-correlation-id"] == b"abc"

    async def deny(scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {"type": "websocket.http.response.start", "status": 403, "headers": []}
        await send(start)
        await send({"type": "websocket.http.response.body", "body": b""})

    answer = await call(CorrelationASGI(deny), websocket("/x", headers=[(b"x-correlation-id", b"not well formed")]))
    (named,) = [value for name, value in answer.sent[0]["headers"] if name == b"x-correlation-id"]
    assert named != b"not well formed"


async def test_header_fields_may_be_lists_in_place_of_tuples() -> None:
    names = ("X-User-ID", "X-Correlation-ID", "Origin", "Connection", "X-Own", "X-Forwarded-For", "Via")
    headers: list[Any] = [[name.lower().encode(), b"abc"] for name in names]
    async with service() as upstream:
        app: ASGIApp = ProxyApp({"/api": upstream.url})
        for name in sorted(LAYERS):
            app = LAYERS[name](app)
        for method in ("GET", "OPTIONS"):
            answer = await call(app, http("/api/x", method, headers=headers, client=("127.0.0.1", 1)))
            assert (answer.error, answer.status) == (None, 200)
            assert answer.headers[b"x-correlation-id"] == b"abc"
            assert upstream.requests[-1].values(b"x-own") == [b"abc"]

    async def answers_in_lists(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": 200, "headers": [[b"content-length", b"0"], [b"x-a", b"1"]]}
        )
        await send({"type": "http.response.body", "body": b""})

    app = answers_in_lists
    for name in sorted(LAYERS):
        app = LAYERS[name](app)
    answer = await call(app, http("/api/x", headers=headers))
    assert (answer.error, answer.headers[b"x-a"]) == (None, b"1")
