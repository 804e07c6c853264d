"""WebSockets at the edge: handshakes, and frames from strangers (EDGE.md)."""

import asyncio
import logging

import orjson
import pytest
import websockets
from starlette.types import Receive, Scope, Send

from tests.served import GET, Application, Handler, echo_messages, head, parse, read_answer, say_ok, talk
from tests.wire import both_event_loops, connected
from tests.wire import serving_at_the_edge as serving

anyio_backend = both_event_loops


HANDSHAKE = head(
    b"Connection: keep-alive, Upgrade",
    b"Upgrade: WebSocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


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


logging.getLogger("websockets").setLevel(logging.CRITICAL)
