"""Metrics over several workers: what all have counted is shown by each, and nothing is lost when one ends."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry
from prometheus_client.values import MultiProcessValue

from gateway.backends.metric_files import AllWorkers, fold_in
from gateway.backends.prometheus import MOST_CALLERS
from tests.wire import call, connected, read_answer, reserved_port, service, until

ROOT = Path(__file__).parent.parent
CHAT = "/api/v1/chat"
NEVER_FALLS = ("_total", "_count", "_sum", "_bucket")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def assert_nothing_fell(before: Samples, after: Samples) -> None:
    for series, value in before.items():
        if series[0].endswith(NEVER_FALLS):
            assert after.get(series, -1) >= value, series


def requests(seen: Samples) -> float:
    labels = {"method": "POST", "endpoint": CHAT, "status": "200"}
    return seen["http_requests_total", frozenset(labels.items())]


def durations(seen: Samples) -> float:
    return seen["http_request_duration_seconds_count", frozenset({"method": "POST", "endpoint": CHAT}.items())]


class Gateway:
    """`ai-gateway serve` in processes of its own, and how to talk to it."""

    def __init__(self, port: int, directory: Path, workers: int) -> None:
        self.port = port
        self.workers = workers
        self.log = directory / "log"
        self.metrics = directory / "metrics"
        self.metrics.mkdir()

    def start(self, upstream: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            "CHATBOT_SERVICE_URL": upstream,
            "RATE_LIMIT_PER_MINUTE": "off",
            "RATE_LIMIT_PER_HOUR": "off",
            "DRAIN_DELAY": "0",
        }
        command = [sys.executable, "-m", "gateway", "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--workers", str(self.workers)], stdout=log, stderr=log, env=environment, cwd=ROOT
            )

    @property
    def pids(self) -> list[int]:
        return [*map(int, Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())]

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.metrics.glob("*/*"))

    async def has_started(self, times: int) -> None:
        """So many workers listen or did, and no more are there than should be."""
        await until(lambda: self.log.read_text().count(" listens on ") == times, timeout=30)
        await until(lambda: len(self.pids) == self.workers, timeout=30)

    async def ask(self, times: int, connections: int = 1) -> None:
        """Have so many requests answered, over so many connections at once."""

        async def some() -> None:
            async with connected(self.port) as (reader, writer):
                for _ in range(times // connections):
                    writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" % CHAT.encode())
                    assert (await read_answer(reader)).status == 200

        await asyncio.gather(*(some() for _ in range(connections)))

    async def scrape(self) -> Samples:
        answer = await call(self.port, "/metrics")
        assert answer.status == 200, answer.body
        return samples(answer.body.decode())

    async def has_counted(self, count: int) -> None:
        """An answer is counted once it is sent, which may be a moment after it came."""
        async with asyncio.timeout(5):
            while requests(await self.scrape()) < count:
                pass

    async def scrape_each(self) -> list[Samples]:
        """One scrape of each worker, while all others stand still."""
        found = []
        for pid in self.pids:
            with standing_still(other for other in self.pids if other != pid):
                found.append(await self.scrape())
        return found


@contextmanager
def standing_still(pids: Iterable[int]) -> Iterator[None]:
    stopped = [*pids]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def gateway(directory: Path, workers: int) -> AsyncIterator[Gateway]:
    with reserved_port() as port:
        async with service() as upstream:
            rig = Gateway(port, directory, workers)
            rig.start(upstream.url)
            try:
                await rig.has_started(workers)
                yield rig
            finally:
                rig.process.terminate()
                await until(lambda: rig.process.poll() is not None, timeout=20)
                assert rig.process.returncode == 0, rig.log.read_text()
                assert rig.files == []


@asynccontextmanager
async def scraped_all_the_time(rig: Gateway) -> AsyncIterator[None]:
    """No scrape meanwhile fails, and in none is anything lower than in the one before."""
    over = asyncio.Event()

    async def scrape() -> None:
        before: Samples = {}
        while not over.is_set():
            try:
                after = await rig.scrape()
            except (ConnectionError, asyncio.IncompleteReadError):  # the worker that was asked has been killed
                continue
            assert_nothing_fell(before, after)
            before = after
            await asyncio.sleep(0.02)  # leaves the workers time to start in

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scrape())
        yield
        over.set()


# The gateway as it is run


async def test_each_of_four_workers_tells_exactly_what_all_have_answered(tmp_path: Path) -> None:
    async with gateway(tmp_path, workers=4) as rig:
        await rig.ask(1000, connections=50)
        await rig.has_counted(1000)
        for _ in range(2):
            for seen in await rig.scrape_each():
                assert requests(seen) == durations(seen) == 1000


async def test_what_a_killed_worker_counted_stays_and_what_its_successor_counts_is_added(tmp_path: Path) -> None:
    async with gateway(tmp_path, workers=2) as rig:
        await rig.ask(100, connections=20)
        await rig.has_counted(100)
        before = await rig.scrape()
        for count in (1, 2):
            async with scraped_all_the_time(rig):
                os.kill(rig.pids[0], signal.SIGKILL)
                await rig.has_started(2 + count)
            await rig.ask(100, connections=20)
            await rig.has_counted(100 + count * 100)
            for after in await rig.scrape_each():
                assert_nothing_fell(before, after)
                assert requests(after) == durations(after) == 100 + count * 100


async def test_ten_reloads_lose_nothing_and_leave_no_files(tmp_path: Path) -> None:
    async with gateway(tmp_path, workers=2) as rig:
        files = len(rig.files)
        async with scraped_all_the_time(rig):
            for count in range(1, 11):
                await rig.ask(20, connections=4)
                rig.process.send_signal(signal.SIGHUP)
                await rig.has_started(2 + 2 * count)
        for after in await rig.scrape_each():
            assert requests(after) == durations(after) == 200
            for passed in ("gateway_received_bytes_total", "gateway_sent_bytes_total"):
                assert after[passed, frozenset({("service", "chatbot-service")})] == 400
        alive = {int(name.removesuffix(".db").rpartition("_")[2]) for name in rig.files if name.startswith("gauge_")}
        assert alive == set(rig.pids), "what dead workers said of the present is gone"
        assert len(rig.files) == files + 2, "an archive of each type, besides the files of those that live"


# The files


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    return tmp_path


def work(pid: int, requests: int = 1) -> None:
    """Leave such files as a worker does that has counted."""
    kept = MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]
    counted = kept("counter", "a_total", "a_total", ("kind",), ("x",), "a")
    counted.inc(requests)
    kept("counter", "a_total", "a_total", ("kind",), (f"{pid % 3}",), "a").inc(1)
    kept("histogram", "b", "b_sum", (), (), "b").inc(requests / 4)
    for bound, count in (("1.0", requests), ("+Inf", 0)):
        kept("histogram", "b", "b_bucket", ("le",), (bound,), "b").inc(count)
    kept("gauge", "c", "c", (), (), "c", "livesum").set(1)
    kept.close_all_files()


def told(directory: Path) -> Samples:
    registry = CollectorRegistry()
    registry.register(AllWorkers(directory))
    return samples(generate_latest(registry).decode())


def count(directory: Path) -> tuple[float, float]:
    seen = told(directory)
    return seen["a_total", frozenset({("kind", "x")})], seen["b_count", frozenset()]


def test_a_hundred_workers_that_come_and_go_leave_two_files_and_what_they_counted(directory: Path) -> None:
    before: Samples = {}
    for pid in range(100):
        work(pid % 7, requests=3)  # process IDs come again
        fold_in(directory, pid % 7)
        after = told(directory)
        assert_nothing_fell(before, after)
        assert count(directory) == (3 * (pid + 1), 3 * (pid + 1))
        assert ("c", frozenset[tuple[str, str]]()) not in after
        assert sorted(path.name for path in directory.iterdir()) == [
            f"counter_archive-{pid + 1}.db",
            f"histogram_archive-{pid + 1}.db",
        ]
        before = after


def test_the_same_is_told_before_and_after_of_all_but_the_present(directory: Path) -> None:
    work(1, requests=2)
    work(2, requests=3)
    before = told(directory)
    assert before.pop(("c", frozenset())) == 2
    fold_in(directory, 1)
    after = told(directory)
    assert after.pop(("c", frozenset())) == 1
    assert after == before
    fold_in(directory, 2)
    assert told(directory) == before


TOUCHES = {"open", "os.rename", "os.remove", "os.truncate", "mmap.__new__"}  # audit events (PEP 578)


def fold_and_die(directory: Path, pid: int, after: int) -> bool:
    """Fold in a process that is killed before it touches a file once more than ``after`` times; whether it was."""
    child = os.fork()
    if child == 0:
        left = after

        def watch(event: str, _: object) -> None:
            nonlocal left
            if event in TOUCHES:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            fold_in(directory, pid)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_wherever_it_is_killed_all_is_counted_once_and_the_next_one_tidies_up(directory: Path) -> None:
    touches, total = 0, 0
    was_killed = True
    while was_killed:
        work(1, requests=3)
        work(2, requests=4)
        total += 7
        assert count(directory) == (total, total)
        was_killed = fold_and_die(directory, 1, touches)
        assert count(directory) == (total, total), touches
        fold_in(directory, 2 if touches % 2 else 1)
        assert count(directory) == (total, total), touches
        for pid in (1, 2):
            fold_in(directory, pid)
        assert count(directory) == (total, total), touches
        assert [path.name.split("-")[0] for path in sorted(directory.iterdir())] == [
            "counter_archive",
            "histogram_archive",
        ]
        touches += 1
    assert touches > 10


def test_whenever_it_is_looked_at_all_is_counted_once(directory: Path) -> None:
    workers = 60
    for pid in range(workers):
        work(pid)
    child = os.fork()
    if child == 0:
        try:
            for pid in range(workers):
                fold_in(directory, pid)
        finally:
            os._exit(0)
    looks = 0
    while not os.waitpid(child, os.WNOHANG)[0]:
        assert count(directory) == (workers, workers)
        looks += 1
    assert looks
    assert count(directory) == (workers, workers)
    assert len([*directory.iterdir()]) == 2


def test_a_file_that_a_worker_is_just_making_is_passed_over(directory: Path) -> None:
    work(1)
    for empty in ("counter_2.db", "gauge_livesum_2.db"):
        (directory / empty).touch()
    assert count(directory) == (1, 1)
    fold_in(directory, 2)  # which ended over it
    assert count(directory) == (1, 1)
    assert [path.name for path in directory.glob("*_2*")] == []


def test_without_room_it_fails_and_nothing_is_lost(directory: Path) -> None:
    program = """
import resource, signal, sys
from pathlib import Path
from gateway.backends.metric_files import fold_in
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))
try:
    fold_in(Path(sys.argv[1]), 1)
except OSError:
    sys.exit(7)
"""
    work(1, requests=5)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, str(directory)], cwd=ROOT, check=False)
    assert done.returncode == 7
    assert count(directory) == (5, 5)
    work(1, requests=2)  # another of the same process ID
    assert count(directory) == (7, 7)
    fold_in(directory, 1)
    assert count(directory) == (7, 7)
    assert len([path for path in directory.iterdir() if not path.name.endswith(".unfinished")]) == 2


def test_workers_that_follow_one_another_name_no_more_callers_than_one_does(directory: Path) -> None:
    program = """
import os, sys
from gateway.backends.prometheus import process_metrics
metrics = process_metrics()
for number in range(1500):
    metrics.rate_limit_exceeded(f"{sys.argv[1]}:{number}")
print(os.getpid())
"""
    for whose in ("first", "second"):
        command = [sys.executable, "-W", "error", "-c", program, whose]
        fold_in(directory, int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout))
    refused = {labels: value for (name, labels), value in told(directory).items() if name.startswith("rate_limit_ex")}
    assert len(refused) == MOST_CALLERS + 1
    assert refused[frozenset({("identifier", "other")})] == 500 + 1500
    assert sum(refused.values()) == 3000
