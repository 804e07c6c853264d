"""What each layer costs a request: microseconds of one core, in process, around an application that answers at once.

python bench/layers.py              the table; each figure is the best of several rounds, so noise only adds
"""

import gc
import time
from collections.abc import Callable

import uvloop
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.backends.prometheus import process_metrics
from gateway.middleware.access_log import LoggingASGI
from gateway.middleware.admission import AdmissionASGI
from gateway.middleware.breaker import BreakerASGI
from gateway.middleware.correlation import CorrelationASGI
from gateway.middleware.errors import ErrorsASGI
from gateway.middleware.metrics import MetricsASGI
from gateway.middleware.rate_limit import RateLimitASGI
from gateway.middleware.system import SystemASGI
from gateway.policies.circuit_breaker import CircuitBreaker
from gateway.policies.services import Service, ServiceTable

CALLS, ROUNDS = 5000, 15
BODY = b'{"items":[%s]}' % b",".join(b'{"id":%d,"score":0.%d}' % (i, i) for i in range(40))
SERVICE = Service(name="recommendation-service", prefix="/api/v1/recommendations", replicas=("http://127.0.0.1:1",))
START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"server", b"nginx"),
        (b"date", b"Sun, 22 Nov 2026 00:00:00 GMT"),
        (b"content-type", b"application/json"),
        (b"content-length", b"911"),
    ],
}
REST: Message = {"type": "http.response.body", "body": BODY, "more_body": False}
REQUEST: Message = {"type": "http.request", "body": b'{"user_id":"user-1","n":10}', "more_body": False}


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send(START)
    await send(REST)


async def receive() -> Message:
    return REQUEST


async def send(message: Message) -> None:
    pass


def scope() -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": "/api/v1/recommendations/top",
        "raw_path": b"/api/v1/recommendations/top",
        "query_string": b"",
        "client": ("127.0.0.1", 50000),
        "headers": [
            (b"host", b"127.0.0.1"),
            (b"content-type", b"application/json"),
            (b"x-user-id", b"user-17"),
            (b"authorization", b"Bearer 0123456789abcdef"),
            (b"content-length", b"75"),
        ],
    }


LAYERS: dict[str, Callable[[ASGIApp], ASGIApp]] = {
    "CorrelationASGI": CorrelationASGI,
    "LoggingASGI": lambda app: LoggingASGI(app, sink=lambda line: None),
    "MetricsASGI": lambda app: MetricsASGI(app, metrics=process_metrics()),
    "ErrorsASGI": ErrorsASGI,
    "SystemASGI": lambda app: SystemASGI(app, services=ServiceTable([SERVICE])),
    "AdmissionASGI": AdmissionASGI,
    "RateLimitASGI (in memory)": lambda app: RateLimitASGI(app, per_minute=2_000_000, per_hour=2_000_000),
    "BreakerASGI": lambda app: BreakerASGI(app, breakers={SERVICE.name: CircuitBreaker(SERVICE.name)}),
}


async def cost(app: ASGIApp) -> float:
    """Microseconds a request, the best round's mean."""
    best = float("inf")
    for _ in range(ROUNDS):
        scopes = [scope() for _ in range(CALLS)]
        began = time.perf_counter()
        for one in scopes:
            await app(one, receive, send)
        best = min(best, time.perf_counter() - began)
    return best / CALLS * 1e6


async def main() -> None:
    gc.disable()
    floor = await cost(answer)
    print(f"{'layer':<28}{'alone, us':>10}{'in the stack, us':>18}")
    stacked: ASGIApp = answer
    below = floor
    rows = []
    for name, make in reversed(LAYERS.items()):
        alone = await cost(make(answer)) - floor
        stacked = make(stacked)
        upto = await cost(stacked)
        rows.append((name, alone, upto - below))
        below = upto
    for name, alone, added in reversed(rows):
        print(f"{name:<28}{alone:>10.2f}{added:>18.2f}")
    print(f"{'all of them':<28}{'':>10}{below - floor:>18.2f}")


if __name__ == "__main__":
    uvloop.run(main())
