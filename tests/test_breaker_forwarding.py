"""The breaker as a layer within the watch of an outer one, before an application that says why a request ended."""

import asyncio
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.middleware.breaker import BreakerASGI
from gateway.policies.circuit_breaker import CircuitBreaker
from gateway.policies.services import Service
from gateway.watch import Watch
from tests.breaker_rig import DISCONNECT, Answer, Crash, answering, ask, attempting, body, ok, saying, start
from tests.clocks import FakeClock


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
