"""ProxyApp alone: clients that leave or do not read, and a gateway that stops."""

import asyncio

import pytest
from starlette.types import Message, Scope

from gateway.context import Cause, RequestContext
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from tests.asgi_call import http
from tests.proxy_rig import CHUNKED, EVENTS, rig, silent, with_either_client
from tests.wire import OK, Reader, Request, Writer, service, until

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
