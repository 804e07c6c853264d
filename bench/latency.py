"""What the gateway adds to the latency of a request at a fixed rate, well below what it can serve."""

from statistics import median
from typing import Any

from bench.case import Report, Say, Sizes
from bench.figures import table
from bench.peers import GATEWAY
from bench.stage import PATH, Figures, Stage, call, set_up, start

PERCENTILES = ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms")
SETTLING = 0.5  # seconds of load before what is counted


def measure(sizes: Sizes, say: Say) -> Report:
    """Ask the service directly and through the gateway by turns, at each rate."""
    turns: dict[int, list[tuple[Figures, Figures]]] = {}
    with set_up(say) as stage:
        gateway = start(stage, GATEWAY)
        for rate in sizes.rates:
            turns[rate] = []
            for number in range(1, sizes.rounds + 1):
                say(f"latency: {rate:,} requests/s, round {number} of {sizes.rounds}, direct")
                direct = ask(stage, stage.service, rate, sizes.seconds)
                say(f"latency: {rate:,} requests/s, round {number} of {sizes.rounds}, gateway")
                turns[rate].append((direct, ask(stage, gateway.port, rate, sizes.seconds)))
    return report(turns)


def ask(stage: Stage, port: int, rate: int, seconds: float) -> Figures:
    """Latencies of a server at a fixed rate, sent on schedule (see ``bench.client.OpenLoop``)."""
    counts = {"count": round(rate * seconds), "settling": round(rate * SETTLING)}
    return call(stage, "ask", port, seconds + SETTLING, path=PATH, rate=rate, **counts)


def report(turns: dict[int, list[tuple[Figures, Figures]]]) -> Report:
    """Medians over rounds of what each percentile was; what is added is the median of the differences in each round.

    Args:
        turns: by rate, each round's figures of the service itself and of the gateway before it.
    """
    figures: dict[str, dict[str, Any]] = {}
    for rate, rounds in turns.items():
        figures[str(rate)] = {
            "errors": sum(round(direct["errors"] + through["errors"]) for direct, through in rounds),
            **{
                name: {
                    "direct": round(median(direct[name] for direct, _ in rounds), 3),
                    "gateway": round(median(through[name] for _, through in rounds), 3),
                    "added": round(median(through[name] - direct[name] for direct, through in rounds), 3),
                }
                for name in PERCENTILES
            },
            "rounds": [{"direct": direct, "gateway": through} for direct, through in rounds],
        }
    rows = [
        (f"{int(rate):,} requests/s, {name.removesuffix('_ms')}", *(f"{row[name][key]:.2f}" for key in ABOUT))
        for rate, row in figures.items()
        for name in PERCENTILES
    ]
    faults = [f"at {int(rate):,} requests/s: {row['errors']} errors" for rate, row in figures.items() if row["errors"]]
    return Report({"rates": figures}, table(("latency", *ABOUT.values()), rows), faults)


ABOUT = {"direct": "direct, ms", "gateway": "gateway, ms", "added": "added, ms"}
