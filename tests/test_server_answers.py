"""How an application's answers leave the edge: framing, order, and what would mislead a client (EDGE.md)."""

import asyncio
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from tests.served import CLOSE, GET, Application, answer, parse, read_answer, say_ok, show_path, stream, talk
from tests.wire import both_event_loops, connected, leaving_server
from tests.wire import serving_at_the_edge as serving

anyio_backend = both_event_loops


async def test_requests_sent_at_once_are_answered_one_after_another_in_order() -> None:
    running = 0

    async def one_at_a_time(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0.001)
        running -= 1
        await show_path(scope, receive, send)

    requests = [b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc" % number for number in range(20)]
    chunked = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with serving(Application(one_at_a_time)) as port:
        received = await talk(port, chunked + b"".join(requests) + CLOSE)
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [b"/x", *(b"/%d" % number for number in range(20)), b"/"]


@pytest.mark.usefixtures("short_farewell")
async def test_too_many_requests_at_once_are_left_in_the_kernel_not_in_memory() -> None:
    go_on = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await answer(send)

    app = Application(wait)
    count = 8 * 1024 * 1024 // len(GET)
    async with leaving_server(app) as (port, server, _), connected(port) as (reader, writer), asyncio.timeout(20):
        writer.write(GET * count)
        await app.events.get()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.09)
        go_on.set()
        for _ in range(1000):
            await read_answer(reader)
        connections: Any = server.server_state.connections
        assert max(len(each.buffer) for each in connections) < 512 * 1024, "the window, and what one read brings"


async def test_bytes_after_the_last_request_are_ignored() -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        received = await talk(port, CLOSE + GET + b"garbage")
    assert received.count(b"HTTP/1.1") == 1
    assert len(app.scopes) == 1


async def test_garbage_behind_a_request_is_refused_only_after_its_answer() -> None:
    async with serving(Application(say_ok)) as port:
        received = await talk(port, GET + b"\x00\x01garbage\r\n\r\n")
    first, second = received.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    assert first.endswith(b"\r\n\r\nok")
    assert second.startswith(b"400")


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)])
async def test_an_answer_without_a_body_keeps_its_content_length(method: str, status: int) -> None:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"12345" if scope["method"] == "HEAD" else b"", status, [(b"Content-Length", b"5")])

    async with serving(Application(respond)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        request = GET.replace(b"GET", method.encode())
        writer.write(request + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        received = await reader.read()
    line = b"HTTP/1.1 %d" % status
    assert received.count(line) == 2
    assert received.count(b"content-length: 5\r\n") == 2
    assert b"12345" not in received
    assert received.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("status", [299, 418, 599, 999])
async def test_a_status_needs_no_name(status: int) -> None:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, status=status)

    async with serving(Application(respond)) as port:
        assert parse(await talk(port, CLOSE))[0] == status


async def test_an_answer_of_unknown_length_is_chunked_or_for_http_1_0_ends_with_the_connection() -> None:
    async with serving(Application(stream)) as port:
        received = await talk(port, CLOSE)
        assert received.endswith(
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
        )
        received = await talk(port, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert received == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nonetwo"
    async with serving(Application(say_ok)) as port:
        assert parse(await talk(port, b"GET / HTTP/1.0\r\n\r\n"))[1][b"content-length"] == b"2"


async def test_the_head_waits_for_the_first_piece_of_the_body_and_an_empty_one_sends_it_off() -> None:
    go_on = asyncio.Event()

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/changed-my-mind":
            raise ValueError
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"late"})

    async with serving(Application(respond)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(GET)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        go_on.set()
        assert await reader.readuntil(b"0\r\n\r\n") == b"4\r\nlate\r\n0\r\n\r\n"
        writer.write(GET.replace(b"/ ", b"/changed-my-mind "))
        assert (await read_answer(reader))[0] == b"HTTP/1.1 500 Internal Server Error"


async def test_a_large_answer_arrives_whole() -> None:
    body = bytes(range(256)) * 40_000

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for at in range(0, len(body), 50_000):
            await send({"type": "http.response.body", "body": body[at : at + 50_000], "more_body": True})
        await send({"type": "http.response.body"})

    async with serving(Application(respond)) as port:
        assert parse(await talk(port, b"GET / HTTP/1.0\r\n\r\n"))[2] == body


@pytest.mark.parametrize(
    "header",
    [
        (b"x", b"a\r\nset-cookie: evil"),
        (b"x", b"a\nb"),
        (b"x", b"a\rb"),
        (b"x", b"a\0b"),
        (b"x\r\ny", b"a"),
        (b"x: y", b"a"),
        (b"", b"a"),
        (b"content-length", b"+2"),
        (b"content-length", b"3"),
        (b"content-length", b"1"),
    ],
)
async def test_a_head_or_body_of_the_applications_that_would_mislead_the_client_never_leaves(
    header: tuple[bytes, bytes],
) -> None:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, headers=[header])

    async with serving(Application(respond)) as port:
        received = await talk(port, GET)
    assert received.startswith(b"HTTP/1.1 500 ")
    assert b"evil" not in received


async def test_the_fields_of_an_answer_leave_in_order_repeated_or_not_with_names_in_lower_case() -> None:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        headers = (
            [name, value] for name, value in ((b"B", b"1"), (b"Content-Length", b"2"), (b"a", b""), (b"b", b"3"))
        )
        await answer(send, headers=headers)

    async with serving(Application(respond)) as port:
        for _ in range(2):  # a name is new, then known
            received = await talk(port, b"GET / HTTP/1.0\r\n\r\n")
            assert received.startswith(b"HTTP/1.1 200 OK\r\nb: 1\r\ncontent-length: 2\r\na: \r\nb: 3\r\n")


async def test_the_applications_own_framing_of_the_connection_is_replaced() -> None:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Transfer-Encoding", b"chunked"), (b"Keep-Alive", b"timeout=1"), (b"Connection", b"Close")]
        await answer(send, headers=headers)

    async with serving(Application(respond)) as port:
        received = await talk(port, GET)
    assert received == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


async def test_a_failing_application_becomes_500_without_detail(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("secret")

    async with serving(Application(fail)) as port:
        status, _, body = parse(await talk(port, GET.replace(b"\r\n\r\n", b"\r\nX-Correlation-ID: abc\r\n\r\n")))
    assert status == 500
    assert b"secret" not in body
    assert orjson.loads(body)["error"]["correlation_id"] == "abc"
    assert [record.message for record in caplog.records] == ["The application failed at /"]


@pytest.mark.parametrize(
    ("error", "logged"), [(ConnectionAbortedError(), 0), (ValueError(), 1), (None, 1)], ids=["cut", "error", "returned"]
)
async def test_an_answer_that_breaks_off_cuts_the_connection(
    error: Exception | None, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def break_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if error is not None:
            raise error

    async with serving(Application(break_off)) as port:
        received = await talk(port, GET)
        assert received.endswith(b"\r\n\r\n4\r\nhalf\r\n")
        with pytest.raises(ConnectionResetError):  # else HTTP/1.0 would take it for the whole
            await talk(port, b"GET / HTTP/1.0\r\n\r\n")
    assert len(caplog.records) == 2 * logged


async def test_a_connection_goes_on_while_the_application_still_tidies_up() -> None:
    go_on = asyncio.Event()

    async def linger(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send)
        if len(app.scopes) == 1:
            await go_on.wait()
            with pytest.raises(RuntimeError):
                await send({"type": "http.response.body", "body": b"more"})
            assert (await receive())["type"] == "http.disconnect"

    app = Application(linger)
    async with serving(app) as port, connected(port) as (reader, writer):
        for _ in range(2):
            writer.write(GET)
            assert (await read_answer(reader))[2] == b"ok"
        go_on.set()
