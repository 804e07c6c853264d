"""The breaker as a layer: how it judges a WebSocket."""

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import Cause
from tests.breaker_rig import WS_DENIAL, Crash, Watched, answering, body, saying, start
from tests.clocks import FakeClock

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def watched(clock: FakeClock) -> Watched:
    return Watched(clock)


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
