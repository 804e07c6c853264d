"""A real Redis server for tests: on a free port and a unix socket, stopped, continued, killed and started again."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from tests.wire import reserved_port


class RedisServer:
    """One redis-server process that keeps nothing on disk; a context manager.

    Attributes:
        port: on 127.0.0.1.
        url: for clients, over TCP.
        unix_url: the same over a unix socket.
    """

    def __init__(self, port: int, *options: str) -> None:
        self._options = options
        self._directory = tempfile.TemporaryDirectory(prefix="redis-")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.unix_url = f"unix://{self._socket_path}"

    @property
    def _socket_path(self) -> Path:
        return Path(self._directory.name) / "redis.sock"

    def __enter__(self) -> "RedisServer":
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._directory.cleanup()

    def start(self) -> None:
        """Start it, empty, and return when it answers."""
        self._process = subprocess.Popen(
            [
                *("redis-server", "--bind", "127.0.0.1", "--port", str(self.port)),
                *("--unixsocket", str(self._socket_path), "--dir", self._directory.name),
                *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + 10
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"redis-server did not start (status {self._process.poll()})")
            time.sleep(0.005)

    def stop(self) -> None:
        """Freeze it: connections stay open, nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo ``stop``."""
        self._send(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once; ``start`` brings it back on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> bytes:
        """Send one command by a connection of its own and return the first 64 KiB of the answer, as sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
            encoded = [word.encode() for word in words]
            link.sendall(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in encoded))
            return link.recv(65536)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def _answers(self) -> bool:
        with suppress(OSError):
            return self.command("PING") == b"+PONG\r\n"
        return False


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """A running server, with further options of redis-server's."""
    with reserved_port() as port, RedisServer(port, *options) as server:
        yield server
