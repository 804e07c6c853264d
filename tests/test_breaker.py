"""The breaker as a layer: what it lets through, how it judges what becomes of that, and that it keeps no permit."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.circuit_breaker import CircuitBreakerConfig
from gateway.context import KEY, OUTCOMES, Cause, RequestContext
from gateway.middleware.breaker import BreakerASGI
from gateway.policies.circuit_breaker import CircuitBreaker, Outcome
from gateway.policies.services import Service
from gateway.watch import Watch
from tests.clocks import FakeClock

DISCONNECT = {"type": "http.disconnect"}
WS_DENIAL: dict[str, Any] = {"extensions": {"websocket.http.response": {}}}


class Answer:
    """What a request was answered, as far as it was."""

    def __init__(self, sent: list[Message]) -> None:
        self.sent = sent
        start: Message = next((message for message in sent if message["type"].endswith("response.start")), {})
        self.status: int | None = start.get("status")
        self.headers = dict(start.get("headers", ()))
        self.body = b"".join(message.get("body", b"") for message in sent)


async def ask(app: ASGIApp, *incoming: Message, send: Send | None = None, **scope: Any) -> Answer:
    """Send a request, or a WebSocket's messages, through ``app``; once they are read it waits for ever."""
    sent: list[Message] = []
    kind = scope.setdefault("type", "http")
    first = (
        {"type": "http.request", "body": b"", "more_body": False} if kind == "http" else {"type": "websocket.connect"}
    )
    messages = list(incoming or (first,))

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def keep(message: Message) -> None:
        sent.append(message)

    usual = {"method": "POST", "path": "/", "headers": [], "query_string": b"", "client": ("127.0.0.1", 5000)}
    with suppress(Crash):
        await app({**usual, **scope}, receive, send or keep)
    return Answer(sent)


class Crash(Exception):  # noqa: N818  it is the application's, not ours
    """An application's mishap."""


def answering(*messages: Message, crash: BaseException | None = None) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if crash is not None:
            raise crash

    return app


def start(status: int = 200, kind: str = "http.response") -> Message:
    return {"type": f"{kind}.start", "status": status, "headers": []}


def body(content: bytes = b"", *, more: bool = False, kind: str = "http.response") -> Message:
    return {"type": f"{kind}.body", "body": content, "more_body": more}


def ok(status: int = 200) -> ASGIApp:
    return answering(start(status), body(b"done"))


def saying(cause: Cause | None, app: ASGIApp, **facts: Any) -> ASGIApp:
    """An application that knows why the request ended, as the proxy does."""

    async def knowing(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            context: RequestContext = scope[KEY]
            context.cause = cause
            for name, value in facts.items():
                setattr(context, name, value)

    return knowing


class Watched:
    """A breaker layer whose application can be exchanged, and whose outcomes can be counted."""

    def __init__(self, clock: FakeClock, config: CircuitBreakerConfig | None = None) -> None:
        self.clock = clock
        self.app: ASGIApp = ok()
        self.layer = BreakerASGI(self._call, config=config, clock=clock)
        assert self.layer.breaker is not None
        self.breaker = self.layer.breaker
        self.asked = 0

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        await self.app(scope, receive, send)

    async def ask(self, app: ASGIApp | None = None, *incoming: Message, **scope: Any) -> Answer:
        self.app = app or self.app
        return await ask(self.layer, *incoming, **scope)

    async def fail(self, times: int = 5) -> None:
        for _ in range(times):
            await self.ask(ok(500))

    async def half_open(self) -> None:
        await self.fail()
        self.clock.advance(60)

    @property
    def state(self) -> str:
        return str(self.breaker.status(self.clock())["state"])

    @property
    def outcomes(self) -> tuple[int, int]:
        """Successes and failures in the window."""
        status = self.breaker.status(self.clock())
        return status["recent_calls"] - status["recent_failures"], status["recent_failures"]


@pytest.fixture
def watched(clock: FakeClock) -> Watched:
    return Watched(clock)


# --- refusing


async def test_after_five_failures_it_answers_by_itself_in_the_error_form(watched: Watched) -> None:
    await watched.fail()
    watched.clock.advance(17.5)
    answer = await watched.ask(ok())
    assert watched.asked == 5
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"43")
    error = orjson.loads(answer.body)["error"]
    assert error == {
        "type": "service_unavailable",
        "message": "Circuit breaker 'app' is OPEN",
        "correlation_id": "",
        "reason": "breaker_open",
        "retry_after": 43,
    }


async def test_retry_after_is_at_least_a_second(watched: Watched) -> None:
    await watched.fail()
    watched.clock.advance(59.99)
    assert (await watched.ask()).headers[b"retry-after"] == b"1"


async def test_a_refusal_while_half_open_says_so(watched: Watched) -> None:
    await watched.half_open()
    waiting = asyncio.Event()

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        waiting.set()
        await asyncio.Event().wait()

    probes = []
    for _ in range(2):
        waiting.clear()
        probes.append(asyncio.create_task(watched.ask(never)))
        await waiting.wait()
    answer = await watched.ask()
    assert orjson.loads(answer.body)["error"]["message"] == "Circuit breaker 'app' is HALF_OPEN"
    for probe in probes:
        probe.cancel()
    await asyncio.gather(*probes, return_exceptions=True)
    assert (await watched.ask(ok())).status == 200  # both slots were given back


async def test_a_refused_request_is_neither_passed_on_nor_read(watched: Watched) -> None:
    await watched.fail()

    async def receive() -> Message:
        raise AssertionError("the body was read")

    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    context = RequestContext()
    await watched.layer({"type": "http", "headers": [], KEY: context}, receive, send)
    assert sent[0]["status"] == 503
    assert (context.cause, context.reason) == (Cause.REFUSED, "breaker_open")


async def test_a_refused_websocket_is_denied_in_the_same_form(watched: Watched) -> None:
    await watched.fail()
    answer = await watched.ask(type="websocket", **WS_DENIAL)
    assert answer.sent[0]["type"] == "websocket.http.response.start"
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"60")
    assert (await watched.ask(type="websocket")).sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]


async def test_it_recovers_by_two_probes(watched: Watched) -> None:
    await watched.half_open()
    await watched.ask(ok())
    assert watched.state == "half_open"
    await watched.ask(ok())
    assert watched.state == "closed"


async def test_the_application_is_told_that_it_answers_a_probe(watched: Watched) -> None:
    told = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.append(scope[KEY].probe)
        await ok()(scope, receive, send)

    await watched.ask(app)
    await watched.half_open()
    await watched.ask(app)
    assert told == [False, True]


# --- alone and in the stack


async def test_lifespan_and_unknown_scopes_pass_untouched(clock: FakeClock) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope, receive, send))

    layer = BreakerASGI(app, clock=clock)
    for kind in ("lifespan", "something.new"):
        through: Any = ({"type": kind}, object(), object())
        await layer(*through)
        assert all(got is given for got, given in zip(seen.pop(), through, strict=True))


async def test_alone_it_leaves_the_outer_scope_as_it_was(watched: Watched) -> None:
    scope = {"type": "http", "headers": []}

    async def receive() -> Message:
        return DISCONNECT

    async def send(message: Message) -> None: ...

    await watched.layer(scope, receive, send)
    assert scope == {"type": "http", "headers": []}


async def test_its_breaker_is_known_to_the_registry_by_name(clock: FakeClock, registry: Any) -> None:
    layer = BreakerASGI(ok(500), name="my-app", config=CircuitBreakerConfig(1), clock=clock)
    await ask(layer)
    assert registry.get("my-app") is layer.breaker
    assert registry.get("my-app").state(clock()) == "open"
    registry.reset_breaker("my-app")
    assert registry.get("my-app").state(clock()) == "closed"


async def test_each_service_has_its_own_breaker_and_a_request_without_one_passes(clock: FakeClock) -> None:
    breakers = {name: CircuitBreaker(name) for name in ("search-service", "chatbot-service")}
    layer = BreakerASGI(ok(500), breakers=breakers, clock=clock)

    async def status_from(name: str | None) -> int | None:
        context = RequestContext()
        if name is not None:
            context.service = Service(name=name, prefix="/api", replicas=("http://127.0.0.1:1",))
        return (await ask(layer, gateway=context)).status

    for _ in range(5):
        await status_from("search-service")
    assert await status_from("search-service") == 503
    assert await status_from("chatbot-service") == 500
    for _ in range(10):
        assert await status_from("pricing-service") == 500  # it has none here
        assert await status_from(None) == 500


# --- judging an answer by what passes


@pytest.mark.parametrize(
    ("app", "outcomes"),
    [
        (ok(), (1, 0)),
        (ok(404), (1, 0)),
        (ok(429), (1, 0)),
        (ok(501), (1, 0)),
        (ok(500), (0, 1)),
        (ok(503), (0, 1)),
        (ok(599), (0, 1)),
        (answering(start(204), body()), (1, 0)),
        (answering(start(), {"type": "http.response.pathsend", "path": "/dev/null"}), (1, 0)),
        (answering(start(), body(b"a", more=True), body(b"b")), (1, 0)),
        (answering(start(), body(b"a", more=True)), (0, 1)),
        (answering(start()), (0, 1)),
        (answering(), (0, 1)),
        (answering(crash=Crash()), (0, 1)),
        (answering(start(), body(b"a", more=True), crash=Crash()), (0, 1)),
        (answering(start(), body(b"whole"), crash=Crash()), (1, 0)),
        (answering(start(500), body(b"whole"), crash=Crash()), (0, 1)),
    ],
)
async def test_an_answer_is_judged_by_its_status_once_it_is_whole(
    watched: Watched, app: ASGIApp, outcomes: tuple[int, int]
) -> None:
    await watched.ask(app)
    assert watched.outcomes == outcomes


async def test_an_exception_goes_on_to_the_outer_layers(clock: FakeClock) -> None:
    crash = ValueError("boom")
    with pytest.raises(ValueError, match="boom") as caught:
        await ask(BreakerASGI(answering(crash=crash), clock=clock))
    assert caught.value is crash


async def test_a_client_that_leaves_says_nothing_about_the_service(watched: Watched) -> None:
    async def notices(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()
        raise Crash

    for _ in range(10):
        await watched.ask(notices, {"type": "http.request", "more_body": True}, DISCONNECT)
        await watched.ask(notices, {"type": "http.request"}, DISCONNECT)
    assert watched.outcomes == (0, 0)


async def test_a_cancelled_request_says_nothing_and_stays_cancelled(watched: Watched) -> None:
    started = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"a", more=True))
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(watched.ask(slow))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert watched.outcomes == (0, 0)


async def test_a_server_that_takes_no_more_of_the_answer_says_nothing(watched: Watched) -> None:
    async def send(message: Message) -> None:
        raise OSError("the client is gone")

    with pytest.raises(OSError, match="gone"):
        await ask(watched.layer, send=send)
    assert watched.outcomes == (0, 0)


async def test_a_disconnect_after_the_whole_answer_is_no_leaving(watched: Watched) -> None:
    async def listens_on(scope: Scope, receive: Receive, send: Send) -> None:
        await ok()(scope, receive, send)
        assert (await receive()) == DISCONNECT

    await watched.ask(listens_on, DISCONNECT)
    assert watched.outcomes == (1, 0)


@pytest.mark.parametrize(("waited", "failures"), [(30, 0), (30.5, 1)])
async def test_a_caller_who_gives_up_after_half_a_minute_of_silence_is_a_failure(
    watched: Watched, waited: float, failures: int
) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        watched.clock.advance(waited)
        await receive()

    for _ in range(3):  # of one caller only the first counts
        await watched.ask(silent, {"type": "http.request"}, DISCONNECT)
    assert watched.outcomes == (0, failures)
    await watched.ask(silent, {"type": "http.request"}, DISCONNECT, client=("127.0.0.2", 5000))
    assert watched.outcomes == (0, 2 * failures)


async def test_a_caller_who_leaves_within_an_answer_is_none_however_long_it_took(watched: Watched) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        watched.clock.advance(600)
        await receive()

    await watched.ask(slow, DISCONNECT)
    assert watched.outcomes == (0, 0)


async def test_a_client_who_dawdles_over_its_body_and_leaves_cannot_open_the_breaker(watched: Watched) -> None:
    async def reads(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        watched.clock.advance(600)
        await receive()

    for number in range(10):
        part = {"type": "http.request", "body": b"a", "more_body": True}
        await watched.ask(reads, part, DISCONNECT, client=(f"127.0.0.{number}", 5000))
    assert watched.outcomes == (0, 0)


# --- judging by what inner layers know


def test_every_cause_has_its_outcome() -> None:
    assert set(OUTCOMES) == set(Cause)


@pytest.mark.parametrize("cause", Cause)
async def test_the_cause_that_the_context_names_decides(watched: Watched, cause: Cause) -> None:
    await watched.ask(saying(cause, ok(200)))
    expected = {Outcome.SUCCESS: (1, 0), Outcome.FAILURE: (0, 1), Outcome.NEUTRAL: (0, 0)}[OUTCOMES[cause]]
    assert watched.outcomes == expected


@pytest.mark.parametrize(
    ("app", "outcomes"),
    [
        (saying(Cause.COMPLETED, ok(500)), (0, 1)),
        (saying(Cause.COMPLETED, ok(501)), (1, 0)),
        (saying(Cause.REFUSED, ok(503), reason="full"), (0, 0)),
        (saying(None, ok(503), reason="full"), (0, 0)),
        (saying(Cause.CLIENT_DEADLINE, ok(504)), (0, 0)),
        (saying(Cause.CUT_SHORT, answering(start(), body(b"a", more=True), crash=Crash())), (0, 1)),
        (saying(Cause.SHUTDOWN, answering(start(), body(b"a", more=True), crash=Crash())), (0, 0)),
    ],
)
async def test_a_cause_goes_before_appearances(watched: Watched, app: ASGIApp, outcomes: tuple[int, int]) -> None:
    await watched.ask(app)
    assert watched.outcomes == outcomes


async def test_a_callers_leaving_that_the_context_names_counts_by_caller(watched: Watched) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        watched.clock.advance(31)

    for caller in ("user:1", "user:2", "user:1"):
        context = RequestContext()
        context.caller = caller
        await watched.ask(saying(Cause.CLIENT_LEFT, silent), gateway=context)
    assert watched.outcomes == (0, 2)


# --- probes


async def test_a_probe_is_judged_at_its_first_byte_and_its_rest_as_an_ordinary_call(watched: Watched) -> None:
    await watched.half_open()
    states = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        states.append(watched.state)
        await send(body(b"", more=True))  # not yet a byte
        states.append(watched.state)
        await send(body(b"token", more=True))
        states.append(watched.state)
        await send(body(b"token", more=True))
        raise Crash

    await watched.ask(stream)
    assert states == ["half_open"] * 3
    states.clear()
    await watched.ask(stream)
    assert states == ["half_open", "half_open", "closed"]
    assert watched.outcomes == (0, 1)  # the second one's breaking off, when the breaker was closed


async def test_a_probe_with_an_answer_of_500_fails_as_a_whole(watched: Watched) -> None:
    await watched.half_open()
    await watched.ask(answering(start(500), body(b"a", more=True), body(b"b")))
    assert watched.state == "open"


async def test_probes_that_only_cancel_or_crash_the_client_leave_it_half_open(watched: Watched) -> None:
    await watched.half_open()

    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    for _ in range(10):
        with pytest.raises(asyncio.CancelledError):
            await watched.ask(leaves)
    assert watched.state == "half_open"
    assert (await watched.ask(ok())).status == 200


async def test_a_call_from_before_the_outage_does_not_end_it(watched: Watched) -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def long(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await end.wait()
        await ok()(scope, receive, send)

    task = asyncio.create_task(watched.ask(long))
    await begun.wait()
    await watched.half_open()
    end.set()
    await task
    assert (watched.state, watched.breaker._successes) == ("half_open", 0)


# --- applications as people write them


async def noticing_that_the_client_left(request: Request) -> Response:
    await request.body()
    return PlainTextResponse("left" if await request.is_disconnected() else "here")


async def streaming(request: Request) -> Response:
    async def tokens() -> AsyncIterator[str]:
        for _ in range(3):
            yield "token "
        await asyncio.Event().wait()

    return StreamingResponse(tokens())


async def failing_afterwards(request: Request) -> Response:
    def mail() -> None:
        raise Crash

    return PlainTextResponse("done", background=BackgroundTask(mail))


async def failing(request: Request) -> Response:
    raise Crash


def starlette(endpoint: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    return Starlette(routes=[Route("/", endpoint, methods=["POST"])])


async def test_asking_whether_the_client_is_there_is_not_its_leaving(watched: Watched) -> None:
    answer = await watched.ask(starlette(noticing_that_the_client_left), {"type": "http.request"})
    assert answer.body == b"here"
    assert watched.outcomes == (1, 0)


async def test_a_stream_that_its_reader_leaves_is_neutral(watched: Watched) -> None:
    await watched.ask(starlette(streaming), {"type": "http.request"}, DISCONNECT)
    assert watched.outcomes == (0, 0)


async def test_work_that_fails_after_the_answer_is_not_the_answers_failure(watched: Watched) -> None:
    await watched.ask(starlette(failing_afterwards))
    assert watched.outcomes == (1, 0)


async def test_an_endpoint_that_raises_is_a_failure_once(watched: Watched) -> None:
    answer = await watched.ask(starlette(failing))  # answered 500 by Starlette, and raised on
    assert answer.status == 500
    assert watched.outcomes == (0, 1)


# --- WebSockets

ACCEPT = {"type": "websocket.accept"}


def closing(code: int) -> Message:
    return {"type": "websocket.close", "code": code}


def session(*sent: Message, clock: FakeClock | None = None, lasting: float = 0, crash: bool = False) -> ASGIApp:
    """A WebSocket that is accepted, lasts some seconds and then ends as told."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(ACCEPT)
        if clock is not None:
            clock.advance(lasting)
        for message in sent:
            await send(message)
        if crash:
            raise Crash

    return app


async def test_a_websocket_succeeds_when_it_is_accepted(watched: Watched) -> None:
    during = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        during.append(watched.outcomes)
        await receive()
        await send(closing(1000))

    await watched.ask(app, type="websocket")
    assert during == [(1, 0)]
    assert watched.outcomes == (1, 0)


@pytest.mark.parametrize(
    ("code", "failures"), [(1000, 0), (1001, 0), (1008, 0), (4401, 0), (1006, 1), (1011, 1), (1012, 1)]
)
async def test_one_that_the_service_drops_at_once_is_a_failure_too(watched: Watched, code: int, failures: int) -> None:
    await watched.ask(session(closing(code)), type="websocket")
    assert watched.outcomes == (1, failures)


@pytest.mark.parametrize(("lasting", "failures"), [(4.5, 1), (5, 0)])
async def test_at_once_means_within_five_seconds(watched: Watched, lasting: float, failures: int) -> None:
    for app in (
        session(closing(1011), clock=watched.clock, lasting=lasting),
        session(clock=watched.clock, lasting=lasting),
        session(clock=watched.clock, lasting=lasting, crash=True),
        saying(Cause.CUT_SHORT, session(clock=watched.clock, lasting=lasting)),
    ):
        await watched.ask(app, type="websocket")
    assert watched.outcomes == (4, 4 * failures)


async def test_a_service_that_drops_every_websocket_opens_its_breaker(watched: Watched) -> None:
    for _ in range(5):
        await watched.ask(session(closing(1011)), type="websocket")
    assert watched.state == "open"


async def test_a_drop_that_the_context_names_is_a_failure_whenever_it_came(watched: Watched) -> None:
    await watched.ask(saying(Cause.DROPPED, session(clock=watched.clock, lasting=60)), type="websocket")
    assert watched.outcomes == (1, 1)


async def test_a_client_that_closes_its_websocket_says_nothing(watched: Watched) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        await receive()
        raise Crash

    await watched.ask(app, {"type": "websocket.disconnect", "code": 1006}, type="websocket")
    assert watched.outcomes == (1, 0)


@pytest.mark.parametrize(
    ("messages", "outcomes"),
    [
        ([closing(1008)], (1, 0)),
        ([start(403, "websocket.http.response"), body(kind="websocket.http.response")], (1, 0)),
        ([start(502, "websocket.http.response"), body(kind="websocket.http.response")], (0, 1)),
        ([], (0, 1)),
    ],
)
async def test_a_denied_handshake_is_judged_like_an_answer(
    watched: Watched, messages: list[Message], outcomes: tuple[int, int]
) -> None:
    await watched.ask(answering(*messages), type="websocket", **WS_DENIAL)
    assert watched.outcomes == outcomes


async def test_a_denial_that_the_server_can_only_close_is_judged_by_the_status_that_the_context_has(
    watched: Watched,
) -> None:
    await watched.ask(saying(Cause.COMPLETED, answering(closing(1008)), status=502), type="websocket")
    assert watched.outcomes == (0, 1)


async def test_an_accepted_websocket_is_a_probes_success(watched: Watched) -> None:
    await watched.half_open()
    states = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ACCEPT)
        states.append(watched.state)
        await send(closing(1000))

    await watched.ask(app, type="websocket")
    await watched.ask(app, type="websocket")
    assert states == ["half_open", "closed"]


# --- within the watch of an outer layer, around an application that says why a request ended


class Forwarding:
    """A service's breaker within a watch: what an application does, and the outcomes that are counted."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.breaker = CircuitBreaker("search-service")
        self.app: ASGIApp = ok()
        self.layer = BreakerASGI(self._call, breakers={"search-service": self.breaker}, clock=clock)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    async def ask(self, app: ASGIApp, *incoming: Message, send: Send | None = None, **scope: Any) -> Answer:
        self.app = app

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            _, scope, receive, send = Watch.over(scope, receive, send, self.clock)
            await self.layer(scope, receive, send)

        context = RequestContext()
        context.service = Service(name="search-service", prefix="/api", replicas=("http://127.0.0.1:1",))
        return await ask(watched, *incoming, send=send, gateway=context, **scope)

    @property
    def outcomes(self) -> tuple[int, int]:
        status = self.breaker.status(self.clock())
        return status["recent_calls"] - status["recent_failures"], status["recent_failures"]


def attempting(app: ASGIApp) -> ASGIApp:
    async def attempts(scope: Scope, receive: Receive, send: Send) -> None:
        scope[KEY].attempts += 1
        await app(scope, receive, send)

    return attempts


@pytest.fixture
def forwarding(clock: FakeClock) -> Forwarding:
    return Forwarding(clock)


@pytest.mark.parametrize(
    ("app", "outcomes"),
    [
        (saying(Cause.COMPLETED, ok()), (1, 0)),
        (saying(Cause.COMPLETED, ok(500)), (0, 1)),
        (saying(Cause.COMPLETED, ok(501)), (1, 0)),
        (saying(Cause.STALLED, answering(start(), body(b"a", more=True), crash=Crash())), (0, 1)),
        (saying(Cause.REFUSED, ok(503), reason="full"), (0, 0)),
        (saying(None, ok(503), reason="full"), (0, 0)),
        (saying(Cause.GATEWAY_FAULT, answering(crash=Crash())), (0, 0)),
        (ok(), (1, 0)),
        (ok(500), (0, 1)),
        (answering(start(), body(b"a", more=True)), (0, 1)),
        (answering(), (0, 1)),
        (answering(crash=Crash()), (0, 1)),
        (attempting(answering(start(), body(b"a", more=True), crash=Crash())), (0, 0)),
        (attempting(answering(start(), body(b"whole"), crash=Crash())), (1, 0)),
    ],
)
async def test_a_forwarded_request_is_judged_by_its_cause_and_by_what_the_watch_saw(
    forwarding: Forwarding, app: ASGIApp, outcomes: tuple[int, int]
) -> None:
    await forwarding.ask(app)
    assert forwarding.outcomes == outcomes


async def test_a_server_that_takes_no_more_of_a_forwarded_answer_says_nothing(forwarding: Forwarding) -> None:
    async def send(message: Message) -> None:
        raise OSError("the client is gone")

    with pytest.raises(OSError, match="gone"):
        await forwarding.ask(attempting(ok()), send=send)
    assert forwarding.outcomes == (0, 0)


async def test_a_cancelled_forwarded_request_says_nothing_and_stays_cancelled(forwarding: Forwarding) -> None:
    with pytest.raises(asyncio.CancelledError):
        await forwarding.ask(answering(start(), body(b"a", more=True), crash=asyncio.CancelledError()))
    assert forwarding.outcomes == (0, 0)


@pytest.mark.parametrize(("waited", "failures"), [(30, 0), (30.5, 1)])
async def test_the_wait_for_a_forwarded_answer_is_counted_from_the_end_of_the_request(
    forwarding: Forwarding, waited: float, failures: int
) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            forwarding.clock.advance(100)  # the client's own time
        forwarding.clock.advance(waited)
        await receive()

    upload: list[Message] = [{"type": "http.request", "more_body": True}, {"type": "http.request"}, DISCONNECT]
    await forwarding.ask(silent, *upload)
    await forwarding.ask(saying(Cause.CLIENT_LEFT, silent), *upload, client=("127.0.0.2", 5000))
    assert forwarding.outcomes == (0, 2 * failures)


async def test_a_caller_who_leaves_within_a_forwarded_answer_is_none_however_long_it_took(
    forwarding: Forwarding,
) -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send(start())
        forwarding.clock.advance(600)
        await receive()

    await forwarding.ask(saying(Cause.CLIENT_LEFT, slow), {"type": "http.request"}, DISCONNECT)
    await forwarding.ask(slow, {"type": "http.request"}, DISCONNECT)
    assert forwarding.outcomes == (0, 0)


async def test_a_forwarded_probe_is_judged_at_its_first_byte(forwarding: Forwarding) -> None:
    for _ in range(5):
        await forwarding.ask(ok(500))
    forwarding.clock.advance(60)
    states = []

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"token", more=True))
        states.append(forwarding.breaker.state(forwarding.clock()))
        await send(body(b"token"))

    await forwarding.ask(saying(Cause.COMPLETED, stream))
    await forwarding.ask(saying(Cause.COMPLETED, stream))
    assert states == ["half_open", "closed"]


# --- giving back


async def test_after_a_thousand_cancelled_probes_every_slot_is_free(watched: Watched) -> None:
    await watched.half_open()

    async def wanders(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    for steps in range(1000):
        task = asyncio.create_task(watched.ask(wanders))
        for _ in range(steps % 8):  # cancelled at each of its awaits, and before the first
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not watched.breaker._leases
    assert watched.state == "half_open"


async def test_two_requests_at_once_are_judged_each_by_itself(watched: Watched) -> None:
    first, second = asyncio.Event(), asyncio.Event()

    def waiting(event: asyncio.Event, status: int) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send(start(status))
            await event.wait()
            await send(body())

        return app

    fails = asyncio.create_task(watched.ask(waiting(first, 500)))
    await asyncio.sleep(0)
    succeeds = asyncio.create_task(watched.ask(waiting(second, 200)))
    second.set()
    await succeeds
    assert watched.outcomes == (1, 0)
    first.set()
    await fails
    assert watched.outcomes == (1, 1)
