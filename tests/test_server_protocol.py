"""The edge towards clients: raw bytes in, raw bytes out, over real sockets (EDGE.md)."""

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from tests.served import CLOSE, GET, Application, answer, echo, head, parse, read_answer, read_body, say_ok, talk
from tests.wire import both_event_loops, connected
from tests.wire import serving_at_the_edge as serving

anyio_backend = both_event_loops


# What the application is given


async def test_a_request_reaches_the_application_byte_for_byte() -> None:
    app = Application(echo)
    async with serving(app) as port:
        await talk(
            port,
            b"POST //a%2Fb/%20/\xc3\xa9;x?q=1&q=2&%20 HTTP/1.1\r\nHOST: a:80\r\nX-Odd:  \t v\xe9 \r\nCookie: a\r\n"
            b"Cookie: b\r\nConnection: close\r\ncontent-length: 3\r\n\r\nabc",
        )
    (scope,) = app.scopes
    assert scope["method"] == "POST"
    assert scope["raw_path"] == "//a%2Fb/%20/é;x".encode()
    assert scope["path"] == "//a/b/ /é;x"
    assert scope["query_string"] == b"q=1&q=2&%20"
    assert scope["http_version"] == "1.1"
    assert scope["headers"] == [
        (b"host", b"a:80"),
        (b"x-odd", b"v\xe9"),
        (b"cookie", b"a"),
        (b"cookie", b"b"),
        (b"connection", b"close"),
        (b"content-length", b"3"),
    ]
    assert scope["client"][0] == scope["server"][0] == "127.0.0.1"
    assert scope["scheme"] == "http"
    assert "gateway.server" in scope["extensions"]


async def test_requests_of_one_connection_share_nothing_that_they_may_change() -> None:
    async def spoil(scope: Scope, receive: Receive, send: Send) -> None:
        line = [scope[key] for key in ("method", "path", "query_string", "http_version")]
        seen.append([*line, dict(scope["state"])])
        scope["state"]["mine"] = True
        scope["headers"].append((b"mine", b"true"))
        scope["path"] = scope["query_string"] = scope["http_version"] = scope["method"] = "mine"
        await answer(send)

    seen: list[object] = []
    async with serving(Application(spoil)) as port:
        await talk(
            port,
            b"GET /a?b HTTP/1.1\r\nHost: a\r\n\r\nGET /a HTTP/1.1\r\nHost: a\r\n\r\nGET /a HTTP/1.1\r\nHost: a\r\n\r\n"
            b"GET /a?c HTTP/1.1\r\nHost: a\r\n\r\nGET /a HTTP/1.1\r\nHost: a\r\n\r\nPOST /a HTTP/1.0\r\n\r\n",
        )
    assert seen == [
        ["GET", "/a", b"b", "1.1", {}],
        ["GET", "/a", b"", "1.1", {}],
        ["GET", "/a", b"", "1.1", {}],
        ["GET", "/a", b"c", "1.1", {}],
        ["GET", "/a", b"", "1.1", {}],
        ["POST", "/a", b"", "1.0", {}],
    ]


async def test_requests_are_tasks_of_the_event_loops_own_making() -> None:
    def make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(asyncio.Task(coroutine, loop=loop, **options))
        return made[-1]

    async def note_task(scope: Scope, receive: Receive, send: Send) -> None:
        running.append(asyncio.current_task())
        await say_ok(scope, receive, send)

    made: list[asyncio.Task[Any]] = []
    running: list[asyncio.Task[Any] | None] = []
    asyncio.get_running_loop().set_task_factory(make_task)
    async with serving(Application(note_task)) as port:
        await talk(port, CLOSE)
    asyncio.get_running_loop().set_task_factory(None)
    assert [*{*running} - {*made}] == []
    assert len(running) == 1


async def test_the_authority_of_an_absolute_target_becomes_the_host() -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        await talk(port, b"GET http://Example.com:80?x HTTP/1.0\r\n\r\n")
        await talk(port, b"GET http://example.com/y HTTP/1.1\r\nHost: Example.com\r\nConnection: close\r\n\r\n")
    assert app.scopes[0]["headers"] == [(b"host", b"Example.com:80")]
    assert (app.scopes[0]["raw_path"], app.scopes[0]["query_string"]) == (b"/", b"x")
    assert app.scopes[1]["raw_path"] == b"/y"


async def test_look_alikes_of_fields_that_matter_are_dropped_and_others_kept() -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        await talk(
            port,
            b"GET / HTTP/1.0\r\nContent_Length: 5\r\nX_User-ID: root\r\ntransfer_encoding: chunked\r\nx_own: 1\r\n\r\n",
        )
    assert app.scopes[0]["headers"] == [(b"x_own", b"1")]


# Bodies


async def test_a_body_arrives_whole_however_it_is_cut() -> None:
    request = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    plain = request + b"Content-Length: 11\r\n\r\nhello world"
    chunked = request + b"Transfer-Encoding: Chunked\r\n\r\n5;a=b\r\nhello\r\n006\r\n world\r\n0\r\nX: y\r\n\r\n"
    app = Application(echo)
    async with serving(app) as port:
        for data in (plain, chunked):
            for pieces in ([data], [data[at : at + 1] for at in range(len(data))]):
                assert parse(await talk(port, *pieces))[2] == b"hello world"


async def test_trailers_never_become_headers() -> None:
    app = Application(echo)
    async with serving(app) as port:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        await talk(port, request, b"0\r\nAuthorization: Bearer x\r\n\r\n")
    assert all(name != b"authorization" for name, _ in app.scopes[0]["headers"])


@pytest.mark.parametrize(
    "body",
    [
        b"g\r\n",
        b"+5\r\nhello\r\n",
        b"-1\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5 ;x\r\nhello\r\n",
        b"\r\n",
        b"FFFFFFFFFFFFFFFFF\r\n",
        b"5\nhello\n",
        b"5\r\nhelloworld\r\n",
        b"5\r\nhello\n",
        b"5;a\nb\r\nhello\r\n",
        b"5;" + b"a" * 5000,
        b"5;" + b"a" * 5000 + b"\r\nhello\r\n",
        b"0\r\nno colon but a space\r\n",
        b"0\r\nno-colon\r\n\r\n",
        b"0\r\nX: a\nb\r\n\r\n",
        b"0\r\n" + b"X: a\r\n" * 1000,
        b"1;" + b"a" * 3000 + b"\r\nx\r\n1;" + b"a" * 3000 + b"\r\nx\r\n",
    ],
)
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_unsound_chunks_are_refused(body: bytes) -> None:
    app = Application(echo)
    async with serving(app) as port:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        for pieces in ([request + body], [request, *(body[at : at + 1] for at in range(len(body)))]):
            assert parse(await talk(port, *pieces))[0] == 400
    assert app.refusals == []  # the application had the request, and tells of it


async def test_chunks_that_turn_unsound_while_the_answer_runs_cut_it_without_a_second_status_line() -> None:
    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass

    app = Application(stream)
    async with serving(app) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        received = await reader.readuntil(b"begun\r\n")
        writer.write(b"nonsense\r\n")
        received += await reader.read()
    assert received.count(b"HTTP/1.1 ") == 1
    assert not received.endswith(b"0\r\n\r\n")


async def test_100_continue_is_sent_when_the_application_first_asks_for_the_body() -> None:
    request = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n"
    async with serving(Application(echo)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(request)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hello")
        status, headers, body = await read_answer(reader)
        assert (status, body) == (b"HTTP/1.1 200 OK", b"hello")
        assert b"connection" not in headers

    async with serving(Application(say_ok)) as port:  # which never asks
        code, headers, _ = parse(await talk(port, request))
        assert (code, headers[b"connection"]) == (200, b"close")


async def test_a_body_that_nobody_reads_holds_its_sender_back() -> None:
    go_on = asyncio.Event()

    async def read_late(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await answer(send, b"%d" % len(await read_body(receive)))

    size = 8 * 1024 * 1024
    app = Application(read_late)
    async with serving(app) as port, connected(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        sending = asyncio.create_task(send_zeros(writer, size))
        await app.events.get()
        held = asyncio.create_task(writer.drain())
        done, _ = await asyncio.wait({sending, held}, timeout=0.09)
        assert not done
        go_on.set()
        assert (await read_answer(reader))[2] == b"%d" % size
        await sending
        await held


async def send_zeros(writer: asyncio.StreamWriter, size: int) -> None:
    for _ in range(size // 65536):
        writer.write(bytes(65536))
        await writer.drain()


# Answers before the request has ended


async def test_an_answer_before_the_end_of_a_large_upload_arrives_and_the_connection_is_closed() -> None:
    async with serving(Application(say_ok), discard_timeout=0.05) as port, connected(port) as (reader, writer):
        size = 10 * 1024 * 1024
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
        writer.write(bytes(1024 * 1024))
        status, headers, body = await read_answer(reader)
        assert (status, headers[b"connection"], body) == (b"HTTP/1.1 200 OK", b"close", b"ok")
        assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_an_answer_before_the_end_of_a_small_upload_keeps_the_connection() -> None:
    async with serving(Application(say_ok)) as port, connected(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + bytes(500))
        assert b"connection" not in (await read_answer(reader))[1]
        writer.write(bytes(500) + GET)
        assert (await read_answer(reader))[2] == b"ok"


async def test_the_rest_of_a_small_upload_is_not_awaited_for_long() -> None:
    async with serving(Application(say_ok), discard_timeout=0.05) as port:
        received = await talk(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + bytes(500))
    assert received.endswith(b"ok")


async def test_a_refusal_is_seen_though_the_client_is_still_sending() -> None:
    async with serving(Application(say_ok)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(head(b"Content-Length: 10000000", b"Content-Length: 1") + bytes(1_000_000))
        received = await reader.read()
    assert parse(received)[0] == 400
