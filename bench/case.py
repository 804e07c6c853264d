"""What each case of the benchmark is given, and what it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Say = Callable[[str], object]  # tells whoever waits what is going on, a line at a time


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: how often each target takes its turn.
        seconds: of load in each.
        warm_up: seconds of load before the first round; whole ones, as wrk counts.
        rates: requests a second at which latency is measured.
        streams: server-sent-event streams at once, ``frames`` events each, one every ``every`` seconds.
        idle_streams: silent streams held open at once.
        requests: after which memory is looked at again.
        connections: idle keep-alive connections held open at once.
    """

    rounds: int = 3
    seconds: int = 4
    warm_up: int = 1
    rates: tuple[int, ...] = (1000, 4000)
    streams: int = 512
    frames: int = 64
    every: float = 0.02
    idle_streams: int = 5000
    requests: int = 10_000
    connections: int = 1000


QUICK = Sizes(
    rounds=1,
    seconds=1,
    warm_up=0,
    rates=(200,),
    streams=32,
    frames=8,
    idle_streams=100,
    requests=500,
    connections=100,
)


@dataclass(frozen=True)
class Report:
    """What a case found.

    Attributes:
        figures: for machines; a tree of plain values.
        text: for people.
        faults: what a gateway in good health would not have done; empty as a rule.
    """

    figures: dict[str, Any]
    text: str
    faults: list[str]
