"""The gateway, composed from its settings: the stack reads top to bottom as a request meets it."""

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from time import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.backends.fleet import Fleet
from gateway.backends.health_checks import Ask, HealthChecks
from gateway.backends.log_sink import LogSink, configure_logging, event_line, event_text
from gateway.backends.memory import MemoryLimiter
from gateway.backends.prometheus import Metrics, process_metrics
from gateway.backends.qdrant import QdrantCheck
from gateway.backends.redis import RedisLimiter
from gateway.circuit_breaker import circuit_breaker_registry
from gateway.event_loop import LagMeter
from gateway.middleware.access_log import LoggingASGI
from gateway.middleware.admission import AdmissionASGI
from gateway.middleware.breaker import BreakerASGI
from gateway.middleware.correlation import CorrelationASGI
from gateway.middleware.errors import ErrorsASGI
from gateway.middleware.metrics import MetricsASGI
from gateway.middleware.rate_limit import RateLimitASGI
from gateway.middleware.system import SystemASGI
from gateway.policies.callers import Networks
from gateway.policies.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, Event, State
from gateway.policies.health import Health, Phase
from gateway.policies.services import ServiceTable
from gateway.policies.token_bucket import Limits
from gateway.proxy.app import ProxyApp
from gateway.settings import Settings

logger = logging.getLogger("gateway")
Layer = Callable[[ASGIApp], ASGIApp]
STARTING = Phase.STARTING  # looked up once: an enumeration's member costs more than a global


def create_app(settings: Settings | None = None) -> "Gateway":
    """The whole gateway as one ASGI application.

    Args:
        settings: from where everything is made; read from the environment if None.

    Raises:
        SettingsError: the environment has mistakes; all of them are named.
    """
    if settings is None:
        settings = Settings.from_environment()

    metrics = process_metrics()
    sink = LogSink(buffer_bytes=settings.log_buffer_bytes, on_drop=metrics.lines_dropped)
    table = ServiceTable(each.service for each in settings.services)
    breakers: dict[str, CircuitBreaker] = {}
    fleet: Fleet | None = None
    if settings.redis_url is not None:
        fleet = Fleet(settings.redis_url, breakers, prefix=settings.redis_key_prefix, workers=settings.workers)
    for each in settings.services:
        breakers[each.service.name] = _breaker(each.service.name, each.breaker, metrics, fleet)
    parts = {"redis": settings.redis_url, "qdrant": settings.qdrant_url}
    health = Health(enabled=[part for part, url in parts.items() if url])
    limiter = _limiter(settings, metrics, health)
    circuit_breaker_registry.replace_all(breakers, fleet)
    metrics.expect(table.services)

    meter = LagMeter()
    proxy = ProxyApp(table.services, trusted_proxies=settings.trusted_proxies, max_connections=settings.max_in_flight)

    def refresh() -> None:
        metrics.refresh(circuit_breaker_registry.status(), proxy.retries_left, proxy.routes, limiter, meter.lags)

    app = stack(
        CorrelationASGI,
        partial(
            LoggingASGI,
            sink=sink.write,
            json=settings.log_json,
            colour=sink.is_terminal,
            level=settings.log_level,
        ),
        partial(MetricsASGI, metrics=metrics),
        ErrorsASGI,
        partial(  # before the limiter: a probe is never limited
            SystemASGI,
            services=table,
            health=health,
            breakers=circuit_breaker_registry,
            fleet=fleet,
            replicas=proxy.replicas,
            allowed=Networks(settings.system_from),
            admin_token=settings.admin_token,
            workers=f"1 of {settings.workers}",
            before_metrics=refresh,
        ),
        partial(  # before the limiter: what is turned away at the door costs its caller no token
            AdmissionASGI,
            max_in_flight=settings.max_in_flight,
            service_max_in_flight={
                service.name: service.max_in_flight for service in table.services if service.max_in_flight is not None
            },
        ),
        partial(  # before the breaker: a refused caller must not use up a probe
            RateLimitASGI,
            per_minute=settings.rate_limit_per_minute,
            per_hour=settings.rate_limit_per_hour,
            limiter=limiter,
            service_limits={
                each.service.name: Limits.of(each.rate_limit_per_minute, each.rate_limit_per_hour)
                for each in settings.services
                if each.own_buckets
            },
            trusted_proxies=settings.trusted_proxies,
            on_redis_failure=settings.rate_limit_on_redis_failure,
            service_on_redis_failure={
                each.service.name: each.rate_limit_on_redis_failure for each in settings.services
            },
            exceeded=metrics.rate_limit_exceeded,
        ),
        partial(BreakerASGI, breakers=breakers),
        around=proxy,
    )
    return Gateway(
        app,
        settings,
        proxy=proxy,
        health=health,
        limiter=limiter,
        fleet=fleet,
        sink=sink,
        meter=meter,
        refresh=refresh,
    )


def stack(*layers: Layer, around: ASGIApp) -> ASGIApp:
    """Wrap an application in layers, the first outermost."""
    app: Any = around
    for layer in reversed(layers):
        app = layer(app.__call__)  # the method, not the object, whose method Python would look up at every call
    stacked: ASGIApp = app.__call__
    return stacked


class Gateway:
    """The stack with what runs beside it: log, health checks, the connections to Redis and to the services.

    A server that knows more than ASGI can ask it for more: to announce that it drains, to end what still streams, and
    to log and count what the server itself refuses.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        *,
        proxy: ProxyApp,
        health: Health,
        limiter: MemoryLimiter | RedisLimiter,
        fleet: Fleet | None,
        sink: LogSink,
        meter: LagMeter,
        refresh: Callable[[], None],
    ) -> None:
        self.app = app
        self.settings = settings
        self.proxy = proxy
        self.health = health
        self.limiter = limiter
        self.fleet = fleet
        self.sink = sink
        self.meter = meter
        self.refresh = refresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            if self.health.phase is STARTING:  # mounted, so without a lifespan: ready as soon as it is asked
                self.health.serve()
                if self.fleet is not None:
                    self.fleet.start()
            await self.app(scope, receive, send)

    def begin_drain(self) -> None:
        """Say ``draining`` on ``/health`` from now on; requests still pass."""
        self.health.drain()

    def cut(self) -> None:
        """End what still streams: with an ``error`` event where that is possible."""
        self.proxy.cut()

    def on_refusal(
        self, peer: str, status: int, reason: str, correlation_id: str = "", method: str = "", path: str = ""
    ) -> None:
        """Log and count a request that the server refused before it was one."""
        process_metrics().unparsed(status)
        line = event_line if self.settings.log_json else event_text
        if self.settings.log_level in ("TRACE", "DEBUG", "INFO"):
            known = {"correlation_id": correlation_id, "method": method, "path": path}
            fields: dict[str, object] = {name: value for name, value in known.items() if value}
            fields |= {"status_code": status, "client": peer, "reason": reason}
            self.sink.write(line(time(), "INFO", "Request refused", fields=fields))

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with AsyncExitStack() as running:
            try:
                await self._start(running)
            except Exception as error:
                logger.exception("The gateway can't start")
                await send({"type": "lifespan.startup.failed", "message": str(error)})
                return
            self.health.serve()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            self.health.drain()
        await send({"type": "lifespan.shutdown.complete"})

    async def _start(self, running: AsyncExitStack) -> None:
        """Start what runs beside the stack; ``running`` stops it in the opposite order."""
        settings, limiter = self.settings, self.limiter
        running.callback(self.sink.close)
        running.callback(configure_logging(self.sink, settings.log_level, settings.log_json))
        if not settings.redis_url and not settings.workers_known:
            logger.warning(
                "Limits are counted in this process alone: set WEB_CONCURRENCY to the number of workers, or REDIS_URL"
            )
        elif not settings.redis_url and settings.workers > 1:
            logger.warning("Without REDIS_URL each of the %d workers enforces its share of a limit", settings.workers)
        checks: dict[str, Ask] = {}
        if isinstance(limiter, RedisLimiter):
            running.push_async_callback(limiter.aclose)
            await limiter.start()
        if self.fleet is not None:
            running.push_async_callback(self.fleet.aclose)
            self.fleet.start()
        if settings.qdrant_url:
            qdrant = QdrantCheck(settings.qdrant_url)
            running.push_async_callback(qdrant.aclose)
            checks["qdrant"] = qdrant
        running.push_async_callback(self.proxy.aclose)
        running.callback(self.refresh)  # what was counted since the last time
        health_checks = HealthChecks(self.health, checks, each_round=[self.refresh])
        running.push_async_callback(health_checks.aclose)
        await health_checks.start()
        self.meter.start()
        running.callback(self.meter.stop)


def _limiter(settings: Settings, metrics: Metrics, health: Health) -> MemoryLimiter | RedisLimiter:
    if settings.redis_url is None:
        metrics.limiter_shared(False)
        return MemoryLimiter(workers=settings.workers)

    def changed(shared: bool, why: str) -> None:
        metrics.limiter_shared(shared)
        health.saw("redis", shared)
        if shared:
            logger.info("Limits are shared in Redis: %s", why)
        else:
            logger.warning("Limits are counted by each worker for itself: %s", why)

    return RedisLimiter(
        settings.redis_url,
        prefix=settings.redis_key_prefix,
        deadline=settings.redis_deadline,
        workers=settings.workers,
        on_change=changed,
    )


def _breaker(name: str, config: CircuitBreakerConfig, metrics: Metrics, fleet: Fleet | None) -> CircuitBreaker:
    def changed(old: State, new: State, why: Event) -> None:
        metrics.breaker_changed(name, new, why)
        if fleet is not None:
            fleet.changed(name, why)
        if why is not Event.RESET:  # of which there is a line already, with who and why
            logger.log(
                logging.WARNING if new is State.OPEN else logging.INFO,
                "Circuit breaker '%s' went from %s to %s: %s", name, old, new, why,
                extra={"service": name},
            )  # fmt: skip

    return CircuitBreaker(name, config, on_change=changed)
