"""The breaker as a layer: how it judges what becomes of a request."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import OUTCOMES, Cause, RequestContext
from gateway.middleware.breaker import BreakerASGI
from gateway.policies.circuit_breaker import Outcome
from tests.breaker_rig import DISCONNECT, Crash, Watched, answering, ask, body, ok, saying, start
from tests.clocks import FakeClock

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def watched(clock: FakeClock) -> Watched:
    return Watched(clock)


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
