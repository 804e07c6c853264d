"""ProxyApp alone, over real sockets: what reaches the service, what reaches the client, and what is refused."""

import asyncio
import gc

import pytest
from starlette.types import Message

from gateway.context import Cause
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from gateway.proxy.http1 import Http1Connection
from tests.proxy_rig import CHUNKED, EVENTS, rig, silent, with_either_client
from tests.wire import OK, Handler, Reader, Request, Writer, parse, read_body, reply, send_raw, until

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
