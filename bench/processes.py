"""Processes of a benchmark: each kept to its cores, watched from outside, and ended whatever happens."""

import http.client
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent
OPEN_FILES = 32_768  # 5,000 streams through a gateway are 10,000 sockets there
START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 10.0  # seconds from SIGTERM to SIGKILL
SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin"  # Debian keeps servers where users do not look
KEPT = ("HOME", "LANG", "LC_ALL", "TMPDIR")  # of our environment; no setting of the gateway's may slip in


class BenchError(Exception):
    """Something can't be measured: a program is missing or did not do its part; the message says which and why."""


class Processes:
    """Starts processes and ends them all when the ``with`` block is left.

    The server under test has the first of our cores for itself; everything else shares the others. With one core only,
    all share it.

    Attributes:
        directory: a scratch directory, gone at the end; each server's output is in ``NAME.log`` there.
    """

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="bench-")
        self.directory = Path(self._scratch.name)
        self.directory.chmod(0o755)  # nginx started by root looks into it as somebody else
        first, *others = sorted(os.sched_getaffinity(0))
        self._tested = ["taskset", "--cpu-list", str(first)]
        self._others = ["taskset", "--cpu-list", ",".join(map(str, others or [first]))]
        self._started: list[subprocess.Popen[bytes]] = []
        self._holders: list[socket.socket] = []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            _signal(process, signal.SIGTERM)
        give_up = time.monotonic() + STOP_TIMEOUT
        for process in self._started:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, give_up - time.monotonic()))
            _signal(process, signal.SIGKILL)  # what is left of its group, too
            process.wait()
        for holder in self._holders:
            holder.close()
        self._scratch.cleanup()

    def reserve_port(self) -> int:
        """A port of loopback for a server that is to be started: nobody else is given it before the end.

        The server must set SO_REUSEADDR, as they do.
        """
        holder = socket.socket()
        self._holders.append(holder)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))  # without listening: connections are refused until the server does
        port: int = holder.getsockname()[1]
        return port

    def start(
        self, name: str, command: Sequence[str], *, tested: bool = False, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a server, on the core of its own if it is the one under test."""
        with (self.directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*(self._tested if tested else self._others), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(environment),
                cwd=self.directory,  # where there is no .env of anybody's
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def await_answer(self, name: str, process: "subprocess.Popen[bytes]", port: int, path: str) -> bytes:
        """Return the body of the first 200 that a server gives to a POST.

        Raises:
            BenchError: it ended, or gave none within 30 seconds.
        """
        give_up = time.monotonic() + START_TIMEOUT
        while time.monotonic() < give_up and process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                return _post(port, path)
            time.sleep(0.05)  # there is nothing to wait on in a server that is not ours
        lines = (self.directory / f"{name}.log").read_text(errors="replace").split("\n")
        raise BenchError(f"{name} did not start: {next(filter(None, reversed(lines)), 'it said nothing')}")

    def empty_logs(self) -> None:
        """Throw away what servers wrote so far; a line a request is hundreds of megabytes in a minute."""
        for log in self.directory.glob("*.log"):
            os.truncate(log, 0)

    def run(self, command: Sequence[str], *, timeout: float) -> str:
        """Run a program to its end beside the server under test; return its output.

        Raises:
            BenchError: its exit status is not 0, or it took longer than ``timeout`` seconds.
        """
        with self.running(command) as process:
            try:
                output, complaint = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                raise BenchError(f"{_name(command)} took longer than {timeout:.0f} s") from None
        if process.returncode:
            raise BenchError(
                f"{_name(command)} failed: {(complaint.strip() or output.strip() or '?').splitlines()[-1]}"
            )
        return output

    @contextmanager
    def running(self, command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
        """A program beside the server under test, with pipes to talk to it; killed where it does not end by itself."""
        process = subprocess.Popen(
            [*self._others, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
            cwd=self.directory,
            start_new_session=True,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                _signal(process, signal.SIGKILL)


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this checkout."""
    return [sys.executable, "-m", module, *arguments]


def raise_open_files(wanted: int = OPEN_FILES) -> int:
    """Let this process and those it starts open so many files, or as many as the hard limit allows; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
    found = [pid]
    for one in found:  # which grows as we go
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def cpu_seconds(pid: int) -> float:
    """What a process and its descendants that live have used of a core so far; a hundredth of a second is its grain."""
    ticks = 0
    for one in (pid, *descendants(pid)):
        with suppress(OSError):
            ticks += sum(map(int, _stat(one)[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """What a process has in memory, pages that it shares with others included (RSS)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def proportional_bytes(pids: Sequence[int]) -> int:
    """What processes have in memory, shared pages counted once: what a container of them pays (PSS)."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on; its name before them may hold anything (proc_pid_stat(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PATH": SEARCH_PATH, "PYTHONPATH": str(ROOT), **(more or {})}


def _post(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("POST", path, b"{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise http.client.HTTPException(f"status {answer.status}")
        return body
    finally:
        connection.close()


def _signal(process: "subprocess.Popen[bytes] | subprocess.Popen[str]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _name(command: Sequence[str]) -> str:
    return " ".join(command[2:4] if command[0] == sys.executable else command[:1])
