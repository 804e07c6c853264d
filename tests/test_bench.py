"""The benchmark: its arithmetic on fixed figures, its callers on real sockets, and each case once at small sizes."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import latency, memory, peers, picture, processes, stage, streams, throughput
from bench.case import Sizes
from bench.client import CONNECTIONS, OpenLoop, Stream, judge
from bench.figures import percentiles, table
from bench.memory import Moment
from bench.streams import Idle
from bench.throughput import Round
from tests.wire import OK, Reader, Request, Writer, eventually, read_body, service, until

CASES = ("throughput", "latency", "streams", "memory")


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    values = [*range(1000, 0, -1)]
    assert percentiles(values, (50, 90, 99, 99.9, 100)) == [500, 900, 990, 999, 1000]
    assert percentiles([1, 2, 3], (50, 99.9)) == [2, 3]
    assert percentiles([7], (0.1, 50, 99.9)) == [7, 7, 7]


def test_no_values_have_no_percentiles() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentiles([], (50,))


def test_a_table_is_markdown_with_its_figures_to_the_right() -> None:
    assert table(("name", "n"), [("a", 1), ("longer", 1000)]) == (
        "| name   |    n |\n"
        "|--------|-----:|\n"
        "| a      |    1 |\n"
        "| longer | 1000 |"
    )  # fmt: skip


def turn(rps: float, *, errors: int = 0, busy: float = 1.0) -> Round:
    return Round(rps=rps, p50_ms=6.0, p99_ms=9.0, cpu_us=1e6 / rps, busy=busy, errors=errors)


def test_throughput_is_the_median_and_ratios_are_those_within_a_round() -> None:
    found = throughput.report(
        {
            "gateway": [turn(10_000), turn(4_000), turn(11_000)],  # the second minute was a slow one, for all
            "nginx": [turn(50_000), turn(16_000), turn(44_000)],
            "direct": [turn(100_000), turn(100_000), turn(100_000)],
        }
    )
    targets = found.figures["targets"]
    assert targets["gateway"]["rps"] == 10_000
    assert (targets["gateway"]["rps_lowest"], targets["gateway"]["rps_highest"]) == (4_000, 11_000)
    assert targets["nginx"]["rps"] == 44_000
    assert targets["nginx"]["gateway_ratio"] == 0.25  # of 0.2, 0.25, 0.25, where the medians' own ratio is 0.227
    assert targets["gateway"]["cpu_us"] == 100.0
    assert len(targets["nginx"]["rounds"]) == 3
    assert "44,000 |   16,000 to 50,000 |     0.25 x |" in found.text
    assert "The gateway's limits were in memory." in found.text
    assert not found.faults


def test_throughput_tells_how_much_of_the_limiting_redis_saw() -> None:
    found = throughput.report({"gateway": [replace(turn(10_000), in_redis=share) for share in (1.0, 0.5, 0.998)]})
    assert "The gateway's limits were in Redis for 99.8% of its requests." in found.text


def test_errors_under_load_are_told() -> None:
    found = throughput.report({"gateway": [turn(10_000, errors=2), turn(10_000, errors=1)]})
    assert found.faults == ["gateway: 3 errors"]


def latencies(p50: float, p99: float, errors: int = 0) -> dict[str, float]:
    return {"p50_ms": p50, "p90_ms": p50, "p99_ms": p99, "p99.9_ms": p99, "max_ms": p99, "errors": errors}


def test_added_latency_is_the_median_of_the_differences_in_each_round() -> None:
    rounds = [
        (latencies(0.1, 1.0), latencies(0.5, 2.0)),
        (latencies(0.4, 9.0), latencies(0.9, 9.5)),
        (latencies(0.2, 1.5), latencies(0.5, 4.5, errors=1)),
    ]
    found = latency.report({1000: rounds})
    rate = found.figures["rates"]["1000"]
    assert rate["p50_ms"] == {"direct": 0.2, "gateway": 0.5, "added": 0.4}
    assert rate["p99_ms"] == {"direct": 1.5, "gateway": 4.5, "added": 1.0}
    assert "| 1,000 requests/s, p99   |       1.50 |        4.50 |      1.00 |" in found.text
    assert found.faults == ["at 1,000 requests/s: 1 errors"]


def running(whole: int, gap: float, delay: float, lost: int = 0) -> dict[str, float]:
    times = {"gap_p50_ms": 20.0, "gap_p99_ms": gap, "delay_p50_ms": delay, "delay_p99_ms": delay}
    return {"streams": 4, "whole": whole, "lost": lost, "reordered": 0, **times}


def idle(held: int = 100) -> Idle:
    return Idle(100, held, 40 << 20, (40 << 20) + (100 << 14), latencies(0.5, 1.0), latencies(0.5, 2.5))


def test_streams_report_what_the_gateway_adds_and_what_a_silent_one_takes() -> None:
    found = streams.report(Sizes(streams=4, frames=8), [(running(4, 20.5, 0.1), running(4, 22.0, 0.4))], idle())
    assert found.figures["running"]["gap_p99_ms"] == {"direct": 20.5, "gateway": 22.0, "added": 1.5}
    assert found.figures["running"]["delay_p50_ms"]["added"] == 0.3
    assert found.figures["idle"]["kib_each"] == 16.0
    assert found.figures["idle"]["other_requests"]["p99_ms"] == {"before": 1.0, "during": 2.5}
    assert "4 of 4 whole, 0 events lost, 0 out of order" in found.text
    assert not found.faults


def test_a_lost_event_or_a_stream_that_could_not_be_held_is_told() -> None:
    rounds = [(running(4, 20.0, 0.1), running(3, 20.0, 0.1, lost=2))]
    found = streams.report(Sizes(streams=4), rounds, idle(held=99))
    assert found.faults == [
        "streams: 3 of 4 whole, 2 events lost, 0 out of order",
        "idle streams: 99 of 100 held",
    ]


def test_memory_is_told_in_mib_and_for_a_thousand_connections() -> None:
    mib = 1 << 20
    moments = Moment(40 * mib, 50 * mib), Moment(42 * mib, 52 * mib), Moment(43 * mib, 53 * mib)
    found = memory.report(Sizes(connections=500), *moments, held=500, errors=0)
    assert found.figures["mib"] == {
        "fresh": {"worker": 40.0, "together": 50.0},
        "worked": {"worker": 42.0, "together": 52.0},
        "per_1000_connections": {"worker": 2.0, "together": 2.0},
    }
    assert not found.faults
    assert len(memory.report(Sizes(connections=500), *moments, held=499, errors=3).faults) == 2


def test_the_picture_shows_servers_to_scale_the_fastest_first_and_what_a_dark_page_needs() -> None:
    rows = {
        "gateway": {"about": "the <gateway>", "rps": 1000, "rps_lowest": 900, "rps_highest": 1100},
        "nginx": {"about": "nginx", "rps": 4000, "rps_lowest": 3000, "rps_highest": 5000},
        "direct": {"about": "the service", "rps": 9000, "rps_lowest": 9000, "rps_highest": 9000},
    }
    drawn = ElementTree.fromstring(picture.svg(rows))
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(text.itertext()) for text in drawn.iter(f"{space}text")]
    assert texts[1:5] == ["nginx", "4,000", "the <gateway>", "1,000"]
    bars = [(bar.attrib["class"], float(bar.attrib["width"])) for bar in drawn.iter(f"{space}rect")]
    assert [kind for kind, _ in bars] == ["bar", "bar ours"]
    assert bars[0][1] == pytest.approx(4 * bars[1][1], rel=1e-3)
    assert "the service" not in drawn.attrib["aria-label"]
    assert "prefers-color-scheme: dark" in "".join(drawn.itertext())


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["thruput"], "no case is called thruput"),
        (["--peers", "nginx,apache"], "no peer is called apache"),
        (["--rounds", "0"], "at least 1"),
        (["latency", "--picture", "x.svg"], "--picture draws throughput"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_command_line_picks_cases_peers_and_sizes() -> None:
    asked = command.parse(["throughput", "--peers", "nginx,caddy", "--rounds", "5", "--seconds", "2"])
    assert (asked.cases, asked.peers, asked.rounds, asked.seconds) == (["throughput"], ("nginx", "caddy"), 5, 2)
    everything = command.parse([])
    assert (everything.cases, everything.peers) == ([], tuple(peers.PEERS))
    assert command.parse(["--peers", "none"]).peers == ()


def test_without_wrk_throughput_says_so_in_a_line_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(throughput, "SEARCH_PATH", "")
    assert command.main(["throughput", "--json", str(tmp_path / "results.json")]) == command.NOTHING
    assert capsys.readouterr().err == "throughput: left out, for it needs wrk (Debian: apt-get install wrk)\n"
    assert not (tmp_path / "results.json").exists()


# Its processes --------------------------------------------------------------------------------------------------------


def test_what_was_started_is_ended_whatever_happens() -> None:
    with suppress(ZeroDivisionError), processes.Processes() as started:
        process = started.start("family", ["sh", "-c", "sleep 600 & sleep 600"])
        children = descendants(process.pid, at_least=2)
        raise ZeroDivisionError
    assert process.returncode == -signal.SIGTERM
    eventually(lambda: not any(map(is_running, children)))
    assert not started.directory.exists()


def test_a_benchmark_that_is_told_to_end_takes_what_it_started_with_it() -> None:
    bench = subprocess.Popen([sys.executable, "-m", "bench", "latency"], stderr=subprocess.PIPE, cwd=processes.ROOT)
    assert bench.stderr is not None
    assert bench.stderr.readline().startswith(b"latency: ")
    children = descendants(bench.pid, at_least=4)  # the service, the gateway, its worker, callers
    bench.terminate()
    bench.communicate(timeout=30)
    assert bench.returncode == 128 + signal.SIGTERM
    eventually(lambda: not any(map(is_running, children)))  # whoever gets a signal ends a moment after


def descendants(pid: int, *, at_least: int) -> list[int]:
    return eventually(lambda: found if len(found := processes.descendants(pid)) >= at_least else None)


def is_running(pid: int) -> bool:
    """It runs, and is not just waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_that_does_not_start_is_named_with_its_last_words() -> None:
    with processes.Processes() as started:
        process = started.start("moody", ["sh", "-c", "echo not today; exit 1"])
        with pytest.raises(processes.BenchError, match="moody did not start: not today"):
            started.await_answer("moody", process, 1, "/")


def test_a_program_that_fails_or_dawdles_is_named_with_its_last_words() -> None:
    with processes.Processes() as started:
        with pytest.raises(processes.BenchError, match="sh failed: no luck"):
            started.run(["sh", "-c", "echo trying; echo no luck >&2; exit 3"], timeout=10)
        with pytest.raises(processes.BenchError, match="sleep took longer than 0 s"):
            started.run(["sleep", "600"], timeout=0.05)
        assert started.run(["echo", "done"], timeout=10) == "done\n"


def test_processes_do_not_inherit_settings_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT_PER_MINUTE", "1")
    with processes.Processes() as started:
        assert "RATE_LIMIT_PER_MINUTE" not in started.run(["env"], timeout=10)


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    program = (
        "import resource as r; from bench.processes import raise_open_files as up\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 512))\n"
        "print(up(256), r.getrlimit(r.RLIMIT_NOFILE), up(4096), r.getrlimit(r.RLIMIT_NOFILE), up(8))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output == "256 (256, 512) 512 (512, 512) 512\n"


def test_time_on_a_core_is_counted_with_that_of_descendants() -> None:
    with processes.Processes() as started:
        process = started.start("busy", ["sh", "-c", "(while :; do :; done) & wait"])
        eventually(lambda: processes.cpu_seconds(process.pid) >= 0.1)


def test_peers_that_are_missing_are_left_out_in_a_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SEARCH_PATH", "")  # nothing is installed
    said: list[str] = []
    with stage.set_up(said.append) as scene:
        found = throughput.start_present(scene, ("haproxy", "uvicorn", "nginx-lua"), said.append)
    assert [server.name for server in found] == ["uvicorn"]
    assert said == [
        "redis-server is not installed: the gateway limits in memory (Debian: apt-get install redis-server)",
        "haproxy is not installed: left out (Debian: apt-get install haproxy)",
        f"nginx-lua is not installed: left out (Debian: apt-get install {peers.PEERS['nginx-lua'].packages})",
    ]


def test_a_peer_that_does_not_start_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    moody = replace(peers.PEERS["uvicorn"], command=lambda scene, port: ["sh", "-c", "echo not today"])
    monkeypatch.setitem(peers.PEERS, "uvicorn", moody)
    said: list[str] = []
    with stage.set_up(said.append) as scene:
        assert throughput.start_present(scene, ("uvicorn",), said.append) == []
    assert said == ["uvicorn did not start: not today: left out"]


@pytest.mark.skipif(
    peers.PEERS["nginx-lua"].missing() or shutil.which("redis-server") is None, reason="needs nginx with Lua, and Redis"
)
def test_nginx_with_lua_counts_in_redis_and_writes_its_line() -> None:
    with stage.set_up(print) as scene:
        port = stage.start(scene, peers.PEERS["nginx-lua"]).port
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("POST", stage.PATH, b"{}", {"X-User-ID": "alice", "X-Correlation-ID": "abc-1"})
            answer = connection.getresponse()
            answer.read()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
            connection.request("POST", stage.PATH, b"{}")  # one worker: the line of what came before is written
            connection.getresponse().read()
        lines = [json.loads(line) for line in (scene.processes.directory / "access.log").read_text().splitlines()]
    assert (answer.status, answer.headers["X-Correlation-ID"]) == (200, "abc-1")
    assert int(answer.headers["X-RateLimit-Remaining-Hour"]) == peers.LIMIT - 1
    assert [line["caller"] for line in lines if line["correlation_id"] == "abc-1"] == ["alice"]


# Its callers ----------------------------------------------------------------------------------------------------------


async def test_a_server_that_stalls_is_charged_for_all_that_was_due_meanwhile() -> None:
    stall, rate = 0.3, 1000
    released = asyncio.Event()

    async def stalls(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        await released.wait()
        writer.write(OK)

    async with service(stalls) as upstream:
        load = OpenLoop("/", rate, 400)
        running = asyncio.create_task(load.run(upstream.port))
        await until(lambda: upstream.requests)
        asyncio.get_running_loop().call_later(stall, released.set)
        figures = await running
    assert (figures["answered"], figures["errors"]) == (400, 0)
    assert upstream.connections == CONNECTIONS  # far fewer could be sent in time than were due
    assert figures["max_ms"] >= stall * 1e3 * 0.95
    late = sum(latency > 0.1 for latency in load.latencies)
    assert late >= rate * (stall - 0.1) * 0.9


async def test_answers_that_are_errors_or_never_come_are_counted_as_errors() -> None:
    async def leaves(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        number = len(upstream.requests)
        if number == 3:
            writer.close()
        else:
            writer.write(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n" if number % 10 == 0 else OK)

    async with service(leaves) as upstream:
        figures = await OpenLoop("/", 1000, 60, settling=30).run(upstream.port)
    assert figures["errors"] == 1 + 9
    assert figures["answered"] == 60 - 6  # the first thirty settle, and their latency is not counted


def stream(*numbers: int) -> Stream:
    one = Stream()
    for position, number in enumerate(numbers):
        sent = position * 20_000_000
        one.read(b"data: %d %d x\n" % (number, sent))
        one.read(b"\n")
        one.seen[-1] = sent + 1_000_000
    return one


async def test_events_that_are_missing_or_out_of_order_are_found() -> None:
    found = judge([stream(0, 1, 2, 3), stream(0, 1, 3), stream(0, 2, 1, 3), stream(0, 1, 1, 2, 3)], 4)
    counts = {"streams": 4, "whole": 1, "lost": 1, "reordered": 2}
    times = {"gap_p50_ms": 20.0, "gap_p99_ms": 20.0, "delay_p50_ms": 1.0, "delay_p99_ms": 1.0}
    assert found == counts | times


# End to end -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick() -> Iterator[dict[str, tuple["subprocess.Popen[str]", Path]]]:
    """Every case at once, each in a process of its own: it is not their figures that count here."""
    with tempfile.TemporaryDirectory() as directory:
        started = {}
        for case in CASES:
            place = Path(directory) / case
            options = ["--quick", "--json", str(place / "results.json")]
            if case == "throughput":
                options += ["--peers", "nginx-lua,nginx,haproxy,caddy", "--picture", str(place / "picture.svg")]
            process = subprocess.Popen(
                [sys.executable, "-m", "bench", case, *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(processes.ROOT)},
                text=True,
            )
            started[case] = process, place
        try:
            yield started
        finally:
            for process, _ in started.values():
                process.terminate()
                process.communicate()


def finished(quick: dict[str, tuple["subprocess.Popen[str]", Path]], case: str) -> tuple[dict[str, Any], str, str]:
    process, place = quick[case]
    output, progress = process.communicate(timeout=120)
    assert process.returncode == 0, progress
    results = json.loads((place / "results.json").read_text())
    assert results["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert f"{case}: " in progress
    return results[case], output, progress


@pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk")
def test_throughput_measures_the_gateway_and_the_peers_that_are_there(quick: Any) -> None:
    figures, output, progress = finished(quick, "throughput")
    targets = figures["targets"]
    names = ["nginx-lua", "nginx", "haproxy", "caddy"]
    left_out = [name for name in names if f"{name} is not installed: left out" in progress]
    assert list(targets) == ["gateway", *(name for name in names if name not in left_out), "direct"]
    for row in targets.values():
        assert row["rps"] > 0
        assert row["p99_ms"] >= row["p50_ms"] > 0
    assert targets["gateway"]["gateway_ratio"] == 1
    assert 0 < targets["gateway"]["busy"] <= 1.1
    assert "throughput: round 1 of 1, gateway" in progress
    assert "| ai-gateway serve" in output
    assert f"limits were in {'Redis' if shutil.which('redis-server') else 'memory'}" in output
    assert "ai-gateway serve" in (quick["throughput"][1] / "picture.svg").read_text()


def test_latency_measures_direct_and_through_the_gateway(quick: Any) -> None:
    figures, output, _ = finished(quick, "latency")
    rate = figures["rates"]["200"]
    assert rate["rounds"][0]["direct"]["answered"] == rate["rounds"][0]["gateway"]["answered"] == 200
    assert rate["p50_ms"]["gateway"] > rate["p50_ms"]["direct"] > 0
    assert "| 200 requests/s, p99.9 |" in output


def test_streams_arrive_whole_and_silent_ones_are_held(quick: Any) -> None:
    figures, output, _ = finished(quick, "streams")
    assert figures["running"]["whole"] == figures["running"]["streams"] == 32
    assert figures["idle"]["held"] == 100
    assert "32 of 32 whole" in output


def test_memory_is_looked_at_fresh_worked_and_beside_connections(quick: Any) -> None:
    figures, output, _ = finished(quick, "memory")
    assert figures["connections"] == 100
    assert figures["mib"]["worked"]["together"] > figures["mib"]["worked"]["worker"] > 10
    assert "after 500 requests" in output
