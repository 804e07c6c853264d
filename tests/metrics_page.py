"""docs/metrics.md, from the code: ``python -m tests.metrics_page > docs/metrics.md``."""

import sys
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry

from gateway.backends.prometheus import BOUNDS, METHODS, MOST_CALLERS, SOURCES, STATES, Metrics
from gateway.context import Cause
from gateway.middleware.system import ALLOWED
from gateway.policies.circuit_breaker import Event

SERVICES, STATUSES = 7, 20  # what the page reckons with


class Label(NamedTuple):
    meaning: str
    values: Callable[[int, int], int]  # how many at most, from how many services and statuses there are


LABELS = {
    "method": Label(f"one of {len(METHODS)}, or `OTHER`", lambda services, statuses: len(METHODS) + 1),
    "endpoint": Label(
        "a service's prefix, a path of the gateway's own, or `other`",
        lambda services, statuses: services + len(ALLOWED) + 1,
    ),
    "status": Label(
        "of the answer; 499 where there was none, 101 for a WebSocket; services may answer what they like",
        lambda services, statuses: statuses,
    ),
    "service": Label(
        "a service's name, or `none`: the gateway's own paths, and what was refused before it had a service",
        lambda services, statuses: services + 1,
    ),
    "cause": Label(", ".join(f"`{cause.value}`" for cause in Cause), lambda services, statuses: len(Cause)),
    "state": Label(
        ", ".join(f"`{state}`" for state in STATES) + " of a breaker, or `busy`, `idle` of a connection",
        lambda services, statuses: len(STATES),
    ),
    "why": Label(", ".join(f"`{event.value}`" for event in Event), lambda services, statuses: len(Event)),
    "identifier": Label(
        f"the caller, `user:...` or `ip:...`, of the first {MOST_CALLERS} that a worker refuses; then `other`",
        lambda services, statuses: MOST_CALLERS + 1,
    ),
    "source": Label(
        "`redis`; `remembered`, a denial of Redis's that still holds; without Redis `local`, the worker's own buckets, "
        "`open`, all pass, or `closed`, none does",
        lambda services, statuses: len(SOURCES),
    ),
    "version": Label("the gateway's", lambda services, statuses: 1),
}


class Family(NamedTuple):
    name: str
    kind: str
    meaning: str
    labels: tuple[str, ...]
    samples: int  # of each series

    @property
    def unit(self) -> str:
        name = self.name.removesuffix("_total").removesuffix("_info")
        return next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), "")

    def most(self, services: int, statuses: int) -> int:
        """How many samples it can have."""
        return self.samples * prod(LABELS[label].values(services, statuses) for label in self.labels)


def families() -> list[Family]:
    """All that the gateway has, by name."""
    registry = CollectorRegistry()
    Metrics(registry)
    found = []
    for collector in list(registry._collector_to_names):
        for family in collector.collect():
            owner: Any = collector if hasattr(collector, "_labelnames") else family
            samples = 1
            if family.type == "histogram":
                samples = len(getattr(collector, "_upper_bounds", BOUNDS)) + 2  # the sum and the count
            name = f"{family.name}_total" if family.type == "counter" else family.name
            labels = tuple(owner._labelnames)
            found.append(Family(name, family.type, family.documentation, labels, samples))
    return sorted(found)


def page() -> str:
    every = families()
    rows = [
        f"| `{family.name}` | {family.kind} | {family.unit} | {', '.join(f'`{label}`' for label in family.labels)} "
        f"| {family.meaning} |"
        for family in every
    ]
    labels = [f"| `{name}` | {label.meaning} | {label.values(SERVICES, STATUSES)} |" for name, label in LABELS.items()]
    most = sum(family.most(SERVICES, STATUSES) for family in every)
    callers = sum(family.most(SERVICES, STATUSES) for family in every if "identifier" in family.labels)
    return f"""\
# What `/metrics` tells

<!-- written by `python -m tests.metrics_page > docs/metrics.md` -->

| family | type | unit | labels | meaning |
|---|---|---|---|---|
{chr(10).join(rows)}

## Labels

No path, method or header of a client's becomes a label as it is, so that strangers can't make up series.

| label | values | at most |
|---|---|---|
{chr(10).join(labels)}

With {SERVICES} services that answer with {STATUSES} different statuses there are at most {most:,} samples, buckets
counted, were all that can be met together. Of them {callers:,} are those of callers that were refused: so many for each
worker, and one that takes another's place names no more where so many are named already.

## Over several workers

Under `ai-gateway serve --workers 4` each worker answers for all, and for those before them.

- The workers keep their values in files of a directory that the supervisor makes for this, private and in memory
  (`/dev/shm` where there is one), and removes in the end. Set `PROMETHEUS_MULTIPROC_DIR` to have it made in another
  place; several gateways may be given the same. What a gateway that was killed has left there the next one removes,
  once no worker uses it any more.
- When a worker ends, in whatever way, the supervisor adds its counters and histograms to those of all before it. A
  scrape in between finds each value once, and none gets lower. Of all that are gone there are two files in the end.
  What a worker said of the present, its gauges, goes with it.
- Requests, their durations, errors, outcomes, attempts and retries, 429s, transitions and lost log lines count at once.
  The rest - bytes, streams, connections, the limiter's decisions and waits, lags - is written twice a second and when a
  worker leaves, so another worker tells it half a second late, and of one that was killed the last half second is lost.
- Gauges are added up over the workers that live; `circuit_breaker_state` is that of the worst, `rate_limiter_shared`
  that of the one that has no Redis, if any has none.
- Exemplars, a correlation ID with each bucket, are there with one worker alone, where OpenMetrics is asked for.
"""


if __name__ == "__main__":
    sys.stdout.write(page())
