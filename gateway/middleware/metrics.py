"""Metrics: what every request counts in, under names that can't grow without bound."""

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import KEY, RequestContext
from gateway.watch import Watch, end


class RequestMetrics(Protocol):
    """Where requests are counted; ``under_way`` is how many have begun and not ended."""

    under_way: int

    def ended(self, kind: tuple[str, str, int, str, str], seconds: float, context: RequestContext) -> None:
        """Count one that has ended; its kind is method, endpoint, status, the service's name or ``""``, and cause."""


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

        context: RequestContext | None = scope.get(KEY)
        if context is None or not context.watched:
            context, scope, receive, send = Watch.over(scope, receive, send, self.clock)
        metrics = self.metrics
        metrics.under_way += 1
        try:
            await self.app(scope, receive, send)
        except BaseException as error:
            end(context, self.clock(), error)
            raise
        else:
            if not context.ended:
                end(context, self.clock())
        finally:
            metrics.under_way -= 1
            status, service = context.final_status, context.service
            seconds = context.seconds
            if status == 101 and context.answered_at is not None:
                seconds = max(0.0, context.answered_at - context.started)
            name = "" if service is None else service.name
            method = scope.get("method", "GET")  # a WebSocket's handshake is a GET
            metrics.ended((method, context.endpoint, status, name, context.cause or ""), seconds, context)
