"""What the gateway needs of memory: fresh, after some work, and for each connection that does nothing."""

from dataclasses import dataclass

from bench.case import Report, Say, Sizes
from bench.figures import table
from bench.peers import GATEWAY
from bench.processes import descendants, proportional_bytes, raise_open_files, resident_bytes
from bench.stage import PATH, Running, call, holding, set_up, start

RATE = 2000  # requests a second


@dataclass(frozen=True)
class Moment:
    """Memory at one time, in bytes: the worker's (RSS), and all that supervisor and worker take together (PSS)."""

    worker: int
    together: int


def measure(sizes: Sizes, say: Say) -> Report:
    """Look at a fresh gateway with one worker, then after requests, then with idle keep-alive connections."""
    raise_open_files()
    with set_up(say) as stage:
        say("memory: a fresh gateway")
        gateway = start(stage, GATEWAY)
        fresh = look(gateway)
        say(f"memory: {sizes.requests:,} requests")
        seconds = sizes.requests / RATE
        answers = call(stage, "ask", gateway.port, seconds, path=PATH, rate=RATE, count=sizes.requests)
        worked = look(gateway)
        say(f"memory: {sizes.connections:,} idle connections")
        with holding(stage, gateway.port, PATH, sizes.connections) as held:
            holding_them = look(gateway)
    return report(sizes, fresh, worked, holding_them, held, round(answers["errors"]))


def look(gateway: Running) -> Moment:
    (worker,) = descendants(gateway.pid)
    return Moment(resident_bytes(worker), proportional_bytes([gateway.pid, worker]))


def report(sizes: Sizes, fresh: Moment, worked: Moment, idle: Moment, held: int, errors: int) -> Report:
    """In MiB, and for connections in MiB a thousand."""
    per_thousand = [
        (after - before) / max(1, held) * 1000
        for before, after in ((worked.worker, idle.worker), (worked.together, idle.together))
    ]
    rows: dict[str, tuple[str, float, float]] = {
        "fresh": ("at start", fresh.worker, fresh.together),
        "worked": (f"after {sizes.requests:,} requests", worked.worker, worked.together),
        "per_1000_connections": ("more for 1,000 idle keep-alive connections", per_thousand[0], per_thousand[1]),
    }
    mib = {key: {"worker": round(row[1] / 2**20, 1), "together": round(row[2] / 2**20, 1)} for key, row in rows.items()}
    head = ("memory, MiB", "worker (RSS)", "with its supervisor (PSS)")
    shown = [(rows[key][0], f"{row['worker']:.1f}", f"{row['together']:.1f}") for key, row in mib.items()]
    faults = [] if held == sizes.connections else [f"idle connections: {held} of {sizes.connections} held"]
    if errors:
        faults.append(f"memory: {errors} errors in {sizes.requests:,} requests")
    return Report({"mib": mib, "connections": held}, table(head, shown), faults)
