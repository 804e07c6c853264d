from collections.abc import Mapping
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.middleware.system import SystemASGI
from gateway.policies.health import Health
from gateway.policies.services import Service, ServiceTable
from tests.asgi_call import call, http, websocket

CHAT = Service(name="chatbot-service", prefix="/api/v1/chat", replicas=("http://chatbot:8004",))
SERVICES = ServiceTable([CHAT])
TOKEN = b"a-long-admin-token"
STATUS = {"chatbot-service": {"state": "closed", "failure_count": 0, "recent_failures": 0, "total_calls": 42}}
READS = ["/health", "/health/live", "/health/ready", "/metrics", "/circuit-breakers"]


class Breakers:
    def __init__(self) -> None:
        self.reset: list[str] = []
        self.told: list[Mapping[str, str]] = []

    def status(self) -> Mapping[str, Mapping[str, Any]]:
        return STATUS

    def reset_breaker(self, name: str, **told: str) -> None:
        if name not in STATUS:
            raise KeyError(name)
        self.reset.append(name)
        self.told.append(told)


class OnlyLoopback:
    def contains(self, host: str | None) -> bool:
        return host == "127.0.0.1"


async def service(scope: Scope, receive: Receive, send: Send) -> None:
    context: RequestContext = scope["gateway"]
    name = context.service.name if context.service is not None else "none"
    kind = "websocket.http" if scope["type"] == "websocket" else "http"
    await send({"type": f"{kind}.response.start", "status": 200, "headers": []})
    await send({"type": f"{kind}.response.body", "body": f"{name} {context.endpoint}".encode()})


def system(**options: Any) -> SystemASGI:
    return SystemASGI(service, services=SERVICES, now=lambda: 1764239400.9, **options)


def reset(name: str = "chatbot-service", *authorization: bytes, method: str = "POST") -> Scope:
    return http(
        f"/circuit-breakers/{name}/reset", method, headers=[(b"authorization", value) for value in authorization]
    )


async def test_health_answers_in_the_fixed_form() -> None:
    health = Health(enabled=["redis", "qdrant"])
    health.serve()
    health.saw("redis", True)
    health.saw("qdrant", True)
    answer = await call(system(health=health), http("/health"))
    assert answer.status == 200
    assert answer.headers[b"content-type"] == b"application/json"
    assert answer.body == (
        b'{"status":"healthy","timestamp":"2025-11-27T10:30:00Z","service":"api_gateway",'
        b'"checks":{"redis":"ok","qdrant":"ok"}}'
    )


async def test_starting_and_draining_are_503_but_alive() -> None:
    health = Health()
    layer = system(health=health)
    for change, status in ((None, "starting"), (health.serve, "healthy"), (health.drain, "draining")):
        if change is not None:
            change()
        expected = 200 if status == "healthy" else 503
        for path, code in (("/health", expected), ("/health/ready", expected), ("/health/live", 200)):
            answer = await call(layer, http(path))
            assert (answer.status, answer.json["status"]) == (code, status)


async def test_circuit_breakers_show_their_status() -> None:
    answer = await call(system(breakers=Breakers()), http("/circuit-breakers"))
    assert (answer.status, answer.json) == (200, {name: {**each, "workers": "1 of 1"} for name, each in STATUS.items()})


async def test_metrics_are_prometheus_text_or_openmetrics_where_asked_for() -> None:
    refreshed: list[None] = []
    layer = system(before_metrics=lambda: refreshed.append(None))
    answer = await call(layer, http("/metrics"))
    assert answer.status == 200
    assert answer.headers[b"content-type"].startswith(b"text/plain; version=")
    assert b"# TYPE python_info gauge" in answer.body
    accept = b"application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    answer = await call(layer, http("/metrics", headers=[(b"accept", accept)]))
    assert answer.headers[b"content-type"].startswith(b"application/openmetrics-text")
    assert answer.body.endswith(b"# EOF\n")
    assert len(refreshed) == 2


@pytest.mark.parametrize("path", READS)
async def test_head_has_the_same_head_and_no_body(path: str) -> None:
    layer = system(health=Health())
    full, head = await call(layer, http(path)), await call(layer, http(path, "HEAD"))
    assert head.status == full.status
    assert head.headers.keys() == full.headers.keys()
    assert int(head.headers[b"content-length"]) > 0
    assert head.body == b""
    assert head.whole


@pytest.mark.parametrize(
    ("scope", "allow"),
    [
        *((http(path, "POST"), b"GET, HEAD") for path in READS),
        (reset(method="GET"), b"POST"),
        (http("/api/v1/chat", "TRACE"), b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (http("chat:443", "CONNECT"), b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
        (http("*", "OPTIONS"), b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
    ],
)
async def test_a_wrong_method_is_405_and_told_the_right_ones(scope: Scope, allow: bytes) -> None:
    answer = await call(system(), scope)
    assert (answer.status, answer.json["error"]["type"]) == (405, "method_not_allowed")
    assert answer.headers[b"allow"] == allow


async def test_a_reset_with_the_token_closes_the_breaker() -> None:
    breakers = Breakers()
    layer = system(breakers=breakers, admin_token=TOKEN.decode(), workers="1 of 4")
    answer = await call(layer, reset("chatbot-service", b"bearer " + TOKEN))
    assert (answer.status, answer.json) == (
        200,
        {"service": "chatbot-service", "state": "closed", "workers": "1 of 4"},
    )
    assert breakers.reset == ["chatbot-service"]


def body(*parts: bytes) -> list[Message]:
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": at < last} for at, part in enumerate(parts)]


async def test_a_reset_tells_who_and_why() -> None:
    breakers = Breakers()
    layer = system(breakers=breakers, admin_token=TOKEN.decode())
    bearing = reset("chatbot-service", b"bearer " + TOKEN)
    whole = b'{"reason": "deployed \xe2\x80\x93 fixed"}'
    for given in (
        body(b""),
        body(b"{}"),
        body(whole[:9], whole[9:23], whole[23:]),
        body(b'{"reason":"%b"}' % (b"x" * 200)),
    ):
        assert (await call(layer, bearing, given)).status == 200
    assert (await call(layer, {**bearing, "client": None}, body(whole))).status == 200
    assert [told["reason"] for told in breakers.told] == ["", "", "deployed – fixed", "x" * 200, "deployed – fixed"]
    assert [told["by"] for told in breakers.told] == ["192.0.2.7"] * 4 + ["the peer of a unix socket"]


@pytest.mark.parametrize(
    ("given", "status"),
    [
        *((text, 400) for text in (b"{", b"7", b"[]", b'"x"', b"\xff", b'{"reason": 7}', b'{"reason": null}')),
        *((b'{"reason": "%b"}' % text, 400) for text in (b"a\\nb", b"\\u001b[31m", b"\\ud800", b"x" * 201)),
        (b'{"reason": "x", "force": true}', 400),
        (b'{"reason": "%b"}' % (b"x" * 4096), 413),
    ],
)
async def test_a_reset_with_an_unfit_reason_is_refused(given: bytes, status: int) -> None:
    breakers = Breakers()
    layer = system(breakers=breakers, admin_token=TOKEN.decode())
    assert (await call(layer, reset("chatbot-service", b"bearer " + TOKEN), body(given))).status == status
    assert (await call(layer, reset("chatbot-service", b"bearer wrong"), body(given))).status == 401
    assert breakers.told == []


async def test_a_reset_whose_client_leaves_before_it_has_said_why_does_nothing() -> None:
    breakers = Breakers()
    layer = system(breakers=breakers, admin_token=TOKEN.decode())
    part = {"type": "http.request", "body": b'{"rea', "more_body": True}
    answer = await call(layer, reset("chatbot-service", b"bearer " + TOKEN), [part, {"type": "http.disconnect"}])
    assert (answer.sent, breakers.told) == ([], [])


async def test_replicas_are_shown_where_asked_for() -> None:
    replicas = {"chatbot-service": [{"address": "http://chatbot:8004", "in_flight": 0}]}
    layer = system(breakers=Breakers(), replicas=lambda: replicas)
    for query, shown in ((b"replicas=1", True), (b"a=b&replicas=1", True), (b"replicas=0", False), (b"", False)):
        answer = await call(layer, http("/circuit-breakers", query_string=query))
        assert answer.json["chatbot-service"].get("replicas") == (replicas["chatbot-service"] if shown else None)


@pytest.mark.parametrize(
    "authorization",
    [
        [],
        [b""],
        [b"Bearer"],
        [b"Bearer "],
        [b"Bearer wrong"],
        [b"Basic " + TOKEN],
        [TOKEN],
        [b"Bearer " + TOKEN + b"x"],
        [b"Bearer " + TOKEN, b"Bearer " + TOKEN],
        [b"Bearer \xff\xfe"],
    ],
)
async def test_a_reset_without_the_right_token_is_401(authorization: list[bytes]) -> None:
    breakers = Breakers()
    layer = system(breakers=breakers, admin_token=TOKEN.decode())
    for name in ("chatbot-service", "unknown"):
        answer = await call(layer, reset(name, *authorization))
        assert (answer.status, answer.json["error"]["type"]) == (401, "unauthorized")
        assert answer.headers[b"www-authenticate"] == b"Bearer"
    assert breakers.reset == []


@pytest.mark.parametrize("token", [None, ""])
async def test_without_an_admin_token_no_reset_is_possible(token: str | None) -> None:
    for authorization in (b"Bearer ", b"Bearer None", b"Bearer " + TOKEN):
        answer = await call(system(breakers=Breakers(), admin_token=token), reset("chatbot-service", authorization))
        assert answer.status == 403


async def test_a_reset_of_an_unknown_service_names_it() -> None:
    layer = system(breakers=Breakers(), admin_token=TOKEN.decode())
    answer = await call(layer, reset("nobody", b"Bearer " + TOKEN))
    assert answer.status == 404
    assert "nobody" in answer.json["error"]["message"]
    answer = await call(SystemASGI(service, admin_token=TOKEN.decode()), reset("nobody", b"Bearer " + TOKEN))
    assert answer.status == 404


@pytest.mark.parametrize("scope", [*map(http, READS), reset(), http("/health", "POST"), websocket("/health")])
async def test_strangers_get_403_from_the_gateways_own_paths(scope: Scope) -> None:
    layer = system(allowed=OnlyLoopback())
    answer = await call(layer, scope)
    assert (answer.status, answer.json["error"]["type"]) == (403, "forbidden")
    answer = await call(layer, {**scope, "client": None})
    assert answer.status == 403
    answer = await call(layer, {**scope, "client": ("127.0.0.1", 1)})
    assert answer.status != 403 or answer.json["error"]["reason"] == "no_admin_token"
    answer = await call(layer, http("/api/v1/chat"))
    assert answer.status == 200, "a service is for everyone"


@pytest.mark.parametrize("scope", [http("/api/v1/chat"), http("/api/v1/chat/x", "POST"), websocket("/api/v1/chat/ws")])
async def test_a_path_leads_to_its_service(scope: Scope) -> None:
    answer = await call(system(), scope)
    assert answer.body == b"chatbot-service /api/v1/chat"


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/",
            "",
            "/api/v1/chatter",
            "/health/",
            "/%68ealth",
            "//health",
            "/Health",
            "/metrics/x",
            "/circuit-breakers/",
        ),
        *("/circuit-breakers/x", "/circuit-breakers//reset", "/circuit-breakers/x/reset/"),
        "/circuit-breakers/x/y/reset",
    ],
)
@pytest.mark.parametrize("kind", [http, websocket])
async def test_what_leads_nowhere_is_404(path: str, kind: Any) -> None:
    context = RequestContext()
    answer = await call(system(), kind(path, gateway=context))
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found")
    assert answer.json["error"]["message"] == "No route for this path"
    assert (context.cause, context.reason, context.endpoint) == (Cause.REFUSED, "no_route", "other")


@pytest.mark.parametrize("path", ["/api/v1/chat/../fraud", "/api/v1/chat/%2e%2e/%2e%2e/health", "/a\\b"])
async def test_an_unsafe_path_is_400(path: str) -> None:
    answer = await call(system(), http(path))
    assert (answer.status, answer.json["error"]["type"]) == (400, "bad_request")


async def test_a_websocket_at_a_path_of_the_gateways_own_is_denied() -> None:
    answer = await call(system(), websocket("/health"))
    assert answer.status == 404
    answer = await call(system(), {**websocket("/nowhere"), "extensions": {}})
    assert answer.sent == [{"type": "websocket.close", "code": 1008, "reason": ""}]


@pytest.mark.parametrize(
    ("scope", "endpoint"),
    [
        *((http(path), path) for path in READS),
        (reset("x"), "/circuit-breakers/{service}/reset"),
        (reset("y"), "/circuit-breakers/{service}/reset"),
        (http("/api/v1/chat/a/b"), "/api/v1/chat"),
        (http("/nowhere"), "other"),
    ],
)
async def test_the_endpoint_is_one_of_few(scope: Scope, endpoint: str) -> None:
    context = RequestContext()
    await call(system(), {**scope, "gateway": context})
    assert context.endpoint == endpoint


async def test_a_server_that_does_not_tell_the_raw_path_will_do() -> None:
    def without_raw(path: str) -> Scope:
        return {name: value for name, value in http(path).items() if name != "raw_path"}

    for path in ("/api/v1/chat", "/api/v1/chat/é ~%", "/api/v1/chat/\udcff", "/api/v1/chat/\ud800"):
        assert (await call(system(), without_raw(path))).body.startswith(b"chatbot-service")
    assert (await call(system(), without_raw("/health"))).json["service"] == "api_gateway"
    assert (await call(system(), http("/health", raw_path=b"/health?verbose=1"))).status == 200


async def test_alone_it_answers_its_own_paths_and_passes_on_the_rest() -> None:
    layer = SystemASGI(service)
    assert (await call(layer, http("/health"))).json["status"] == "healthy"
    assert (await call(layer, http("/circuit-breakers"))).json == {}
    assert (await call(layer, http("/anything"))).body == b"none other"


async def test_lifespan_passes_untouched() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope = {"type": "lifespan"}
    await call(SystemASGI(app), scope, [])
    assert seen[0] is scope


async def test_a_path_that_was_asked_before_leads_where_it_did_whoever_asks() -> None:
    app = system()
    for _ in range(2):
        assert (await call(app, http("/api/v1/chat/x", "POST"))).body == b"chatbot-service /api/v1/chat"
        assert (await call(app, http("/api/v1/chat/x", "TRACE"))).status == 405
        assert (await call(app, websocket("/api/v1/chat/x"))).body == b"chatbot-service /api/v1/chat"
        assert (await call(app, {**http("/api/v1/chat/x"), "raw_path": b"/api/v1/chat/x?a=/../b"})).status == 200
        assert (await call(app, {**http("/api/v1/chat/x"), "raw_path": None})).status == 200
        assert (await call(app, http("/api/v1/chat/../x"))).status == 400


async def test_what_is_remembered_of_paths_is_bounded_in_number_and_length() -> None:
    app = system()
    for number in range(3000):
        await call(app, http(f"/api/v1/chat/{number}"))
        await call(app, http(f"/nowhere/{number}"))
        await call(app, http(f"/api/v1/chat/{number:0>300}"))
    assert 0 < len(app._remembered) <= 2048
    assert all(len(path) <= 256 for path in app._remembered)
