"""Log lines on their way out: a bounded buffer that never makes a request wait, and everyone's records in one form."""

import atexit
import errno
import logging
import os
import select
import stat
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any
from weakref import WeakSet

import orjson

from gateway.policies.timestamps import timestamp

MOST_BYTES = 4096  # PIPE_BUF: what a pipe takes whole or not at all, however many write to it (POSIX, write())
FILE_BYTES = 64 * 1024  # what a file takes at once: the kernel lets no two writes to one mix, and each costs a handover
HURRY_BYTES = 128 * 1024  # waiting lines that are not kept for the timer
RETRY_SECONDS = 0.2  # between two tries on a full disk
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def _ignore(_: int) -> None: ...


class LogSink:
    """Take whole lines at once, write them out behind the caller's back; what does not fit is dropped and counted.

    A thread, started with a process's first line, gathers lines for a moment and writes whole ones: at most 4,096 bytes
    at a time, so that several processes may share a pipe, and 64 KiB into a file. A stalled reader or a full disk
    stalls that thread alone.

    Args:
        write_to: the file descriptor, which stays the caller's to close.
        buffer_bytes: how much may wait.
        interval: seconds for which lines are gathered.
        on_drop: called with the number of lines dropped, from any thread; for a counter.
    """

    def __init__(
        self,
        write_to: int = 1,
        *,
        buffer_bytes: int = 1024 * 1024,
        interval: float = 0.05,
        on_drop: Callable[[int], None] = _ignore,
    ) -> None:
        self.write_to = write_to
        self.buffer_bytes = buffer_bytes
        self.interval = interval
        self.on_drop = on_drop
        self.dropped = 0
        self._hurry_bytes = min(HURRY_BYTES, buffer_bytes // 4)
        self._begin()
        _sinks.add(self)

    def _begin(self) -> None:
        self._lines: deque[bytes] = deque()
        # Bytes waiting are what was accepted and not yet taken: each count has one kind of writer, so no lock. Should
        # two producers ever lose an addition between them, the thread sets the counts right when it finds no line.
        self._accepted = 0
        self._taken = 0
        self._awake = False
        self._wakeup = threading.Event()
        self._hurry = threading.Event()
        self._abandoned = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def is_terminal(self) -> bool:
        """A person may be reading: colours help, where they would clutter a file."""
        try:
            return os.isatty(self.write_to)
        except OSError:
            return False

    def write(self, line: bytes) -> None:
        """Accept one line, its newline included, without ever waiting. One of over 4,096 bytes is shortened."""
        accepted = self._accepted + len(line)
        if len(line) > MOST_BYTES or accepted - self._taken > self._hurry_bytes:
            self._write_rarely(line)
            return
        self._accepted = accepted
        self._lines.append(line)
        if not self._awake:
            self._wake()

    def _write_rarely(self, line: bytes) -> None:
        """A line that is too long, or one of many that wait."""
        if len(line) > MOST_BYTES:
            line = shortened(line)
        waiting = self._accepted - self._taken + len(line)
        if waiting > self.buffer_bytes:
            self._drop(1)
            return
        self._accepted += len(line)
        self._lines.append(line)
        if not self._awake:
            self._wake()
        if waiting > self._hurry_bytes and not self._hurry.is_set():
            self._hurry.set()

    def close(self, timeout: float = 1.0) -> None:
        """Write what waits, for at most so many seconds; what is left then is dropped.

        A line written later starts afresh, unless this one had to give up.
        """
        thread = self._thread
        if thread is None or self._abandoned.is_set():
            return
        self._closing = True
        self._hurry.set()
        self._wakeup.set()
        thread.join(timeout)
        atexit.unregister(self.close)
        if thread.is_alive():
            self._abandoned.set()
            self._awake = False  # so that what is still written is dropped at once, and counted
            self._drop(self._forget())
            return
        left = self._lines  # what another thread wrote meanwhile
        self._begin()
        while left:
            self.write(left.popleft())

    def _wake(self) -> None:
        if self._abandoned.is_set():
            self._drop(self._forget())
            return
        self._awake = True
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="log-sink", daemon=True)
                    try:
                        thread.start()
                    except RuntimeError:  # the interpreter is shutting down
                        self._drop(self._forget())
                        return
                    self._thread = thread
                    atexit.register(self.close)
        self._wakeup.set()

    def _run(self) -> None:
        wakeup, hurry, abandoned = self._wakeup, self._hurry, self._abandoned
        most = FILE_BYTES if _is_file(self.write_to) else MOST_BYTES
        while not abandoned.is_set():
            wakeup.wait()
            wakeup.clear()
            closing = self._closing
            if not closing:
                hurry.wait(self.interval)
            self._awake = False  # from here on a new line wakes us again, so that none is overlooked
            hurry.clear()
            while not abandoned.is_set() and (chunk := self._next_chunk(most)):
                self._put(chunk)
            if closing and not self._lines:
                return

    def _next_chunk(self, most: int) -> bytes:
        lines = self._lines
        chunk: list[bytes] = []
        size = 0
        try:
            while (longer := size + len(lines[0])) <= most:  # only this thread takes lines: the first stays the first
                size = longer
                chunk.append(lines.popleft())
        except IndexError:  # no line is left
            self._taken = self._accepted - size
        self._taken += size
        return b"".join(chunk)

    def _put(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest and not self._abandoned.is_set():
            try:
                rest = rest[os.write(self.write_to, rest) :]
            except BlockingIOError:  # another process made the pipe we share non-blocking
                self._wait_until_writable()
            except OSError as error:
                if error.errno not in FULL:  # no reader any more, or no such file
                    break
                self._abandoned.wait(RETRY_SECONDS)
        if rest:
            self._drop(bytes(rest).count(b"\n"))

    def _wait_until_writable(self) -> None:
        poll = select.poll()
        poll.register(self.write_to, select.POLLOUT)
        while not self._abandoned.is_set():
            if poll.poll(100):  # milliseconds between two looks
                return

    def _drop(self, lines: int) -> None:
        if lines:
            self.dropped += lines
            self.on_drop(lines)

    def _forget(self) -> int:
        lines = 0
        while self._lines:
            try:
                self._lines.popleft()
            except IndexError:  # the thread took it
                break
            lines += 1
        self._taken = self._accepted
        return lines


_sinks: WeakSet[LogSink] = WeakSet()


def _begin_in_child() -> None:
    for sink in tuple(_sinks):
        sink._begin()  # a child has neither the thread nor, lest they be written twice, the lines of its parent
        sink.dropped = 0


os.register_at_fork(after_in_child=_begin_in_child)


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


@cache
def standard_output() -> LogSink:
    """The sink of a layer that was given none: the process's standard output."""
    return LogSink()


def shortened(line: bytes) -> bytes:
    """A line cut to at most 4,096 bytes in the middle of what is longest; JSON stays JSON."""
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError:
        fields = None
    if not isinstance(fields, dict):
        text = line.decode("utf-8", "replace").rstrip("\n")
        while len(line) > MOST_BYTES:
            text = _without_middle(text, len(line) - MOST_BYTES)
            line = f"{text}\n".encode()
        return line
    while len(line) > MOST_BYTES:
        name = max(fields, key=lambda name: len(orjson.dumps(fields[name])))
        value = fields[name]
        if not isinstance(value, str):
            value = orjson.dumps(value).decode()
        if len(value) < 64:  # very many small fields: none of ours
            fields = {"message": "A log record of too many fields was dropped"}
            return orjson.dumps(fields, None, orjson.OPT_APPEND_NEWLINE)
        fields[name] = _without_middle(value, len(line) - MOST_BYTES)
        line = orjson.dumps(fields, None, orjson.OPT_APPEND_NEWLINE)
    return line


def _without_middle(text: str, excess: int) -> str:
    """Cut so many characters out, or half of the text if that is less; an exception's last lines say the most."""
    kept = max(len(text) - excess - 40, len(text) // 2)
    head = kept // 3
    return f"{text[:head]} ...{len(text) - kept} characters... {text[head - kept :]}"


# --- records of standard logging and of loguru ---------------------------------------------------------------------

COLOURS = {"TRACE": 36, "DEBUG": 36, "INFO": 32, "SUCCESS": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 91}
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
NUMBERS = {"TRACE": 5, "SUCCESS": 25}  # what loguru knows beside the levels of standard logging
INDISCREET = {  # the least level at which each writes no query string, head or body of a request
    "httpx": logging.WARNING,
    "httpcore": logging.WARNING,
    "uvicorn.access": logging.WARNING,
    "uvicorn.asgi": logging.WARNING,
    "uvicorn.error": logging.INFO,  # but for what `_is_discreet` leaves out
    "websockets": logging.INFO,
}
Error = tuple[type[BaseException], BaseException, TracebackType | None]


def event_line(
    second: float,
    level: str,
    message: str,
    *,
    logger: str | None = None,
    fields: Mapping[str, Any] | None = None,
    error: Error | None = None,
) -> bytes:
    """One event as a line of JSON, in the fields that a request's line has too."""
    line: dict[str, Any] = {"timestamp": timestamp(int(second)), "level": level, "message": message}
    for name, value in (fields or {}).items():
        line.setdefault(name, value)
    if logger:
        line["logger"] = logger
    if error is not None:
        line["exception"] = "".join(traceback.format_exception(*error)).rstrip()
    try:
        return orjson.dumps(line, str, orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a lone surrogate, or something that can't even be told
        line = {str(name): repr(value).encode("ascii", "backslashreplace").decode() for name, value in line.items()}
        return orjson.dumps(line, None, orjson.OPT_APPEND_NEWLINE)


def event_text(
    second: float,
    level: str,
    message: str,
    *,
    logger: str | None = None,
    fields: Mapping[str, Any] | None = None,
    error: Error | None = None,
    colour: bool = False,
) -> bytes:
    """The same for people: one line, and a traceback below it."""
    shown = f"{level:<8}"
    if colour:
        shown = f"\x1b[{COLOURS.get(level, 0)}m{shown}\x1b[0m"
    details = "".join(f" {name}={value}" for name, value in (fields or {}).items())
    source = f" ({logger})" if logger else ""
    text = f"{timestamp(int(second))} {shown} {(message + details + source).translate(CONTROLS)}\n"
    if error is not None:
        printed = "".join(traceback.format_exception(*error)).rstrip().split("\n")
        text += "".join(f"    {row.translate(CONTROLS)}\n" for row in printed)
    return text.encode("utf-8", "backslashreplace")


class SinkHandler(logging.Handler):
    """Standard logging into a sink; of what a record carries beyond its message, the names of ``KEPT`` alone."""

    KEPT = ("correlation_id", "service")

    def __init__(self, sink: LogSink, line: Callable[..., bytes]) -> None:
        super().__init__()
        self.sink = sink
        self.line = line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {name: value for name in self.KEPT if (value := record.__dict__.get(name)) is not None}
            error: Any = record.exc_info if record.exc_info and record.exc_info[0] is not None else None
            self.sink.write(
                self.line(
                    record.created,
                    record.levelname,
                    record.getMessage(),
                    logger=record.name,
                    fields=fields,
                    error=error,
                )
            )
        except Exception:  # as every handler of the standard library does: a bad log call must not fail its caller
            self.handleError(record)


def configure_logging(sink: LogSink, level: str = "INFO", json: bool = True) -> Callable[[], None]:
    """Send what standard logging (uvicorn's included), loguru and ``warnings`` have to say into one sink, in one form.

    Takes the place of what printed to the terminal before: plain stream handlers of the root logger, uvicorn's, and
    loguru's. A second call takes the place of the first.

    Args:
        sink: where to.
        level: the least to write, ``TRACE`` to ``CRITICAL``.
        json: lines for machines; else for people, in colour on a terminal.

    Returns:
        What to call when the sink is to get no more of it.

    Raises:
        ValueError: no such level.
    """
    level = level.upper()
    number = NUMBERS.get(level) or logging.getLevelNamesMapping().get(level)
    if number is None:
        raise ValueError(f"No such log level: {level}")
    logging.addLevelName(5, "TRACE")
    if json:
        line: Callable[..., bytes] = event_line
    else:
        colour = sink.is_terminal

        def line(*event: Any, **details: Any) -> bytes:
            return event_text(*event, **details, colour=colour)

    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, SinkHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
    ours = SinkHandler(sink, line)
    root.addHandler(ours)
    root.setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name, least in INDISCREET.items():
        logging.getLogger(name).setLevel(max(number, least))
    logging.getLogger("uvicorn.error").addFilter(_is_discreet)  # the second time does nothing
    logging.captureWarnings(True)
    leave_loguru = _configure_loguru(sink, number, line)

    def leave() -> None:
        root.removeHandler(ours)
        logging.captureWarnings(False)
        leave_loguru()

    return leave


def _is_discreet(record: logging.LogRecord) -> bool:
    """Whether it is not one of uvicorn's lines on a WebSocket, which carry its query string; ours on it does not."""
    return not str(record.msg).startswith('%s - "WebSocket ')


def _configure_loguru(sink: LogSink, number: int, line: Callable[..., bytes]) -> Callable[[], None]:
    from loguru import logger  # 75 ms that embedding a single layer does not spend

    def write(message: Any) -> None:
        record = message.record
        error = record["exception"]
        sink.write(
            line(
                record["time"].timestamp(),
                record["level"].name,
                record["message"],
                logger=record["name"],
                fields=record["extra"],
                error=None if error is None else (error.type, error.value, error.traceback),
            )
        )

    logger.remove()
    # `diagnose` would print the values of variables, secrets among them.
    ours = logger.add(write, level=number, format="{message}", backtrace=False, diagnose=False)

    def leave() -> None:
        with suppress(ValueError):  # another call has taken our place
            logger.remove(ours)

    return leave
