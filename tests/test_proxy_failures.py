"""ProxyApp alone, before a service that is not there, is slow, breaks off or talks nonsense."""

import asyncio

import pytest

from gateway.context import Cause
from gateway.policies.services import Timeouts
from tests.proxy_rig import CHUNKED, EVENTS, rig, silent, with_either_client
from tests.wire import OK, Reader, Request, Writer, read_body, reply, until


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
