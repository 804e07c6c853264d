"""Streams of tokens through one worker: whether all arrive, in order and in time, and what silent ones cost."""

from dataclasses import dataclass
from statistics import median

from bench.case import Report, Say, Sizes
from bench.figures import table
from bench.latency import ask
from bench.peers import GATEWAY
from bench.processes import descendants, raise_open_files, resident_bytes
from bench.stage import Figures, Stage, call, holding, set_up, start

STREAM, IDLE = "/api/v1/chat/stream", "/api/v1/chat/idle"
TIMES = ("gap_p50_ms", "gap_p99_ms", "delay_p50_ms", "delay_p99_ms")
RATE = 200  # other requests a second, while streams are silent
FILES_BESIDES = 1000  # open in a gateway besides the two sockets of each stream


@dataclass(frozen=True)
class Idle:
    """What silent streams cost.

    Attributes:
        wanted, held: streams that were to be open, and that were.
        bytes_before, bytes_during: resident in the gateway's worker.
        before, during: latencies of other requests.
    """

    wanted: int
    held: int
    bytes_before: int
    bytes_during: int
    before: Figures
    during: Figures


def measure(sizes: Sizes, say: Say) -> Report:
    """Read streams directly and through the gateway by turns; then hold silent ones open and look at the rest."""
    files = raise_open_files()
    idle = min(sizes.idle_streams, (files - FILES_BESIDES) // 2)
    if idle < sizes.idle_streams:
        say(f"streams: {idle} idle ones, not {sizes.idle_streams}: only {files} files may be open (ulimit -Hn)")
    with set_up(say) as stage:
        gateway = start(stage, GATEWAY)
        turns = []
        for number in range(1, sizes.rounds + 1):
            say(f"streams: {sizes.streams} at once, round {number} of {sizes.rounds}, direct")
            direct = read(stage, stage.service, sizes)
            say(f"streams: {sizes.streams} at once, round {number} of {sizes.rounds}, gateway")
            turns.append((direct, read(stage, gateway.port, sizes)))
        (worker,) = descendants(gateway.pid)
        say(f"streams: other requests, before {idle} idle streams")
        before = ask(stage, gateway.port, RATE, sizes.seconds)
        bytes_before = resident_bytes(worker)
        say(f"streams: other requests, beside {idle} idle streams")
        with holding(stage, gateway.port, IDLE, idle) as held:
            bytes_during = resident_bytes(worker)
            during = ask(stage, gateway.port, RATE, sizes.seconds)
    return report(sizes, turns, Idle(idle, held, bytes_before, bytes_during, before, during))


def read(stage: Stage, port: int, sizes: Sizes) -> Figures:
    """What became of the streams of one turn (see ``bench.client.judge``)."""
    told = {"streams": sizes.streams, "frames": sizes.frames, "every": sizes.every}
    return call(stage, "read", port, sizes.frames * sizes.every, path=STREAM, **told)


def report(sizes: Sizes, turns: list[tuple[Figures, Figures]], idle: Idle) -> Report:
    """Medians over rounds of times, sums of what was lost."""
    through = [gateway for _, gateway in turns]
    counts = {name: sum(round(one[name]) for one in through) for name in ("streams", "whole", "lost", "reordered")}
    times = {
        name: {
            "direct": round(median(direct[name] for direct, _ in turns), 3),
            "gateway": round(median(gateway[name] for gateway in through), 3),
            "added": round(median(gateway[name] - direct[name] for direct, gateway in turns), 3),
        }
        for name in TIMES
    }
    kib = (idle.bytes_during - idle.bytes_before) / 1024 / max(1, idle.held)
    others = {name: {"before": idle.before[name], "during": idle.during[name]} for name in ("p50_ms", "p99_ms")}
    figures = {
        "running": {**counts, **times, "rounds": [{"direct": one, "gateway": two} for one, two in turns]},
        "idle": {"wanted": idle.wanted, "held": idle.held, "kib_each": round(kib, 1), "other_requests": others},
    }

    what = f"{sizes.streams} streams of {sizes.frames} events, one every {sizes.every * 1e3:g} ms"
    rows = [
        (f"{kind}, {percent}", *(f"{times[f'{kind}_{percent}_ms'][key]:.2f}" for key in ("direct", "gateway", "added")))
        for kind in ("gap", "delay")
        for percent in ("p50", "p99")
    ]
    running = table((what, "direct, ms", "gateway, ms", "added, ms"), rows)
    verdict = "{whole} of {streams} whole, {lost} events lost, {reordered} out of order".format(**counts)
    meaning = "gap: between two events as their reader sees them; delay: from the service's writing one to its reader."
    head = (f"{idle.held:,} idle streams", "before", "meanwhile")
    rows = [
        ("KiB of memory each", "", f"{kib:.1f}"),
        *(
            (f"other requests, {name[:3]} ms", f"{row['before']:.2f}", f"{row['during']:.2f}")
            for name, row in others.items()
        ),
    ]
    faults = [] if counts["whole"] == counts["streams"] else [f"streams: {verdict}"]
    if idle.held < idle.wanted:
        faults.append(f"idle streams: {idle.held} of {idle.wanted} held")
    errors = round(idle.before["errors"] + idle.during["errors"])
    if errors:
        faults.append(f"other requests beside idle streams: {errors} errors")
    return Report(figures, f"{running}\n\n{verdict}. {meaning}\n\n{table(head, rows)}", faults)
