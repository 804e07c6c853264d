"""The rate limit layer: its headers, its 429, whom it counts, and what it leaves alone."""

import asyncio
import json
import logging
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.backends.memory import MemoryLimiter
from gateway.backends.redis import RedisLimiter
from gateway.context import KEY, Cause, RequestContext
from gateway.middleware.rate_limit import OURS, RateLimitASGI
from gateway.policies.services import Service
from gateway.policies.token_bucket import Decision, Limits
from tests.clocks import FakeMicroseconds

NOW = 1_764_239_400  # Unix seconds
Headers = list[tuple[bytes, bytes]]


class Service200:
    """An application that answers 200, or accepts a WebSocket, and keeps the scopes it was given."""

    def __init__(self, *headers: tuple[bytes, bytes]) -> None:
        self.headers = list(headers)
        self.scopes: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
            await send({"type": "http.response.body", "body": b"hello"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.accept", "headers": self.headers})


class Answer:
    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        start = messages[0]
        self.status: int = start.get("status", 0)
        self.pairs: Headers = list(start.get("headers", ()))
        self.headers = {name.decode(): value.decode() for name, value in self.pairs}

    @property
    def json(self) -> Any:
        return json.loads(self.messages[1]["body"])


def scope_of(
    kind: str = "http",
    *,
    method: str = "POST",
    peer: tuple[str, int] | None = ("198.51.100.9", 4711),
    headers: Headers | None = None,
    service: str | None = None,
    **more: Any,
) -> Scope:
    scope: Scope = {"type": kind, "path": "/", "headers": headers or [], "client": peer, **more}
    if kind == "http":
        scope["method"] = method
    if service is not None:
        context = RequestContext()
        context.service = Service(name=service, prefix="/x", replicas=("http://127.0.0.1:1",))
        scope[KEY] = context
    return scope


async def ask(app: RateLimitASGI, scope: Scope | None = None) -> Answer:
    messages: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the layer reads no body")

    async def send(message: Message) -> None:
        messages.append(message)

    await app(scope_of() if scope is None else scope, receive, send)
    return Answer(messages)


@pytest.fixture
def clock() -> FakeMicroseconds:
    return FakeMicroseconds()


def limited(clock: FakeMicroseconds, service: Service200 | None = None, **options: Any) -> RateLimitASGI:
    return RateLimitASGI(service or Service200(), limiter=MemoryLimiter(clock=clock), **options)


async def test_every_answer_says_what_is_left_in_all_three_forms(clock: FakeMicroseconds) -> None:
    app = limited(clock)
    answer = await ask(app)
    assert answer.status == 200
    assert answer.messages[1]["body"] == b"hello"
    assert answer.headers == {
        "x-ratelimit-limit-minute": "60",
        "x-ratelimit-limit-hour": "1000",
        "x-ratelimit-remaining-minute": "59",
        "x-ratelimit-remaining-hour": "999",
        "x-ratelimit-reset-minute": str(NOW + 1),
        "x-ratelimit-reset-hour": str(NOW + 4),
        "ratelimit-policy": '"minute";q=60;w=60, "hour";q=1000;w=3600',
        "ratelimit": '"minute";r=59;t=1, "hour";r=999;t=4',
    }
    for _ in range(14):
        answer = await ask(app)
    assert answer.headers["ratelimit"] == '"minute";r=45;t=15, "hour";r=985;t=54'
    assert answer.headers["x-ratelimit-reset-minute"] == str(NOW + 15)


async def test_beyond_the_limit_is_the_exact_429(clock: FakeMicroseconds) -> None:
    exceeded: list[str] = []
    app = limited(clock, per_minute=2, per_hour=1000, exceeded=exceeded.append)
    scope = scope_of(service="chatbot-service")
    assert [(await ask(app, scope)).status for _ in range(3)] == [200, 200, 429]
    answer = await ask(app, scope)
    assert answer.json == {
        "detail": {
            "error": "Rate limit exceeded",
            "limit_per_minute": 2,
            "limit_per_hour": 1000,
            "retry_after": 30,
        }
    }
    assert list(answer.json["detail"]) == ["error", "limit_per_minute", "limit_per_hour", "retry_after"]
    assert answer.headers["retry-after"] == "30"
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["content-length"] == str(len(answer.messages[1]["body"]))
    assert answer.headers["x-ratelimit-remaining-minute"] == "0"
    assert answer.headers["x-ratelimit-reset-minute"] == str(NOW + 60)
    assert answer.headers["ratelimit"] == '"minute";r=0;t=60, "hour";r=998;t=8'
    assert exceeded == ["ip:198.51.100.9"] * 2
    context = scope[KEY]
    assert (context.cause, context.reason, context.caller) == (Cause.REFUSED, "rate_limited", "ip:198.51.100.9")
    clock.advance(30)
    assert (await ask(app, scope)).status == 200


async def test_a_caller_that_saturates_its_limit_gets_what_the_model_says(clock: FakeMicroseconds) -> None:
    app = limited(clock, per_minute=100, per_hour=None)
    passed = 0
    for tick in range(2 * 60 * 4):  # two minutes, asking every 250 ms, twice
        passed += [(await ask(app)).status for _ in range(2)].count(200)
        assert passed == min(2 * (tick + 1), 100 + 100 * tick // 240)
        clock.advance(0.25)


async def test_limits_that_are_off_leave_their_headers_out(clock: FakeMicroseconds) -> None:
    answer = await ask(limited(clock, per_hour=None))
    assert not any("hour" in name for name in answer.headers)
    assert answer.headers["ratelimit-policy"] == '"minute";q=60;w=60'
    assert answer.headers["ratelimit"] == '"minute";r=59;t=1'
    answer = await ask(limited(clock, per_minute=None))
    assert not any("minute" in name for name in answer.headers)
    assert answer.headers["ratelimit"] == '"hour";r=999;t=4'
    service = Service200((b"ratelimit", b"its own"))
    assert (await ask(limited(clock, service, per_minute=None, per_hour=None))).pairs == service.headers
    assert service.scopes[0][KEY].caller == "ip:198.51.100.9"
    refused = await ask(limited(clock, per_minute=None, per_hour=0))
    assert refused.json["detail"] == {
        "error": "Rate limit exceeded",
        "limit_per_minute": None,
        "limit_per_hour": 0,
        "retry_after": None,
    }
    assert "retry-after" not in refused.headers


async def test_a_services_own_headers_of_these_names_are_replaced(clock: FakeMicroseconds) -> None:
    theirs = [(name, b"theirs") for name in sorted(OURS)]
    service = Service200(*theirs, (b"X-RateLimit-Limit-Minute", b"theirs"), (b"x-other", b"1"), (b"x-other", b"2"))
    answer = await ask(limited(clock, service))
    assert [value for name, value in answer.pairs if name == b"x-other"] == [b"1", b"2"]
    assert b"theirs" not in [value for _, value in answer.pairs]
    assert len(service.headers) == len(theirs) + 3  # what it sent is not touched


@pytest.mark.parametrize("name", [b"ratelimit-policy", b"RateLimit-Policy", b"Ratelimit-Policy", b"RATELIMIT-POLICY"])
async def test_they_are_replaced_however_they_are_usually_spelt(clock: FakeMicroseconds, name: bytes) -> None:
    answer = await ask(limited(clock, Service200((b"x-first", b"1"), (name, b"theirs"), (b"x-last", b"2"))))
    assert [value for found, value in answer.pairs if found.lower() == b"ratelimit-policy"] == [
        b'"minute";q=60;w=60, "hour";q=1000;w=3600'
    ]
    assert [name for name, _ in answer.pairs][:2] == [b"x-first", b"x-last"]


async def test_what_others_do_to_one_answers_headers_does_not_show_in_the_next(clock: FakeMicroseconds) -> None:
    app = limited(clock, per_minute=0)
    preflight: Headers = [(b"origin", b"https://example.com"), (b"access-control-request-method", b"POST")]
    for scope in (scope_of(method="OPTIONS", headers=preflight), scope_of()):
        first = await ask(app, scope)
        pairs = list(first.pairs)
        first.messages[0]["headers"].clear()
        assert (await ask(app, scope)).pairs == pairs


async def test_two_services_have_buckets_of_their_own_and_others_share_the_common_ones(clock: FakeMicroseconds) -> None:
    app = limited(
        clock,
        per_minute=3,
        service_limits={"chatbot-service": Limits.of(1, None), "vision-service": Limits.of(2, 10)},
        service_on_redis_failure={"fraud-service": "closed"},
    )

    async def passes(service: str | None) -> int:
        return [(await ask(app, scope_of(service=service))).status for _ in range(5)].count(200)

    assert await passes("chatbot-service") == 1
    assert await passes("vision-service") == 2
    assert await passes("search-service") == 3
    assert [await passes(service) for service in ("fraud-service", "pricing-service", None)] == [0, 0, 0]
    answer = await ask(app, scope_of(service="vision-service"))
    assert (answer.headers["x-ratelimit-limit-minute"], answer.json["detail"]["limit_per_hour"]) == ("2", 10)


async def test_a_user_is_one_caller_from_any_address_and_a_stranger_is_its_address(clock: FakeMicroseconds) -> None:
    app = limited(clock, per_minute=1)
    alice = [(b"x-user-id", b"alice")]

    async def status(peer: str, headers: Headers) -> int:
        return (await ask(app, scope_of(peer=(peer, 1), headers=headers))).status

    assert await status("127.0.0.1", [*alice, (b"x-forwarded-for", b"203.0.113.1")]) == 200
    assert await status("127.0.0.1", [*alice, (b"x-forwarded-for", b"203.0.113.2")]) == 429
    assert await status("127.0.0.1", [(b"x-forwarded-for", b"203.0.113.1")]) == 200
    assert await status("198.51.100.9", alice) == 200
    assert await status("198.51.100.9", [(b"x-user-id", b"bob"), (b"x-forwarded-for", b"1.2.3.4")]) == 429


async def test_a_user_id_not_believed_is_not_forwarded_and_the_first_warns(
    clock: FakeMicroseconds, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service200()
    app = limited(clock, service)
    scope = scope_of(headers=[(b"x-user-id", b"alice"), (b"x-other", b"1"), (b"x-user-id", b"bob")])
    given = list(scope["headers"])
    with caplog.at_level(logging.WARNING, logger="gateway.rate_limit"):
        await ask(app, scope)
        await ask(app, scope)
        await ask(app, scope_of(headers=[(b"x-forwarded-for", b"1.2.3.4")]))
    assert [seen["headers"] for seen in service.scopes[:2]] == [[(b"x-other", b"1")]] * 2
    assert scope["headers"] == given
    assert KEY not in scope
    (record,) = caplog.records
    assert "x-user-id from 198.51.100.9" in record.getMessage()
    assert "TRUSTED_PROXIES" in record.getMessage()


async def test_what_a_trusted_proxy_says_is_passed_on_without_a_copy(
    clock: FakeMicroseconds, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service200()
    scope = scope_of(
        peer=None, headers=[(b"x-user-id", b"alice"), (b"x-forwarded-for", b"203.0.113.1")], service="chatbot-service"
    )
    await ask(limited(clock, service), scope)
    assert service.scopes == [scope]
    assert service.scopes[0] is scope
    assert (scope[KEY].caller, scope[KEY].client_address) == ("user:alice", "203.0.113.1")
    assert not caplog.records


async def test_a_preflight_takes_no_token_and_is_never_refused(clock: FakeMicroseconds) -> None:
    app = limited(clock, per_minute=1)
    preflight: Headers = [(b"origin", b"https://example.com"), (b"access-control-request-method", b"POST")]
    for _ in range(3):
        answer = await ask(app, scope_of(method="OPTIONS", headers=preflight))
        assert (answer.status, answer.headers["x-ratelimit-remaining-minute"]) == (200, "1")
    assert (await ask(app, scope_of(method="OPTIONS", headers=preflight[:1]))).status == 200
    assert (await ask(app, scope_of(method="POST", headers=preflight))).status == 429
    assert (await ask(app, scope_of(method="OPTIONS", headers=preflight[1:]))).status == 429
    assert (await ask(app, scope_of(method="OPTIONS", headers=preflight))).status == 200


async def test_a_websocket_takes_one_token_at_its_handshake(clock: FakeMicroseconds) -> None:
    app = limited(clock, per_minute=1)
    accepted = await ask(app, scope_of("websocket"))
    assert accepted.messages[0]["type"] == "websocket.accept"
    assert accepted.headers["x-ratelimit-remaining-minute"] == "0"
    denied = await ask(app, scope_of("websocket", extensions={"websocket.http.response": {}}))
    assert [message["type"] for message in denied.messages] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert (denied.status, denied.headers["retry-after"], denied.json["detail"]["retry_after"]) == (429, "60", 60)
    closed = await ask(app, scope_of("websocket"))
    assert [message["type"] for message in closed.messages] == ["websocket.close"]


async def test_a_websocket_that_the_service_denies_says_what_is_left_too(clock: FakeMicroseconds) -> None:
    async def denies(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
        await send({"type": "websocket.http.response.body", "body": b""})

    app = RateLimitASGI(denies, limiter=MemoryLimiter(clock=clock))
    answer = await ask(app, scope_of("websocket", extensions={"websocket.http.response": {}}))
    assert (answer.status, answer.headers["x-ratelimit-remaining-minute"]) == (403, "59")


async def test_other_scopes_pass_untouched(clock: FakeMicroseconds) -> None:
    service = Service200()
    app = limited(clock, service, per_minute=0)
    scope: Scope = {"type": "lifespan"}

    async def never(*_: Any) -> Any:
        raise AssertionError

    await app(scope, never, never)
    assert service.scopes[0] is scope


async def test_an_exception_and_a_cancellation_pass_through(clock: FakeMicroseconds) -> None:
    waiting = asyncio.Event()

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            raise RuntimeError("ours")
        waiting.set()
        await asyncio.Event().wait()

    app = RateLimitASGI(fails, limiter=MemoryLimiter(clock=clock))
    with pytest.raises(RuntimeError, match="ours"):
        await ask(app, scope_of(method="GET"))
    task = asyncio.ensure_future(ask(app))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_while_the_limiter_decides_reaches_neither_service_nor_client(
    clock: FakeMicroseconds,
) -> None:
    class Slow:
        asked = asyncio.Event()

        async def take(self, key: str, limits: Limits, cost: int, on_failure: str) -> Decision:
            self.asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    service = Service200()
    task = asyncio.ensure_future(ask(RateLimitASGI(service, limiter=Slow())))
    await Slow.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert service.scopes == []


async def test_two_requests_at_once_do_not_mix_their_headers(clock: FakeMicroseconds) -> None:
    both = asyncio.Barrier(2)

    async def together(scope: Scope, receive: Receive, send: Send) -> None:
        await both.wait()
        await Service200()(scope, receive, send)

    app = RateLimitASGI(together, limiter=MemoryLimiter(clock=clock))
    answers = await asyncio.gather(ask(app), ask(app))
    assert [answer.headers["x-ratelimit-remaining-minute"] for answer in answers] == ["59", "58"]


async def test_without_redis_answers_say_so_and_each_service_fails_in_its_own_way(port: int) -> None:
    limiter = RedisLimiter(f"redis://127.0.0.1:{port}")
    app = RateLimitASGI(
        Service200(),
        limiter=limiter,
        per_minute=1,
        service_on_redis_failure={"search-service": "open", "fraud-service": "closed"},
    )
    try:
        local = [await ask(app, scope_of(service="chatbot-service")) for _ in range(2)]
        assert [(answer.status, answer.headers["x-ratelimit-mode"]) for answer in local] == [
            (200, "local"),
            (429, "local"),
        ]
        passed = [await ask(app, scope_of(service="search-service")) for _ in range(3)]
        assert [(answer.status, answer.headers["x-ratelimit-mode"]) for answer in passed] == [(200, "open")] * 3
        scope = scope_of(service="fraud-service")
        closed = await ask(app, scope)
        assert (closed.status, closed.headers["retry-after"]) == (503, "1")
        assert closed.headers["x-ratelimit-mode"] == "closed"
        assert closed.json["error"]["type"] == "service_unavailable"
        assert closed.json["error"]["reason"] == "limiter_unavailable"
        assert (scope[KEY].cause, scope[KEY].reason) == (Cause.REFUSED, "limiter_unavailable")
    finally:
        await limiter.aclose()


@pytest.mark.parametrize(
    "options",
    [
        {"per_minute": -1},
        {"per_hour": 3_000_000},
        {"trusted_proxies": ["10.0.0.0/33"]},
        {"on_redis_failure": "maybe"},
        {"service_on_redis_failure": {"a": "maybe"}},
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        RateLimitASGI(Service200(), **options)


async def test_alone_it_limits_in_memory() -> None:
    app = RateLimitASGI(Service200(), per_minute=1, per_hour=1)
    assert [(await ask(app)).status for _ in range(2)] == [200, 429]
