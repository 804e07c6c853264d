import errno
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from gateway.backends.log_sink import (
    INDISCREET,
    LogSink,
    SinkHandler,
    configure_logging,
    event_line,
    event_text,
    shortened,
)
from tests.wire import eventually, serving

ROOT = Path(__file__).parent.parent


class Pipe:
    """A pipe whose reader reads when it is told to, and keeps every read apart."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.read = b""

    def read_until(self, enough: Callable[[bytes], bool]) -> bytes:
        while not enough(self.read):
            assert select.select([self.reader], [], [], 5)[0], self.read
            self.read += os.read(self.reader, 65536)
        return self.read

    def close_reader(self) -> None:
        os.close(self.reader)
        self.reader = -1

    def close(self) -> None:
        for descriptor in (self.reader, self.writer):
            if descriptor >= 0:
                os.close(descriptor)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def lines_of(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines()]


def test_lines_arrive_whole_in_order_and_at_most_4096_bytes_at_a_time(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = os.write

    def noting(descriptor: int, data: bytes) -> int:
        writes.append(bytes(data))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noting)
    sink = LogSink(pipe.writer, interval=0.001)
    sent = [b'{"n":%d,"x":"%s"}\n' % (number, b"x" * (number * 37 % 700)) for number in range(500)]
    reader = threading.Thread(target=pipe.read_until, args=(lambda data: data.count(b"\n") == 500,))
    reader.start()
    for line in sent:
        sink.write(line)
    sink.close()
    reader.join(5)
    assert pipe.read == b"".join(sent)
    assert all(len(data) <= 4096 and data.endswith(b"\n") for data in writes)
    assert len(writes) < 100, "lines are gathered"
    assert sink.dropped == 0


def test_a_line_does_not_wait_for_others(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.01)
    sink.write(b"one\n")
    assert pipe.read_until(lambda data: data.endswith(b"\n")) == b"one\n"
    sink.write(b"two\n")
    assert pipe.read_until(lambda data: data.endswith(b"two\n"))
    sink.close()


def test_many_waiting_lines_do_not_wait_for_the_timer(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=60, buffer_bytes=4000)
    for _ in range(20):
        sink.write(b"x" * 99 + b"\n")
    pipe.read_until(lambda data: len(data) == 2000)
    sink.close()


def test_a_stalled_reader_costs_lines_but_never_time(pipe: Pipe) -> None:
    counted: list[int] = []
    sink = LogSink(pipe.writer, buffer_bytes=10_000, interval=0.001, on_drop=counted.append)
    line = b"x" * 99 + b"\n"
    started = time.monotonic()
    for _ in range(5000):
        sink.write(line)
    assert time.monotonic() - started < 1
    assert sink.dropped > 4000
    assert sum(counted) == sink.dropped
    reader = threading.Thread(target=pipe.read_until, args=(lambda data: len(data) + 100 * sink.dropped == 500_000,))
    reader.start()
    sink.close()
    reader.join(5)
    assert not reader.is_alive(), "every line was either read or counted"


def test_closing_gives_up_on_a_stalled_reader_and_counts_what_it_leaves(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.001)
    for _ in range(2000):
        sink.write(b"x" * 99 + b"\n")
    started = time.monotonic()
    sink.close(timeout=0.05)
    assert time.monotonic() - started < 1
    dropped = sink.dropped
    assert dropped > 1000
    sink.write(b"too late\n")
    assert sink.dropped == dropped + 1
    pipe.read_until(lambda data: len(data) >= 65536)  # lets the thread see that nobody waits for it any more
    sink.close()


def test_a_line_after_closing_starts_afresh(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.001)
    sink.close()
    sink.write(b"one\n")
    sink.close()
    sink.write(b"two\n")
    sink.close()
    assert pipe.read_until(lambda data: data.count(b"\n") == 2) == b"one\ntwo\n"


def test_without_a_reader_lines_are_dropped_and_counted(pipe: Pipe) -> None:
    pipe.close_reader()
    sink = LogSink(pipe.writer, interval=0.001)
    for number in range(10):
        sink.write(b"%d\n" % number)
    eventually(lambda: sink.dropped == 10)
    sink.close()


def test_a_pipe_that_another_process_made_non_blocking_is_waited_for(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    sink = LogSink(pipe.writer, interval=0.001)
    for _ in range(2000):
        sink.write(b"x" * 99 + b"\n")
    pipe.read_until(lambda data: len(data) == 200_000)
    assert sink.dropped == 0
    sink.close()


def test_a_full_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.backends.log_sink.RETRY_SECONDS", 0.001)
    write = os.write
    failures = 3

    def full(descriptor: int, data: bytes) -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data)[:5])  # and then hardly any

    monkeypatch.setattr(os, "write", full)
    with (tmp_path / "log").open("wb") as file:
        sink = LogSink(file.fileno(), interval=0.001)
        sink.write(b"a line on a full disk\n")
        sink.write(b"another\n")
        sink.close()
    assert (tmp_path / "log").read_bytes() == b"a line on a full disk\nanother\n"
    assert sink.dropped == 0


def test_many_threads_may_write(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.001)

    def write(name: int) -> None:
        for number in range(300):
            sink.write(b"%d %d\n" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    pipe.read_until(lambda data: data.count(b"\n") == 1200)
    for thread in threads:
        thread.join()
    sink.close()
    for name in range(4):
        own = [line for line in pipe.read.splitlines() if line.startswith(b"%d " % name)]
        assert own == [b"%d %d" % (name, number) for number in range(300)]


def test_a_forked_child_writes_its_own_lines_and_not_its_parents(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.02)
    sink.write(b"parent\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which this is about
        child = os.fork()
    if child == 0:
        sink.write(b"child\n")
        sink.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sink.close()
    assert sorted(pipe.read_until(lambda data: data.count(b"\n") == 2).splitlines()) == [b"child", b"parent"]


def test_what_waits_at_exit_is_written() -> None:
    code = "from gateway.backends.log_sink import LogSink; LogSink(interval=60).write(b'last words\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert (run.stdout, run.stderr) == (b"last words\n", b"")


@given(
    st.dictionaries(
        st.sampled_from(["timestamp", "level", "message", "path", "exception", "a", "b"]),
        st.one_of(st.integers(0, 99), st.text(), st.text(min_size=100).map(lambda text: text * 60)),
        min_size=1,
    )
)
def test_a_long_line_is_cut_to_what_a_pipe_takes_whole_and_stays_json(fields: dict[str, Any]) -> None:
    line = json.dumps(fields).encode() + b"\n"
    short = shortened(line)
    assert len(short) <= 4096
    assert short.count(b"\n") == 1
    assert json.loads(short).keys() == fields.keys()


def test_a_long_line_for_people_is_cut_too_and_an_exception_keeps_its_end() -> None:
    assert len(shortened("é".encode() * 5000 + b"\n")) <= 4096
    short = json.loads(shortened(json.dumps({"level": "ERROR", "exception": "x" * 9000 + "the reason"}).encode()))
    assert short["level"] == "ERROR"
    assert short["exception"].endswith("the reason")
    assert len(shortened(json.dumps({str(number): number for number in range(2000)}).encode())) <= 4096


def test_events_of_all_kinds_become_lines() -> None:
    line = json.loads(event_line(0.5, "INFO", "so", logger="here", fields={"correlation_id": "a", "message": "no"}))
    assert line == {
        "timestamp": "1970-01-01T00:00:00Z",
        "level": "INFO",
        "message": "so",
        "correlation_id": "a",
        "logger": "here",
    }
    assert b"\\ud800" in event_line(0, "INFO", "lone \ud800")
    assert json.loads(event_line(0, "INFO", "x", fields={"o": object()}))["o"].startswith("<object")


def test_a_line_for_people_has_no_control_bytes() -> None:
    text = event_text(0, "INFO", "two\nlines \x1b[31m", fields={"service": "a\rb"}, logger="x")
    assert text == b"1970-01-01T00:00:00Z INFO     two\\x0alines \\x1b[31m service=a\\x0db (x)\n"
    assert event_text(0, "ERROR", "red", colour=True) == b"1970-01-01T00:00:00Z \x1b[31mERROR   \x1b[0m red\n"


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    names = ("uvicorn", *INDISCREET)
    levels = {name: logging.getLogger(name).level for name in names}
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, own in levels.items():
        logging.getLogger(name).setLevel(own)
    logging.captureWarnings(False)
    from loguru import logger

    logger.remove()


@pytest.mark.usefixtures("logging_as_before")
def test_standard_logging_uvicorn_and_loguru_share_the_sink_and_its_form(pipe: Pipe) -> None:
    from loguru import logger as loguru

    sink = LogSink(pipe.writer, interval=0.001)
    uvicorn = logging.getLogger("uvicorn.error")
    uvicorn.addHandler(logging.StreamHandler())
    configure_logging(sink, "info")
    leave = configure_logging(sink, "info")  # as a second gateway in the process does

    logging.getLogger("gateway.test").warning("hello %s", "there", extra={"correlation_id": "abc", "secret": "no"})
    uvicorn.info("Started server process [%d]", 7)
    logging.getLogger("uvicorn.access").info('GET "/?key=secret"')
    logging.getLogger("httpx").info("GET /?key=secret")
    logging.getLogger("gateway.test").debug("no")
    token = "hunter" + "2"
    try:
        raise ValueError("what came")
    except ValueError:
        logging.getLogger("gateway.test").exception("failed")
        loguru.bind(correlation_id="abc").exception("failed too")
    loguru.debug("no")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    leave()
    logging.getLogger("gateway.test").warning("the sink is no longer for this: secret")
    sink.close()
    text = pipe.read_until(lambda data: data.count(b"\n") >= 5)
    lines = lines_of(text)
    assert [(line["level"], line["message"]) for line in lines[:4]] == [
        ("WARNING", "hello there"),
        ("INFO", "Started server process [7]"),
        ("ERROR", "failed"),
        ("ERROR", "failed too"),
    ]
    assert [line.get("correlation_id") for line in lines[:4]] == ["abc", None, None, "abc"]
    assert all(line["exception"].endswith("ValueError: what came") for line in lines[2:4])
    assert "DeprecationWarning: old" in lines[4]["message"]
    assert b"secret" not in text
    assert token.encode() not in text, "a traceback does not show what variables held"


@pytest.mark.parametrize("level", ["INFO", "TRACE"])
@pytest.mark.usefixtures("logging_as_before")
async def test_neither_the_query_nor_the_head_of_a_websocket_reaches_the_log_under_bare_uvicorn(
    pipe: Pipe, level: str
) -> None:
    sink = LogSink(pipe.writer, interval=0.001)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["type"] == "lifespan":  # uvicorn has set up logging as it likes it by then
            leave = configure_logging(sink, level)
            await send({"type": "lifespan.startup.complete"})
            await receive()
            leave()
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["path"] == "/accepted":
            await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 1000})
        logging.getLogger("uvicorn.error").info("of %s", scope["path"])

    head = {"Authorization": "Bearer secret"}
    async with serving(app, log_level=level.lower()) as port:
        for path in ("/accepted", "/refused"):
            with suppress(InvalidStatus):
                async with connect(f"ws://127.0.0.1:{port}{path}?key=secret", additional_headers=head) as socket:
                    await socket.wait_closed()
    sink.close()
    text = pipe.read_until(lambda data: b"of /refused" in data)
    assert b"of /accepted" in text
    assert b"secret" not in text


def test_a_bad_log_call_does_not_fail_its_caller(pipe: Pipe, capsys: pytest.CaptureFixture[str]) -> None:
    sink = LogSink(pipe.writer)
    SinkHandler(sink, event_line).handle(logging.LogRecord("x", logging.INFO, "x.py", 1, "wrong %d", ("x",), None))
    assert "wrong %d" in capsys.readouterr().err


@pytest.mark.usefixtures("logging_as_before")
def test_an_unknown_level_is_refused_and_lines_for_people_are_text(pipe: Pipe) -> None:
    sink = LogSink(pipe.writer, interval=0.001)
    with pytest.raises(ValueError, match="LOUD"):
        configure_logging(sink, "LOUD")
    configure_logging(sink, "TRACE", json=False)
    logging.getLogger("gateway.test").debug("for people")
    sink.close()
    line = pipe.read_until(lambda data: b"\n" in data)
    assert line.endswith(b" DEBUG    for people (gateway.test)\n")
