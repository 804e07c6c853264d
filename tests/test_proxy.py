"""ProxyApp alone, over real sockets: what reaches the service, what reaches the client, and what ends a request."""

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from gateway.proxy.http1 import Http1Connection
from tests.asgi_call import http
from tests.wire import (
    OK,
    Answer,
    Handler,
    Reader,
    Request,
    Service,
    Writer,
    call,
    parse,
    read_body,
    reply,
    send_raw,
    service,
    serving,
    until,
)

QUICK = Timeouts(connect=1, pool=0.05, write=0.3, first_byte=0.3, between_bytes=0.3, answer=1, stream=1, client=0.3)

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


CLIENT = ContextVar("CLIENT", default="http1")  # what the proxy reaches its services with


@pytest.fixture(params=["http1", "httpx"])
def either_client(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests of what holds whichever client the proxy has."""
    token = CLIENT.set(request.param)
    yield
    CLIENT.reset(token)


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


class Rig:
    """A proxy under uvicorn with one service behind it."""

    def __init__(self, port: int, upstream: Service, proxy: ProxyApp, seen: Seen) -> None:
        self.port, self.upstream, self.proxy, self.seen = port, upstream, proxy, seen

    async def call(self, target: str = "/api/x", method: str = "GET", **more: Any) -> Answer:
        return await call(self.port, target, method, **more)

    async def cause(self) -> Cause | None:
        await until(lambda: self.seen.contexts and self.seen.last.cause is not None)
        return self.seen.last.cause

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


# What reaches the service


@with_either_client
async def test_path_and_query_arrive_byte_for_byte() -> None:
    async with rig(path="/base") as gw:
        target = "/api/a%2Fb/%25%20;p=1//x?b=2&a=1&a=1;c=+%20&%C3%A9"
        await gw.call(target)
        assert gw.upstream.requests[0].target == b"/base" + target.encode()


@with_either_client
async def test_host_is_the_services_own_and_the_clients_goes_into_x_forwarded_host() -> None:
    async with rig() as gw:
        await gw.call()
        request = gw.upstream.requests[0]
        assert request.values(b"host") == [b"127.0.0.1:%d" % gw.upstream.port]
        assert request.values(b"x-forwarded-host") == [b"gateway.test"]
        assert request.values(b"x-forwarded-for") == [b"127.0.0.1"]


@with_either_client
async def test_a_service_may_ask_for_the_clients_host() -> None:
    async with rig(preserve_host=True) as gw:
        await gw.call()
        assert gw.upstream.requests[0].values(b"host") == [b"gateway.test"]


@with_either_client
@pytest.mark.parametrize("size", [0, 1, 1000, 65535, 65536, 65537, 300_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_arrives_whole_in_one_framing(size: int, chunked: bool) -> None:
    body = bytes(i % 251 for i in range(size))
    async with rig(reply_with_body()) as gw:
        if chunked:
            parts = [body[i : i + 7000] for i in range(0, size, 7000)]
            framed = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            head = b"POST /api/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            answer = parse(await send_raw(gw.port, head + framed))
        else:
            answer = await gw.call(method="POST", headers=(("Content-Length", "0"),) if not body else (), body=body)
        request = gw.upstream.requests[0]
        assert answer.status == 200
        assert answer.body == request.body == body
        assert len(request.values(b"content-length")) + len(request.values(b"transfer-encoding")) == 1
        assert gw.seen.last.bytes_in == size


def reply_with_body() -> Handler:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        body = await read_body(request, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    return handle


@with_either_client
async def test_a_get_without_a_body_gets_no_framing() -> None:
    async with rig() as gw:
        await gw.call()
        request = gw.upstream.requests[0]
        assert not request.values(b"content-length")
        assert not request.values(b"transfer-encoding")


async def test_connections_to_the_service_are_used_again() -> None:
    async with rig() as gw:
        for _ in range(5):
            assert (await gw.call()).body == b"ok"
        assert gw.upstream.connections == 1


# What reaches the client


@with_either_client
@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (CHUNKED + b"2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\nX-T: 1\r\n\r\n", b"hello"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello", b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 599 \r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 404 Nope\r\nContent-Length: 2\r\n\r\nno", b"no"),
    ],
)  # fmt: skip
async def test_every_framing_of_an_answer_reaches_the_client_whole(answer: bytes, body: bytes) -> None:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(answer)
        if b"Content-Length" not in answer and b"chunked" not in answer:
            writer.close()

    async with rig(handle, retries=0) as gw:
        got = await gw.call()
        assert got.body == body
        assert got.status == int(answer.rsplit(b"HTTP/1.", 1)[1][2:5])
        assert b"x-t" not in dict(got.headers)
        assert await gw.cause() is Cause.COMPLETED


async def test_head_and_304_keep_their_length_and_have_no_body() -> None:
    async with rig(reply(b"HTTP/1.1 200 OK\r\nContent-Length: 911\r\n\r\n")) as gw:
        answer = await gw.call(method="HEAD")
        assert answer.values(b"content-length") == [b"911"]
        assert answer.body == b""
        assert (await gw.call(method="HEAD")).status == 200
        assert gw.upstream.connections == 1
        gw.upstream.handler = reply(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 911\r\nETag: e\r\n\r\n")
        answer = await gw.call()
        assert (answer.status, answer.body, answer.values(b"etag")) == (304, b"", [b"e"])


@with_either_client
async def test_repeated_fields_keep_their_order() -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nX: 1\r\nSet-Cookie: b=2\r\nX: 2\r\nDate: d\r\nContent-Length: 0\r\n\r\n"
    )
    async with rig(reply(head)) as gw:
        names = [(k, v) for k, v in (await gw.call()).headers if k != b"connection"]
        assert names == [
            (b"set-cookie", b"a=1"), (b"x", b"1"), (b"set-cookie", b"b=2"), (b"x", b"2"), (b"date", b"d"),
            (b"content-length", b"0"),
        ]  # fmt: skip


@with_either_client
async def test_each_event_leaves_as_it_arrives() -> None:
    step = asyncio.Event()

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS)
        for number in range(3):
            writer.write(b"9\r\ndata: %d\n\n\r\n" % number)
            await step.wait()
            step.clear()
        writer.write(b"0\r\n\r\n")

    async with rig(handle) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}")
        for number in range(3):
            assert await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % number), 2)
            step.set()
        assert (await reader.readuntil(b"0\r\n\r\n")).endswith(b"0\r\n\r\n")
        writer.close()


@with_either_client
async def test_the_head_of_an_answer_does_not_wait_for_its_body() -> None:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await reader.read(1)

    async with rig(handle, timeouts=Timeouts()) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 2)
        writer.transport.abort()
        await gw.settle()


# What the service does wrong


@with_either_client
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    ],
)
async def test_an_answer_that_is_not_clean_http_becomes_502(answer: bytes) -> None:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(answer)
        writer.close()

    async with rig(handle, retries=0) as gw:
        got = await gw.call()
        assert got.status == 502
        assert b'"bad_gateway"' in got.body
        assert await gw.cause() in (Cause.GARBLED, Cause.RESET)
        await gw.settle()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + OK,
    ],
)
async def test_an_answer_that_lenient_readers_take_becomes_502(answer: bytes) -> None:
    async with rig(reply(answer), retries=0) as gw:
        assert (await gw.call()).status == 502
        assert await gw.cause() is Cause.GARBLED


@with_either_client
async def test_an_answer_that_breaks_off_anywhere_never_looks_whole() -> None:
    whole = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    cut_at = 0

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(whole[:cut_at])
        await writer.drain()
        writer.close()

    async with rig(handle, retries=0) as gw:
        head_ends = whole.index(b"\r\n\r\n") + 4
        for cut_at in range(len(whole)):
            got = await gw.call()
            if cut_at < head_ends:
                assert got.status == 502, cut_at
            else:
                assert got.status == 200
                assert not got.whole, cut_at
        await gw.settle()


@with_either_client
async def test_a_service_that_is_not_there_is_502_and_one_that_is_silent_504() -> None:
    async with rig() as gw:
        await gw.upstream.stop()
        answer = await gw.call()
        assert (answer.status, await gw.cause()) == (502, Cause.CONNECT_FAILED)
        assert b"can't be reached" in answer.body
    async with rig(silent) as gw:
        answer = await gw.call()
        assert (answer.status, await gw.cause()) == (504, Cause.FIRST_BYTE_TIMEOUT)
        assert b'"gateway_timeout"' in answer.body
        await gw.settle()


async def silent(request: Request, reader: Reader, writer: Writer) -> None:
    await reader.read(-1)
    raise ConnectionError


@with_either_client
async def test_a_stalled_answer_is_cut_and_a_stalled_stream_says_so_between_two_events() -> None:
    async def stall(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS)
        writer.write(b"9\r\ndata: 1\n\n\r\n" if request.target.endswith(b"event") else b"6\r\ndata: \r\n")
        await reader.read(1)
        raise ConnectionError

    async with rig(stall) as gw:
        answer = await gw.call("/api/event")
        assert not answer.whole
        assert answer.body.startswith(b'data: 1\n\nevent: error\ndata: {"error":{"type":"gateway_timeout"')
        assert answer.body.endswith(b"}\n\n")
        assert await gw.cause() is Cause.STALLED
        answer = await gw.call("/api/middle")
        assert (answer.body, answer.whole) == (b"data: ", False)
        await gw.settle()


@with_either_client
async def test_an_answer_that_drips_is_ended_by_the_time_for_the_whole() -> None:
    async def drip(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not reader.at_eof():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)
        raise ConnectionError

    async with rig(drip, timeouts=Timeouts(answer=0.3, between_bytes=0.2)) as gw:
        answer = await gw.call()
        assert (answer.status, answer.whole) == (200, False)
        assert await gw.cause() is Cause.ANSWER_TIMEOUT
        await gw.settle()


@with_either_client
async def test_bytes_behind_an_answer_never_reach_another_client() -> None:
    async with rig(reply(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen")) as gw:
        for _ in range(3):
            assert (await gw.call()).body == b"ok"
        assert gw.upstream.connections == 3
        await gw.settle()


# Retries


async def test_a_stale_connection_costs_a_get_nothing_and_a_post_is_never_sent_twice() -> None:
    async def hang_up_on_the_second(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        if sum(seen.connection == request.connection for seen in gw.upstream.requests) > 1:
            writer.close()
        else:
            writer.write(OK)

    async with rig(hang_up_on_the_second) as gw:
        assert (await gw.call()).status == 200
        assert (await gw.call()).status == 200
        assert gw.seen.last.attempts == 2
        before = len(gw.upstream.requests)
        answer = await gw.call(method="POST", body=b"pay")
        assert answer.status == 502
        assert len(gw.upstream.requests) == before + 1


@with_either_client
async def test_a_post_with_an_idempotency_key_is_sent_again_with_its_body() -> None:
    async def fail_once(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        if len(gw.upstream.requests) == 1:
            writer.close()
        else:
            writer.write(OK)

    async with rig(fail_once) as gw:
        answer = await gw.call(method="POST", body=b"pay", headers=(("Idempotency-Key", "k"),))
        assert answer.status == 200
        first, second = gw.upstream.requests
        assert first.body == second.body == b"pay"
        assert second.values(b"x-gateway-attempt") == [b"2"]
        framed = b"POST /api/x HTTP/1.1\r\nHost: h\r\nIdempotency-Key: k\r\nConnection: close\r\n"
        gw.upstream.requests.clear()
        answer = parse(await send_raw(gw.port, framed + b"Transfer-Encoding: chunked\r\n\r\n3\r\npay\r\n0\r\n\r\n"))
        assert answer.status == 200
        assert [request.body for request in gw.upstream.requests] == [b"pay", b"pay"]


@with_either_client
@pytest.mark.parametrize(("after", "status", "times"), [(b"0", 200, 2), (b"5", 503, 1), (b"", 503, 1)])
async def test_a_refusal_is_sent_again_only_where_the_service_says_soon(after: bytes, status: int, times: int) -> None:
    async def refuse_once(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        if len(gw.upstream.requests) > 1:
            writer.write(OK)
            return
        line = b"Retry-After: " + after + b"\r\n" if after else b""
        writer.write(b"HTTP/1.1 503 Busy\r\n" + line + b"Content-Length: 4\r\n\r\nbusy")

    async with rig(refuse_once) as gw:
        answer = await gw.call(method="POST", body=b"x")
        assert (answer.status, len(gw.upstream.requests)) == (status, times)
        assert answer.body == (b"ok" if status == 200 else b"busy")


@with_either_client
async def test_a_dead_replica_costs_nothing_where_another_lives() -> None:
    async with service() as dead:
        url = dead.url
    async with rig(replicas=(url,), random=lambda: 0.99) as gw:
        for _ in range(6):
            assert (await gw.call(method="POST", body=b"x")).status == 200
        assert any(context.attempts == 2 for context in gw.seen.contexts)


# Refused at the door


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "type_"),
    [
        (b"POST /api/x", b"Content-Length: 11\r\n", 413, b"payload_too_large"),
        (b"GET /api/../x", b"", 400, b"bad_request"),
        (b"GET /apiary", b"", 404, b"not_found"),
        (b"TRACE /api/x", b"", 405, b"method_not_allowed"),
        (b"GET /api/x", b"X-Request-Timeout-Ms: soon\r\n", 400, b"bad_request"),
        (b"GET /api/x", b"X-Request-Timeout-Ms: 0\r\n", 504, b"gateway_timeout"),
    ],
)
async def test_what_is_refused_never_reaches_the_service(
    request_line: bytes, headers: bytes, status: int, type_: bytes
) -> None:
    async with rig(max_body_bytes=10) as gw:
        data = request_line + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" + headers + b"\r\n"
        answer = parse(await send_raw(gw.port, data))
        assert answer.status == status
        assert b'"type":"' + type_ + b'"' in answer.body
        assert not gw.upstream.requests


@with_either_client
async def test_a_body_that_grows_past_the_limit_is_413_and_the_service_is_let_go() -> None:
    async with rig(read_all, max_body_bytes=1000) as gw:
        head = b"POST /api/x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(head + b"1f4\r\n" + b"x" * 500 + b"\r\n")
        await until(lambda: gw.upstream.requests)
        writer.write(b"1f5\r\n" + b"x" * 501 + b"\r\n")
        assert parse(await reader.read(-1)).status == 413
        writer.transport.abort()
        assert await gw.cause() is Cause.REFUSED
        await gw.settle()


async def read_all(request: Request, reader: Reader, writer: Writer) -> None:
    await read_body(request, reader)
    writer.write(OK)


async def test_a_request_that_came_through_this_gateway_before_is_508() -> None:
    async with rig() as gw:
        answer = await gw.call(headers=(("Via", "1.1 edge, 1.1 " + gw.proxy.via.decode()),))
        assert answer.status == 508


@with_either_client
async def test_when_all_connections_stay_in_use_the_next_request_is_503() -> None:
    async with rig(silent, max_connections=1) as gw:
        first = asyncio.create_task(gw.call())
        await until(lambda: gw.upstream.requests)
        answer = await gw.call()
        assert answer.status == 503
        assert answer.values(b"retry-after") == [b"1"]
        assert await gw.cause() is Cause.NO_CONNECTION
        assert (await first).status == 504


async def test_requests_wait_their_turn_for_a_connection() -> None:
    async with rig(max_connections=1, timeouts=Timeouts()) as gw:
        answers = await asyncio.gather(*(gw.call() for _ in range(20)))
        assert {answer.status for answer in answers} == {200}
        assert gw.upstream.connections == 1
        await gw.settle()


async def test_an_answer_in_the_very_turn_in_which_the_client_begins_to_be_watched_ends_the_watch_unharmed() -> None:
    async with rig(silent, timeouts=Timeouts()) as gw:
        answer = asyncio.ensure_future(gw.call())
        await until(lambda: gw.upstream.requests)
        (exchange,) = gw.proxy.exchanges
        assert isinstance(exchange._connection, Http1Connection)
        exchange._connection.data_received(OK)
        exchange.expire()  # starts the watcher, which the answer ends before its first step
        assert (await answer).status == 200
        await until(lambda: not gw.proxy.exchanges)
        gc.collect()  # a coroutine that never ran would complain, and any warning fails the test


# Time that the caller allows


@with_either_client
async def test_a_caller_with_little_time_gets_its_answer_in_it_and_the_service_is_told() -> None:
    async with rig(silent, timeouts=Timeouts()) as gw:
        began = asyncio.get_running_loop().time()
        answer = await gw.call(headers=(("X-Request-Timeout-Ms", "100"),))
        assert answer.status == 504
        assert await gw.cause() is Cause.CLIENT_DEADLINE
        assert 0.1 <= asyncio.get_running_loop().time() - began < 2
        left = int(gw.upstream.requests[0].values(b"x-request-timeout-ms")[0])
        assert 0 < left <= 100


# Clients that leave, in each phase


@with_either_client
@pytest.mark.parametrize("phase", ["sending", "waiting", "streaming"])
async def test_a_client_that_leaves_ends_the_upstream_request(phase: str) -> None:
    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        if phase == "streaming":
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await reader.read(-1)
        gw.upstream.left.set()

    async with rig(handle, timeouts=Timeouts()) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        length = 100 if phase == "sending" else 2
        writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n{}" % length)
        await until(lambda: gw.upstream.requests)
        if phase == "streaming":
            await reader.readuntil(b"hi")
        writer.transport.abort()
        async with asyncio.timeout(1):
            await gw.upstream.left.wait()
        assert await gw.cause() is Cause.CLIENT_LEFT
        await gw.settle()
        assert gw.proxy.open_connections == 0


@with_either_client
async def test_a_client_that_leaves_the_queue_for_a_connection_takes_none() -> None:
    go_on = asyncio.Event()

    async def wait(request: Request, reader: Reader, writer: Writer) -> None:
        await go_on.wait()
        writer.write(OK)

    async with rig(wait, max_connections=1, timeouts=Timeouts()) as gw:
        first = asyncio.create_task(gw.call())
        await until(lambda: gw.upstream.requests)
        _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: len(gw.seen.contexts) == 2)
        writer.transport.abort()
        assert await gw.cause() is Cause.CLIENT_LEFT
        go_on.set()
        assert (await first).status == 200
        assert len(gw.upstream.requests) == 1
        await gw.settle()


@with_either_client
async def test_a_slow_reader_is_charged_to_itself_and_the_service_waits_meanwhile() -> None:
    sent = 0

    async def flood(request: Request, reader: Reader, writer: Writer) -> None:
        nonlocal sent
        writer.write(CHUNKED)
        while True:
            writer.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            await writer.drain()
            sent += 65536

    async with rig(flood, timeouts=Timeouts(client=0.4)) as gw:
        _, writer = await asyncio.open_connection("127.0.0.1", gw.port, limit=1024)
        writer.write(b"GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n")
        assert await gw.cause() is Cause.CLIENT_TOO_SLOW
        assert sent < 32 * 1024 * 1024, "only the kernel's buffers fill"
        await gw.settle()
        writer.transport.abort()


async def test_a_client_that_is_slow_over_a_whole_answer_is_charged_to_itself_as_well() -> None:
    async with service() as upstream:
        target = Target(
            name="api", prefix="/api", replicas=(upstream.url,), timeouts=Timeouts(client=0.1, first_byte=0.1)
        )
        context = RequestContext()
        opening: Message = {"type": "http.request", "body": b"", "more_body": False}

        async def receive() -> Message:
            nonlocal opening
            message, opening = opening, {}
            if not message:
                await asyncio.Event().wait()
            return message

        async def send(message: Message) -> None:
            await asyncio.Event().wait()

        with pytest.raises(ConnectionAbortedError):
            await ProxyApp([target])(http("/api", gateway=context), receive, send)
        assert context.cause is Cause.CLIENT_TOO_SLOW


@with_either_client
async def test_a_service_that_stops_taking_the_body_is_a_timeout_of_its_own() -> None:
    async def take_nothing(request: Request, reader: Reader, writer: Writer) -> None:
        await gw.upstream.left.wait()
        raise ConnectionError

    async with rig(take_nothing, max_body_bytes=1 << 30) as gw:
        head = b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 500000000\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(head)
        pump = asyncio.create_task(_pump(writer))
        assert b"504 Gateway" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        assert await gw.cause() is Cause.WRITE_TIMEOUT
        pump.cancel()
        writer.transport.abort()
        gw.upstream.left.set()
        await gw.settle()


async def _pump(writer: Writer) -> None:
    while not writer.is_closing():
        writer.write(b"x" * 65536)
        await writer.drain()


async def test_an_answer_before_the_body_is_up_passes() -> None:
    async def refuse(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno")
        await reader.read(-1)
        raise ConnectionError

    async with rig(refuse) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nstart")
        assert b"403" in await asyncio.wait_for(reader.readuntil(b"no"), 2)
        assert await gw.cause() is Cause.COMPLETED
        writer.transport.abort()
        await gw.settle()
        assert gw.proxy.open_connections == 0


@with_either_client
@pytest.mark.parametrize(
    ("events", "cause"),
    [
        (b"data: 1\n\n", Cause.COMPLETED),
        (b"data: 1\n\nevent: error\ndata: {}\n\n", Cause.ERROR_EVENT),
        (b"data: 1\r\n\r\nevent:error\r\ndata: {}\r\n\r\n", Cause.ERROR_EVENT),
        (b"event: error\ndata: {}\n\ndata: [DONE]\n\n", Cause.COMPLETED),
        (b"data: event: error\n\n", Cause.COMPLETED),
    ],
)
async def test_a_stream_that_ends_in_an_error_event_has_failed(events: bytes, cause: Cause) -> None:
    async def stream(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(EVENTS)
        for byte in events:
            writer.write(b"1\r\n%c\r\n" % byte)
        writer.write(b"0\r\n\r\n")

    async with rig(stream) as gw:
        answer = await gw.call()
        assert (answer.body, answer.whole) == (events, True)
        assert await gw.cause() is cause


@with_either_client
async def test_an_event_that_ends_in_a_read_of_its_own_is_ended_all_the_same() -> None:
    async def stall(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS + b"8\r\ndata: 1\n\r\n")
        await until(lambda: gw.seen.last.bytes_out)
        writer.write(b"1\r\n\n\r\n")
        await reader.read(1)
        raise ConnectionError

    async with rig(stall) as gw:
        assert (await gw.call()).body.startswith(b"data: 1\n\nevent: error\n")


async def test_garbage_that_comes_with_the_head_of_an_answer_is_a_whole_502() -> None:
    async with rig(reply(CHUNKED + b"zz\r\n"), retries=0) as gw:
        answer = await gw.call()
        assert (answer.status, answer.whole) == (502, True)
        assert await gw.cause() is Cause.GARBLED


# The gateway's own ending


@with_either_client
async def test_a_stream_cut_by_the_gateways_stop_gets_an_error_event() -> None:
    async def endless(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(EVENTS)
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await reader.read(-1)
        raise ConnectionError

    async with rig(endless, timeouts=Timeouts()) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n")
        await reader.readuntil(b"data: 1\n\n")
        gw.proxy.cut()
        assert b"event: error" in await asyncio.wait_for(reader.read(-1), 2)
        assert await gw.cause() is Cause.SHUTDOWN
        writer.transport.abort()
        await gw.settle()


@with_either_client
async def test_somebody_elses_cancellation_passes_through_and_leaves_nothing() -> None:
    async with rig(silent, timeouts=Timeouts()) as gw:
        messages: list[Message] = []

        async def receive() -> Message:
            if not gw.upstream.requests and not messages:
                return {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Message) -> None:
            messages.append(message)

        scope: Scope = {
            "type": "http",
            "method": "GET",
            "path": "/api/x",
            "query_string": b"",
            "headers": [],
            "client": None,
        }
        request = asyncio.create_task(gw.proxy(scope, receive, send))
        await until(lambda: gw.upstream.requests)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert not messages
        await gw.settle()


async def test_it_answers_the_lifespan_and_refuses_what_it_does_not_know() -> None:
    proxy = ProxyApp({"/api": "http://127.0.0.1:1"})
    incoming: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    outgoing: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        outgoing.append(message)

    await proxy({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in outgoing] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    with pytest.raises(RuntimeError, match="radio"):
        await proxy({"type": "radio"}, receive, send)
