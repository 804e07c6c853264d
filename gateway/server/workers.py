"""The supervisor of `ai-gateway serve`: binds, starts workers, replaces those that fail or are out of date, drains.

It does no work of its own and never blocks on a worker, so that whatever happens while some of them leave is handled.
"""

import fcntl
import logging
import os
import selectors
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from starlette.types import ASGIApp

from gateway.policies.edge import EdgeLimits
from gateway.server.worker import BACKLOG, DRAIN, QUIT, RETIRE, run_worker, server_config

logger = logging.getLogger("gateway.server")

ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STABLE_AFTER = 5.0  # seconds a worker must live for its death not to look like a fault that comes again at once
FIRST_BACKOFF, MAX_BACKOFF = 0.5, 30.0  # seconds before a worker is tried again whose predecessor died at once, too
START_TIMEOUT = 60.0  # seconds a worker that replaces another may take to start
KILL_AFTER = 10.0  # seconds a worker has beyond what the limits allow it for leaving
QUIT_AFTER = 3.0  # the same once it was told to leave at once
METRICS = "PROMETHEUS_MULTIPROC_DIR"
DIRECTORIES = "ai-gateway-metrics-"  # what the names of those for metrics begin with
FAILED = 1  # exit status: nothing could be served
fork = get_context("fork")  # starts in milliseconds, and is safe: the supervisor has no threads and no event loop


class Settings(Protocol):
    """What the supervisor must know of the settings."""

    @property
    def edge(self) -> EdgeLimits: ...


def serve(
    *,
    app: Callable[[Any], ASGIApp],
    load: Callable[[], Settings],
    host: str = "0.0.0.0",
    port: int = 8080,
    workers: int = 1,
    certfile: str | None = None,
    keyfile: str | None = None,
    on_worker_exit: Callable[[int], object] = lambda _: None,
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; a second one ends it at once. SIGHUP loads the settings again.

    Each worker has ``GATEWAY_WORKER`` (from 0) and ``GATEWAY_WORKERS`` in its environment, and with more than one,
    ``PROMETHEUS_MULTIPROC_DIR`` names a directory for the metrics of all: a private one, within that which the variable
    named before, if it did (then one worker has it, too), else in memory.

    Args:
        app: makes the application from the settings; called in each worker, never here.
        load: reads the settings; called here, at once and on SIGHUP. A ValueError or SystemExit of the latter call
            leaves things as they are (so does any other error); of the first it is passed on.
        host: an address or name, IPv6 included.
        port: its port.
        workers: processes that serve.
        certfile, keyfile: for TLS.
        on_worker_exit: called here with the process ID of each worker that has ended, before another can have it.

    Returns:
        The exit status: 0 after a drain, 1 if nothing could be served.
    """
    os.environ["GATEWAY_WORKERS"] = str(workers)
    settings = load()
    with ExitStack() as held:
        try:
            held.enter_context(_metrics_directory(workers))
        except OSError as error:
            logger.error("Can't keep metrics in %s: %s", error.filename or METRICS, error.strerror or error)
            return FAILED
        try:
            listeners = bind(host, port)
        except OSError as error:
            logger.error("Can't listen on %s port %d: %s", host, port, error.strerror or error)
            return FAILED
        orders = held.enter_context(_signals())
        supervisor = Supervisor(
            app=app,
            load=load,
            settings=settings,
            listeners=listeners,
            workers=workers,
            certfile=certfile,
            keyfile=keyfile,
            on_worker_exit=on_worker_exit,
            orders=orders,
        )
        try:
            return supervisor.run()
        finally:
            supervisor.close()


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of ``host``.

    Raises:
        OSError: one of them is taken, or not ours.
    """
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # else IPv4 clients would appear under addresses that no CIDR matches
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


@dataclass(eq=False)
class Worker:
    """One process, as the supervisor sees it."""

    index: int
    process: ForkProcess
    news: int  # a pipe's read end: "+" comes once it accepts connections, or else why it does not
    settings: Settings
    started: float = field(default_factory=monotonic)
    ready: bool = False
    leaving: bool = False
    kill_at: float = float("inf")
    complaint: str = ""


class Supervisor:
    """Keeps so many workers running. See ``serve`` for the arguments."""

    def __init__(
        self,
        *,
        app: Callable[[Any], ASGIApp],
        load: Callable[[], Settings],
        settings: Settings,
        listeners: list[socket.socket],
        workers: int,
        certfile: str | None,
        keyfile: str | None,
        on_worker_exit: Callable[[int], object],
        orders: socket.socket,
    ) -> None:
        self.app = app
        self.load = load
        self.settings = settings
        self.listeners = listeners
        self.size = workers
        self.certfile = certfile
        self.keyfile = keyfile
        self.on_worker_exit = on_worker_exit
        self.orders = orders
        self.alive, self.alive_here = os.pipe()  # its write end is here alone: workers read its end when we die

        self.workers: list[Worker] = []  # all that live
        self.current: dict[int, Worker] = {}  # of these, those that serve or are about to, by index
        self.starts_at: dict[int, float] = {}  # when to start those that are missing
        self.deaths = dict.fromkeys(range(workers), 0)  # of each, in a row and at once
        self.out_of_date: list[int] = []  # indices that a reload has still to replace
        self.replacement: Worker | None = None
        self.previous_settings: Settings = settings  # to go back to if the replacement does not start
        self.ever_ready = False
        self.stopping = False
        self.status = 0
        self.selector = selectors.DefaultSelector()
        self.selector.register(orders, selectors.EVENT_READ)

    def run(self) -> int:
        """Supervise until told to stop and all workers have left; returns the exit status."""
        for index in range(self.size):
            self.current[index] = self._start(index)
        while self.workers or not self.stopping:
            for key, _ in self.selector.select(self._patience()):
                if key.fileobj is self.orders:
                    for order in self.orders.recv(64):
                        self._obey(order)
                elif key.data not in self.workers:
                    continue  # buried by an event just before
                elif key.fd == key.data.news:
                    self._hear(key.data)
                else:
                    self._bury(key.data)
            self._keep_time()
        return self.status

    def close(self) -> None:
        """Let go of everything; workers that are left notice, and drain."""
        for worker in self.workers:
            os.close(worker.news)
        self.selector.close()
        os.close(self.alive)
        os.close(self.alive_here)
        for listener in self.listeners:
            listener.close()

    # Orders

    def _obey(self, order: int) -> None:
        if order == signal.SIGHUP:
            self._reload()
        elif order in (signal.SIGTERM, signal.SIGINT):
            if self.stopping:
                logger.warning("Told to stop again: leaving at once")
                for worker in self.workers:
                    self._tell(worker, QUIT, QUIT_AFTER)
            else:
                logger.info("Draining")
                self._stop()

    def _stop(self) -> None:
        self.stopping = True
        self.starts_at.clear()
        self.out_of_date.clear()
        for listener in self.listeners:  # the workers have theirs
            listener.close()
        for worker in self.workers:
            if not worker.leaving:
                self._dismiss(worker, DRAIN)

    def _reload(self) -> None:
        if self.stopping:
            return
        try:
            settings = self.load()
        except (Exception, SystemExit) as error:
            logger.error("Settings not changed: %s", error)
            return
        if self.replacement is None:
            self.previous_settings = self.settings
        self.settings = settings
        self.out_of_date = list(range(self.size))
        self._replace_next()

    def _replace_next(self) -> None:
        while self.out_of_date and self.replacement is None:
            index = self.out_of_date.pop(0)
            if index in self.starts_at:
                continue  # it will start with the new settings anyway
            self.replacement = self._start(index)
            self.replacement.kill_at = monotonic() + START_TIMEOUT

    # Workers

    def _start(self, index: int) -> Worker:
        news, report = os.pipe()
        settings = self.settings
        process = fork.Process(target=self._work, args=(index, settings, report), name=f"worker-{index}")
        with _signals_blocked():  # one that came between the fork and the child's first step would reach us by its pipe
            process.start()
        os.close(report)
        worker = Worker(index, process, news, settings)
        self.workers.append(worker)
        self.selector.register(news, selectors.EVENT_READ, worker)
        self.selector.register(process.sentinel, selectors.EVENT_READ, worker)
        return worker

    def _work(self, index: int, settings: Settings, report: int) -> None:
        """What the new process does."""
        signal.set_wakeup_fd(-1)
        for order in (*ORDERS, RETIRE, QUIT):
            signal.signal(order, signal.SIG_DFL)
        for order in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the supervisor decides
            signal.signal(order, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)
        os.close(self.alive_here)
        self.selector.close()
        self.orders.close()
        os.environ["GATEWAY_WORKER"] = str(index)

        def on_ready() -> None:
            addresses = ", ".join("{} port {}".format(*listener.getsockname()) for listener in self.listeners)
            logger.info("Worker %d listens on %s", index, addresses)
            os.write(report, b"+")

        try:
            config = server_config(self.app(settings), settings.edge, certfile=self.certfile, keyfile=self.keyfile)
            run_worker(
                config,
                settings.edge,
                listeners=self.listeners,
                parent=self.alive,
                on_ready=on_ready,
            )
        except SystemExit as error:
            if error.code:
                os.write(report, b"the application's start-up failed")
            raise
        except Exception as error:
            os.write(report, f"{type(error).__name__}: {error}".encode()[:4000])
            sys.exit(FAILED)

    def _hear(self, worker: Worker) -> None:
        news = os.read(worker.news, 4096)
        if news == b"+":
            worker.ready = True
            self.ever_ready = True
            if worker is self.replacement:
                self._take_over(worker)
        elif news:
            worker.complaint = news.decode(errors="replace")
        else:
            self.selector.unregister(worker.news)

    def _take_over(self, worker: Worker) -> None:
        self.replacement = None
        worker.kill_at = float("inf")
        old = self.current.get(worker.index)
        self.current[worker.index] = worker
        self.deaths[worker.index] = 0
        if old is not None:
            self._dismiss(old, RETIRE)
        if not self.stopping:
            self._replace_next()

    def _dismiss(self, worker: Worker, how: signal.Signals) -> None:
        limits = worker.settings.edge
        worker.leaving = True
        self._tell(worker, how, limits.drain_delay + limits.drain_timeout + KILL_AFTER)

    def _tell(self, worker: Worker, what: signal.Signals, patience: float) -> None:
        """Send a signal, to be followed by a last one if the worker is not gone by then."""
        with suppress(ProcessLookupError):
            os.kill(worker.process.pid or 0, what)
        worker.kill_at = monotonic() + patience

    def _bury(self, worker: Worker) -> None:
        """A worker has ended; start another if it should not have."""
        self._hear_the_last_of(worker)
        process = worker.process
        process.join()
        try:
            self.on_worker_exit(process.pid or 0)
        except Exception:
            logger.exception("What was to be done about the end of a worker failed")
        why = worker.complaint or _cause_of_death(process.exitcode or 0)
        process.close()
        self.workers.remove(worker)

        if worker is self.replacement:
            self.replacement = None
            if not self.stopping:
                logger.error("Settings not changed: a worker with the new ones did not start: %s", why)
                self.settings = self.previous_settings
                self.out_of_date.clear()
                if worker.index not in self.current:
                    self._start_later(worker.index)
        elif self.current.get(worker.index) is worker:
            del self.current[worker.index]
            if not self.stopping:
                self._mourn(worker, why)

    def _hear_the_last_of(self, worker: Worker) -> None:
        self.selector.unregister(worker.process.sentinel)
        if worker.news in self.selector.get_map():
            self._hear(worker)
        if worker.news in self.selector.get_map():
            self.selector.unregister(worker.news)
        os.close(worker.news)

    def _mourn(self, worker: Worker, why: str) -> None:
        if not self.ever_ready and not self.workers:
            logger.error("No worker could start: %s", why)
            self.status = FAILED
            self._stop()
            return
        logger.error("Worker %d %s: %s", worker.index, "ended" if worker.ready else "did not start", why)
        if monotonic() - worker.started >= STABLE_AFTER:
            self.deaths[worker.index] = 0
        if self.replacement is None or self.replacement.index != worker.index:
            self._start_later(worker.index)

    def _start_later(self, index: int) -> None:
        """Start a worker anew: the first time at once, then ever later while it dies at once."""
        deaths = self.deaths[index]
        self.deaths[index] += 1
        backoff = min(FIRST_BACKOFF * 2 ** (deaths - 1), MAX_BACKOFF) if deaths else 0.0
        self.starts_at[index] = monotonic() + backoff

    # Time

    def _patience(self) -> float | None:
        """Seconds until there is something to do by the clock."""
        due = min((*self.starts_at.values(), *(worker.kill_at for worker in self.workers)), default=float("inf"))
        return None if due == float("inf") else max(0.0, due - monotonic())

    def _keep_time(self) -> None:
        now = monotonic()
        for index, due in list(self.starts_at.items()):
            if due <= now:
                del self.starts_at[index]
                self.current[index] = self._start(index)
        for worker in self.workers:
            if worker.kill_at <= now:
                logger.warning("Worker %d did not %s in time", worker.index, "leave" if worker.leaving else "start")
                worker.kill_at = float("inf")
                worker.process.kill()


def _cause_of_death(exitcode: int) -> str:
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit status {exitcode}"


@contextmanager
def _signals() -> Iterator[socket.socket]:
    """Signals as bytes that can be read from a socket, together with what else is waited for."""
    orders, written = socket.socketpair()
    orders.setblocking(False)
    written.setblocking(False)
    before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)
    handlers = {order: signal.signal(order, lambda *_: None) for order in ORDERS}
    try:
        yield orders
    finally:
        for order, handler in handlers.items():
            signal.signal(order, handler)
        signal.set_wakeup_fd(before)
        orders.close()
        written.close()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ORDERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _metrics_directory(workers: int) -> Iterator[None]:
    """Where the workers' metrics meet: prometheus_client looks for the variable when it is imported, in them.

    It stays locked for as long as we live, or a worker that has outlived us, so that no other supervisor takes it for
    one that was left behind.

    Raises:
        OSError: it can't be made.
    """
    given = os.environ.get(METRICS)
    if workers == 1 and not given:
        os.environ.pop(METRICS, None)  # an empty one, which prometheus_client would believe
        yield
        return
    in_memory = "/dev/shm"  # noqa: S108  mkdtemp makes a directory of our own there
    parent = Path(given or (in_memory if os.access(in_memory, os.W_OK) else tempfile.gettempdir()))
    _remove_left_behind(parent)
    unlocked = Path(tempfile.mkdtemp(prefix=f".{DIRECTORIES}", dir=parent))
    directory = unlocked.with_name(unlocked.name[1:])
    lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # not all file systems can; there nobody removes what is left behind
        fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(directory)
    os.environ[METRICS] = str(directory)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        del os.environ[METRICS]
        if given:
            os.environ[METRICS] = given


def _remove_left_behind(parent: Path) -> None:
    """Remove directories of supervisors that were killed: those that are ours, and that nobody has locked."""
    for found in parent.glob(f"{DIRECTORIES}*"):
        try:
            lock = os.open(found, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found, ignore_errors=True)
        except OSError:  # it is in use
            pass
        finally:
            os.close(lock)
