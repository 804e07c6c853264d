"""The gateway's metrics as Prometheus families, in one process or over several workers.

With ``PROMETHEUS_MULTIPROC_DIR`` set before this module is imported, prometheus_client keeps every value in a file of
that directory, and whichever worker is scraped answers for all. In one process requests are added up in plain numbers,
at a quarter of the cost, and become families when they are asked for.

docs/metrics.md lists the families; ``python -m tests.metrics_page`` writes it from here.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString
from starlette.types import ASGIApp, Scope

from gateway import __version__
from gateway.backends.metric_files import AllWorkers, directory
from gateway.context import Cause, RequestContext
from gateway.policies.circuit_breaker import TRANSITIONS
from gateway.policies.services import Service
from gateway.tally import GAPS, LAGS, WAITS, Tally

# Seconds. Up to the longest stream: an answer of a language model may take minutes.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0)
BOUNDS = [*map(floatToGoString, (*BUCKETS, float("inf")))]
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "OTHER"
OTHER_CALLER = "other"
NO_SERVICE = "none"  # the gateway's own paths, and requests refused before they had a service
MOST_CALLERS = 1000  # label values last as long as the process, so strangers must not make them up without end
STATES = {"closed": 0, "half_open": 1, "open": 2}
SOURCES = ("redis", "remembered", "local", "open", "closed")  # of a limiter's decisions
OPENMETRICS = b"application/openmetrics-text"
LONGEST_EXEMPLAR = 128 - len("correlation_id")  # OpenMetrics: names and values together
Kind = tuple[str, str, int, str, str]  # method, endpoint, status, service, cause: all bounded, once the method is

REQUESTS = ("http_requests_total", "Requests that ended.", ("method", "endpoint", "status"))
SECONDS = (
    "http_request_duration_seconds",
    "Seconds from a request's arrival to its end; for a WebSocket, to the answer to its handshake.",
    ("method", "endpoint"),
)
ERRORS = ("http_request_errors_total", "Requests answered 5xx, or cut short.", ("method", "endpoint"))
OUTCOMES = ("gateway_request_outcomes_total", "Why requests ended.", ("service", "cause"))
ATTEMPTS = ("gateway_upstream_attempts_total", "Requests sent to a service, retries included.", ("service",))
RETRIES = ("gateway_upstream_retries_total", "Requests sent to a service again.", ("service",))
DENIED = (
    "gateway_upstream_retries_denied_total",
    "Requests not sent to a service again because its budget for retries was spent.",
    ("service",),
)
COUNTERS = (REQUESTS, ERRORS, OUTCOMES, ATTEMPTS, RETRIES, DENIED)


class Pool(Protocol):
    """The connections to a replica; ``open`` counts the idle ones, too."""

    @property
    def open(self) -> int: ...
    @property
    def idle(self) -> int: ...


class Route(Protocol):
    """What there is of a service while it runs: connections by replica, and the seconds between parts of streams."""

    service: Service
    gaps: Tally

    @property
    def pools(self) -> Mapping[str, Pool]: ...


class Limiter(Protocol):
    """What it has decided by, and how many seconds its store took to answer, where it asks one."""

    decided: dict[str, int]

    @property
    def waits(self) -> Tally | None: ...


class Metrics:
    """Every family of the gateway; :func:`process_metrics` gives the process's own.

    Args:
        registry: where the families are registered; ``/metrics`` shows the default one.

    Raises:
        ValueError: a family of the same name is in the registry already.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, registry=registry)
        histogram = partial(Histogram, registry=registry)
        self.breaker_states = gauge(
            "circuit_breaker_state",
            "0 closed, 1 half-open, 2 open; over workers, the worst.",
            ("service",),
            multiprocess_mode="livemax",
        )
        self.transitions = counter(
            "circuit_breaker_transitions_total", "Changes of a breaker into a state.", ("service", "state", "why")
        )
        self.retry_budgets = gauge(
            "gateway_upstream_retry_budget",
            "Retries that a service may get now; over workers, the sum.",
            ("service",),
            multiprocess_mode="livesum",
        )
        self.exceeded = counter("rate_limit_exceeded_total", "Requests refused with 429, by caller.", ("identifier",))
        self.shared = gauge(
            "rate_limiter_shared",
            "1 where limits are counted together in Redis, 0 where each worker counts by itself.",
            multiprocess_mode="livemin",
        )
        self.in_flight = gauge(
            "gateway_requests_in_flight", "Requests and WebSockets under way.", multiprocess_mode="livesum"
        )
        self.dropped = counter("log_lines_dropped_total", "Log lines that found no room.")
        self.build = gauge("gateway_build_info", "1, by version.", ("version",), multiprocess_mode="livemax")

        # What follows is brought up to date by `refresh`.
        self.received = counter(
            "gateway_received_bytes_total",
            "Bytes of bodies, and of WebSockets' messages, from clients whose request has ended.",
            ("service",),
        )
        self.sent = counter(
            "gateway_sent_bytes_total",
            "Bytes of bodies, and of WebSockets' messages, to clients whose request has ended.",
            ("service",),
        )
        self.first_bytes = histogram(
            "gateway_stream_first_byte_seconds",
            "Seconds from a request's arrival to the first byte of its answer, where that is a stream.",
            ("service",),
            buckets=BUCKETS,
        )
        self.gaps = histogram(
            "gateway_stream_gap_seconds",
            "Seconds between two parts of an answer that is a stream, as they pass.",
            ("service",),
            buckets=GAPS,
        )
        self.connections = gauge(
            "gateway_upstream_connections",
            "Connections to a service, those of WebSockets apart.",
            ("service", "state"),
            multiprocess_mode="livesum",
        )
        self.decisions = counter(
            "rate_limiter_decisions_total", "Decisions of the limiter, by what made them.", ("source",)
        )
        self.waits = histogram("rate_limiter_redis_seconds", "Seconds that a decision of Redis took.", buckets=WAITS)
        self.lags = histogram(
            "gateway_event_loop_lag_seconds",
            "Seconds by which a worker's event loop came late to a timer, ten times a second.",
            buckets=LAGS,
        )

        self.under_way = 0  # requests and WebSockets that have begun and not ended
        self._passed: dict[str, _Passed] = {}
        self._directory = files = directory()
        self._requests = (_InOneProcess if files is None else _OverWorkers)(registry, self._passed)
        self.ended = self._requests.ended
        self._callers = set() if files is None else _callers_of(files)
        if files is None:
            self.in_flight.set_function(lambda: self.under_way)
        self.build.labels(__version__).set(1)
        self.exceeded.labels(OTHER_CALLER)
        for source in SOURCES:
            self.decisions.labels(source)

    def expect(self, services: Iterable[Service]) -> None:
        """Show these services at zero from the start, so that the first error is an increase and not a beginning."""
        for service in services:
            self._requests.expect(("POST", service.prefix, 200, service.name, Cause.COMPLETED))
            self.breaker_states.labels(service.name)
            self.retry_budgets.labels(service.name)
            for (old, why), new in TRANSITIONS.items():
                if new is not old:
                    self.transitions.labels(service.name, new, why)
            self.gaps.labels(service.name)
            for state in ("busy", "idle"):
                self.connections.labels(service.name, state)

    def unparsed(self, status: int) -> None:
        """The server refused what it could not read as a request."""
        self.ended((OTHER_METHOD, "other", status, "", Cause.REFUSED), 0.0, RequestContext())

    def rate_limit_exceeded(self, caller: str) -> None:
        """A caller was refused with 429; the first thousand have a series of their own.

        Each worker counts for itself to a thousand, beginning with those whom others have named before it started.
        """
        if caller not in self._callers:
            if len(self._callers) >= MOST_CALLERS:
                caller = OTHER_CALLER
            else:
                self._callers.add(caller)
        self.exceeded.labels(caller).inc()

    def limiter_shared(self, shared: bool) -> None:
        """Whether limits are counted in Redis, together with all other workers."""
        self.shared.set(1 if shared else 0)

    def breaker_changed(self, service: str, state: str, why: str) -> None:
        """A breaker is now ``closed``, ``half_open`` or ``open``, and why."""
        self.transitions.labels(service, state, why).inc()
        self.breaker_states.labels(service).set(STATES[state])

    def lines_dropped(self, lines: int) -> None:
        """So many log lines found no room."""
        self.dropped.inc(lines)

    def refresh(
        self,
        breakers: Mapping[str, Mapping[str, Any]],
        retries_left: Mapping[str, int],
        routes: Iterable[Route] = (),
        limiter: Limiter | None = None,
        lags: Tally | None = None,
    ) -> None:
        """Bring up to date what is not counted as it happens: call it before a scrape, every second or so, at the end.

        Args:
            breakers: by service, with its ``state``. An open breaker becomes half-open by the clock alone.
            retries_left: by service, in its budget.
            routes: those of the services that are in use.
            limiter: what decides about callers.
            lags: seconds by which the event loop was late.
        """
        for service, left in retries_left.items():
            self.retry_budgets.labels(service).set(left)
        for service, status in breakers.items():
            self.breaker_states.labels(service).set(STATES[status["state"]])
        for service, passed in self._passed.items():
            self.received.labels(service).inc(passed.received)
            self.sent.labels(service).inc(passed.sent)
            passed.received = passed.sent = 0
            _pour(passed.first_bytes, self.first_bytes.labels(service))
        for route in routes:
            service, pools = route.service.name, route.pools.values()
            idle = sum(pool.idle for pool in pools)
            self.connections.labels(service, "idle").set(idle)
            self.connections.labels(service, "busy").set(sum(pool.open for pool in pools) - idle)
            _pour(route.gaps, self.gaps.labels(service))
        if limiter is not None:
            for source, count in limiter.decided.items():
                self.decisions.labels(source).inc(count)
                limiter.decided[source] = 0
            if limiter.waits is not None:
                _pour(limiter.waits, self.waits)
        if lags is not None:
            _pour(lags, self.lags)
        if self._directory is not None:
            self.in_flight.set(self.under_way)
            _forget_dead_workers(self._directory)


def exposition(scope: Scope) -> ASGIApp:
    """An answer with all metrics of this process, or of all workers, in the form that the request accepts."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette_exporter import handle_metrics, handle_openmetrics

    openmetrics = any(name == b"accept" and OPENMETRICS in value for name, value in scope["headers"])
    files = directory()
    if files is None:
        answer: ASGIApp = (handle_openmetrics if openmetrics else handle_metrics)(Request(scope))
        return answer
    registry = CollectorRegistry()
    registry.register(AllWorkers(files))  # what starlette-exporter has for this may meet a value twice, or not at all
    if openmetrics:
        from prometheus_client.openmetrics import exposition as other

        text = other.generate_latest(registry)  # type: ignore[no-untyped-call]
        return Response(text, headers={"content-type": other.CONTENT_TYPE_LATEST})
    return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


class _Passed:
    """What has passed for one service since the last refresh."""

    __slots__ = ("first_bytes", "received", "sent")

    def __init__(self) -> None:
        self.received = 0  # bytes
        self.sent = 0
        self.first_bytes = Tally(BUCKETS)

    def add(self, context: RequestContext) -> None:
        self.received += context.bytes_in
        self.sent += context.bytes_out
        if context.streamed and context.first_byte_at is not None:
            self.first_bytes.add(max(0.0, context.first_byte_at - context.started))


def _pour(tally: Tally, histogram: Histogram) -> None:
    """Make what was tallied, by the histogram's own bounds, part of it."""
    counts, total = tally.take()
    if any(counts):
        for bucket, count in zip(histogram._buckets, counts, strict=True):
            bucket.inc(count)
        histogram._sum.inc(total)


class _Tally:
    """What requests of one kind add up to."""

    __slots__ = ("buckets", "denied", "errors", "exemplars", "passed", "retries", "seconds", "unsent")

    def __init__(self, passed: _Passed) -> None:
        self.passed = passed  # for their service
        self.unsent = 0  # requests that no service was asked to answer
        self.retries = self.denied = 0
        self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * len(BOUNDS)
        self.exemplars: list[tuple[str, float] | None] = [None] * len(BOUNDS)  # the latest of each bucket


class _InOneProcess(Collector):
    """The families that every request counts in, added up in plain numbers."""

    def __init__(self, registry: CollectorRegistry, passed: dict[str, _Passed]) -> None:
        self.series: dict[Kind, _Tally] = {}
        self._passed = passed
        registry.register(self)

    def expect(self, kind: Kind) -> _Tally:
        return self.series.setdefault(kind, _Tally(self._passed.setdefault(kind[3] or NO_SERVICE, _Passed())))

    def ended(self, kind: Kind, seconds: float, context: RequestContext) -> None:
        """Count a request or WebSocket that is over."""
        tally = self.series.get(kind)
        if tally is None:
            tally = self.expect(_bounded(kind))
        bucket = bisect_left(BUCKETS, seconds)
        tally.seconds += seconds
        tally.buckets[bucket] += 1
        correlation_id = context.correlation_id
        if correlation_id and len(correlation_id) <= LONGEST_EXEMPLAR:
            tally.exemplars[bucket] = (correlation_id, seconds)
        if kind[2] >= 500 or context.cut_short:
            tally.errors += 1
        attempts = context.attempts
        if attempts > 1:
            tally.retries += attempts - 1
        elif attempts == 0:
            tally.unsent += 1
        if context.retry_denied:
            tally.denied += 1
        tally.passed.add(context)

    def collect(self) -> Iterable[Metric]:
        counts: dict[str, dict[tuple[str, ...], float]] = {name: defaultdict(float) for name, _, _ in COUNTERS}
        times: dict[tuple[str, str], _Tally] = {}
        for (method, endpoint, status, service, cause), tally in tuple(self.series.items()):
            count = sum(tally.buckets)
            where = (method, endpoint)
            counts[REQUESTS[0]][(method, endpoint, str(status))] += count
            counts[ERRORS[0]][where] += tally.errors
            counts[OUTCOMES[0]][(service or NO_SERVICE, cause)] += count
            if service:
                counts[ATTEMPTS[0]][(service,)] += count - tally.unsent + tally.retries
                counts[RETRIES[0]][(service,)] += tally.retries
                counts[DENIED[0]][(service,)] += tally.denied
            total = times.setdefault(where, _Tally(tally.passed))
            total.seconds += tally.seconds
            total.buckets = [*map(sum, zip(total.buckets, tally.buckets, strict=True))]
            total.exemplars = [new or old for new, old in zip(tally.exemplars, total.exemplars, strict=True)]
        for name, meaning, labels in COUNTERS:
            counter = CounterMetricFamily(name, meaning, labels=labels)
            for label_values, value in counts[name].items():
                counter.add_metric(label_values, value)
            yield counter
        name, meaning, labels = SECONDS
        histogram = HistogramMetricFamily(name, meaning, labels=labels)
        for where, total in times.items():
            histogram.add_metric(where, buckets=[*_cumulated(total)], sum_value=total.seconds)
        yield histogram

    def describe(self) -> Iterable[Metric]:
        return self.collect()


def _cumulated(tally: _Tally) -> Iterable[tuple[str, float] | tuple[str, float, Exemplar]]:
    count = 0
    for bound, more, example in zip(BOUNDS, tally.buckets, tally.exemplars, strict=True):
        count += more
        if example is None:
            yield bound, count
        else:
            correlation_id, seconds = example
            yield bound, count, Exemplar({"correlation_id": correlation_id}, seconds)


class _OverWorkers:
    """The same families in the files that all workers share; exemplars are not kept there."""

    def __init__(self, registry: CollectorRegistry, passed: dict[str, _Passed]) -> None:
        counter = partial(Counter, registry=registry)
        self._passed = passed
        self._requests = counter(*REQUESTS)
        self._errors = counter(*ERRORS)
        self._outcomes = counter(*OUTCOMES)
        self._attempts = counter(*ATTEMPTS)
        self._retries = counter(*RETRIES)
        self._denied = counter(*DENIED)
        self._seconds = Histogram(*SECONDS, buckets=BUCKETS, registry=registry)
        self.series: dict[Kind, _Children] = {}

    def expect(self, kind: Kind) -> "_Children":
        method, endpoint, status, service, cause = kind
        children = self.series[kind] = _Children(
            self._requests.labels(method, endpoint, str(status)),
            self._seconds.labels(method, endpoint),
            self._outcomes.labels(service or NO_SERVICE, cause),
            self._errors.labels(method, endpoint),
            self._attempts.labels(service) if service else None,
            self._retries.labels(service) if service else None,
            self._denied.labels(service) if service else None,
            self._passed.setdefault(service or NO_SERVICE, _Passed()),
        )
        return children

    def ended(self, kind: Kind, seconds: float, context: RequestContext) -> None:
        """Count a request or WebSocket that is over."""
        children = self.series.get(kind)
        if children is None:
            children = self.expect(_bounded(kind))
        children.requests.inc()
        children.times.observe(seconds)
        children.outcomes.inc()
        if kind[2] >= 500 or context.cut_short:
            children.errors.inc()
        attempts = context.attempts
        if attempts and children.attempts is not None and children.retries is not None:
            children.attempts.inc(attempts)
            if attempts > 1:
                children.retries.inc(attempts - 1)
        if context.retry_denied and children.denied is not None:
            children.denied.inc()
        children.passed.add(context)


@dataclass(slots=True)
class _Children:
    """Where requests of one kind count; looking a child up by its labels costs more than counting in it."""

    requests: Counter
    times: Histogram
    outcomes: Counter
    errors: Counter
    attempts: Counter | None
    retries: Counter | None
    denied: Counter | None
    passed: _Passed


def _bounded(kind: Kind) -> Kind:
    method = kind[0]
    return kind if method in METHODS else (OTHER_METHOD, *kind[1:])


def _callers_of(files: Path) -> set[str]:
    """Callers that have a series already."""
    families = [family for family in AllWorkers(files).collect() if family.name.startswith("rate_limit_exceeded")]
    return {sample.labels["identifier"] for family in families for sample in family.samples} - {OTHER_CALLER}


def _forget_dead_workers(directory: Path) -> None:
    """Remove what workers that are gone said of the present; what they counted stays counted."""
    for file in directory.glob("gauge_live*.db"):
        try:
            os.kill(int(file.stem.rpartition("_")[2]), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)  # another worker may see the same
        except (PermissionError, ValueError):  # it lives as another user, or the file is none of ours
            pass


@cache
def process_metrics() -> Metrics:
    """The metrics of this process, which any number of gateways in it share."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a series beside each counter, of a name that is taken for one more
    return Metrics()
