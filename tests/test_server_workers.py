"""The supervisor of `serve`: real processes, real signals, real sockets."""

import http.client
import json
import os
import resource
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gateway.server.worker import FILES, FILES_AT_ONCE
from gateway.server.workers import bind
from tests.wire import eventually, reserved_port

PROGRAM = """
import asyncio, json, os, sys
from pathlib import Path
from types import SimpleNamespace

from gateway.policies.edge import EdgeLimits
from gateway.server.workers import serve


def load():
    settings = json.loads(Path(sys.argv[1]).read_text())
    return SimpleNamespace(edge=EdgeLimits(**settings["edge"]), **settings["app"])


class App:
    def __init__(self, settings):
        if settings.fault == "factory":
            raise ValueError("the factory failed")
        self.settings = settings
        self.draining = asyncio.Event()
        self.waiting = 0  # requests that it lets wait

    def begin_drain(self):
        self.draining.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            if self.settings.fault == "lifespan":
                await send({"type": "lifespan.startup.failed", "message": "the lifespan failed"})
                return
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/until-drain":
            self.waiting += 1
            await self.draining.wait()
        elif scope["path"] == "/forever":
            self.waiting += 1
            await asyncio.Event().wait()
        names = "GATEWAY_WORKER", "GATEWAY_WORKERS", "PROMETHEUS_MULTIPROC_DIR"
        facts = {name: os.environ.get(name) for name in names}
        facts |= {"pid": os.getpid(), "answer": self.settings.answer, "draining": self.draining.is_set()}
        facts["waiting"] = self.waiting
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(facts).encode()})


if __name__ == "__main__":
    host, port, workers, *certfile = sys.argv[2:]
    sys.exit(
        serve(
            app=App,
            load=load,
            host=host,
            port=int(port),
            workers=int(workers),
            certfile=next(iter(certfile), None),
            on_worker_exit=lambda pid: print("gone", pid, flush=True),
        )
    )
"""


class Served:
    """A supervisor in a process of its own, and how to talk to it."""

    def __init__(self, directory: Path, port: int) -> None:
        self.program = directory / "program.py"
        self.program.write_text(PROGRAM)
        self.settings = directory / "settings.json"
        self.log = directory / "log"
        self.port = port
        self.write()

    def write(self, answer: str = "one", fault: str = "", **edge: Any) -> None:
        """Write the settings that it loads."""
        edge = {"drain_delay": 0, "discard_timeout": 0.05, **edge}
        self.settings.write_text(json.dumps({"app": {"answer": answer, "fault": fault}, "edge": edge}))

    def start(
        self, workers: int = 1, host: str = "127.0.0.1", certfile: Path | None = None, files: tuple[int, int] = (0, 0)
    ) -> None:
        """``files``: the soft and the hard limit of open files, where they are not to be ours."""
        command = [sys.executable, str(self.program), str(self.settings), host, str(self.port), str(workers)]
        if any(files):
            command = ["prlimit", f"--nofile={files[0]}:{files[1]}", *command]
        if certfile is not None:
            command.append(str(certfile))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def get(self, path: str = "/", host: str = "127.0.0.1") -> dict[str, Any]:
        connection = http.client.HTTPConnection(host, self.port, timeout=10)
        try:
            connection.request("GET", path)
            facts: dict[str, Any] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return facts

    def is_up(self) -> dict[str, Any]:
        return eventually(self.get)

    def pids(self, count: int) -> set[int]:
        """The workers, once so many have answered."""
        seen: set[int] = set()
        while len(seen) < count:
            seen.add(eventually(self.get)["pid"])
        return seen

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, seconds: float = 10.0) -> int:
        return self.process.wait(seconds)

    def end_at_once(self) -> int:
        """Two signals; each by itself, for the kernel makes one of two that are pending."""
        self.signal(signal.SIGTERM)
        eventually(self.refuses)
        self.signal(signal.SIGTERM)
        return self.ends()

    def refuses(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) != 0

    def said(self, words: str) -> bool:
        return words in self.log.read_text()


@pytest.fixture
def served(tmp_path: Path, port: int) -> Iterator[Served]:
    served = Served(tmp_path, port)
    yield served
    if hasattr(served, "process") and served.process.poll() is None:
        served.end_at_once()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while it is read
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_up_soon_and_ends_with_status_0_when_told_to(served: Served, number: signal.Signals) -> None:
    served.start()
    assert served.is_up()["GATEWAY_WORKERS"] == "1"
    assert served.get()["PROMETHEUS_MULTIPROC_DIR"] is None
    told = time.monotonic()
    served.signal(number)
    assert served.ends() == 0
    assert time.monotonic() - told < 1
    with pytest.raises(ConnectionRefusedError):
        served.get()


def test_workers_know_their_number_and_share_a_directory_that_goes_with_them(served: Served) -> None:
    served.start(workers=3)
    seen: dict[str, dict[str, Any]] = {}
    while len(seen) < 3:
        facts = served.is_up()
        seen[facts["GATEWAY_WORKER"]] = facts
    assert sorted(seen) == ["0", "1", "2"]
    assert {facts["GATEWAY_WORKERS"] for facts in seen.values()} == {"3"}
    (directory,) = {facts["PROMETHEUS_MULTIPROC_DIR"] for facts in seen.values()}
    assert Path(directory).is_dir()
    served.signal(signal.SIGTERM)
    assert served.ends() == 0
    assert not Path(directory).exists()
    for facts in seen.values():
        assert is_gone(facts["pid"])
        assert served.said(f"gone {facts['pid']}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user wants metrics to be kept."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(place))
    return place


def test_gateways_that_are_given_one_place_for_metrics_have_a_private_directory_each(
    served: Served, place: Path, tmp_path: Path
) -> None:
    (place / "counter_1.db").write_bytes(b"another's")
    served.start(workers=2)
    directory = Path(served.is_up()["PROMETHEUS_MULTIPROC_DIR"])
    with reserved_port() as port:
        (tmp_path / "other").mkdir()
        other = Served(tmp_path / "other", port)
        other.start(workers=1)  # to ask for a place is to ask for metrics that outlive a reload
        others = Path(other.is_up()["PROMETHEUS_MULTIPROC_DIR"])
        assert directory.parent == others.parent == place
        assert directory != others
        assert stat.S_IMODE(others.stat().st_mode) == 0o700
        other.signal(signal.SIGTERM)
        assert other.ends() == 0
    assert not others.exists()
    assert directory.is_dir()
    served.signal(signal.SIGTERM)
    assert served.ends() == 0
    assert [path.name for path in place.iterdir()] == ["counter_1.db"]


def test_what_a_killed_supervisor_left_is_removed_at_the_next_start_but_not_before_its_workers_are_gone(
    served: Served, place: Path, tmp_path: Path
) -> None:
    served.start(workers=2)
    pids = served.pids(2)
    directory = Path(served.get()["PROMETHEUS_MULTIPROC_DIR"])
    stopped = pids.pop()
    os.kill(stopped, signal.SIGSTOP)
    served.process.kill()
    served.ends()
    eventually(lambda: all(map(is_gone, pids)))
    with reserved_port() as port:  # the worker has the other one still
        (tmp_path / "other").mkdir()
        other = Served(tmp_path / "other", port)
        for is_there in (True, False):  # a worker that may still count in it
            other.start(workers=2)
            other.is_up()
            assert directory.is_dir() is is_there
            other.signal(signal.SIGTERM)
            assert other.ends() == 0
            if is_there:
                os.kill(stopped, signal.SIGKILL)
                eventually(lambda: is_gone(stopped))
    assert [*place.iterdir()] == []


def test_a_place_for_metrics_that_is_none_is_one_line_and_status_1(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "nowhere"))
    served.start(workers=2)
    assert served.ends() == 1
    assert served.log.read_text().startswith(f"Can't keep metrics in {tmp_path}/nowhere")
    assert served.log.read_text().endswith(": No such file or directory\n")


def test_answers_in_flight_are_finished_before_it_ends(served: Served) -> None:
    served.start()
    served.is_up()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.get, "/until-drain")
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as idle:  # has a second for a request
            eventually(lambda: served.get()["waiting"])  # by a later connection than the idle one: that is accepted too
            served.signal(signal.SIGTERM)
            assert answer.result(10)["draining"]
            idle.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"connection: close" in idle.recv(1000)
    assert served.ends() == 0


def test_new_requests_pass_during_the_drain_delay(served: Served) -> None:
    served.write(drain_delay=0.5)
    served.start()
    served.is_up()
    served.signal(signal.SIGTERM)
    eventually(lambda: served.get()["draining"])
    assert served.ends() == 0


def test_a_second_signal_ends_it_at_once(served: Served) -> None:
    served.write(drain_delay=60, drain_timeout=60)
    served.start(workers=2)
    served.pids(2)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.get, "/forever")
        eventually(lambda: served.get()["waiting"])
        served.signal(signal.SIGTERM)
        eventually(lambda: served.get()["draining"])
        served.signal(signal.SIGTERM)
        assert served.ends() == 0
        assert answer.result(10)["error"]["type"] == "service_unavailable"


def test_sighup_replaces_the_workers_and_no_request_fails(served: Served) -> None:
    served.start(workers=2)
    old = served.pids(2)
    stop = threading.Event()
    answers: list[set[str]] = [set() for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        clients = [
            pool.submit(keep_asking, served, kept_alive, to, stop)
            for kept_alive, to in zip((True, True, False, False), answers, strict=True)
        ]
        try:
            eventually(lambda: all(given == {"one"} for given in answers))
            served.write(answer="two")
            served.signal(signal.SIGHUP)
            eventually(lambda: all(map(is_gone, old)))
            eventually(lambda: all(given == {"one", "two"} for given in answers))
        finally:
            stop.set()
            for client in clients:
                client.result(10)
    assert not served.pids(2) & old


def keep_asking(served: Served, kept_alive: bool, answers: set[str], stop: threading.Event) -> None:
    """Ask without a pause, by one connection as long as the server lets it, or by one for each request."""
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
        while not stop.is_set():
            connection.request("GET", "/")
            answers.add(json.loads(connection.getresponse().read())["answer"])
            if not kept_alive:
                connection.close()


def test_a_reload_that_fails_changes_nothing_and_says_why(served: Served) -> None:
    served.start()
    pid = served.is_up()["pid"]
    served.settings.write_text("{")
    served.signal(signal.SIGHUP)
    eventually(lambda: served.said("Settings not changed: Expecting property name"))
    for fault in ("factory", "lifespan"):
        served.write(fault=fault)
        served.signal(signal.SIGHUP)
        eventually(lambda fault=fault: served.said(f"the {fault} failed"))  # type: ignore[misc]
    eventually(lambda: served.log.read_text().count("Settings not changed") == 3)
    assert served.get()["pid"] == pid
    served.write(answer="two")
    served.signal(signal.SIGHUP)
    eventually(lambda: served.get()["answer"] == "two")


def test_a_worker_that_dies_is_replaced_and_its_fellow_serves_meanwhile(served: Served) -> None:
    served.start(workers=2)
    victim, fellow = served.pids(2)
    os.kill(victim, signal.SIGKILL)
    died = time.monotonic()
    eventually(lambda: served.pids(2) - {victim, fellow}, 5)
    assert time.monotonic() - died < 2
    assert served.said("killed by SIGKILL")
    served.signal(signal.SIGTERM)
    assert served.ends() == 0


def test_a_lone_worker_that_dies_is_replaced_while_its_predecessor_still_drains(served: Served) -> None:
    served.start()
    first = served.is_up()["pid"]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(served.get, "/forever")
        eventually(lambda: served.get()["waiting"])
        served.signal(signal.SIGHUP)
        second = eventually(lambda: {served.get()["pid"]} - {first}).pop()
        os.kill(second, signal.SIGKILL)
        third = eventually(lambda: {served.get()["pid"]} - {first, second}).pop()
        assert len({first, second, third}) == 3
        assert not is_gone(first)
        assert served.end_at_once() == 0
        assert answer.result(10)["error"]["type"] == "service_unavailable"


def test_a_worker_that_dies_twice_is_started_again_with_the_settings_that_were_loaded(served: Served) -> None:
    served.start()
    pid = served.is_up()["pid"]
    served.write(fault="factory")
    for _ in range(2):
        os.kill(pid, signal.SIGKILL)
        pid = eventually(lambda pid=pid: {served.get()["pid"]} - {pid}).pop()  # type: ignore[misc]
    assert served.get()["answer"] == "one"


HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize(
    ("files", "soft", "room"),
    [((256, 3000), 3000, 3000), ((256, HARD), min(HARD, FILES), min(HARD, FILES_AT_ONCE)), ((3000, 3000), 3000, 3000)],
    ids=["hard limit", "much", "no more"],
)
def test_a_worker_may_open_as_many_files_as_the_system_lets_it_and_has_room_for_them_at_once(
    served: Served, files: tuple[int, int], soft: int, room: int
) -> None:
    served.start(files=files)
    process = Path(f"/proc/{served.is_up()['pid']}")
    limit = next(line for line in (process / "limits").read_text().splitlines() if line.startswith("Max open files"))
    assert limit.split()[3:5] == [str(soft), str(files[1])]
    size = next(line for line in (process / "status").read_text().splitlines() if line.startswith("FDSize:"))
    assert int(size.split()[1]) >= room


@pytest.mark.parametrize(("fault", "reason"), [("factory", "ValueError: the factory failed"), ("lifespan", "failed")])
def test_if_no_worker_can_start_it_says_why_and_ends_with_status_1(served: Served, fault: str, reason: str) -> None:
    served.write(fault=fault)
    served.start(workers=2)
    assert served.ends() == 1
    assert served.said("No worker could start: ")
    assert served.said(reason)


def test_a_port_that_is_taken_is_one_line_and_status_1(served: Served) -> None:
    (taken,) = bind("127.0.0.1", served.port)
    served.start()
    assert served.ends() == 1
    assert served.log.read_text() == f"Can't listen on 127.0.0.1 port {served.port}: Address already in use\n"
    taken.close()


def test_workers_do_not_outlive_a_supervisor_that_is_killed(served: Served) -> None:
    served.start(workers=2)
    pids = served.pids(2)
    directory = served.get()["PROMETHEUS_MULTIPROC_DIR"]
    served.process.kill()
    served.ends()
    eventually(lambda: all(map(is_gone, pids)))
    shutil.rmtree(directory)


def test_it_listens_at_an_ipv6_address(served: Served) -> None:
    served.start(host="::1")
    assert eventually(lambda: served.get(host="::1"))["pid"]
    with pytest.raises(ConnectionRefusedError):
        served.get()


def test_it_speaks_tls(served: Served, tmp_path: Path) -> None:
    certfile = tmp_path / "certificate.pem"
    certfile.write_text(CERTIFICATE)
    served.start(certfile=certfile)
    context = ssl.create_default_context(cafile=str(certfile))

    def ask() -> tuple[int, bytes, bytes]:
        connection = http.client.HTTPSConnection("127.0.0.1", served.port, context=context, timeout=10)
        try:
            connection.request("GET", "/")
            first = connection.getresponse()
            body = first.read()
            connection.request("GET", "/", headers={"Content-Length": "x"})
            return first.status, body, connection.getresponse().read()
        finally:
            connection.close()

    status, body, refusal = eventually(ask)
    assert status == 200
    assert json.loads(body)["answer"] == "one"
    assert json.loads(refusal)["error"]["type"] == "bad_request"
    served.signal(signal.SIGTERM)
    assert served.ends() == 0


# Of 127.0.0.1, signed by itself, good for a hundred years and for nothing but this test
CERTIFICATE = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg7mmEQ0PEbpCqo3fA
g8JLuOcWdLsIB1rKAFKY8em8s32hRANCAAS46S/FYufjGm0q2zt2ugaPz8hz070I
bOmENa9uVVIRgX1uGyz/x/O00NcRI1t2YTlTtD8v7coKjK1Ssd7vG7kd
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUCMcOYNDvGUei2Q4ipcZ017mrOfcwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzAwMDk1OVoYDzIxMjYxMDMw
MDAwOTU5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAS46S/FYufjGm0q2zt2ugaPz8hz070IbOmENa9uVVIRgX1uGyz/x/O0
0NcRI1t2YTlTtD8v7coKjK1Ssd7vG7kdo2QwYjAdBgNVHQ4EFgQUX4CPPwMR5Gsn
d8Fita0myax5J7AwHwYDVR0jBBgwFoAUX4CPPwMR5Gsnd8Fita0myax5J7AwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IEUyuVYOs+z9LI9yuaDGLO2BZI6lOV+J7xvg799b3A0eAiEA5VEQcqH6F4mYTyZk
JnsEN45gVRgmgKopgsVAF1Fk6Kc=
-----END CERTIFICATE-----
"""
