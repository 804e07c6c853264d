"""Clients of the edge that leave, half-close, are slow or do not read (EDGE.md)."""

import asyncio
import socket
import struct
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from gateway.server.websocket import TCP_CLOSED
from tests.served import GET, Application, Handler, answer, echo, parse, read_answer, read_body, say_ok, stream, talk
from tests.wire import both_event_loops, connected, leaving_server, until
from tests.wire import serving_at_the_edge as serving

anyio_backend = both_event_loops


@pytest.mark.parametrize("close_with", ["FIN", "RST"])
async def test_a_client_that_leaves_before_the_answer_is_noticed_though_nothing_is_written(close_with: str) -> None:
    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        assert await read_body(receive) == b""
        app.left.append(await receive())

    app = Application(wait)
    async with serving(app) as port, asyncio.timeout(5):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(GET)
        assert await app.events.get() == "begun"
        if close_with == "RST":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert await app.events.get() == "ended"
    assert app.left == [{"type": "http.disconnect"}]


async def test_a_client_that_leaves_within_the_answer_is_noticed() -> None:
    async def drip(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await read_body(receive)
        waiting = asyncio.ensure_future(receive())
        while not waiting.done():
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.wait({waiting}, timeout=0.01)
        app.left.append(await waiting)
        await send({"type": "http.response.body", "body": b"x", "more_body": True})  # is no error

    app = Application(drip)
    async with serving(app) as port, asyncio.timeout(5):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(GET)
        assert await app.events.get() == "begun"
        assert await asyncio.to_thread(client.recv, 1000)
        client.close()
        assert await app.events.get() == "ended"
    assert app.left == [{"type": "http.disconnect"}]


async def test_a_client_that_leaves_within_its_request_is_noticed() -> None:
    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(ConnectionError):
            await read_body(receive)

    app = Application(read)
    async with serving(app) as port, asyncio.timeout(5), connected(port) as (_, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
        assert await app.events.get() == "begun"
        writer.write_eof()
        assert await app.events.get() == "ended"
    assert app.refusals == []


@pytest.mark.parametrize("handler", [say_ok, stream])
async def test_a_client_that_half_closes_after_its_requests_is_answered(handler: Handler) -> None:
    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        connections: Any = server.server_state.connections
        await until(lambda: all(each.peer_is_done for each in connections))
        await handler(scope, receive, send)

    async with leaving_server(Application(slowly)) as (port, server, _):
        received = await talk(port, GET + GET, half_close=True)
    assert received.count(b"HTTP/1.1 200 OK") == 2
    assert received.endswith((b"ok", b"0\r\n\r\n"))


async def test_a_half_closed_client_that_waits_long_is_asked_with_an_interim_answer_and_answered() -> None:
    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        waiting = asyncio.ensure_future(receive())  # the empty body
        await waiting
        await until_probed.wait()
        await answer(send)

    until_probed = asyncio.Event()
    async with serving(Application(slowly)) as port, connected(port) as (reader, writer), asyncio.timeout(5):
        writer.write(GET)
        writer.write_eof()
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        until_probed.set()
        assert (await reader.read()).endswith(b"\r\n\r\nok")


async def test_a_head_that_takes_too_long_is_408() -> None:
    app = Application(say_ok)
    async with serving(app, head_timeout=0.05) as port:
        assert parse(await talk(port))[0] == 408
        assert parse(await talk(port, b"GET / HT"))[0] == 408
        async with connected(port) as (reader, writer), asyncio.timeout(5):
            writer.write(GET)
            await read_answer(reader)
            writer.write(b"GET")
            assert parse(await reader.read())[0] == 408
    assert app.refusals == [(408, "head_timeout")] * 3


async def test_a_body_that_stops_coming_is_408() -> None:
    app = Application(echo)
    async with serving(app, body_timeout=0.05, discard_timeout=0.05) as port:
        for request in (
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        ):
            assert parse(await talk(port, request))[0] == 408
    assert app.refusals == []  # the application had the request, and tells of it


async def test_a_body_that_nobody_waits_for_may_take_its_time() -> None:
    async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"abc"
        waiting = asyncio.ensure_future(receive())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0.09)  # thrice as long as it has once somebody waits
        await answer(send)

    app = Application(answer_late)
    async with serving(app, body_timeout=0.03, discard_timeout=0.03) as port:
        status, _, _ = parse(await talk(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc"))
    assert status == 200
    assert app.refusals == []


async def test_an_idle_connection_is_closed_silently() -> None:
    app = Application(say_ok)
    async with serving(app, keep_alive_timeout=0.05) as port:
        assert (await talk(port, GET)).endswith(b"ok")
    assert app.refusals == []


async def test_a_client_that_does_not_read_is_cut() -> None:
    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await read_body(receive)
        waiting = asyncio.ensure_future(receive())
        while not waiting.done():
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        app.left.append(await waiting)

    app = Application(pour)
    async with serving(app, client_timeout=0.1) as port, asyncio.timeout(10):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(GET)
            assert await app.events.get() == "begun"
            assert await app.events.get() == "ended"
    assert app.left == [{"type": "http.disconnect", "reason": "client_too_slow"}]


async def test_a_client_that_does_not_read_an_answer_that_is_over_is_cut_too() -> None:
    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, bytes(32 * 1024 * 1024), headers=[(b"connection", b"close")])

    app = Application(pour)
    async with serving(app, client_timeout=0.1) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(GET)
            assert await app.events.get() == "begun"
            assert await app.events.get() == "ended"
            await until(lambda: client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSED)
