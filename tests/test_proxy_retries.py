"""ProxyApp alone: which requests are sent again, and where to."""

import asyncio

import pytest

from tests.proxy_rig import rig, with_either_client
from tests.wire import (
    OK,
    Answer,
    Reader,
    Request,
    Writer,
    connected,
    parse,
    read_answer,
    read_body,
    send_raw,
    service,
    until,
)


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
        assert (first.values(b"x-gateway-attempt"), second.values(b"x-gateway-attempt")) == ([b"1"], [b"2"])
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


async def test_a_request_never_comes_between_the_parts_of_a_body_that_a_service_has_not_taken_yet() -> None:
    seconds: list[asyncio.Task[Answer]] = []

    async def answer_before_reading(request: Request, reader: Reader, writer: Writer) -> None:
        if request.target == b"/api/first":
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: gw.proxy.exchanges[0]._uploaded)
            writer.write(OK)
            await until(lambda: gw.seen.contexts[0].cause)
            seconds.append(asyncio.create_task(gw.call("/api/second", "POST", body=b"pay")))
            await until(lambda: len(gw.seen.contexts) == 2 and gw.seen.last.attempts)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
        await read_body(request, reader)
        if request.target == b"/api/second":
            writer.write(OK)

    async with rig(answer_before_reading) as gw, connected(gw.port) as (reader, writer):
        writer.write(b"POST /api/first HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        await until(lambda: gw.upstream.requests)
        sent, piece = 1, bytes(10_000)
        to_service = gw.proxy.exchanges[0]._connection.transport  # type: ignore[union-attr]
        while not to_service.get_write_buffer_size():  # the kernel takes more yet
            writer.write(b"2710\r\n%b\r\n" % piece)
            sent += len(piece)
            await until(lambda: gw.seen.last.bytes_in == sent)  # noqa: B023
        writer.write(b"186a0\r\n%b\r\n0\r\n\r\n" % bytes(100_000))
        assert (await read_answer(reader)).status == 200
        await until(lambda: seconds)
        answer = await seconds[0]
        assert (answer.status, gw.upstream.requests[1].body) == (200, b"pay")
