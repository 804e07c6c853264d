"""The edge towards clients: raw bytes in, raw bytes out, over real sockets (EDGE.md)."""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import httptools
import orjson
import pytest
import websockets
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from gateway.context import RequestContext
from gateway.middleware.correlation import CorrelationASGI
from gateway.policies.edge import EdgeLimits
from gateway.server import http1
from gateway.server.http1 import METHODS, ChunkedBody, RefusedError, RequestHead, read_head, refuse_early
from gateway.server.protocol import TCP_CLOSED
from tests.wire import both_event_loops, connected, leaving_server, until
from tests.wire import serving_at_the_edge as serving

LIMITS = EdgeLimits()
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
anyio_backend = both_event_loops


Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class Application:
    """Runs a handler for each request; keeps what happened."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.scopes: list[Scope] = []
        self.refusals: list[tuple[int, str]] = []
        self.known: list[tuple[str, str, str]] = []
        self.left: list[Message] = []
        self.events: asyncio.Queue[str] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        self.scopes.append(scope)
        self.events.put_nowait("begun")
        try:
            await self.handler(scope, receive, send)
        finally:
            self.events.put_nowait("ended")

    def on_refusal(
        self, peer: str, status: int, reason: str, correlation_id: str = "", method: str = "", path: str = ""
    ) -> None:
        assert peer == "127.0.0.1"
        self.refusals.append((status, reason))
        self.known.append((correlation_id, method, path))


async def talk(port: int, *pieces: bytes, half_close: bool = False) -> bytes:
    """Send the pieces, each by itself, and read until the server closes."""
    async with connected(port) as (reader, writer), asyncio.timeout(10):
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        if half_close:
            writer.write_eof()
        return await reader.read()


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, dict[bytes, bytes], bytes]:
    """One answer with a Content-Length: status line, headers, body."""
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
        status, *lines = head[:-4].split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines)
        body: bytes = await reader.readexactly(int(headers.get(b"content-length", 0)))
        return status, headers, body


def parse(answer: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    return int(status.split(b" ")[1]), dict(line.split(b": ", 1) for line in lines), body


async def read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


async def answer(send: Send, body: bytes = b"ok", status: int = 200, headers: Any = ()) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def say_ok(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, await read_body(receive))


async def show_path(scope: Scope, receive: Receive, send: Send) -> None:
    await read_body(receive)
    await answer(send, scope["raw_path"])


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


# What is refused


def head(*lines: bytes) -> bytes:
    return b"\r\n".join((b"GET / HTTP/1.1", b"Host: a", *lines, b"", b""))


MALFORMED = {
    "Content-Length and Transfer-Encoding": (400, head(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    "Content-Length twice": (400, head(b"Content-Length: 5", b"Content-Length: 5")),
    "Content-Length list": (400, head(b"Content-Length: 5, 5")),
    "Content-Length signed": (400, head(b"Content-Length: +5")),
    "Content-Length negative": (400, head(b"Content-Length: -5")),
    "Content-Length hexadecimal": (400, head(b"Content-Length: 0x5")),
    "Content-Length with underscore": (400, head(b"Content-Length: 5_0")),
    "Content-Length empty": (400, head(b"Content-Length: ")),
    "Content-Length beyond 64 bits": (400, head(b"Content-Length: 18446744073709551617")),
    "Transfer-Encoding gzip, chunked": (501, head(b"Transfer-Encoding: gzip, chunked")),
    "Transfer-Encoding chunked, identity": (501, head(b"Transfer-Encoding: chunked, identity")),
    "Transfer-Encoding twice": (501, head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    "Transfer-Encoding empty": (501, head(b"Transfer-Encoding:")),
    "Transfer-Encoding with vertical tab": (400, head(b"Transfer-Encoding: \x0bchunked")),
    "Transfer-Encoding in HTTP/1.0": (400, b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "name with no-break space": (400, head(b"Transfer-Encoding\xa0: chunked")),
    "folded line": (400, head(b"X: a", b" b")),
    "folded first line": (400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "space before colon": (400, head(b"Content-Length : 5")),
    "empty name": (400, head(b": x")),
    "no colon": (400, head(b"nothing")),
    "bare LF": (400, b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    "bare LF between fields": (400, head(b"X: a\nTransfer-Encoding: chunked")),
    "bare CR": (400, head(b"X: a\rTransfer-Encoding: chunked")),
    "NUL": (400, head(b"X: a\0b")),
    "control byte": (400, head(b"X: a\x01b")),
    "DEL": (400, head(b"X: a\x7fb")),
    "HTTP/0.9": (400, b"GET /\r\n"),
    "HTTP/2 preface": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.2": (505, b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    "HTTP/3": (505, b"GET / HTTP/3\r\nHost: a\r\n\r\n"),
    "lower-case version": (400, b"GET / http/1.1\r\nHost: a\r\n\r\n"),
    "no version": (400, b"GET / \r\nHost: a\r\n\r\n"),
    "another protocol": (400, b"EHLO mail.example.com\r\n"),
    "TLS to a plain port": (400, bytes.fromhex("16030100f5010000f10303")),
    "no Host": (400, b"GET / HTTP/1.1\r\n\r\n"),
    "two Hosts": (400, head(b"Host: a")),
    "Host empty": (400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    "Host with space": (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    "Host with slash": (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    "Host with user": (400, b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"),
    "Host with comma": (400, b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"),
    "Host with odd port": (400, b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"),
    "Host with open bracket": (400, b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
    "Host against target": (400, b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target of another scheme": (400, b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target without slash": (400, b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target with fragment": (400, b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target with tab": (400, b"GET /\ta HTTP/1.1\r\nHost: a\r\n\r\n"),
    "target with two spaces": (400, b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "asterisk but not OPTIONS": (400, b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    "OPTIONS *": (405, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
    "CONNECT": (405, b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
    "TRACE": (405, b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "unknown method": (400, b"FROB / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "lower-case method": (400, b"get / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "unknown expectation": (417, head(b"Expect: a-pony")),
    "WebSocket version": (
        400,
        head(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 8", b"Sec-WebSocket-Key: a"),
    ),
    "WebSocket key": (
        400,
        head(b"Connection: upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: a"),
    ),
    "long request line": (414, b"GET /" + b"a" * 400 + b" HTTP/1.1\r\nHost: a\r\n\r\n"),
    "endless request line": (414, b"GET /" + b"a" * 400),
    "long field": (431, head(b"X: " + b"a" * 400)),
    "endless field": (431, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 400),
    "many fields": (431, head(*[b"X: a"] * 20)),
    "endless fields": (431, b"GET / HTTP/1.1\r\n" + b"X: a\r\n" * 20),
    "large head": (431, head(*[b"X: " + b"a" * 90] * 10)),
}
TIGHT = {"max_request_line_bytes": 300, "max_field_bytes": 200, "max_head_bytes": 800, "max_fields": 15}


@pytest.mark.parametrize("in_one", [True, False], ids=["whole", "byte by byte"])
async def test_a_malformed_head_is_refused_in_the_error_form_and_the_connection_closed(in_one: bool) -> None:
    app = Application(say_ok)
    async with serving(app, **TIGHT) as port:
        for name, (expected, data) in MALFORMED.items():
            app.refusals.clear()
            pieces = [data] if in_one else [data[at : at + 1] for at in range(len(data))]
            status, headers, body = parse(await talk(port, *pieces))
            assert status == expected, name
            assert headers[b"connection"] == b"close", name
            assert int(headers[b"content-length"]) == len(body), name
            error = orjson.loads(body)["error"]
            assert error["correlation_id"] == headers[b"x-correlation-id"].decode(), name
            assert error.keys() == {"type", "message", "correlation_id"}, name
            assert [status for status, _ in app.refusals] == [expected], name
    assert app.scopes == []


async def test_a_refusal_bears_the_correlation_id_that_was_sent_if_the_request_was_understood() -> None:
    app = Application(echo)
    async with serving(app) as port:
        status, headers, _ = parse(
            await talk(
                port,
                b"POST / HTTP/1.1\r\nHost: a\r\nX-Correlation-ID: abc-1\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"5\r\nhellox",
            )
        )
    assert (status, headers[b"x-correlation-id"]) == (400, b"abc-1")


@pytest.mark.parametrize(
    "request_head",
    [
        b"POST /a%2Fb?secret=1 HTTP/1.1\r\nHost: a\r\nX-Correlation-ID: abc-1\r\nContent-Length: +5\r\n\r\nhello",
        b"POST /a%2Fb HTTP/1.1\r\nX-CORRELATION-ID:abc-1\t\r\n\r\n",
        b"POST /a%2Fb HTTP/1.1\r\nHost: a\r\nX-Correlation-ID: abc-1\r\nno colon\r\n\r\n",
        b"POST /a%2Fb?secret=1 HTTP/1.1\r\nX-Correlation-ID: abc-1\r\nX: \0",
    ],
)
async def test_a_refused_head_keeps_its_correlation_id_and_is_told_of_by_it(request_head: bytes) -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        status, headers, body = parse(await talk(port, request_head))
    assert (status, headers[b"x-correlation-id"]) == (400, b"abc-1")
    assert orjson.loads(body)["error"]["correlation_id"] == "abc-1"
    assert app.known == [("abc-1", "POST", "/a%2Fb")]


@pytest.mark.parametrize(
    "fields",
    [
        b"X-Correlation-ID: a b\r\nContent-Length: +5\r\n\r\n",
        b"X-Correlation-ID: one\r\nX-Correlation-ID: two\r\nContent-Length: +5\r\n\r\n",
        b"X: \0\r\nX-Correlation-ID: hal",
    ],
)
async def test_a_refused_head_with_no_sound_correlation_id_is_given_one(fields: bytes) -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        _, headers, _ = parse(await talk(port, b"GET http://user:secret@a/?b HTTP/1.1\r\nHost: a\r\n" + fields))
    ((correlation_id, method, path),) = app.known
    assert headers[b"x-correlation-id"].decode() == correlation_id
    assert (len(correlation_id), method, path) == (32, "GET", "")


async def test_what_is_not_http_at_all_is_told_of_without_method_and_path() -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        await talk(port, b"EHLO mail.example.com\r\n")
    ((correlation_id, method, path),) = app.known
    assert (len(correlation_id), method, path) == (32, "", "")


@pytest.mark.parametrize("body", [b"5\r\nhellox", b"5\r\nhel"], ids=["bad chunk", "body timeout"])
async def test_a_body_refused_while_its_request_runs_is_answered_with_the_id_the_application_gave_it(
    body: bytes,
) -> None:
    seen: asyncio.Queue[Message] = asyncio.Queue()

    async def read_all(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            pass
        seen.put_nowait({**message, "id": RequestContext.of(scope).correlation_id})

    app = Application(CorrelationASGI(read_all))
    async with serving(app, body_timeout=0.05, discard_timeout=0.05) as port:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nX-Correlation-ID: a b\r\nTransfer-Encoding: chunked\r\n\r\n"
        status, headers, _ = parse(await talk(port, request + body))
        message = await seen.get()
    assert message["id"] == headers[b"x-correlation-id"].decode()
    assert message["status"] == status
    assert message["reason"] == ("bad_body" if status == 400 else "client_too_slow")
    assert app.refusals == []


async def test_nothing_behind_a_refused_head_is_read() -> None:
    app = Application(say_ok)
    async with serving(app) as port:
        received = await talk(port, head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n" + GET)
    assert received.count(b"HTTP/1.1") == 1
    assert app.scopes == []


async def test_a_405_says_what_is_allowed() -> None:
    async with serving(Application(say_ok)) as port:
        _, headers, _ = parse(await talk(port, b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert b"GET" in headers[b"allow"]


async def test_an_endless_head_is_refused_after_a_bounded_number_of_bytes() -> None:
    async with (
        serving(Application(say_ok)) as port,
        connected(port) as (reader, writer),
        asyncio.timeout(10),
    ):
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n")
        answered = asyncio.create_task(reader.readline())
        sent = 0
        while not answered.done():
            writer.write(b"X: " + b"a" * 1000 + b"\r\n")
            sent += 1005
            await writer.drain()
            await asyncio.sleep(0)
        assert (await answered).startswith(b"HTTP/1.1 431 ")
        assert sent < 200 * 1024


@pytest.mark.parametrize(
    "line",
    [
        b"Connection: keep-alive, X-Forwarded-For",
        b"Connection:\r\nConnection: x",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA",
        b"Upgrade: websocket",
        b"X:",
        b"TE: gzip, trailers",
        b"Keep-Alive: timeout=5",
    ],
)
async def test_odd_but_sound_fields_are_let_in(line: bytes) -> None:
    async with serving(Application(say_ok)) as port, connected(port) as (reader, writer):
        writer.write(b"\r\n\r\n" + head(line) + b"\r\n" + CLOSE)
        assert (await read_answer(reader))[0] == b"HTTP/1.1 200 OK"
        assert (await read_answer(reader))[1][b"connection"] == b"close"


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


# Answers


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
    async with serving(app) as port, connected(port) as (reader, writer), asyncio.timeout(20):
        writer.write(GET * count)
        await app.events.get()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.09)
        go_on.set()
        for _ in range(1000):
            await read_answer(reader)


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

    async with (
        serving(Application(respond)) as port,
        connected(port) as (reader, writer),
        asyncio.timeout(10),
    ):
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


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in (b"", b"one", b"", b"two"):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


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

    async with (
        serving(Application(respond)) as port,
        connected(port) as (reader, writer),
        asyncio.timeout(10),
    ):
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


# Clients that leave, and clients that are slow


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
        await asyncio.sleep(0.02)
        await handler(scope, receive, send)

    async with serving(Application(slowly)) as port:
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
    async with (
        serving(Application(slowly)) as port,
        connected(port) as (reader, writer),
        asyncio.timeout(5),
    ):
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
        await asyncio.sleep(0.09)
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


# Answers before the request has ended


async def test_an_answer_before_the_end_of_a_large_upload_arrives_and_the_connection_is_closed() -> None:
    async with (
        serving(Application(say_ok), discard_timeout=0.05) as port,
        connected(port) as (reader, writer),
    ):
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
    async with (
        serving(Application(say_ok)) as port,
        connected(port) as (reader, writer),
        asyncio.timeout(10),
    ):
        writer.write(head(b"Content-Length: 10000000", b"Content-Length: 1") + bytes(1_000_000))
        received = await reader.read()
    assert parse(received)[0] == 400


async def test_connections_beyond_the_cap_are_told_so() -> None:
    app = Application(say_ok)
    async with serving(app, max_connections=1) as port, connected(port) as (reader, writer):
        writer.write(GET)
        await read_answer(reader)
        status, headers, body = parse(await talk(port))
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert orjson.loads(body)["error"]["retry_after"] == 1
        writer.write(GET)
        await read_answer(reader)
    assert app.refusals == [(503, "too_many_connections")]


# Leaving


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


# WebSockets


HANDSHAKE = head(
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


async def echo_messages(scope: Scope, receive: Receive, send: Send) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept", "subprotocol": next(iter(scope["subprotocols"]), None)})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


async def test_a_websocket_is_handed_over_with_what_the_client_sent() -> None:
    app = Application(echo_messages)
    async with serving(app) as port:
        url = f"ws://127.0.0.1:{port}/a%2Fb?x=%20"
        headers = {"X-Long": "a" * 12_000, "Cookie": "b"}
        async with websockets.connect(url, additional_headers=headers, subprotocols=["chat"]) as client:  # type: ignore[list-item]
            for text in ("one", "two" * 50_000):
                await client.send(text)
                assert await client.recv() == text
            assert client.subprotocol == "chat"
    (scope,) = app.scopes
    assert scope["type"] == "websocket"
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == ("/a/b", b"/a%2Fb", b"x=%20")
    assert (b"x-long", b"a" * 12_000) in scope["headers"]
    assert "websocket.http.response" in scope["extensions"]


async def test_a_frame_right_behind_the_handshake_is_not_lost() -> None:
    async def both(scope: Scope, receive: Receive, send: Send) -> None:
        await (say_ok if scope["type"] == "http" else echo_messages)(scope, receive, send)

    async with serving(Application(both)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(GET)  # pipelined: the handshake has to wait
        writer.write(HANDSHAKE + b"\x81\x82\x00\x00\x00\x00hi")
        assert (await read_answer(reader))[2] == b"ok"
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        assert await reader.readexactly(4) == b"\x81\x02hi"


async def test_malformed_frames_before_a_websocket_is_accepted_close_it_once_it_is() -> None:
    app = Application(echo_messages)
    async with serving(app) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(HANDSHAKE + b"\xff\x00garbage")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        opcode, _, *code = (await reader.read())[:4]
        assert (opcode & 15, int.from_bytes(code)) == (8, 1002)  # close, for a protocol error


async def test_frames_before_a_websocket_is_accepted_are_bounded_and_dropped_with_it() -> None:
    go_on = asyncio.Event()

    async def refuse_late(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await send({"type": "websocket.close"})

    app = Application(refuse_late)
    async with serving(app) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(HANDSHAKE)
        assert await app.events.get() == "begun"
        writer.write(b"\x81\x82\x00\x00\x00\x00hi" * 2_000_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.09)
        go_on.set()
        assert (await reader.readline()).startswith(b"HTTP/1.1 403 ")


async def test_a_handshake_too_long_for_the_implementation_is_431() -> None:
    protocols = b"Sec-WebSocket-Protocol: " + b"a" * 9_000
    async with serving(Application(echo_messages)) as port:
        assert parse(await talk(port, HANDSHAKE[:-2] + protocols + b"\r\n\r\n"))[0] == 431


async def test_a_refused_websocket_gets_the_answer_that_the_application_sends() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"2"), (b"x-odd", b"1")]
        await send({"type": "websocket.http.response.start", "status": 429, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"no"})

    async with serving(Application(refuse)) as port:
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(f"ws://127.0.0.1:{port}/")
    assert caught.value.response.status_code == 429
    assert caught.value.response.body == b"no"
    assert caught.value.response.headers["x-odd"] == "1"


@pytest.mark.parametrize(
    "line",
    [
        b"Sec-WebSocket-Protocol: a b",
        b"Sec-WebSocket-Protocol: \xc3\xa9",
        b"Sec-WebSocket-Extensions: ;;;=",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Sec-WebSocket-Version: 13",
        b"Connection: a b",
        b"Upgrade: websocket",
    ],
)
async def test_a_malformed_handshake_is_refused_in_the_error_form(
    line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    app = Application(echo_messages)
    async with serving(app) as port:
        answer = await talk(port, HANDSHAKE[:-2] + b"X-Correlation-ID: abc-1\r\n" + line + b"\r\n\r\n")
    status, headers, body = parse(answer)
    assert (status, headers[b"x-correlation-id"]) == (400, b"abc-1")
    assert orjson.loads(body)["error"]["correlation_id"] == "abc-1"
    assert app.known == [("abc-1", "GET", "/")]
    assert (app.scopes, caplog.records) == ([], [])


@pytest.mark.parametrize("target", [b"/\xc3\xa9", b"/?\xff"])
async def test_a_handshake_with_bytes_beyond_ascii_in_its_target_is_refused_in_the_error_form(
    target: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    app = Application(echo_messages)
    async with serving(app) as port:
        status, headers, body = parse(await talk(port, HANDSHAKE.replace(b"GET /", b"GET " + target)))
    assert status == 400
    assert orjson.loads(body)["error"]["correlation_id"] == headers[b"x-correlation-id"].decode()
    assert app.refusals == [(400, "malformed")]
    assert (app.scopes, caplog.records) == ([], [])


async def accept_and_leave(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.accept"})


async def close_at_once(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.close"})


async def deny(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "websocket.http.response.start", "status": 404, "headers": []})
    await send({"type": "websocket.http.response.body", "body": b"n", "more_body": True})
    await send({"type": "websocket.http.response.body", "body": b"o"})


@pytest.mark.parametrize("handler", [accept_and_leave, close_at_once, deny])
async def test_strangers_cannot_fill_the_log_with_handshakes(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Application(handler)) as port:
        caplog.set_level(logging.INFO)
        caplog.set_level(logging.INFO, "uvicorn.error")
        answer = await talk(port, HANDSHAKE.replace(b"GET /", b"GET /?secret=1") + b"\x81\x82\x00\x00\x00\x00hi")
        told = [record.getMessage() for record in caplog.records]
    assert answer.startswith(b"HTTP/1.1 ")
    assert told == []


async def test_a_denial_that_does_not_end_is_still_an_error_of_the_application(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def begin_to_deny(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 404, "headers": []})

    async with serving(Application(begin_to_deny)) as port:
        await talk(port, HANDSHAKE)
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_what_comes_along_with_a_handshake_that_had_to_wait_is_bounded_too() -> None:
    go_on = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await (say_ok if scope["type"] == "http" else accept_and_leave)(scope, receive, send)
        go_on.clear()

    app = Application(wait)
    async with serving(app) as port, connected(port) as (reader, writer), asyncio.timeout(10):
        writer.write(GET)
        assert await app.events.get() == "begun"
        writer.write(HANDSHAKE + b"\x81\x82\x00\x00\x00\x00hi" * 2_000_000)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.09)
        go_on.set()
        assert (await read_answer(reader))[2] == b"ok"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(writer.drain(), 0.09)


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


# The parser alone


class Reference:
    """What llhttp makes of a head."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = self.keeps_alive = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keeps_alive = self.parser.should_keep_alive()  # once the message is over it has forgotten what was said


HOSTS = st.sampled_from([b"Host: a", b"Host: [::1]:80"])
FRAMING = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: 05",
        b"content-length:5 ",
        b"Transfer-Encoding: chunked",
        b"transfer-encoding: CHUNKED",
    ]
)
OTHERS = st.sampled_from(
    [
        b"Connection: close",
        b"Connection: keep-alive",
        b"Connection: keep-alive, x",
        b"connection:x ,\tClose ",
        b"Connection: ,close,",
        b"Connection: close x, closed, x-close",
        b"X: y",
        b"X_y:z",
        b"Expect: 100-continue",
        b"Cookie: a=b; c=d",
        b"Odd: \xff\t\x80",
    ]
)
FIELDS = HOSTS | FRAMING | OTHERS
LINES = st.one_of(FIELDS, st.binary(max_size=12), st.tuples(FIELDS, st.binary(max_size=2)).map(b"".join))
TARGETS = st.one_of(
    st.sampled_from([b"/", b"/a?b", b"//a", b"http://a/b", b"*"]), st.binary(max_size=5).map(lambda tail: b"/" + tail)
)
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0"])
REQUEST_LINES = st.tuples(st.sampled_from([*METHODS, b"FOO"]), TARGETS, VERSIONS).map(b" ".join)
ANY_HEADS = st.tuples(REQUEST_LINES, st.lists(LINES, max_size=5)).map(lambda head: b"\r\n".join((head[0], *head[1])))
SOUND_HEADS = st.builds(
    lambda method, host, framing, others: b"\r\n".join((method + b" / HTTP/1.1", *others, host, *framing)),
    st.sampled_from([b"GET", b"POST", b"DELETE"]),
    HOSTS,
    st.lists(FRAMING, max_size=1),
    st.lists(OTHERS, max_size=4),
)
HEADS = ANY_HEADS | SOUND_HEADS


def accepted(head: bytes) -> RequestHead | None:
    try:
        return read_head(head, LIMITS)
    except RefusedError:
        return None


@given(HEADS)
def test_what_is_let_in_the_reference_parser_reads_in_the_same_way(head: bytes) -> None:
    request = accepted(head)
    if request is None:
        return
    (method, raw_path, _, query, version, _), headers, _, special = request
    if not raw_path.isascii() or not query.isascii():
        return  # where we are laxer: curl sends UTF-8 as it is
    reference = Reference(head + b"\r\n\r\n")
    assert reference.complete
    assert reference.parser.get_method().decode() == method
    assert reference.parser.get_http_version() == version
    target = raw_path + (b"?" + query if query else b"")
    assert reference.url.removeprefix(b"http://a").rstrip(b"?") == target.rstrip(b"?")
    theirs = [(name, value.strip(b" \t")) for name, value in reference.headers if b"_" not in name]
    ours = [field for field in headers if b"_" not in field[0]]
    assert ours == theirs or (version == "1.0" and ours[1:] == theirs)  # the authority became the Host
    if version == "1.1":
        assert reference.keeps_alive == (special is None or special.keep_alive)


@given(HEADS)
def test_a_head_means_the_same_when_its_lines_were_read_before(head: bytes) -> None:
    http1._FIELDS.clear()
    http1._REQUEST_LINES.clear()
    assert facts(accepted(head)) == facts(accepted(head))


def facts(request: RequestHead | None) -> object:
    if request is None:
        return None
    line, headers, length, special = request
    return line, headers, length, special and (special.keep_alive, special.expects_continue, special.websocket)


def test_requests_with_the_same_line_share_nothing_that_can_be_changed() -> None:
    first = read_head(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close", LIMITS)
    second = read_head(b"POST /a HTTP/1.1\r\nHost: b", LIMITS)
    assert first[1][0] == (b"host", b"a")
    assert first[2] == 5
    assert first[3] is not None
    assert not first[3].keep_alive
    assert second[1:] == ([(b"host", b"b")], 0, None)


def test_what_is_remembered_of_requests_is_bounded_and_no_secret() -> None:
    for number in range(5000):
        read_head(b"GET /%d HTTP/1.1\r\nHost: a%d\r\nCookie: secret=%d" % (number, number, number), LIMITS)
        read_head(b"GET /?secret=%d HTTP/1.1\r\nHost: a\r\nAuthorization: secret %d" % (number, number), LIMITS)
        read_head(b"GET / HTTP/1.1\r\nHost: a\r\nX-User-ID: secret-%d\r\nX%d: secret" % (number, number), LIMITS)
        read_head(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: %b%d" % (b"long" * 64, number), LIMITS)
    assert len(http1._FIELDS) <= 512
    assert len(http1._REQUEST_LINES) <= 256
    assert len(http1._PLAIN_NAMES) <= 1024
    remembered = [*http1._FIELDS, *http1._REQUEST_LINES, *http1._PLAIN_NAMES]
    assert not [line for line in remembered if b"secret" in line or len(line) > 256]


@given(HEADS, st.data())
def test_no_beginning_of_a_sound_head_is_refused_early(head: bytes, data: st.DataObject) -> None:
    if accepted(head) is not None:
        whole = head + b"\r\n\r\n"
        refuse_early(whole[: data.draw(st.integers(1, len(whole)))], LIMITS)


@given(
    st.lists(st.binary(min_size=1, max_size=30)),
    st.binary(max_size=10),
    st.sampled_from([b"", b";x=y"]),
    st.sampled_from([b"", b"A: b\r\n"]),
    st.data(),
)
def test_a_chunked_body_is_the_same_however_it_is_cut(
    chunks: list[bytes], rest: bytes, extension: bytes, trailer: bytes, data: st.DataObject
) -> None:
    coded = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    coded += b"0" + extension + b"\r\n" + trailer + b"\r\n" + rest
    decoder = ChunkedBody()
    body, following, at = b"", None, 0
    while following is None:
        to = data.draw(st.integers(at + 1, len(coded)))
        piece, following = decoder.feed(coded[at:to])
        body += piece
        at = to
    assert body == b"".join(chunks)
    assert following + coded[at:] == rest


logging.getLogger("websockets").setLevel(logging.CRITICAL)
