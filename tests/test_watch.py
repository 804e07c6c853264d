"""What passes between a request and its answer is noted alike by our server and by a watch; so is what layers add."""

import asyncio
import os
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext, field_lines, fields_of
from gateway.middleware.access_log import LoggingASGI
from gateway.middleware.correlation import CorrelationASGI, is_well_formed, random_id
from gateway.middleware.errors import ErrorsASGI
from gateway.middleware.metrics import MetricsASGI
from gateway.middleware.rate_limit import RateLimitASGI
from gateway.server.protocol import GatewayProtocol
from gateway.watch import Watch, end
from tests.asgi_call import call, http
from tests.garbage import cyclic_garbage
from tests.wire import parse, send_raw, serving, until

HEAD = b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n"
START: Message = {"type": "http.response.start", "status": 201, "headers": [(b"content-length", b"9")]}
MORE: Message = {"type": "http.response.body", "body": b"12345", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"6789", "more_body": False}


class Seen:
    """The outermost layer of a test: keeps each request's context, settled when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.contexts: list[RequestContext] = []
        self.by_server: list[bool] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.by_server.append(KEY in scope and scope[KEY].watched)
        context, scope, receive, send = Watch.over(scope, receive, send)
        error = None
        try:
            await self.app(scope, receive, send)
        except BaseException as raised:
            error = raised
            raise
        finally:
            end(context, context.started + 1, error)
            self.contexts.append(context)


@asynccontextmanager
async def under(server: str, app: ASGIApp) -> AsyncIterator[tuple[int, Seen]]:
    seen = Seen(app)
    protocol: Any = GatewayProtocol if server == "ours" else server
    async with serving(seen, http=protocol, lifespan="off") as port:
        yield port, seen
        assert set(seen.by_server) == {server == "ours"}


async def read(receive: Receive) -> None:
    message = await receive()
    while message["type"] == "http.request" and message["more_body"]:
        message = await receive()


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await read(receive)
    await send(START)
    await send(MORE)
    await send(END)


async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
    await read(receive)
    await send(START)
    await send(MORE)
    raise ConnectionAbortedError


async def waits(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def leaves_unread(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send(MORE)
    await send(END)


@pytest.mark.parametrize("server", ["ours", "httptools"])
@pytest.mark.parametrize(
    ("app", "request_", "facts"),
    [
        (answers, b"Content-Length: 3\r\n\r\nabc", (201, 3, 9, True, False, Cause.COMPLETED)),
        (answers, b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n",
         (201, 5, 9, True, False, Cause.COMPLETED)),
        (breaks_off, b"Content-Length: 3\r\n\r\nabc", (201, 3, 5, False, True, Cause.CUT_SHORT)),
        (leaves_unread, b"Content-Length: 3\r\n\r\nabc", (201, 0, 9, True, False, Cause.COMPLETED)),
        (waits, b"Content-Length: 300\r\n\r\nabc", (499, 3, 0, False, True, Cause.CLIENT_LEFT)),
    ],
)  # fmt: skip
async def test_what_passed_is_noted_alike_by_our_server_and_by_a_watch_over_another(
    server: str, app: ASGIApp, request_: bytes, facts: tuple[Any, ...]
) -> None:
    async with under(server, app) as (port, seen):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + request_)
        if app is waits:
            await until(lambda: seen.by_server)
            writer.close()
        await until(lambda: seen.contexts)
        writer.close()
        (context,) = seen.contexts
        assert facts == (
            context.final_status, context.bytes_in, context.bytes_out, context.whole, context.cut_short, context.cause,
        )  # fmt: skip
        assert (context.answered_at is not None) == (context.status == 201)
        assert (context.request_whole_at < float("inf")) == (app not in (waits, leaves_unread))


async def test_an_answer_that_the_client_no_longer_waits_for_counts_as_it_was_given() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await waits(scope, receive, send)
        await answers(scope, receive, send)

    for server in ("ours", "httptools"):
        async with under(server, app) as (port, seen):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HEAD + b"\r\n")
            await until(lambda seen=seen: seen.by_server)  # type: ignore[misc]
            writer.close()
            await until(lambda seen=seen: seen.contexts)  # type: ignore[misc]
            (context,) = seen.contexts
            assert (context.final_status, context.bytes_out, context.cause) == (201, 9, Cause.COMPLETED)


# What layers put on answers


def stacked(app: ASGIApp) -> ASGIApp:
    return CorrelationASGI(ErrorsASGI(RateLimitASGI(app, per_minute=60, per_hour=None)))


@pytest.mark.parametrize("server", ["ours", "httptools"])
async def test_an_answer_has_each_field_of_the_layers_once_in_place_of_the_applications(server: str) -> None:
    headers = [
        (b"x-correlation-id", b"mine"),
        (b"X-RateLimit-Limit-Minute", b"7"),
        (b"content-length", b"0"),
        (b"a", b"b"),
    ]
    start = {"type": "http.response.start", "status": 200, "headers": headers}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start)
        await send({"type": "http.response.body", "body": b""})

    before = [*headers]
    async with serving(stacked(app), http=GatewayProtocol if server == "ours" else server, lifespan="off") as port:
        for _ in range(2):
            answer = parse(
                await send_raw(port, b"GET / HTTP/1.1\r\nHost: h\r\nX-Correlation-ID: abc\r\nConnection: close\r\n\r\n")
            )
            assert answer.values(b"x-correlation-id") == [b"abc"]
            assert answer.values(b"x-ratelimit-limit-minute") == [b"60"]
            assert answer.values(b"a") == [b"b"]
    assert start["headers"] is headers
    assert headers == before, "the application's message is its own"


@pytest.mark.parametrize("server", ["ours", "httptools"])
async def test_an_unexpected_error_tells_the_caller_where_it_stands_too(server: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("x")

    async with serving(stacked(app), http=GatewayProtocol if server == "ours" else server, lifespan="off") as port:
        answer = parse(await send_raw(port, b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"))
        assert answer.status == 500
        assert len(answer.values(b"x-correlation-id")) == len(answer.values(b"x-ratelimit-remaining-minute")) == 1


async def test_an_application_asked_twice_by_a_layer_between_has_its_fields_on_the_answer_once() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    limited = RateLimitASGI(app, per_minute=60, per_hour=None)

    async def tries_again(scope: Scope, receive: Receive, send: Send) -> None:
        await limited(scope, receive, send)
        await limited(scope, receive, send)
        await send(START)
        await send(END)

    answer = await call(CorrelationASGI(tries_again), http())
    headers = answer.sent[0]["headers"]
    assert [value for name, value in headers if name == b"x-ratelimit-remaining-minute"] == [b"58"]
    assert len([value for name, value in headers if name == b"x-correlation-id"]) == 1


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.encode)
NAMES = st.from_regex(rb"[a-z-]{1,20}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, VALUES)))
def test_header_fields_are_the_same_after_a_way_over_the_wire(fields: list[tuple[bytes, bytes]]) -> None:
    assert fields_of(field_lines(fields)) == fields


# The IDs


def test_ids_are_well_formed_and_all_different() -> None:
    ids = {random_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert all(is_well_formed(one) and len(one) == 32 for one in ids)


def test_a_forked_worker_gives_out_none_of_its_parents_ids() -> None:
    random_id()  # the parent has drawn some by now
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.write(writer, b"".join(random_id() for _ in range(500)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as drawn:
        theirs = drawn.read()
    os.waitpid(child, 0)
    assert len(theirs) == 500 * 32
    assert {theirs[i : i + 32] for i in range(0, len(theirs), 32)}.isdisjoint(random_id() for _ in range(500))


# What is left behind


async def test_a_request_leaves_no_cycle_of_objects() -> None:
    lines: list[bytes] = []
    app = CorrelationASGI(LoggingASGI(MetricsASGI(ErrorsASGI(answers)), sink=lines.append))
    request = b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
    for server in ("ours", "httptools"):
        async with serving(app, http=GatewayProtocol if server == "ours" else server, lifespan="off") as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def ask(writer: asyncio.StreamWriter = writer, reader: asyncio.StreamReader = reader) -> None:
                writer.write(request)
                await reader.readuntil(b"123456789")

            for _ in range(10):
                await ask()
            with cyclic_garbage() as garbage:
                for _ in range(100):
                    await ask()
            left = [thing for thing in garbage if isinstance(thing, (RequestContext, Watch, types.CoroutineType))]
            garbage.clear()
            writer.close()
            await writer.wait_closed()
            assert left == []
