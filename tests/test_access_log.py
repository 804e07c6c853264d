import asyncio
import json
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.middleware.access_log import LoggingASGI
from gateway.policies.services import Service
from tests.asgi_call import Answer, call, http, websocket
from tests.clocks import FakeClock

START: Message = {"type": "http.response.start", "status": 200, "headers": []}
MORE: Message = {"type": "http.response.body", "body": b"12345", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"6789", "more_body": False}
ACCEPT: Message = {"type": "websocket.accept"}
LEFT: Message = {"type": "http.disconnect"}
NOON = 1764239400.9


class Log:
    """A logging layer around an application, and the lines it wrote."""

    def __init__(self, app: ASGIApp, **options: Any) -> None:
        self.clock = FakeClock()
        self.written: list[bytes] = []
        self.layer = LoggingASGI(app, sink=self.written.append, clock=self.clock, now=lambda: NOON, **options)

    async def call(self, scope: Scope, *received: Message) -> Answer:
        return await call(self.layer, scope, received or None)

    @property
    def line(self) -> dict[str, Any]:
        (line,) = self.written
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        fields: dict[str, Any] = json.loads(line)
        return fields


async def answers(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send(MORE)
    await send(END)


def answering(status: int) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "status": status})
        await send(END)

    return app


async def test_a_line_has_the_fixed_fields_first() -> None:
    context = RequestContext()
    context.started = 999.85477
    context.correlation_id = "abc-123-def"
    log = Log(answers)
    await log.call(http("/api/v1/recommendations", "POST", gateway=context))
    assert log.written[0].startswith(
        b'{"timestamp":"2025-11-27T10:30:00Z","level":"INFO","message":"Request completed",'
        b'"correlation_id":"abc-123-def","method":"POST","path":"/api/v1/recommendations","status_code":200,'
        b'"duration_ms":145.23'
    )


async def test_what_inner_layers_decided_is_told() -> None:
    log = Log(answers)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["gateway"]
        context.service = Service(name="chatbot-service", prefix="/api/v1/chat", replicas=("http://chatbot:8004",))
        context.caller = "user:42"
        context.client_address = "198.51.100.1"
        context.attempts = 2
        context.replica = "http://chatbot:8004"
        log.clock.advance(0.25)
        context.first_byte_at = log.clock()
        log.clock.advance(1)
        await receive()
        await receive()
        await answers(scope, receive, send)

    log.layer.app = app
    await log.call(
        http("/api/v1/chat"),
        {"type": "http.request", "body": b"abc", "more_body": True},
        {"type": "http.request", "body": b"de", "more_body": False},
    )
    assert log.line == {
        "timestamp": "2025-11-27T10:30:00Z",
        "level": "INFO",
        "message": "Request completed",
        "correlation_id": "",
        "method": "GET",
        "path": "/api/v1/chat",
        "status_code": 200,
        "duration_ms": 1250.0,
        "service": "chatbot-service",
        "caller": "user:42",
        "client": "198.51.100.1",
        "attempts": 2,
        "replica": "http://chatbot:8004",
        "bytes_in": 5,
        "bytes_out": 9,
        "ttfb_ms": 250.0,
    }


@pytest.mark.parametrize(
    ("status", "level"), [(200, "INFO"), (304, "INFO"), (404, "INFO"), (429, "INFO"), (500, "ERROR"), (503, "ERROR")]
)
async def test_the_level_is_by_status(status: int, level: str) -> None:
    log = Log(answering(status))
    await log.call(http())
    assert (log.line["level"], log.line["status_code"]) == (level, status)


async def test_a_refusal_says_why() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["gateway"]
        context.cause, context.reason = Cause.REFUSED, "rate_limited"
        await answering(429)(scope, receive, send)

    log = Log(app)
    await log.call(http())
    assert log.line["message"] == "Request refused"
    assert (log.line["level"], log.line["cause"], log.line["reason"]) == ("INFO", "refused", "rate_limited")


async def test_a_service_out_of_reach_is_a_failure() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["gateway"].cause = Cause.CONNECT_FAILED
        await answering(502)(scope, receive, send)

    log = Log(app)
    await log.call(http())
    assert (log.line["message"], log.line["level"], log.line["cause"]) == ("Request failed", "ERROR", "connect_failed")


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("error", "cause", "unanswered"),
    [
        (ValueError("x"), "gateway_fault", 500),
        (ConnectionAbortedError(), "cut_short", 500),
        (asyncio.CancelledError(), "shutdown", 499),
    ],
)
async def test_what_was_raised_is_logged_and_raised_on(
    error: BaseException, cause: str, unanswered: int, begun: bool
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send(START)
            await send(MORE)
        raise error

    log = Log(app)
    assert (await log.call(http())).error is error
    assert log.line["message"] == "Request aborted"
    assert log.line["cause"] == cause
    assert log.line["status_code"] == (200 if begun else unanswered)
    assert log.line["level"] == ("ERROR" if not begun and unanswered == 500 else "WARNING")


async def test_a_client_that_leaves_is_logged_as_499_or_with_the_status_it_saw() -> None:
    async def unanswered(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    async def begun(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        await receive()

    for app, status in ((unanswered, 499), (begun, 200)):
        log = Log(app)
        await log.call(http(), LEFT)
        assert (log.line["status_code"], log.line["cause"]) == (status, "client_left")
        assert (log.line["message"], log.line["level"]) == ("Request aborted", "WARNING")


async def test_a_client_that_goes_after_a_whole_answer_did_not_leave_early() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answers(scope, receive, send)
        await receive()

    log = Log(app)
    await log.call(http(), LEFT)
    assert log.line["message"] == "Request completed"


async def test_an_application_that_never_answers_has_failed() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    log = Log(app)
    await log.call(http())
    assert (log.line["status_code"], log.line["level"]) == (500, "ERROR")


async def test_a_query_is_never_logged() -> None:
    for scope in (
        http("/x", query_string=b"key=secret"),
        http("/x", raw_path=b"/x?key=secret", query_string=b"key=secret"),
        {name: value for name, value in http("/x?key=secret").items() if name != "raw_path"},
    ):
        for json_lines in (True, False):
            log = Log(answers, json=json_lines)
            await log.call(scope)
            assert b"secret" not in log.written[0]
            assert b"/x" in log.written[0]


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize("path", [b"/a\nb", b"/\x1b[31m", b"/\xff\x00\x7f", b"/" + b"%41" * 9000, b"/\"'\\"])
async def test_whatever_a_path_holds_makes_one_short_line(path: bytes, json_lines: bool) -> None:
    log = Log(answers, json=json_lines)
    await log.call(http(raw_path=path, method="M" * 5000))
    (line,) = log.written
    assert len(line) < 4096
    assert all(byte >= 32 for byte in line[:-1])
    assert line[-1:] == b"\n"
    if json_lines:
        json.loads(line)


async def test_a_lone_surrogate_does_not_lose_the_line() -> None:
    log = Log(answers)
    await log.call(http("/", client=("\ud800", 1)))
    assert log.line["client"] == "\\ud800"


async def test_probes_are_quiet_unless_they_fail() -> None:
    for path in ("/health", "/health/live", "/health/ready", "/metrics"):
        for status, lines in ((200, 0), (503, 1), (403, 1)):
            log = Log(answering(status))
            await log.call(http(path))
            assert len(log.written) == lines
    log = Log(answering(200), level="debug")
    await log.call(http("/health"))
    assert log.line["level"] == "DEBUG"


async def test_lines_below_the_level_are_left_out() -> None:
    log = Log(answering(200), level="WARNING")
    await log.call(http())
    assert log.written == []
    log = Log(answering(500), level="WARNING")
    await log.call(http())
    assert log.line["level"] == "ERROR"
    with pytest.raises(ValueError, match="LOUD"):
        LoggingASGI(answers, level="LOUD")


async def test_an_accepted_websocket_is_one_line_at_its_end_with_101() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": "é"})
            await send({"type": "websocket.send", "bytes": b"abc", "text": None})

    for code, message in ((1000, "Request completed"), (1001, "Request completed"), (1006, "Request aborted")):
        log = Log(app)
        await log.call(
            websocket("/ws"),
            {"type": "websocket.receive", "text": "hello"},
            {"type": "websocket.disconnect", "code": code},
        )
        assert log.line["message"] == message
        assert {name: log.line[name] for name in ("method", "path", "status_code", "bytes_in", "bytes_out")} == {
            "method": "GET",
            "path": "/ws",
            "status_code": 101,
            "bytes_in": 5,
            "bytes_out": 5,
        }


@pytest.mark.parametrize(
    ("messages", "status"),
    [
        ([{"type": "websocket.close", "code": 1008}], 403),
        (
            [
                {"type": "websocket.http.response.start", "status": 429, "headers": []},
                {"type": "websocket.http.response.body", "body": b"no"},
            ],
            429,
        ),
    ],
)
async def test_a_refused_websocket_is_logged_with_its_status(messages: list[Message], status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    log = Log(app)
    await log.call(websocket())
    assert (log.line["status_code"], log.line["level"]) == (status, "INFO")


async def test_lines_for_people_read_well() -> None:
    log = Log(answering(503), json=False)
    await log.call(http("/api/v1/chat", "POST"))
    assert log.written == [b"2025-11-27T10:30:00Z ERROR    Request completed: POST /api/v1/chat 503 0.00 ms -\n"]
    log = Log(answering(200), json=False, colour=True)
    await log.call(http())
    assert b"\x1b[32mINFO    \x1b[0m" in log.written[0]


WORDS = st.text(max_size=20) | st.sampled_from(["", '"', "\\", "\n", "\x7f", "é", "\u2028", "😀", "\ud800"])
NUMBERS = st.integers(0, 3) | st.integers(0, 2**40)
SECONDS = st.none() | st.floats(0, 1000)


@given(
    correlation_id=WORDS,
    path=st.binary(max_size=40) | st.sampled_from([b"/a?b", b"/" + b"x" * 2000]),
    service=st.booleans(),
    caller=WORDS,
    address=WORDS,
    attempts=st.integers(0, 3),
    numbers=st.tuples(NUMBERS, NUMBERS),
    first_byte=SECONDS,
    cause=st.sampled_from(Cause),
    reason=st.sampled_from(["", "full"]),
    status=st.sampled_from([200, 302, 404, 429, 500, 503]),
)
def test_a_line_holds_what_there_is_to_tell_in_the_order_of_the_contract_and_nothing_empty(
    correlation_id: str,
    path: bytes,
    service: bool,
    caller: str,
    address: str,
    attempts: int,
    numbers: tuple[int, int],
    first_byte: float | None,
    cause: Cause,
    reason: str,
    status: int,
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        log.clock.advance(0.12345)
        context: RequestContext = scope["gateway"]
        context.correlation_id, context.cause, context.reason = correlation_id, cause, reason
        context.service = Service(name="chatbot-service", prefix="/chat", replicas=("http://c",)) if service else None
        context.caller, context.client_address = caller, address
        context.attempts, context.replica = attempts, "http://c" if attempts else ""
        context.first_byte_at = None if first_byte is None else context.started + first_byte
        await receive()
        await send({**START, "status": status})
        await send({**END, "body": bytes(numbers[1] % 5000)})

    log = Log(app)
    body: Message = {"type": "http.request", "body": bytes(numbers[0] % 5000)}
    asyncio.run(log.call(http(unquote_to_bytes(path).decode("utf-8", "replace"), "POST", raw_path=path), body))

    shown = path.decode("ascii", "backslashreplace").partition("?")[0]
    ttfb = 0.12345 if first_byte is None else first_byte
    told: dict[str, Any] = {
        "timestamp": "2025-11-27T10:30:00Z",
        "level": "ERROR" if status >= 500 else "WARNING" if status < 400 and cause is not Cause.COMPLETED else "INFO",
        "message": "Request completed",
        "correlation_id": correlation_id,
        "method": "POST",
        "path": shown if len(shown) <= 1024 else f"{shown[:1024]}...",
        "status_code": status,
        "duration_ms": 123.45,
        "service": "chatbot-service" if service else None,
        "caller": caller or None,
        "client": address or "192.0.2.7",
        "attempts": attempts or None,
        "replica": "http://c" if attempts else None,
        "bytes_in": numbers[0] % 5000 or None,
        "bytes_out": numbers[1] % 5000 or None,
        "ttfb_ms": int(ttfb * 100_000 + 0.5) / 100,
        "cause": None if cause is Cause.COMPLETED else str(cause),
        "reason": reason or None,
    }
    if cause is Cause.REFUSED:
        told["message"] = "Request refused"
    elif cause is not Cause.COMPLETED:
        told["message"] = "Request aborted" if status < 400 else "Request failed"
    assert [*log.line] == [name for name, value in told.items() if value is not None]
    assert log.written == [orjson.dumps(log.line) + b"\n"]
    for name, value in log.line.items():
        if isinstance(value, float):
            assert value == pytest.approx(told[name], abs=0.011), name
        else:
            assert value in (told[name], str(told[name]).encode("utf-8", "backslashreplace").decode()), name


async def test_two_requests_at_once_have_a_line_each() -> None:
    both = asyncio.Barrier(2)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await both.wait()
        await answers(scope, receive, send)

    log = Log(app)
    await asyncio.gather(log.call(http("/a")), log.call(http("/b")))
    assert {json.loads(line)["path"] for line in log.written} == {"/a", "/b"}


async def test_lifespan_passes_untouched() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    log = Log(app)
    scope = {"type": "lifespan"}
    await log.call(scope, {"type": "lifespan.startup"})
    assert seen[0] is scope
    assert log.written == []
