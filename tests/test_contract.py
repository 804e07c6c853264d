"""The contract, example by example: the whole stack over real sockets, with a service that does as it is told."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from gateway.app import Gateway, create_app
from gateway.circuit_breaker import CircuitBreakerConfig, circuit_breaker_registry
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.wire import (
    OK,
    Answer,
    Reader,
    Request,
    Service,
    Writer,
    call,
    parse,
    read_body,
    reply,
    send_raw,
    service,
    serving,
    until,
)

ROUTES = {
    "/api/v1/recommendations": ("recommendation-service", "RECOMMENDATION_SERVICE_URL", "http://recommender:8001"),
    "/api/v1/search": ("search-service", "SEARCH_SERVICE_URL", "http://search:8002"),
    "/api/v1/pricing": ("pricing-service", "PRICING_SERVICE_URL", "http://pricing:8003"),
    "/api/v1/chat": ("chatbot-service", "CHATBOT_SERVICE_URL", "http://chatbot:8004"),
    "/api/v1/fraud": ("fraud-service", "FRAUD_SERVICE_URL", "http://fraud:8005"),
    "/api/v1/forecast": ("forecast-service", "FORECAST_SERVICE_URL", "http://forecasting:8006"),
    "/api/v1/vision": ("vision-service", "VISION_SERVICE_URL", "http://vision:8007"),
}
BROKEN = b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops"


class Rig:
    """A gateway with all seven services at one place."""

    def __init__(self, port: int, upstream: Service, app: Gateway) -> None:
        self.port, self.upstream, self.app = port, upstream, app

    async def call(self, target: str = "/api/v1/recommendations", method: str = "POST", **more: Any) -> Answer:
        return await call(self.port, target, method, **({"body": b"{}"} if method == "POST" else {}) | more)

    async def json(self, target: str) -> Any:
        return orjson.loads((await self.call(target, "GET")).body)

    async def breaker(self, name: str = "recommendation-service") -> dict[str, Any]:
        status: dict[str, Any] = (await self.json("/circuit-breakers"))[name]
        return status


@asynccontextmanager
async def gateway(**environ: str) -> AsyncIterator[Rig]:
    async with service() as upstream:
        addresses = {variable: upstream.url for _, variable, _ in ROUTES.values()}
        app = create_app(Settings.load({**addresses, **environ}))
        async with serving(app) as port:
            yield Rig(port, upstream, app)


def error(answer: Answer) -> dict[str, Any]:
    body = orjson.loads(answer.body)
    assert list(body) == ["error"]
    assert answer.values(b"content-type") == [b"application/json"]
    fields: dict[str, Any] = body["error"]
    assert {"type", "message", "correlation_id"} <= fields.keys()
    assert [fields["correlation_id"].encode()] == answer.values(b"x-correlation-id")
    return fields


# 2 Routes


async def test_each_of_the_seven_routes_leads_to_its_service() -> None:
    defaults = {each.service.prefix: each for each in Settings.load({}).services}
    assert {prefix: (each.service.name, each.service.replicas) for prefix, each in defaults.items()} == {
        prefix: (name, (url,)) for prefix, (name, _, url) in ROUTES.items()
    }
    async with gateway() as gw:
        for prefix, (name, _, _) in ROUTES.items():
            for path in (prefix, f"{prefix}/", f"{prefix}/deep/er?q=1"):
                assert (await gw.call(path)).status == 200
                assert gw.upstream.requests[-1].target == path.encode()
            assert (await gw.breaker(name))["total_calls"] == 3
            assert error(await gw.call(f"{prefix}x"))["type"] == "not_found"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"])
async def test_every_method_is_forwarded(method: str) -> None:
    async with gateway() as gw:
        assert (await gw.call(method=method)).status == 200
        assert gw.upstream.requests[0].method == method.encode()


async def test_the_gateways_own_paths_are_for_those_in_system_from() -> None:
    async with gateway(SYSTEM_FROM="10.0.0.0/8") as gw:
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/circuit-breakers"):
            assert error(await gw.call(path, "GET"))["type"] == "forbidden"
        assert (await gw.call()).status == 200


async def test_the_gateways_own_paths_are_never_rate_limited() -> None:
    async with gateway(RATE_LIMIT_PER_MINUTE="1") as gw:
        assert [(await gw.call("/health", "GET")).status for _ in range(5)] == [200] * 5


# 3 Correlation IDs


async def test_a_well_formed_correlation_id_is_on_the_answer_and_at_the_service() -> None:
    async with gateway() as gw:
        answer = await gw.call(headers=(("X-Correlation-ID", "abc-123.DEF_4"),))
        assert answer.values(b"x-correlation-id") == [b"abc-123.DEF_4"]
        assert gw.upstream.requests[0].values(b"x-correlation-id") == [b"abc-123.DEF_4"]


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "x\ty", "ü", "a,b"])
async def test_an_ill_formed_one_is_replaced(given: str) -> None:
    async with gateway() as gw:
        answer = await gw.call(headers=(("X-Correlation-ID", given),))
        (made,) = answer.values(b"x-correlation-id")
        assert made != given.encode()
        assert gw.upstream.requests[0].values(b"x-correlation-id") == [made]


async def test_trace_context_passes_through() -> None:
    async with gateway() as gw:
        parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        await gw.call(headers=(("traceparent", parent), ("tracestate", "a=1")))
        assert gw.upstream.requests[0].values(b"traceparent") == [parent.encode()]
        assert gw.upstream.requests[0].values(b"tracestate") == [b"a=1"]


# 4 Rate limits


async def test_the_61st_request_of_a_burst_gets_the_exact_429() -> None:
    async with gateway() as gw:
        for number in range(60):
            answer = await gw.call(headers=(("X-User-ID", "u1"),))
            assert answer.status == 200
            assert int(answer.values(b"x-ratelimit-remaining-hour")[0]) in (999 - number, 1000 - number)
        answer = await gw.call(headers=(("X-User-ID", "u1"),))
        assert answer.status == 429
        (after,) = answer.values(b"retry-after")
        assert 1 <= int(after) <= 60
        assert orjson.loads(answer.body) == {
            "detail": {
                "error": "Rate limit exceeded",
                "limit_per_minute": 60,
                "limit_per_hour": 1000,
                "retry_after": int(after),
            }
        }
        assert answer.values(b"x-correlation-id")
        assert len(gw.upstream.requests) == 60
        assert (await gw.call(headers=(("X-User-ID", "u2"),))).status == 200
        metrics = (await gw.call("/metrics", "GET")).body.decode()
        assert 'rate_limit_exceeded_total{identifier="user:u1"} 1.0' in metrics


async def test_every_answer_of_a_service_carries_the_limits() -> None:
    own = b"HTTP/1.1 404 No\r\nX-RateLimit-Limit-Minute: 7\r\nRateLimit: x\r\nContent-Length: 0\r\n\r\n"
    async with gateway() as gw:
        gw.upstream.handler = reply(own)
        answer = await gw.call()
        now = time.time()
        assert answer.values(b"x-ratelimit-limit-minute") == [b"60"]
        assert answer.values(b"x-ratelimit-limit-hour") == [b"1000"]
        assert answer.values(b"x-ratelimit-remaining-minute") == [b"59"]
        assert answer.values(b"x-ratelimit-remaining-hour") == [b"999"]
        assert now - 1 <= int(answer.values(b"x-ratelimit-reset-minute")[0]) <= now + 3
        assert now - 1 <= int(answer.values(b"x-ratelimit-reset-hour")[0]) <= now + 6
        assert answer.values(b"ratelimit-policy") == [b'"minute";q=60;w=60, "hour";q=1000;w=3600']
        assert answer.values(b"ratelimit") == [b'"minute";r=59;t=1, "hour";r=999;t=4']


async def test_a_service_with_a_limit_of_its_own_has_buckets_of_its_own() -> None:
    async with gateway(CHATBOT_RATE_LIMIT_PER_MINUTE="1") as gw:
        assert [(await gw.call("/api/v1/chat")).status for _ in range(2)] == [200, 429]
        assert (await gw.call()).values(b"x-ratelimit-remaining-minute") == [b"59"]


async def test_a_preflight_takes_no_token() -> None:
    async with gateway(RATE_LIMIT_PER_MINUTE="1") as gw:
        preflight = (("Origin", "https://shop.example"), ("Access-Control-Request-Method", "POST"))
        assert [(await gw.call(method="OPTIONS", headers=preflight)).status for _ in range(3)] == [200] * 3
        assert [(await gw.call()).status for _ in range(2)] == [200, 429]


async def test_a_strangers_claims_about_itself_make_it_nobody_new() -> None:
    async with gateway(RATE_LIMIT_PER_MINUTE="1", TRUSTED_PROXIES="10.0.0.1") as gw:
        assert (await gw.call(headers=(("X-User-ID", "u1"), ("X-Forwarded-For", "1.2.3.4")))).status == 200
        assert not gw.upstream.requests[0].values(b"x-user-id")
        assert gw.upstream.requests[0].values(b"x-forwarded-for") == [b"127.0.0.1"]
        assert (await gw.call(headers=(("X-User-ID", "u2"), ("X-Forwarded-For", "4.3.2.1")))).status == 429


# 5 Circuit breakers


async def test_five_failures_open_the_breaker_and_the_next_call_gets_the_exact_503() -> None:
    async with gateway() as gw:
        gw.upstream.handler = reply(BROKEN)
        assert [(await gw.call()).status for _ in range(5)] == [500] * 5
        began = time.monotonic()
        answer = await gw.call()
        assert time.monotonic() - began < 1
        assert (answer.status, len(gw.upstream.requests)) == (503, 5)
        assert error(answer)["type"] == "service_unavailable"
        assert error(answer)["message"] == "Circuit breaker 'recommendation-service' is OPEN"
        assert 1 <= int(answer.values(b"retry-after")[0]) <= 60
        assert (await gw.breaker())["state"] == "open"
        assert (await gw.call("/api/v1/search")).status == 500, "the others are not concerned"


async def test_the_status_form_of_every_breaker() -> None:
    async with gateway() as gw:
        await gw.call()
        gw.upstream.handler = reply(BROKEN)
        await gw.call()
        status = await gw.json("/circuit-breakers")
        assert set(status) == {name for name, _, _ in ROUTES.values()}
        expected = {"state": "closed", "failure_count": 1, "recent_failures": 1, "total_calls": 2}
        assert expected.items() <= status["recommendation-service"].items()


async def test_a_breaker_recovers_by_itself_after_its_timeout() -> None:
    quick = {"CIRCUIT_BREAKER_TIMEOUT": "0.2", "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "2"}
    async with gateway(RATE_LIMIT_PER_MINUTE="off", RATE_LIMIT_PER_HOUR="off", **quick) as gw:
        gw.upstream.handler = reply(BROKEN)
        assert [(await gw.call()).status for _ in range(3)] == [500, 500, 503]
        gw.upstream.handler = reply(OK)

        async def recovered() -> bool:
            return (await gw.call()).status == 200

        async with asyncio.timeout(3):
            while not await recovered():
                pass
        assert (await gw.breaker())["state"] == "half_open"
        assert (await gw.call()).status == 200
        assert (await gw.breaker())["state"] == "closed"


async def test_refused_while_half_open_the_message_says_so() -> None:
    held = asyncio.Event()

    async def hold(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        await held.wait()
        writer.write(OK)

    async with gateway(CIRCUIT_BREAKER_TIMEOUT="0.1", CIRCUIT_BREAKER_SUCCESS_THRESHOLD="1") as gw:
        gw.upstream.handler = reply(BROKEN)
        for _ in range(5):
            await gw.call()
        gw.upstream.handler = hold
        while (await gw.breaker())["state"] != "half_open":
            pass
        probe = asyncio.create_task(gw.call())
        await until(lambda: len(gw.upstream.requests) == 6)
        message = error(await gw.call())["message"]
        assert message == "Circuit breaker 'recommendation-service' is HALF_OPEN"
        held.set()
        assert (await probe).status == 200


async def test_a_breaker_is_reset_in_python_and_over_http() -> None:
    async with gateway(ADMIN_TOKEN="s3cret") as gw:
        path = "/circuit-breakers/recommendation-service/reset"
        for reset_over_http in (False, True):
            gw.upstream.handler = reply(BROKEN)
            for _ in range(5):
                await gw.call()
            assert (await gw.breaker())["state"] == "open"
            if reset_over_http:
                assert (await gw.call(path)).status == 401
                assert (await gw.call(path, headers=(("Authorization", "Bearer wrong"),))).status == 401
                answer = await gw.call(path, headers=(("Authorization", "Bearer s3cret"),))
                assert answer.status == 200
                assert orjson.loads(answer.body)["workers"] == "1 of 1"
                unknown = "/circuit-breakers/nobody-service/reset"
                assert (await gw.call(unknown, headers=(("Authorization", "Bearer s3cret"),))).status == 404
            else:
                circuit_breaker_registry.reset_breaker("recommendation-service")
            assert (await gw.breaker())["state"] == "closed"
            gw.upstream.handler = reply(OK)
            assert (await gw.call()).status == 200


async def test_without_an_admin_token_nobody_resets_over_http() -> None:
    async with gateway() as gw:
        assert (await gw.call("/circuit-breakers/recommendation-service/reset")).status == 403


def test_the_configuration_of_a_breaker_is_as_promised() -> None:
    config = CircuitBreakerConfig(failure_threshold=5, success_threshold=2, timeout=60, window_size=100)
    assert config == CircuitBreakerConfig()


async def test_garbage_and_departures_of_clients_move_no_breaker() -> None:
    async with gateway(MAX_BODY_BYTES="100") as gw:
        for _ in range(10):
            assert (await gw.call(body=b"x" * 101)).status == 413
            assert (await gw.call("/api/v1/recommendations/../../x")).status == 400
        assert (await gw.breaker())["recent_failures"] == 0


# 7 Health, metrics, logs


async def test_health_in_the_exact_form() -> None:
    async with gateway() as gw:
        answer = await gw.call("/health", "GET")
        body = orjson.loads(answer.body)
        assert answer.status == 200
        stamp = body.pop("timestamp")
        assert time.strptime(stamp, "%Y-%m-%dT%H:%M:%SZ")
        assert body == {
            "status": "healthy",
            "service": "api_gateway",
            "checks": {"redis": "disabled", "qdrant": "disabled"},
        }
        assert list(orjson.loads(answer.body)) == ["status", "timestamp", "service", "checks"]
        gw.app.begin_drain()
        answer = await gw.call("/health", "GET")
        assert (answer.status, orjson.loads(answer.body)["status"]) == (503, "draining")
        assert (await gw.call("/health/ready", "GET")).status == 503
        assert (await gw.call("/health/live", "GET")).status == 200
        assert (await gw.call()).status == 200, "while it drains, requests still pass"


async def test_a_dead_optional_part_degrades_and_stays_200() -> None:
    async with gateway(REDIS_URL="redis://127.0.0.1:1/0") as gw:
        answer = await gw.call("/health", "GET")
        body = orjson.loads(answer.body)
        assert (answer.status, body["status"], body["checks"]["redis"]) == (200, "degraded", "error")
        answer = await gw.call()
        assert answer.status == 200
        assert answer.values(b"x-ratelimit-mode") == [b"local"]


async def test_the_fixed_metrics_are_there_from_the_start_and_count_by_route() -> None:
    async with gateway() as gw:
        await gw.call("/api/v1/recommendations/very/raw?x=1")
        await gw.call("/random/path")
        text = (await gw.call("/metrics", "GET")).body.decode()
        for family in (
            'http_requests_total{endpoint="/api/v1/recommendations",method="POST",status="200"}',
            'http_request_duration_seconds_bucket{endpoint="/api/v1/recommendations",le="900.0",method="POST"}',
            'http_request_errors_total{endpoint="/api/v1/recommendations",method="POST"}',
            'circuit_breaker_state{service="vision-service"} 0.0',
            "rate_limit_exceeded_total{identifier=",
            'http_requests_total{endpoint="other",method="POST",status="404"}',
        ):
            assert family in text, family
        assert "very/raw" not in text
        assert "random" not in text


async def test_one_json_line_a_request_with_the_fixed_fields(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    async with gateway() as gw:
        await gw.call(
            "/api/v1/recommendations?token=canary",
            headers=(("X-Correlation-ID", "abc-123-def"), ("Authorization", "Bearer canary"), ("X-User-ID", "u1")),
            body=b'{"secret": "canary"}',
        )
        await gw.call("/api/v1/nothing-there/../x")
    out = capfdbinary.readouterr().out
    assert b"canary" not in out
    lines = [orjson.loads(line) for line in out.splitlines()]
    requests = [line for line in lines if "status_code" in line]
    assert len(requests) == 2
    line = requests[0]
    assert list(line)[:8] == [
        "timestamp", "level", "message", "correlation_id", "method", "path", "status_code", "duration_ms",
    ]  # fmt: skip
    fixed = {
        "level": "INFO",
        "message": "Request completed",
        "correlation_id": "abc-123-def",
        "method": "POST",
        "path": "/api/v1/recommendations",
        "status_code": 200,
    }
    assert fixed.items() <= line.items()
    assert time.strptime(line["timestamp"], "%Y-%m-%dT%H:%M:%SZ")
    assert isinstance(line["duration_ms"], float)
    assert {"service": "recommendation-service", "caller": "user:u1", "attempts": 1}.items() <= line.items()
    assert requests[1]["message"] == "Request refused"


# 8 Errors


@pytest.mark.parametrize(
    ("target", "method", "headers", "status", "type_"),
    [
        ("/nowhere", "GET", (), 404, "not_found"),
        ("/api/v1/chatter", "POST", (), 404, "not_found"),
        ("/api/v1/%63hat", "POST", (), 404, "not_found"),
        ("/api/v1/chat/../../admin", "POST", (), 400, "bad_request"),
        ("/api/v1/chat/%2e%2e/x", "POST", (), 400, "bad_request"),
        ("/api/v1/chat", "TRACE", (), 405, "method_not_allowed"),
        ("/health", "POST", (), 405, "method_not_allowed"),
        ("/api/v1/chat", "POST", (("Content-Length", "20000000"),), 413, "payload_too_large"),
        ("/api/v1/chat", "GET", (("X-Request-Timeout-Ms", "-1"),), 400, "bad_request"),
        ("/api/v1/chat", "GET", (("X-Request-Timeout-Ms", "0"),), 504, "gateway_timeout"),
    ],
)
async def test_the_error_form(
    target: str, method: str, headers: tuple[tuple[str, str], ...], status: int, type_: str
) -> None:
    async with gateway() as gw:
        answer = await call(gw.port, target, method, headers)
        assert answer.status == status
        assert error(answer)["type"] == type_
        assert not gw.upstream.requests


async def test_unreachable_is_502_and_slow_504() -> None:
    async def silent(request: Request, reader: Reader, writer: Writer) -> None:
        await reader.read(-1)
        raise ConnectionError

    async with gateway(FIRST_BYTE_TIMEOUT="0.1", VISION_SERVICE_URL="http://127.0.0.1:1") as gw:
        gw.upstream.handler = silent
        assert error(await gw.call("/api/v1/vision"))["type"] == "bad_gateway"
        assert error(await gw.call())["type"] == "gateway_timeout"


async def test_a_full_gateway_answers_503_at_once_and_takes_no_token() -> None:
    release = asyncio.Event()

    async def hold(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        await release.wait()
        writer.write(OK)

    async with gateway(MAX_IN_FLIGHT="2") as gw:
        gw.upstream.handler = hold
        running = [asyncio.create_task(gw.call()) for _ in range(2)]
        await until(lambda: len(gw.upstream.requests) == 2)
        answer = await gw.call()
        assert answer.status == 503
        assert error(answer) == {
            "type": "service_unavailable",
            "message": "The gateway is at its limit of requests in flight",
            "correlation_id": answer.values(b"x-correlation-id")[0].decode(),
            "reason": "full",
            "retry_after": 1,
        }
        assert not answer.values(b"x-ratelimit-limit-minute")
        release.set()
        assert {answer.status for answer in await asyncio.gather(*running)} == {200}
        assert (await gw.call()).status == 200


async def test_a_service_at_its_own_cap_takes_no_place_from_the_others() -> None:
    release = asyncio.Event()

    async def hold(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        if request.target.startswith(b"/api/v1/vision"):
            await release.wait()
        writer.write(OK)

    async with gateway(VISION_MAX_IN_FLIGHT="1") as gw:
        gw.upstream.handler = hold
        held = asyncio.create_task(gw.call("/api/v1/vision"))
        await until(lambda: gw.upstream.requests)
        refused = await gw.call("/api/v1/vision")
        assert (refused.status, error(refused)["reason"], refused.values(b"retry-after")) == (
            503,
            "service_full",
            [b"1"],
        )
        assert (await gw.call("/api/v1/fraud")).status == 200
        release.set()
        assert (await held).status == 200
        assert (await gw.call("/api/v1/vision")).status == 200


async def test_what_the_server_refuses_before_it_is_a_request_is_logged_and_counted(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    app = create_app(Settings.load({}))
    async with serving(app, http=GatewayProtocol) as port:
        broken = b"GET /x?key=canary HTTP/1.1\r\nHost: h\r\nX-Correlation-ID: abc\r\nContent-Length: +5\r\n\r\n"
        answer = parse(await send_raw(port, broken))
        assert (answer.status, error(answer)["correlation_id"]) == (400, "abc")
        metrics = (await call(port, "/metrics")).body.decode()
        assert 'http_requests_total{endpoint="other",method="OTHER",status="400"}' in metrics
    out = capfdbinary.readouterr().out
    assert b"canary" not in out
    (line,) = [line for line in map(orjson.loads, out.splitlines()) if line["message"] == "Request refused"]
    assert {"status_code": 400, "correlation_id": "abc", "path": "/x", "client": "127.0.0.1"}.items() <= line.items()


async def test_a_fault_of_the_gateways_own_is_500_without_detail(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway() as gw:

        def explode() -> int:
            raise RuntimeError("password=hunter2")

        monkeypatch.setattr(gw.app.limiter, "clock", explode)  # injected: no input is known to do it
        answer = await gw.call()
        assert answer.status == 500
        assert error(answer)["message"] == "An unexpected error occurred"
        assert b"hunter2" not in answer.raw


async def test_a_body_that_the_server_can_not_read_is_one_story_to_client_log_and_service(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    async with service() as upstream:
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": upstream.url}))
        async with serving(app, http=GatewayProtocol) as port:
            head = b"POST /api/v1/chat HTTP/1.1\r\nHost: h\r\nX-Correlation-ID: abc\r\n"
            answer = parse(await send_raw(port, head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n"))
            assert (answer.status, answer.values(b"x-correlation-id")) == (400, [b"abc"])
            await until(lambda: not app.proxy.exchanges)
            await until(lambda: upstream.open == 0)
    lines = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    (line,) = [line for line in lines if "status_code" in line]
    expected = {"correlation_id": "abc", "status_code": 400, "cause": "refused", "reason": "bad_body"}
    assert expected.items() <= line.items()


# WebSockets pass the same layers


async def test_a_websocket_is_named_limited_and_refused_like_any_request() -> None:
    async with gateway(RATE_LIMIT_PER_MINUTE="1", CHATBOT_SERVICE_URL="http://127.0.0.1:1") as gw:
        url = f"ws://127.0.0.1:{gw.port}/api/v1/chat/ws"
        for status in (502, 429):
            with pytest.raises(InvalidStatus) as refusal:
                await connect(url, proxy=None, additional_headers={"X-Correlation-ID": "ws-1"})
            response = refusal.value.response
            assert response.status_code == status
            assert response.headers["X-Correlation-ID"] == "ws-1"
            assert response.headers["X-RateLimit-Limit-Minute"] == "1"
        assert orjson.loads(bytes(response.body or b""))["detail"]["error"] == "Rate limit exceeded"
        with pytest.raises(InvalidStatus) as refusal:
            await connect(f"ws://127.0.0.1:{gw.port}/nowhere", proxy=None)
        assert refusal.value.response.status_code == 404
