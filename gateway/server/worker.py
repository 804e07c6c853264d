"""One worker: uvicorn's server around the gateway's protocol, and how it leaves (RESILIENCE.md, 6)."""

import asyncio
import fcntl
import os
import resource
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from socket import socket
from typing import Any, cast

from starlette.types import ASGIApp
from uvicorn import Config, Server

from gateway.policies.edge import EdgeLimits
from gateway.server.collector import LOOK, QuietCollector
from gateway.server.protocol import Edge, GatewayProtocol

DRAIN = signal.SIGTERM  # say `draining`, serve on for a while, then leave
RETIRE = signal.SIGUSR2  # leave now, others accept what comes
QUIT = signal.SIGQUIT  # leave at once, whatever is in flight
LAST_WORDS = 1.0  # seconds for requests that were told that they are cut, and again for those cancelled
SHUTDOWN_TIMEOUT = 5.0  # seconds for the application's own shutdown
BACKLOG = 4096  # connections that wait to be accepted; the kernel's net.core.somaxconn may be lower
FILES = 1_048_576  # open files that a worker asks the system for, where its hard limit allows so many
FILES_AT_ONCE = 65_536  # of these, how many the kernel makes room for at the start: 8 bytes each
POLL = 0.02  # seconds between looks whether all is done, while leaving


def server_config(
    app: ASGIApp, limits: EdgeLimits, *, certfile: str | None = None, keyfile: str | None = None
) -> Config:
    """How uvicorn is to serve ``app``: with our protocol, and nothing added to what the application says."""
    return Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(GatewayProtocol, limits=limits)),
        ws="websockets-sansio",  # what ours is made of; uvicorn's other rests on what websockets has deprecated
        loop="uvloop",
        interface="asgi3",
        lifespan="on",
        log_config=None,
        log_level="warning",  # below, uvicorn logs the query strings of WebSockets
        access_log=False,
        proxy_headers=False,  # rewriting the peer's address would lose who may be believed
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        ssl_certfile=certfile,
        ssl_keyfile=keyfile,
    )


class GatewayServer(Server):
    """A server that leaves in good order.

    An application may have a ``begin_drain()``, called before anything closes, and a ``cut()``, called when the time
    for answers in flight is over, so that streams can end in an error event.

    Args:
        config: see ``server_config``.
        limits: how long leaving may take; the same as the protocol's.
        on_ready: called once connections are accepted.
    """

    def __init__(self, config: Config, limits: EdgeLimits, *, on_ready: Callable[[], object] = lambda: None) -> None:
        super().__init__(config)
        self.limits = limits
        self.on_ready = on_ready
        self._leaving = asyncio.Event()
        self._at_once = asyncio.Event()
        self._delay = 0.0
        self._collector = QuietCollector(lambda: not self.server_state.tasks)
        self._looking: asyncio.TimerHandle | None = None

    def drain(self) -> None:
        """Say that we leave, serve on for ``drain_delay``, then finish what is in flight."""
        if not self._leaving.is_set():
            self._delay = self.limits.drain_delay
        self._leaving.set()

    def retire(self) -> None:
        """Stop accepting now, for there are others who do, and finish what is in flight."""
        self._leaving.set()

    def quit(self) -> None:
        """Leave without finishing anything."""
        self._leaving.set()
        self._at_once.set()

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """None: who runs the server decides which signals it obeys."""
        return nullcontext()

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._collector.take_over()
            self._keep_looking()
            self.on_ready()

    def _keep_looking(self) -> None:
        self._collector.look()
        self._looking = asyncio.get_running_loop().call_later(LOOK, self._keep_looking)

    async def main_loop(self) -> None:
        await self._leaving.wait()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        try:
            await self._leave(sockets)
        finally:
            if self._looking:
                self._looking.cancel()
                self._collector.hand_back()

    async def _leave(self, sockets: list[socket] | None) -> None:
        app = cast("Any", self.config.loaded_app)
        edge = Edge.of(self.config, self.server_state, self.limits, asyncio.get_running_loop())
        connections, tasks = self.server_state.connections, self.server_state.tasks
        if self._delay:
            _tell(app, "begin_drain")
            edge.draining = True
            await self._until(lambda: False, self._delay)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        if not edge.draining:  # not before the listener closed: a probe shall find the worker that takes over
            _tell(app, "begin_drain")
        edge.leave()
        await self._until(lambda: not connections and not tasks, self.limits.drain_timeout)
        if connections or tasks:
            await self._cut(app)
        if not self.lifespan.should_exit:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.lifespan.shutdown(), SHUTDOWN_TIMEOUT)

    async def _cut(self, app: Any) -> None:
        """End what did not end in time: first by asking, then WebSockets by a close frame, then by force."""
        connections, tasks = self.server_state.connections, self.server_state.tasks
        if _tell(app, "cut"):
            await self._until(lambda: not tasks, LAST_WORDS)
        for connection in list(connections):
            if not isinstance(connection, GatewayProtocol):
                connection.shutdown()  # with code 1012, service restart
        await asyncio.sleep(0)  # a request that came just now begins: cancelled before, it would answer nothing
        for task in list(tasks):
            task.cancel()
        await _until(lambda: all(task.done() for task in tasks), LAST_WORDS)
        await _until(lambda: not connections, POLL * 5)  # for what was written last to leave
        for connection in list(connections):
            connection.transport.abort()

    async def _until(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until ``done()``, so many seconds at most, and not at all once told to leave at once."""
        await _until(lambda: done() or self._at_once.is_set(), seconds)


async def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not done() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110  sets of uvicorn's, no events
        await asyncio.sleep(POLL)


def _tell(app: Any, what: str) -> bool:
    """Call a method of the application's that it need not have."""
    method = getattr(app, what, None)
    if method is not None:
        method()
    return method is not None


def run_worker(
    config: Config,
    limits: EdgeLimits,
    *,
    listeners: Sequence[socket],
    parent: int,
    on_ready: Callable[[], object],
) -> None:
    """Serve until told to leave by a signal (``DRAIN``, ``RETIRE``, ``QUIT``) or by the parent's death.

    Args:
        config, limits: see ``GatewayServer``.
        listeners: listening sockets, shared with other workers.
        parent: a pipe's read end whose write end the supervisor holds.
        on_ready: called once connections are accepted.

    Raises:
        SystemExit: the application failed to start; it has logged why.
    """

    async def main() -> None:
        server = GatewayServer(config, limits, on_ready=on_ready)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(DRAIN, server.drain)
        loop.add_signal_handler(RETIRE, server.retire)
        loop.add_signal_handler(QUIT, server.quit)

        def orphaned() -> None:
            loop.remove_reader(parent)
            os.close(parent)
            server.drain()

        loop.add_reader(parent, orphaned)
        await server.serve(sockets=list(listeners))

    open_many_files()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(main())


def open_many_files() -> None:
    """Let this process open as many files as its hard limit allows, and have the kernel's table of them large at once.

    A soft limit of 1,024, the usual one, is for programs that use ``select``. The table doubles when it is full, and a
    process of several threads stands still meanwhile, for up to 25 milliseconds: with each doubling of its connections
    a worker held up all its streams.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    reader, writer = os.pipe()
    with suppress(OSError):  # not all kernels have a table, nor must there be a free place so high
        os.close(fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, min(wanted, FILES_AT_ONCE) - 1))
    os.close(reader)
    os.close(writer)
