"""The demo: what its stand-ins answer, and that none of it outlives it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from gateway.demo import EXAMPLES, FLAKY, FLAKY_OF, StandIn
from gateway.settings import BUILT_IN
from tests.wire import eventually, is_healthy

PREFIXES = {name: prefix for name, (prefix, _) in BUILT_IN.items()}


def client(name: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(StandIn(name)), base_url="http://stand-in")


@pytest.mark.parametrize("name", PREFIXES)
async def test_every_stand_in_answers_its_example_and_echoes_the_correlation_id(name: str) -> None:
    async with client(name) as stand_in:
        headers = {"x-correlation-id": "abc-123"}
        first = await stand_in.post(PREFIXES[name], json=EXAMPLES[name], headers=headers)
        again = await stand_in.post(PREFIXES[name], json=EXAMPLES[name], headers=headers)
    assert first.status_code == 200
    assert first.headers["x-correlation-id"] == first.json()["correlation_id"] == "abc-123"
    assert again.json() == first.json()
    assert len(first.json()) > 1


async def test_what_is_no_json_object_is_refused() -> None:
    async with client("search") as stand_in:
        assert [(await stand_in.post("/", content=body)).status_code for body in (b"{", b"[]", b"\xff", b"")] == [
            400, 400, 400, 200,
        ]  # fmt: skip


async def test_prices_fail_some_times_in_a_row() -> None:
    async with client("pricing") as stand_in:
        statuses = [(await stand_in.post("/", json={})).status_code for _ in range(2 * FLAKY_OF)]
    assert statuses == [*[200] * (FLAKY_OF - FLAKY), *[500] * FLAKY] * 2


@pytest.mark.parametrize(("path", "body"), [("/api/v1/chat/stream", {}), ("/api/v1/chat", {"stream": True})])
async def test_the_chat_streams_its_reply_as_events(path: str, body: dict[str, Any]) -> None:
    question = {"message": "Why?"}
    async with client("chatbot") as stand_in:
        whole = (await stand_in.post("/api/v1/chat", json=question)).json()["reply"]
        streamed = await stand_in.post(path, json={**question, **body})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = streamed.text.removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    tokens = [json.loads(event.removeprefix("data: "))["token"] for event in events[:-1]]
    if "stream" not in body:  # the question is the same, so the reply is
        assert " ".join(tokens) == whole
    assert len(tokens) > 5


class Demo:
    """A running demo, as a person sees it."""

    def __init__(self, port: int, output: Path, process: "subprocess.Popen[bytes]") -> None:
        self.output = output
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def printed(self) -> str:
        return self.output.read_text()

    def stand_ins(self) -> dict[str, int]:
        found = re.findall(r"^  ([a-z]+)-service +127\S+ +pid (\d+)$", self.printed(), re.MULTILINE)
        return {name: int(pid) for name, pid in found}

    def post(self, name: str, body: dict[str, Any] | None = None) -> httpx.Response:
        return httpx.post(self.url + PREFIXES[name], json=body or EXAMPLES[name])

    def until(self, claim: Callable[[], object]) -> None:
        try:
            eventually(claim)
        except AssertionError as error:
            raise AssertionError(self.printed()) from error

    def is_up(self) -> bool:
        return is_healthy(self.port)


def state_and_parent(pid: int) -> tuple[str, int]:
    """Of a process; a zombie, ``Z``, also where there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends while it is read
        return "Z", 0
    return state, int(parent)


def is_alive(pid: int) -> bool:
    return state_and_parent(pid)[0] != "Z"


@contextmanager
def running(tmp_path: Path, port: int, *arguments: str, **environ: str) -> Iterator[Demo]:
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "demo", "--port", str(port), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environ},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    demo = Demo(port, output, process)
    try:
        demo.until(lambda: process.poll() is not None or demo.is_up())
        yield demo
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_the_demo_shows_what_the_gateway_does_and_leaves_nothing_behind(tmp_path: Path, port: int) -> None:
    with running(tmp_path, port, "--restart-after", "0.1", CIRCUIT_BREAKER_TIMEOUT="0.3") as demo:
        stand_ins = demo.stand_ins()
        assert list(stand_ins) == list(BUILT_IN)
        for name in stand_ins:
            answer = demo.post(name)
            assert answer.status_code == 200, answer.text
            assert answer.json()["correlation_id"] == answer.headers["x-correlation-id"]

        url = f"{demo.url}{PREFIXES['chatbot']}/stream"
        with httpx.stream("POST", url, json={}) as stream:
            arrivals = [monotonic() for _ in stream.iter_raw()]
        assert arrivals[-1] - arrivals[0] > 0.1  # they came one by one, not all in the end

        with connect(url.replace("http", "ws", 1)) as websocket:
            websocket.send("text")
            websocket.send(b"bytes")
            assert (websocket.recv(), websocket.recv()) == ("text", b"bytes")

        _, keeper = state_and_parent(stand_ins["fraud"])
        os.kill(keeper, signal.SIGSTOP)  # starts nothing again before we have seen what comes of it
        os.kill(stand_ins["fraud"], signal.SIGKILL)
        assert demo.post("fraud").status_code == 502
        demo.until(lambda: demo.post("fraud").status_code == 503)
        os.kill(keeper, signal.SIGCONT)
        demo.until(lambda: "fraud is back" in demo.printed())
        demo.until(lambda: demo.post("fraud").status_code == 200)
        (again,) = re.findall(r"fraud is back on port \d+, pid (\d+)", demo.printed())

        reset = re.search(r"'Authorization: (Bearer \S+)' (\S+)", demo.printed())
        assert reset is not None
        assert httpx.post(reset[2], headers={"authorization": reset[1]}).status_code == 200

        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(10) == 0
        assert not [pid for pid in (*stand_ins.values(), int(again)) if is_alive(pid)]
        assert not demo.is_up()


def test_a_demo_that_is_killed_leaves_nothing_behind_either(tmp_path: Path, port: int) -> None:
    with running(tmp_path, port) as demo:
        stand_ins = demo.stand_ins()
        demo.process.kill()
        demo.until(lambda: not demo.is_up())
        demo.until(lambda: not any(map(is_alive, stand_ins.values())))


def test_the_demo_says_so_if_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "gateway", "demo", "--port", port], cwd=tmp_path, capture_output=True, text=True
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"Can't listen on 127.0.0.1 port {port}: Address already in use. Try another --port.\n"
