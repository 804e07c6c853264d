"""Where servers are measured: a stand-in service, Redis, and callers around the one under test."""

import hashlib
import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.case import Say
from bench.processes import ROOT, SEARCH_PATH, BenchError, Processes, python
from bench.service import BODY

PATH = "/api/v1/recommendations/top"
PATIENCE = 30.0  # seconds beyond what callers were told to do
SCRIPT = ROOT / "gateway" / "backends" / "token_bucket.lua"

Figures = dict[str, float]  # as callers tell them


@dataclass(frozen=True)
class Stage:
    """What stands around a server under test.

    Attributes:
        service: the port of the stand-in service.
        redis: the port of a Redis of our own, 0 where there is none.
        script: the name by which Redis knows the gateway's rate limit script.
    """

    processes: Processes
    service: int
    redis: int
    script: str

    def decided_in_redis(self) -> int:
        """How often Redis has run the gateway's script so far."""
        found = re.search(rb"cmdstat_evalsha:calls=(\d+)", _redis(self.redis, b"INFO", b"commandstats"))
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Server:
    """A server that can stand in front of the service.

    Attributes:
        about: what it does for a request.
        command: writes its configuration and says how to start it on a port.
        needs: programs, or files, without which it can't run.
        packages: Debian's names for those.
        environment: of its process.
    """

    name: str
    about: str
    command: Callable[[Stage, int], list[str]]
    needs: tuple[str, ...] = ()
    packages: str = ""
    environment: Callable[[Stage], Mapping[str, str]] = field(default=lambda stage: {})

    def missing(self) -> bool:
        return any(shutil.which(need, path=SEARCH_PATH) is None and not Path(need).is_file() for need in self.needs)


@dataclass(frozen=True)
class Running:
    name: str
    port: int
    pid: int


@contextmanager
def set_up(say: Say) -> Iterator[Stage]:
    """The service, and Redis where it is installed; all that is started on the stage ends with it."""
    with Processes() as processes:
        service, redis, script = processes.reserve_port(), 0, ""
        process = processes.start("service", python("bench.service", str(service)))
        processes.await_answer("service", process, service, PATH)
        if shutil.which("redis-server", path=SEARCH_PATH):
            redis = processes.reserve_port()
            options = ["--bind", "127.0.0.1", "--port", str(redis), "--save", "", "--appendonly", "no"]
            processes.start("redis", ["redis-server", *options])
            script = _load_script(redis)
        else:
            say("redis-server is not installed: the gateway limits in memory (Debian: apt-get install redis-server)")
        yield Stage(processes, service, redis, script)


def start(stage: Stage, server: Server) -> Running:
    """Start a server on a core of its own.

    Raises:
        BenchError: it did not start, or does not pass on what the service answers.
    """
    port = stage.processes.reserve_port()
    environment = server.environment(stage)
    process = stage.processes.start(server.name, server.command(stage, port), tested=True, environment=environment)
    if stage.processes.await_answer(server.name, process, port, PATH) != BODY:
        raise BenchError(f"{server.name} does not answer what the service does")
    return Running(server.name, port, process.pid)


def call(stage: Stage, what: str, port: int, seconds: float, **told: object) -> Figures:
    """Let callers do what they are told (see ``bench.client``), which takes so many seconds; return what they say.

    Raises:
        BenchError: they could not.
    """
    command = python("bench.client", what, str(port), json.dumps(told))
    figures: Figures = json.loads(stage.processes.run(command, timeout=seconds + PATIENCE))
    return figures


@contextmanager
def holding(stage: Stage, port: int, path: str, count: int) -> Iterator[int]:
    """Keep so many connections open on which something was asked; gives how many have had an answer, or begun to.

    Raises:
        BenchError: they could not be opened.
    """
    command = python("bench.client", "hold", str(port), json.dumps({"path": path, "count": count}))
    with stage.processes.running(command) as callers:
        assert callers.stdout is not None
        line = callers.stdout.readline()
        if not line:
            complaint = callers.communicate()[1].strip().splitlines()
            raise BenchError(f"{count} connections could not be opened: {complaint[-1] if complaint else '?'}")
        yield json.loads(line)["held"]
        callers.communicate(timeout=PATIENCE)


def _load_script(redis: int) -> str:
    """Teach Redis the gateway's script, once it listens; return the name it has there."""
    text = SCRIPT.read_bytes()
    for _ in range(100):
        try:
            _redis(redis, b"SCRIPT", b"LOAD", text)
            return hashlib.sha1(text).hexdigest()
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise BenchError("redis-server did not start")


def _redis(port: int, *words: bytes) -> bytes:
    """Send Redis one command; return its answer, which is short, as it came."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
        link.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        return link.recv(65536)
