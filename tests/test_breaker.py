"""The breaker as a layer: what it refuses, how it probes, and that it keeps no permit."""

import asyncio
from typing import Any

import orjson
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.circuit_breaker import CircuitBreakerConfig
from gateway.context import KEY, Cause, RequestContext
from gateway.middleware.breaker import BreakerASGI
from gateway.policies.circuit_breaker import CircuitBreaker
from gateway.policies.services import Service
from tests.breaker_rig import DISCONNECT, WS_DENIAL, Crash, Watched, answering, ask, body, ok, start
from tests.clocks import FakeClock

pytestmark = pytest.mark.usefixtures("registry")


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
