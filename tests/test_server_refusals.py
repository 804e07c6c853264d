"""What the edge refuses before an application hears of it, and how it says so (EDGE.md)."""

import asyncio

import orjson
import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.context import RequestContext
from gateway.middleware.correlation import CorrelationASGI
from tests.served import CLOSE, GET, Application, echo, head, parse, read_answer, say_ok, talk
from tests.wire import both_event_loops, connected
from tests.wire import serving_at_the_edge as serving

anyio_backend = both_event_loops


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
    async with serving(Application(say_ok)) as port, connected(port) as (reader, writer), asyncio.timeout(10):
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
