"""How many requests one core serves, beside peers doing the same on the same core by turns."""

import json
import shutil
from dataclasses import asdict, dataclass
from statistics import median

from bench.case import Report, Say, Sizes
from bench.figures import table
from bench.peers import GATEWAY, PEERS
from bench.processes import SEARCH_PATH, BenchError, cpu_seconds
from bench.stage import PATH, Running, Stage, set_up, start

CONNECTIONS = 64
DIRECT = "direct"  # the service without anything before it: what the load itself can do

# A thousand callers take turns; at the end the figures, in microseconds, as a line of JSON.
SCRIPT = """
local requests, turn = {}, 0
function init()
  for caller = 0, 999 do
    requests[caller] = wrk.format("POST", wrk.path, {
      ["Host"] = "127.0.0.1",
      ["Content-Type"] = "application/json",
      ["X-User-ID"] = "user-" .. caller,
      ["Authorization"] = "Bearer 0123456789abcdef",
    }, '{"user_id":"user-' .. caller .. '","n":10,"context":"the quick brown fox jumps over a dog"}')
  end
end
function request()
  turn = (turn + 1) % 1000
  return requests[turn]
end
function done(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format('\\n{"requests": %d, "duration": %d, "errors": %d, "p50": %d, "p99": %d}\\n',
    summary.requests, summary.duration, failed, latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Round:
    """One target's turn.

    Attributes:
        rps: requests a second.
        cpu_us: microseconds of its core that a request took, from the process's own count.
        busy: the share of its core that it used; below 1 something else set its pace.
        errors: answers other than 2xx and 3xx, and broken connections.
        in_redis: the share of requests whose limits were looked up in Redis; None where there is no Redis.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    busy: float
    errors: int
    in_redis: float | None = None


def measure(sizes: Sizes, say: Say, *, peers: tuple[str, ...]) -> Report:
    """Let the gateway and its peers take turns under wrk, 64 connections, for ``sizes.rounds`` rounds."""
    if shutil.which("wrk", path=SEARCH_PATH) is None:
        raise BenchError("it needs wrk (Debian: apt-get install wrk)")
    with set_up(say) as stage:
        targets = [start(stage, GATEWAY), *start_present(stage, peers, say), Running(DIRECT, stage.service, 0)]
        script = stage.processes.directory / "callers.lua"
        script.write_text(SCRIPT)
        if sizes.warm_up:
            for target in targets:
                say(f"throughput: warming up {target.name}")
                load(stage, target, sizes.warm_up)
        rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
        for number in range(1, sizes.rounds + 1):
            for target in targets:
                say(f"throughput: round {number} of {sizes.rounds}, {target.name}")
                rounds[target.name].append(load(stage, target, sizes.seconds))
    return report(rounds)


def start_present(stage: Stage, names: tuple[str, ...], say: Say) -> list[Running]:
    """Start those peers that are there; of each that is not, say so in a line."""
    running = []
    for name in names:
        peer = PEERS[name]
        if peer.missing():
            say(f"{name} is not installed: left out (Debian: apt-get install {peer.packages})")
        elif name == "nginx-lua" and not stage.redis:
            say(f"{name} needs redis-server: left out")
        else:
            try:
                running.append(start(stage, peer))
            except BenchError as failure:
                say(f"{failure}: left out")
    return running


def load(stage: Stage, target: Running, seconds: int) -> Round:
    """One turn of a target's."""
    used = cpu_seconds(target.pid) if target.pid else 0.0
    decided = stage.decided_in_redis() if stage.redis else 0
    url = f"http://127.0.0.1:{target.port}{PATH}"
    script = str(stage.processes.directory / "callers.lua")
    command = ["wrk", "--threads", "1", "--connections", str(CONNECTIONS), "--duration", f"{seconds}s"]
    output = stage.processes.run([*command, "--script", script, url], timeout=seconds + 20)
    used = cpu_seconds(target.pid) - used if target.pid else 0.0
    stage.processes.empty_logs()
    told = json.loads(output.strip().splitlines()[-1])
    if not told["requests"]:
        raise BenchError(f"{target.name} answered nothing in {seconds} s")
    return Round(
        rps=told["requests"] / told["duration"] * 1e6,
        p50_ms=told["p50"] / 1e3,
        p99_ms=told["p99"] / 1e3,
        cpu_us=used / told["requests"] * 1e6,
        busy=used / told["duration"] * 1e6,
        errors=told["errors"],
        in_redis=min(1.0, (stage.decided_in_redis() - decided) / told["requests"]) if stage.redis else None,
    )


def report(rounds: dict[str, list[Round]]) -> Report:
    """Medians over rounds; the gateway's ratio to each other is the median of those within a round."""
    ours = rounds[GATEWAY.name]
    figures = {}
    for name, turns in rounds.items():
        rates = [turn.rps for turn in turns]
        figures[name] = {
            "about": ABOUT[name],
            "rps": round(median(rates)),
            "rps_lowest": round(min(rates)),
            "rps_highest": round(max(rates)),
            "gateway_ratio": round(median(our.rps / turn.rps for our, turn in zip(ours, turns, strict=True)), 3),
            "p50_ms": round(median(turn.p50_ms for turn in turns), 2),
            "p99_ms": round(median(turn.p99_ms for turn in turns), 2),
            "cpu_us": round(median(turn.cpu_us for turn in turns), 1),
            "busy": round(median(turn.busy for turn in turns), 2),
            "errors": sum(turn.errors for turn in turns),
            "rounds": [asdict(turn) for turn in turns],
        }
    head = ("one core", "requests/s", "lowest to highest", "gateway is", "p50 ms", "p99 ms", "core us", "core busy")
    rows = []
    for name, row in figures.items():
        measured = (f"{row['cpu_us']:.1f}", f"{row['busy']:.0%}") if name != DIRECT else ("", "")
        ratio = f"{row['gateway_ratio']:.2f} x" if name != GATEWAY.name else ""
        spread = f"{row['rps_lowest']:,} to {row['rps_highest']:,}"
        latency = (f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
        rows.append((row["about"], f"{row['rps']:,}", spread, ratio, *latency, *measured))
    faults = [f"{name}: {row['errors']} errors" for name, row in figures.items() if row["errors"]]
    shares = [turn.in_redis for turn in ours if turn.in_redis is not None]
    limits = f"in Redis for {median(shares):.1%} of its requests" if shares else "in memory"
    notes = (
        "core us: of the server's core, a request. Where its core was not busy, something else set the pace.\n"
        f"The gateway's limits were {limits}."
    )
    return Report({"targets": figures}, f"{table(head, rows)}\n\n{notes}", faults)


ABOUT = {GATEWAY.name: GATEWAY.about, DIRECT: "the service itself, nothing in front"}
ABOUT |= {name: peer.about for name, peer in PEERS.items()}
