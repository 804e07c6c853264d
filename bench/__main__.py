"""The gateway measured on this machine: ``make bench``, or

    python -m bench                                     all cases
    python -m bench throughput --rounds 3 --seconds 4 --peers nginx,caddy
    python -m bench latency streams memory              some of them
    python -m bench --quick                             whether it works, in under a minute; its figures mean little
    python -m bench --picture docs/throughput.svg       draws what throughput found

It needs Linux. Tables are printed in Markdown, progress on standard error; the figures are written to
bench/out/results.json. Absolutes belong to this machine: what carries over are ratios within one run. The exit status
is 1 where something went wrong that does not in a gateway in good health, such as a lost event, and 2 where nothing
could be measured.
"""

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import latency, memory, picture, streams, throughput
from bench.case import QUICK, Report, Say, Sizes
from bench.peers import PEERS
from bench.processes import ROOT, BenchError
from gateway import __version__
from gateway.cli import COMPILED

RESULTS = ROOT / "bench" / "out" / "results.json"
CASES = ("throughput", "latency", "streams", "memory")
WRONG, NOTHING = 1, 2  # exit statuses

Case = Callable[[Sizes, Say], Report]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    asked = parse(arguments)
    sizes = QUICK if asked.quick else Sizes()
    given = {name: value for name in ("rounds", "seconds") if (value := getattr(asked, name)) is not None}
    sizes = replace(sizes, **given)
    cases: dict[str, Case] = {
        "throughput": lambda sizes, say: throughput.measure(sizes, say, peers=asked.peers),
        "latency": latency.measure,
        "streams": streams.measure,
        "memory": memory.measure,
    }
    if len(os.sched_getaffinity(0)) < 2:
        say("only one core: the load and the server under test share it, so the figures mean little")
    reports: dict[str, Report] = {}
    for name in dict.fromkeys(asked.cases or cases):
        try:
            reports[name] = cases[name](sizes, say)
        except BenchError as failure:
            say(f"{name}: left out, for {failure}")
            continue
        print(f"## {name}\n\n{reports[name].text}\n", flush=True)
    if not reports:
        return NOTHING
    write(asked.json, {name: report.figures for name, report in reports.items()})
    if asked.picture and "throughput" in reports:
        picture.draw(asked.picture, reports["throughput"].figures["targets"])
    faults = [fault for report in reports.values() for fault in report.faults]
    for fault in faults:
        say(f"WRONG: {fault}")
    return WRONG if faults else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all of them unless given")
    parser.add_argument("--rounds", type=positive, help=f"turns of each target, {Sizes.rounds} unless given")
    parser.add_argument("--seconds", type=positive, help=f"of load in a turn, {Sizes.seconds} unless given")
    parser.add_argument(
        "--peers", type=peers, default=tuple(PEERS), help=f"for throughput: some of {','.join(PEERS)}, or none at all"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw throughput as SVG")
    parser.add_argument("--json", type=Path, metavar="FILE", default=RESULTS, help="where to write the figures")
    asked = parser.parse_args(arguments)
    unknown = [case for case in asked.cases if case not in CASES]
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}: there are {', '.join(CASES)}")
    if asked.picture and asked.cases and "throughput" not in asked.cases:
        parser.error("--picture draws throughput, which is not among the cases")
    return asked


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def peers(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name not in ("", "none"))
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no peer is called {', '.join(unknown)}: there are {', '.join(PEERS)}")
    return names


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def write(path: Path, cases: dict[str, dict[str, Any]]) -> None:
    """Write the figures, and what they were taken on, as JSON."""
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    when = datetime.now(UTC).isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"when": when, "gateway": __version__ + COMPILED, "machine": machine, **cases}, indent=1) + "\n"
    )
    say(f"figures are in {path}")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what was started is ended
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
