"""What a request costs in Python instructions, by module and by function: the same figure at every run.

    python -m bench.instructions                 the whole gateway in one process, limits in memory
    python -m bench.instructions --redis URL     limits in Redis
    python -m bench.instructions --top 40        more functions

One keep-alive client posts 75 bytes, the service answers 911; only the gateway's own thread is counted. An instruction
is a step of the interpreter, so what C code does inside one is not seen: read it beside a benchmark.
"""

import argparse
import asyncio
import os
import socket
import sys
import threading
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import uvicorn
import uvloop

from gateway.app import create_app
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.wire import RunningServer

HERE = Path(__file__).resolve().parent.parent
WARM, REQUESTS = 30, 100
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Sun, 22 Nov 2026 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: 911\r\nConnection: keep-alive\r\n\r\n" + b"x" * 911
)
REQUEST = (
    b"POST /api/v1/recommendations/top HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"X-User-ID: user-7\r\nAuthorization: Bearer 0123456789abcdef\r\nContent-Length: 75\r\n\r\n" + b"y" * 75
)
instructions: Counter[CodeType] = Counter()
calls: Counter[CodeType] = Counter()
counting = threading.Event()


def count(frame: FrameType, event: str, arg: Any) -> Any:
    if event == "opcode":
        instructions[frame.f_code] += 1
    return count


def trace(frame: FrameType, event: str, arg: Any) -> Any:
    if not counting.is_set():
        return None
    calls[frame.f_code] += 1
    frame.f_trace_opcodes, frame.f_trace_lines = True, False
    return count


def serve(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    while connection.recv(65536):
        connection.sendall(ANSWER)


def ask(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for number in range(WARM + REQUESTS):
            if number == WARM:
                counting.set()
            connection.sendall(REQUEST)
            answer = b""
            while not answer.endswith(b"x" * 911):
                part = connection.recv(65536)
                if not part:
                    raise SystemExit("the gateway closed the connection")
                answer += part
    counting.clear()


def place(code: CodeType) -> str:
    path = Path(code.co_filename)
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE / "gateway") else path.name


async def main(redis: str, top: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    environ = {"RECOMMENDATION_SERVICE_URL": f"http://127.0.0.1:{listener.getsockname()[1]}", "REDIS_URL": redis}
    limits = {"RATE_LIMIT_PER_MINUTE": "2000000", "RATE_LIMIT_PER_HOUR": "2000000"}
    null = os.open(os.devnull, os.O_WRONLY)
    app = create_app(Settings.load(environ | limits))
    app.sink.write_to = null
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=GatewayProtocol, log_config=None, proxy_headers=False)
    server = RunningServer(config)
    port = await server.start()
    sys.settrace(trace)
    await asyncio.get_running_loop().run_in_executor(None, ask, port)
    sys.settrace(None)
    await server.stop()

    by_place: Counter[str] = Counter()
    for code, number in instructions.items():
        by_place[place(code)] += number
    total, called = sum(instructions.values()) / REQUESTS, sum(calls.values()) / REQUESTS
    print(f"{total:.0f} instructions and {called:.0f} calls a request")
    for name, number in by_place.most_common(30):
        print(f"{number / REQUESTS:8.1f}  {name}")
    print()
    for code, number in instructions.most_common(top):
        line = f"{place(code)}:{code.co_firstlineno}"
        print(f"{number / REQUESTS:8.1f}  {calls[code] / REQUESTS:5.1f} calls  {code.co_qualname}  {line}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", default="", help="redis://...")
    parser.add_argument("--top", type=int, default=30, help="functions to list")
    arguments = parser.parse_args()
    uvloop.run(main(arguments.redis, arguments.top))
