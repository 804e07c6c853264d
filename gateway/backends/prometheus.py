"""The gateway's metrics as Prometheus families, in one process or over several workers.

With ``PROMETHEUS_MULTIPROC_DIR`` set before this module is imported, prometheus_client keeps every value in a file of
that directory, and whichever worker is scraped answers for all. In one process requests are added up in plain numbers,
at a quarter of the cost, and become families when they are asked for.
"""

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from gateway import __version__
from gateway.context import Cause, RequestContext
from gateway.policies.services import Service

# Seconds. Up to the longest stream: an answer of a language model may take minutes.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0)
BOUNDS = [*map(floatToGoString, (*BUCKETS, float("inf")))]
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER_METHOD = "OTHER"
OTHER_CALLER = "other"
NO_SERVICE = "none"  # the gateway's own paths, and requests refused before they had a service
MOST_CALLERS = 1000  # label values last as long as the process, so strangers must not make them up without end
STATES = {"closed": 0, "half_open": 1, "open": 2}
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
        self.breaker_states = gauge(
            "circuit_breaker_state",
            "0 closed, 1 half-open, 2 open; over workers, the worst.",
            ("service",),
            multiprocess_mode="livemax",
        )
        self.transitions = counter(
            "circuit_breaker_transitions_total", "Changes of a breaker into a state.", ("service", "state")
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

        self.under_way = 0  # requests and WebSockets that have begun and not ended
        self._callers: set[str] = set()
        over_workers: bool = values.ValueClass._multiprocess
        self._requests = _OverWorkers(registry) if over_workers else _InOneProcess(registry)
        self.ended = self._requests.ended
        self._directory = Path(MultiProcessCollector(None)._path) if over_workers else None  # type: ignore[no-untyped-call]
        if not over_workers:
            self.in_flight.set_function(lambda: self.under_way)
        self.build.labels(__version__).set(1)
        self.exceeded.labels(OTHER_CALLER)

    def expect(self, services: Iterable[Service]) -> None:
        """Show these services at zero from the start, so that the first error is an increase and not a beginning."""
        for service in services:
            self._requests.expect(("POST", service.prefix, 200, service.name, Cause.COMPLETED))
            self.breaker_states.labels(service.name)
            self.retry_budgets.labels(service.name)
            for state in STATES:
                self.transitions.labels(service.name, state)

    def unparsed(self, status: int) -> None:
        """The server refused what it could not read as a request."""
        self.ended((OTHER_METHOD, "other", status, "", Cause.REFUSED), 0.0, RequestContext())

    def rate_limit_exceeded(self, caller: str) -> None:
        """A caller was refused with 429; the first thousand have a series of their own."""
        if caller not in self._callers:
            if len(self._callers) >= MOST_CALLERS:
                caller = OTHER_CALLER
            else:
                self._callers.add(caller)
        self.exceeded.labels(caller).inc()

    def limiter_shared(self, shared: bool) -> None:
        """Whether limits are counted in Redis, together with all other workers."""
        self.shared.set(1 if shared else 0)

    def breaker_changed(self, service: str, state: str) -> None:
        """A breaker is now ``closed``, ``half_open`` or ``open``."""
        self.transitions.labels(service, state).inc()
        self.breaker_states.labels(service).set(STATES[state])

    def lines_dropped(self, lines: int) -> None:
        """So many log lines found no room."""
        self.dropped.inc(lines)

    def refresh(self, breakers: Mapping[str, Mapping[str, Any]], retries_left: Mapping[str, int]) -> None:
        """Bring up to date what changes without an event: call it before a scrape, and every second or so.

        Args:
            breakers: by service, with its ``state``. An open breaker becomes half-open by the clock alone.
            retries_left: by service, in its budget.
        """
        for service, left in retries_left.items():
            self.retry_budgets.labels(service).set(left)
        for service, status in breakers.items():
            self.breaker_states.labels(service).set(STATES[status["state"]])
        if self._directory is not None:
            self.in_flight.set(self.under_way)
            _forget_dead_workers(self._directory)


class _Tally:
    """What requests of one kind add up to."""

    __slots__ = ("buckets", "denied", "errors", "exemplars", "retries", "seconds", "unsent")

    def __init__(self) -> None:
        self.unsent = 0  # requests that no service was asked to answer
        self.retries = self.denied = 0
        self.errors = 0
        self.seconds = 0.0
        self.buckets = [0] * len(BOUNDS)
        self.exemplars: list[tuple[str, float] | None] = [None] * len(BOUNDS)  # the latest of each bucket


class _InOneProcess(Collector):
    """The families that every request counts in, added up in plain numbers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.series: dict[Kind, _Tally] = {}
        registry.register(self)

    def expect(self, kind: Kind) -> _Tally:
        return self.series.setdefault(kind, _Tally())

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
            total = times.setdefault(where, _Tally())
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

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = partial(Counter, registry=registry)
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


def _bounded(kind: Kind) -> Kind:
    method = kind[0]
    return kind if method in METHODS else (OTHER_METHOD, *kind[1:])


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
