"""A server that is told to leave (RESILIENCE.md, 6)."""

import asyncio

import pytest
import websockets
from starlette.types import Receive, Scope, Send

from gateway.server.protocol import GatewayProtocol
from tests.served import GET, Application, answer, echo_messages, parse, read_answer, talk
from tests.wire import both_event_loops, connected, leaving_server

anyio_backend = both_event_loops


@pytest.mark.usefixtures("short_farewell")
async def test_a_server_that_leaves_finishes_what_is_in_flight_and_closes_what_is_idle() -> None:
    go_on = asyncio.Event()

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await go_on.wait()
        await answer(send)

    app = Application(respond)
    async with (
        leaving_server(app, drain_delay=0.05) as (port, server, running),
        connected(port) as (slow, slow_writer),
        connected(port) as (idle, idle_writer),
        asyncio.timeout(10),
    ):
        slow_writer.write(GET.replace(b"/ ", b"/slow "))
        await app.events.get()
        idle_writer.write(GET)
        await read_answer(idle)
        server.drain()
        async with connected(port) as (late, late_writer):  # before the listener closes
            late_writer.write(GET)
            assert (await read_answer(late))[1][b"connection"] == b"close"
        assert await idle.read() == b""
        assert not running.done()
        go_on.set()
        assert (await read_answer(slow))[1][b"connection"] == b"close"
        await running


@pytest.mark.usefixtures("short_farewell")
async def test_requests_that_do_not_end_in_time_are_cancelled_when_the_server_leaves() -> None:
    cut = False

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.Event().wait()

    class Cuttable(Application):
        def cut(self) -> None:
            nonlocal cut
            cut = True

    app = Cuttable(hang)
    async with leaving_server(app, drain_delay=0, drain_timeout=0.05) as (port, server, running):
        answers = [asyncio.create_task(talk(port, request)) for request in (GET, GET.replace(b"/ ", b"/begun "))]
        await app.events.get()
        await app.events.get()
        server.drain()
        refused, broken_off = await asyncio.gather(*answers)
        await running
    assert cut
    assert parse(refused)[0] == 503
    assert broken_off.endswith(b"1\r\nx\r\n")


async def test_a_request_that_comes_at_the_very_moment_of_the_cut_is_answered_too() -> None:
    class Late(Application):
        """Another request comes once it is told to leave, and in the same turn of the loop all are cancelled."""

        def begin_drain(self) -> None:
            (connection,) = server.server_state.connections
            assert isinstance(connection, GatewayProtocol)
            connection.data_received(GET)

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)

    async with (
        leaving_server(Late(respond), drain_delay=0, drain_timeout=0) as (port, server, running),
        connected(port) as (reader, writer),
        asyncio.timeout(10),
    ):
        writer.write(GET)
        await read_answer(reader)
        server.retire()
        status, _, _ = parse(await reader.read())
        await running
        assert status == 200
        assert not server.server_state.tasks


async def test_websockets_that_outlast_the_drain_are_closed_with_1012() -> None:
    app = Application(echo_messages)
    async with (
        leaving_server(app, drain_delay=0, drain_timeout=0.05) as (port, server, running),
        websockets.connect(f"ws://127.0.0.1:{port}/") as client,
    ):
        server.drain()
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1012
        await running
