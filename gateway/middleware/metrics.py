"""Metrics: what every request counts in, under names that can't grow without bound."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.watch import WATCH, Watch


class RequestMetrics(Protocol):
    """Where requests are counted."""

    def began(self) -> None: ...

    def ended(self, method: str, seconds: float, watch: Watch) -> None: ...


class MetricsASGI:
    """Count each request and WebSocket, and how long it took (SPEC.md, 7).

    The endpoint is what an inner layer calls it in the request's context, never its raw path. A WebSocket counts when
    it has ended, under status 101, with the time that its handshake took.

    Args:
        app: the ASGI application to wrap.
        metrics: where to count; None: the process's Prometheus registry.
        clock: seconds, monotonic.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: RequestMetrics | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        if metrics is None:
            from gateway.backends.prometheus import process_metrics

            metrics = process_metrics()
        self.app = app
        self.metrics = metrics
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        watch: Watch | None = scope.get(WATCH)
        if watch is None:
            watch, scope, receive, send = Watch.over(scope, receive, send, self.clock)
        metrics = self.metrics
        metrics.began()
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            watch.ended(error)
            raise
        else:
            watch.ended()
        finally:
            seconds = watch.seconds
            if watch.status == 101 and watch.answered_at is not None:
                seconds = max(0.0, watch.answered_at - watch.context.started)
            metrics.ended(scope.get("method", "GET"), seconds, watch)  # a WebSocket's handshake is a GET
