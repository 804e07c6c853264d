import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from starlette.types import Receive, Scope, Send

from gateway.app import Gateway, create_app
from gateway.backends.memory import MemoryLimiter
from gateway.backends.prometheus import MOST_CALLERS, Metrics, process_metrics
from gateway.backends.redis import RedisLimiter
from gateway.context import Cause, RequestContext
from gateway.event_loop import LagMeter
from gateway.middleware.metrics import MetricsASGI
from gateway.policies.services import Service
from gateway.policies.token_bucket import Limits
from gateway.settings import Settings
from gateway.tally import Tally
from tests.asgi_call import call, http, websocket
from tests.metrics_page import SERVICES, families, page
from tests.redis_server import redis_server
from tests.wire import Handler, Reader, Request, Writer, connected, read_body, reserved_port, service, serving, until

ROOT = Path(__file__).parent.parent
CHAT = Service(name="chatbot-service", prefix="/api/v1/chat", replicas=("http://chatbot:8004",))
FIXED = {
    "http_requests_total": "counter",
    "http_request_duration_seconds": "histogram",
    "http_request_errors_total": "counter",
    "circuit_breaker_state": "gauge",
    "rate_limit_exceeded_total": "counter",
}


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


class Measured:
    """A metrics layer around an application, with a registry of its own."""

    def __init__(self, app: Any) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry)
        self.clock = Clock()
        self.layer = MetricsASGI(app, metrics=self.metrics, clock=self.clock)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    @property
    def text(self) -> str:
        return generate_latest(self.registry).decode()


def answering(status: int, endpoint: str = "/api/v1/chat", **decided: Any) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        context: RequestContext = scope["gateway"]
        context.endpoint = endpoint
        for name, value in decided.items():
            setattr(context, name, value)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    return app


def test_every_fixed_family_is_there_from_the_start() -> None:
    measured = Measured(answering(200))
    for name, kind in FIXED.items():
        assert f"# TYPE {name} {kind}\n" in measured.text
    for name in ("gateway_requests_in_flight", "log_lines_dropped_total", "rate_limiter_shared", "gateway_build_info"):
        assert f"# TYPE {name} " in measured.text


def test_services_that_are_expected_show_at_zero() -> None:
    measured = Measured(answering(200))
    measured.metrics.expect([CHAT])
    labels = {"method": "POST", "endpoint": "/api/v1/chat"}
    assert measured.value("http_requests_total", status="200", **labels) == 0
    assert measured.value("http_request_errors_total", **labels) == 0
    assert measured.value("http_request_duration_seconds_count", **labels) == 0
    assert measured.value("http_request_duration_seconds_bucket", le="900.0", **labels) == 0
    assert measured.value("circuit_breaker_state", service="chatbot-service") == 0
    assert measured.value("gateway_upstream_attempts_total", service="chatbot-service") == 0


async def test_a_request_is_counted_and_timed_under_its_endpoint() -> None:
    measured = Measured(answering(200))
    context = RequestContext()
    context.started = measured.clock.seconds - 0.2
    await call(measured.layer, http("/api/v1/chat/secret", "POST", gateway=context))
    labels = {"method": "POST", "endpoint": "/api/v1/chat"}
    assert measured.value("http_requests_total", status="200", **labels) == 1
    assert measured.value("http_request_duration_seconds_sum", **labels) == pytest.approx(0.2)
    assert measured.value("http_request_duration_seconds_bucket", le="0.1", **labels) == 0
    assert measured.value("http_request_duration_seconds_bucket", le="0.25", **labels) == 1
    assert measured.value("http_request_errors_total", **labels) == 0
    assert "secret" not in measured.text


@pytest.mark.parametrize(("status", "errors"), [(200, 0), (404, 0), (429, 0), (500, 1), (503, 1), (599, 1)])
async def test_a_5xx_is_an_error(status: int, errors: int) -> None:
    measured = Measured(answering(status))
    await call(measured.layer, http())
    assert measured.value("http_request_errors_total", method="GET", endpoint="/api/v1/chat") == errors


@pytest.mark.parametrize(
    ("error", "begun", "status"),
    [
        (ValueError(), False, "500"),
        (ValueError(), True, "200"),
        (ConnectionAbortedError(), True, "200"),
        (asyncio.CancelledError(), False, "499"),
        (asyncio.CancelledError(), True, "200"),
        (None, True, "200"),
    ],
)
async def test_an_answer_cut_short_is_an_error_and_what_is_raised_passes(
    error: BaseException | None, begun: bool, status: str
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        if error is not None:
            raise error

    measured = Measured(app)
    answer = await call(measured.layer, http())
    assert answer.error is error
    assert measured.value("http_request_errors_total", method="GET", endpoint="other") == 1
    assert measured.value("http_requests_total", method="GET", endpoint="other", status=status) == 1
    assert measured.value("gateway_requests_in_flight") == 0


async def test_a_stream_that_ends_in_an_error_event_is_an_error_though_it_is_whole() -> None:
    measured = Measured(answering(200, cause=Cause.ERROR_EVENT))
    await call(measured.layer, http())
    assert measured.value("http_request_errors_total", method="GET", endpoint="/api/v1/chat") == 1


async def test_why_requests_end_and_how_often_services_are_asked() -> None:
    measured = Measured(answering(502, service=CHAT, cause=Cause.CONNECT_FAILED, attempts=2))
    await call(measured.layer, http())
    service = {"service": "chatbot-service"}
    assert measured.value("gateway_request_outcomes_total", cause="connect_failed", **service) == 1
    assert measured.value("gateway_upstream_attempts_total", **service) == 2
    assert measured.value("gateway_upstream_retries_total", **service) == 1


async def test_a_retry_that_the_budget_denies_is_counted_and_the_budget_shown() -> None:
    measured = Measured(answering(502, service=CHAT, cause=Cause.RESET, attempts=1, retry_denied=True))
    measured.metrics.expect([CHAT])
    assert measured.value("gateway_upstream_retries_denied_total", service=CHAT.name) == 0
    await call(measured.layer, http())
    assert measured.value("gateway_upstream_retries_denied_total", service=CHAT.name) == 1
    assert measured.value("gateway_upstream_retries_total", service=CHAT.name) == 0
    for left in (10, 3):
        measured.metrics.refresh({}, {CHAT.name: left})
        assert measured.value("gateway_upstream_retry_budget", service=CHAT.name) == left


async def test_labels_are_bounded_whatever_clients_send() -> None:
    measured = Measured(answering(200, endpoint="other"))
    await call(measured.layer, http())
    series = measured.text.count("\n")
    for number in range(50):
        await call(measured.layer, http(f"/{number}", f"M{number}"))
        await call(measured.layer, http(f"/{number}", "PROPFIND"))
    assert measured.value("http_requests_total", method="OTHER", endpoint="other", status="200") == 100
    assert measured.text.count("\n") < 2 * series


def test_callers_have_names_up_to_a_bound() -> None:
    measured = Measured(answering(200))
    assert measured.value("rate_limit_exceeded_total", identifier="other") == 0
    for number in range(MOST_CALLERS + 5):
        measured.metrics.rate_limit_exceeded(f"ip:{number}")
    measured.metrics.rate_limit_exceeded("ip:0")
    assert measured.value("rate_limit_exceeded_total", identifier="ip:0") == 2
    assert measured.value("rate_limit_exceeded_total", identifier="other") == 5


async def test_requests_under_way_are_counted_two_at_once() -> None:
    both = asyncio.Barrier(3)
    leave = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await both.wait()
        await leave.wait()

    measured = Measured(app)
    calls = [asyncio.create_task(call(measured.layer, http())) for _ in range(2)]
    await both.wait()
    assert measured.value("gateway_requests_in_flight") == 2
    leave.set()
    await asyncio.gather(*calls)
    assert measured.value("gateway_requests_in_flight") == 0


async def test_a_websocket_counts_with_the_time_of_its_handshake() -> None:
    measured = Measured(None)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        measured.clock.seconds += 0.03
        await send({"type": "websocket.accept"})
        measured.clock.seconds += 3600
        await send({"type": "websocket.close", "code": 1000})

    measured.layer.app = app
    await call(measured.layer, websocket())
    assert measured.value("http_requests_total", method="GET", endpoint="other", status="101") == 1
    assert measured.value("http_request_duration_seconds_sum", method="GET", endpoint="other") == pytest.approx(0.03)
    assert measured.value("http_request_errors_total", method="GET", endpoint="other") == 0


def test_breakers_are_shown_as_numbers() -> None:
    measured = Measured(answering(200))
    for state, number in (("open", 2), ("half_open", 1), ("closed", 0)):
        measured.metrics.breaker_changed("chatbot-service", state, "reset")
        assert measured.value("circuit_breaker_state", service="chatbot-service") == number
    measured.metrics.refresh({"chatbot-service": {"state": "half_open"}}, {})
    assert measured.value("circuit_breaker_state", service="chatbot-service") == 1
    labels = {"service": "chatbot-service", "state": "open", "why": "reset"}
    assert measured.value("circuit_breaker_transitions_total", **labels) == 1


def test_the_limiter_the_log_and_the_parser_are_counted() -> None:
    measured = Measured(answering(200))
    measured.metrics.limiter_shared(True)
    assert measured.value("rate_limiter_shared") == 1
    measured.metrics.limiter_shared(False)
    assert measured.value("rate_limiter_shared") == 0
    measured.metrics.lines_dropped(3)
    assert measured.value("log_lines_dropped_total") == 3
    measured.metrics.unparsed(431)
    assert measured.value("http_requests_total", method="OTHER", endpoint="other", status="431") == 1


async def test_a_slow_request_has_an_exemplar_in_openmetrics() -> None:
    measured = Measured(answering(200))
    for _ in range(2):
        context = RequestContext()
        context.correlation_id = "slow-one"
        context.started = measured.clock.seconds - 7
        await call(measured.layer, http(gateway=context))
        context = RequestContext()
        context.correlation_id = "x" * 128  # longer than an exemplar may be
        context.started = measured.clock.seconds - 8
        await call(measured.layer, http(gateway=context))
    text = generate_openmetrics(measured.registry).decode()  # type: ignore[no-untyped-call]
    assert ' # {correlation_id="slow-one"} 7.0' in text


def test_counters_have_no_second_series_for_when_they_were_created() -> None:
    process_metrics().breaker_changed("chatbot-service", "closed", "reset")
    assert 'circuit_breaker_transitions_total{service="chatbot-service"' in generate_latest().decode()
    assert "_created" not in generate_latest().decode()


def test_two_gateways_in_a_process_share_their_metrics() -> None:
    first, second = MetricsASGI(answering(200)), MetricsASGI(answering(200))
    assert first.metrics is second.metrics is process_metrics()


async def test_lifespan_passes_untouched() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope = {"type": "lifespan"}
    await call(Measured(app).layer, scope, [])
    assert seen[0] is scope


def test_workers_are_added_up_whichever_is_asked(tmp_path: Path) -> None:
    worker = """
import sys
from gateway.backends.prometheus import process_metrics
from gateway.policies.services import Service
metrics = process_metrics()
metrics.expect([Service(name="chatbot-service", prefix="/api/v1/chat", replicas=())])
from gateway.context import RequestContext
context = RequestContext()
context.attempts, context.retry_denied = 2, True
for _ in range(int(sys.argv[1])):
    metrics.ended(("POST", "/api/v1/chat", 200, "chatbot-service", "completed"), 0.2, context)
metrics.under_way = 1
metrics.limiter_shared(sys.argv[2] == "open")
metrics.refresh({"chatbot-service": {"state": sys.argv[2]}}, {"chatbot-service": 7})
if sys.argv[2] == "open":
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    print(generate_latest(registry).decode())
"""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-W", "error", "-c", worker, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("3", "closed")
    text = run("4", "open")
    for name, kind in FIXED.items():
        assert f"# TYPE {name} {kind}\n" in text, "there from the start"
    assert 'http_requests_total{endpoint="/api/v1/chat",method="POST",status="200"} 7.0' in text
    assert 'http_request_duration_seconds_count{endpoint="/api/v1/chat",method="POST"} 7.0' in text
    assert 'gateway_upstream_retries_total{service="chatbot-service"} 7.0' in text
    assert 'gateway_upstream_retries_denied_total{service="chatbot-service"} 7.0' in text
    assert 'gateway_upstream_retry_budget{service="chatbot-service"} 7.0' in text, "of those that live"
    assert 'circuit_breaker_state{service="chatbot-service"} 2.0' in text
    assert "gateway_requests_in_flight 1.0" in text, "the first worker is gone, and its requests with it"
    assert "rate_limiter_shared 1.0" in text


# What is brought up to date before a scrape


async def test_bytes_count_for_their_service_once_the_request_has_ended() -> None:
    measured = Measured(answering(200, service=CHAT))
    received = {"type": "http.request", "body": b"12345", "more_body": False}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await answering(200, service=CHAT)(scope, receive, send)

    measured.layer.app = app
    for _ in range(2):
        await call(measured.layer, http(method="POST"), [received])
        measured.metrics.refresh({}, {})
    assert measured.value("gateway_received_bytes_total", service="chatbot-service") == 10
    assert measured.value("gateway_sent_bytes_total", service="chatbot-service") == 2


def test_a_tally_becomes_part_of_the_histogram_and_begins_anew() -> None:
    measured = Measured(answering(200))
    lags = Tally((0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0))
    for _ in range(2):
        for seconds in (0.0, 0.002, 0.0021, 7.0):
            lags.add(seconds)
        measured.metrics.refresh({}, {}, lags=lags)
        measured.metrics.refresh({}, {}, lags=lags)
    name = "gateway_event_loop_lag_seconds"
    assert [measured.value(f"{name}_bucket", le=le) for le in ("0.002", "0.005", "5.0", "+Inf")] == [4, 6, 6, 8]
    assert measured.value(f"{name}_sum") == pytest.approx(14.0082)
    assert measured.value(f"{name}_count") == 8


async def test_an_event_loop_that_is_held_up_is_late() -> None:
    meter = LagMeter()
    meter.start()
    time.sleep(0.3)  # noqa: ASYNC251  which holds it up
    late: list[float] = []

    def is_measured() -> bool:
        late.append(meter.lags.take()[1])
        return any(late)

    await until(is_measured)
    meter.stop()
    assert 0.19 < max(late) < 5
    meter.lags.take()
    await asyncio.sleep(0.25)
    assert meter.lags.take()[1] == 0, "it measures no longer"


async def test_the_limiters_decisions_are_told_by_what_made_them() -> None:
    measured = Measured(answering(200))
    limits = Limits.of(2, None)

    def decided() -> dict[str, float]:
        measured.metrics.refresh({}, {}, limiter=limiter)
        sources = ("redis", "remembered", "local", "open", "closed")
        counts = {source: measured.value("rate_limiter_decisions_total", source=source) for source in sources}
        return {source: count for source, count in counts.items() if count}

    limiter: MemoryLimiter | RedisLimiter = MemoryLimiter()
    for _ in range(3):
        limiter.take("a", limits)
    assert decided() == {"local": 3}
    with redis_server() as server:
        limiter = RedisLimiter(server.url, deadline=5)
        await limiter.start()
        for _ in range(4):
            await limiter.take("a", limits)
        assert decided() == {"local": 3, "redis": 3, "remembered": 1}
        assert measured.value("rate_limiter_redis_seconds_count") == 3
        server.kill()
        await until(lambda: not limiter.shared)
        for on_failure in ("local", "open", "open", "closed"):
            await limiter.take("b", limits, on_failure=on_failure)
        assert decided() == {"local": 4, "redis": 3, "remembered": 1, "open": 2, "closed": 1}
        await limiter.aclose()


class Told:
    """What the process's own metrics have gained since."""

    def __init__(self, app: Gateway) -> None:
        self.app = app
        self.before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def value(self, name: str, **labels: str) -> float:
        self.app.refresh()
        return REGISTRY.get_sample_value(name, labels) or 0.0

    def since(self, name: str, **labels: str) -> float:
        value = self.value(name, **labels)
        return value - self.before.setdefault((name, (*sorted(labels.items()),)), value)


@asynccontextmanager
async def the_gateway(handler: Handler | None = None, **environ: str) -> AsyncIterator[tuple[int, Told]]:
    async with service(handler) as upstream:
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": upstream.url, "LOG_LEVEL": "ERROR", **environ}))
        async with serving(app) as port:
            yield port, Told(app)


def asked(method: bytes = b"GET") -> bytes:
    return method + b" /api/v1/chat HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_stream_tells_of_its_first_byte_of_the_gaps_between_its_parts_and_of_its_connection() -> None:
    has_come = asyncio.Queue[None]()

    async def three_parts(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"1\r\nx\r\n")
            await has_come.get()
        writer.write(b"0\r\n\r\n")

    chat = {"service": "chatbot-service"}
    async with the_gateway(three_parts) as (port, told), connected(port) as (reader, writer):
        for name in ("gateway_stream_gap_seconds_count", "gateway_stream_first_byte_seconds_count"):
            told.since(name, **chat)
        writer.write(asked())
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(3):
            await reader.readuntil(b"1\r\nx\r\n")
            assert told.value("gateway_upstream_connections", state="busy", **chat) == 1
            assert told.value("gateway_upstream_connections", state="idle", **chat) == 0
            has_come.put_nowait(None)
        await reader.readuntil(b"0\r\n\r\n")
        await until(lambda: told.since("gateway_stream_first_byte_seconds_count", **chat) == 1)
        assert told.since("gateway_stream_gap_seconds_count", **chat) == 2
        assert told.value("gateway_upstream_connections", state="busy", **chat) == 0
        assert told.value("gateway_upstream_connections", state="idle", **chat) == 1


async def test_an_answer_that_announces_its_length_is_no_stream() -> None:
    chat = {"service": "chatbot-service"}
    has_come = asyncio.Event()

    async def two_parts(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx")
        await has_come.wait()
        writer.write(b"y")

    async with the_gateway(two_parts) as (port, told), connected(port) as (reader, writer):
        counted = ("gateway_stream_gap_seconds_count", "gateway_stream_first_byte_seconds_count")
        before = [told.since(name, **chat) for name in counted]
        told.since("gateway_sent_bytes_total", **chat)
        writer.write(asked())
        assert (await reader.readuntil(b"\r\n\r\nx"))[-1:] == b"x"
        has_come.set()
        assert await reader.readexactly(1) == b"y"
        await until(lambda: told.since("gateway_sent_bytes_total", **chat) == 2)
        assert [told.since(name, **chat) for name in counted] == before


async def test_a_breaker_tells_into_what_it_changed_and_why() -> None:
    chat = {"service": "chatbot-service"}
    with reserved_port() as nobody:
        environ = {"CHATBOT_SERVICE_URL": f"http://127.0.0.1:{nobody}", "RETRIES": "0"}
        async with the_gateway(None, **environ) as (port, told), connected(port) as (reader, writer):
            told.since("circuit_breaker_transitions_total", state="open", why="failures", **chat)
            for _ in range(5):
                writer.write(asked(b"HEAD"))
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 502")
            assert told.since("circuit_breaker_transitions_total", state="open", why="failures", **chat) == 1


# How many series there are


async def test_ten_thousand_strangers_make_no_more_series_than_the_page_says() -> None:
    """Whatever they send as paths, methods and callers: what they meet are the gateway's own few statuses."""
    draw = random.Random(7)
    paths = ["/", "/metrics/{}", "/health", "/circuit-breakers", "/circuit-breakers/{}/reset", "/api/v1/{}"]
    paths += [f"{each.service.prefix}/{{}}" for each in Settings.load({}).services]
    with reserved_port() as nobody:
        services = {f"{name}_SERVICE_URL": f"http://127.0.0.1:{nobody}" for name in NAMES}
        limits = {"RATE_LIMIT_PER_MINUTE": "1", "LOG_LEVEL": "CRITICAL", "RETRIES": "0"}
        app = create_app(Settings.load({**services, **limits}))
        app.refresh()
        before = len([*samples()])
        statuses = set()
        for number in range(10_000):
            path = draw.choice(paths).format(draw.randbytes(8).hex())
            method = draw.choice(("GET", "POST", "HEAD", f"X{draw.randbytes(4).hex().upper()}"))
            client = f"10.{number % 3}.{draw.randrange(256)}.{draw.randrange(256)}"
            answer = await call(app, http(path, method, client=(client, 1)))
            statuses.add(answer.status)
        app.refresh()
        after = [*samples()]
    assert {200, 404, 405, 429, 502, 503} <= statuses
    assert len([sample for sample in after if sample.name == "rate_limit_exceeded_total"]) <= MOST_CALLERS + 1
    most = sum(family.most(SERVICES, len(statuses)) for family in families())
    assert 0 < len(after) - before <= most


NAMES = ("RECOMMENDATION", "SEARCH", "PRICING", "CHATBOT", "FRAUD", "FORECAST", "VISION")


def samples() -> Any:
    names = {family.name for family in families()}
    for family in REGISTRY.collect():
        if family.name in names or f"{family.name}_total" in names:
            yield from family.samples


def test_the_page_of_metrics_is_complete_and_true() -> None:
    shown = (ROOT / "docs" / "metrics.md").read_text()
    assert shown == page(), "write it anew: python -m tests.metrics_page > docs/metrics.md"
