"""``ai-gateway demo``: the gateway in front of seven small stand-in AI services, to try it without having any.

Each stand-in is a process of its own, so that one can be killed to see its breaker open. A keeper process starts them
again after a while, and ends them all when the process that started it is gone, however it went.
"""

import asyncio
import json
import os
import random
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from secrets import token_urlsafe
from time import monotonic
from typing import Any

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway.settings import BUILT_IN, Settings

TOKEN_INTERVAL = 0.05  # seconds between two tokens of a streamed answer
FLAKY_OF, FLAKY = 20, 5  # pricing fails the last so many of so many calls: just enough to open its breaker
BREAKER_TIMEOUT = 15  # seconds, rather than a minute: somebody is watching
MOST_FILES = 4096  # open in a process; the demo has a dozen

Answer = dict[str, Any]
EXAMPLES: dict[str, Answer] = {
    "recommendation": {"user_id": "u-17", "limit": 3},
    "search": {"query": "waterproof boots"},
    "pricing": {"sku": "A-100"},
    "chatbot": {"message": "How do tides work?"},
    "fraud": {"transaction_id": "t-9", "amount": 420.0},
    "forecast": {"sku": "A-100", "days": 5},
    "vision": {"image_url": "https://example.com/cat.jpg"},
}


# The stand-ins --------------------------------------------------------------------------------------------------------


def recommendation(asked: Answer, dice: random.Random) -> Answer:
    items = dice.sample(("boots", "tent", "stove", "lantern", "rope", "map", "compass"), 3)
    return {"user_id": asked.get("user_id"), "items": [_scored("item", item, dice) for item in items]}


def search(asked: Answer, dice: random.Random) -> Answer:
    documents = (f"doc-{dice.randrange(1000, 9999)}" for _ in range(3))
    return {"query": asked.get("query"), "hits": [_scored("id", document, dice) for document in documents]}


def pricing(asked: Answer, dice: random.Random) -> Answer:
    return {"sku": asked.get("sku"), "price": round(dice.uniform(5, 200), 2), "currency": "EUR"}


def chatbot(asked: Answer, dice: random.Random) -> Answer:
    reply = " ".join(words(asked, dice))
    return {"reply": reply, "usage": {"completion_tokens": len(reply.split())}}


def fraud(asked: Answer, dice: random.Random) -> Answer:
    score = round(dice.random(), 3)
    return {
        "transaction_id": asked.get("transaction_id"),
        "score": score,
        "decision": "review" if score > 0.8 else "pass",
    }


def forecast(asked: Answer, dice: random.Random) -> Answer:
    return {"sku": asked.get("sku"), "units_by_day": [dice.randrange(80, 140) for _ in range(5)]}


def vision(asked: Answer, dice: random.Random) -> Answer:
    labels = dice.sample(("cat", "sofa", "window", "plant", "book"), 2)
    return {"image_url": asked.get("image_url"), "labels": [_scored("label", label, dice) for label in labels]}


def words(asked: Answer, dice: random.Random) -> list[str]:
    """What the chat says, a token at a time."""
    subject = str(asked.get("message", "that")).rstrip("?.!")
    ending = dice.choice(("in three steps.", "with an example.", "from the beginning."))
    return f"You asked: {subject}. Let me explain it {ending}".split()


def _scored(kind: str, name: str, dice: random.Random) -> Answer:
    return {kind: name, "score": round(dice.uniform(0.5, 1), 3)}


MODELS: dict[str, Callable[[Answer, random.Random], Answer]] = {
    "recommendation": recommendation,
    "search": search,
    "pricing": pricing,
    "chatbot": chatbot,
    "fraud": fraud,
    "forecast": forecast,
    "vision": vision,
}


class StandIn:
    """One stand-in service as an ASGI application: what it answers is plausible, and the same for the same question.

    ``chatbot`` streams server-sent events where the path ends in ``/stream`` or the JSON has ``"stream": true``, and
    echoes over a WebSocket; ``pricing`` fails now and then, five calls in a row.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._echo(WebSocket(scope, receive, send))
        elif scope["type"] == "http":
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> JSONResponse | StreamingResponse:
        self.calls += 1
        correlation_id = request.headers.get("x-correlation-id", "")
        named = {"x-correlation-id": correlation_id}
        try:
            asked = json.loads(await request.body() or b"{}")
        except ValueError:
            asked = None
        if not isinstance(asked, dict):
            return JSONResponse({"error": "expected a JSON object"}, 400, named)
        if self.name == "pricing" and (self.calls - 1) % FLAKY_OF >= FLAKY_OF - FLAKY:
            return JSONResponse({"error": "the model ran out of memory", "correlation_id": correlation_id}, 500, named)
        dice = random.Random(json.dumps(asked, sort_keys=True))
        if self.name == "chatbot" and (request.url.path.endswith("/stream") or asked.get("stream") is True):
            return StreamingResponse(_events(words(asked, dice)), headers=named, media_type="text/event-stream")
        return JSONResponse({**MODELS[self.name](asked, dice), "correlation_id": correlation_id}, headers=named)

    async def _echo(self, websocket: WebSocket) -> None:
        if self.name != "chatbot":
            await websocket.close()
            return
        await websocket.accept()
        while (message := await websocket.receive())["type"] == "websocket.receive":
            await websocket.send({**message, "type": "websocket.send"})


async def _events(tokens: list[str]) -> AsyncIterator[str]:
    for token in tokens:
        yield f"data: {json.dumps({'token': token})}\n\n"
        await asyncio.sleep(TOKEN_INTERVAL)
    yield "data: [DONE]\n\n"


# Their processes ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Process:
    """A stand-in's process.

    Attributes:
        alive: our end of a pipe whose other end that process alone has, so that it ends with it; -1: not running.
        due: when to start it again, monotonic seconds.
    """

    name: str
    port: int = 0
    pid: int = 0
    alive: int = -1
    due: float = 0.0


class _Server(uvicorn.Server):
    """uvicorn that dies of a signal at once, as what somebody kills to see what happens should."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def start(process: Process, lifeline: int) -> bool:
    """Start a stand-in on its port, or on a free one; return whether it listens.

    It ends by itself when ``lifeline`` does.
    """
    process.alive, alive = os.pipe()
    process.pid = os.fork()
    if process.pid == 0:
        try:
            for below, above in pairwise(sorted((2, alive, lifeline, MOST_FILES))):  # what others wait on to end
                os.closerange(below + 1, above)
            asyncio.run(_serve(process.name, process.port, alive, lifeline))
        except OSError as error:
            _say(f"{process.name} can't listen on port {process.port}: {error.strerror}")
        finally:
            os._exit(1)  # what was open before the fork is not this process's to clean up
    os.close(alive)
    told = os.read(process.alive, 16)
    process.port = int(told or process.port)
    return bool(told)


async def _serve(name: str, port: int, alive: int, lifeline: int) -> None:
    listener = socket.create_server(("127.0.0.1", port))
    # asyncio sets it only on sockets that name their protocol; without, each answer waits 40 ms for an acknowledgement
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(StandIn(name), lifespan="off", ws="websockets-sansio", log_level="critical")
    server = _Server(config)
    asyncio.get_running_loop().add_reader(lifeline, os._exit, 0)
    os.write(alive, f"{listener.getsockname()[1]}".encode())
    await server.serve([listener])


def keep(lifeline: int, report: int, restart_after: float) -> None:
    """Run all stand-ins until ``lifeline`` ends; tell on ``report`` where they are, or nothing if one fails."""
    processes = [Process(name) for name in BUILT_IN]
    with os.fdopen(report, "w") as lines:
        if all(start(process, lifeline) for process in processes):
            json.dump([(process.name, process.port, process.pid) for process in processes], lines)
    while True:
        dead = [process for process in processes if process.alive < 0]
        wait = max(0.0, min(process.due for process in dead) - monotonic()) if dead else None
        ends = {process.alive: process for process in processes if process.alive >= 0}
        ready, _, _ = select.select([lifeline, *ends], [], [], wait)
        if lifeline in ready:
            for process in ends.values():
                os.kill(process.pid, signal.SIGKILL)
                os.waitpid(process.pid, 0)
            return
        for end in ready:
            _bury(ends[end], restart_after)
        for process in dead:
            if process.due <= monotonic():
                if start(process, lifeline):
                    _say(f"{process.name} is back on port {process.port}, pid {process.pid}")
                else:
                    _bury(process, restart_after)


def _bury(process: Process, restart_after: float) -> None:
    os.close(process.alive)
    os.waitpid(process.pid, 0)
    process.alive, process.due = -1, monotonic() + restart_after
    _say(f"{process.name} (pid {process.pid}) is dead; it is started again in {restart_after:g} s")


def _say(line: str) -> None:
    with suppress(OSError):  # nobody may be there to read it any more
        print(f"--- {line}", flush=True)


@contextmanager
def stand_ins(restart_after: float) -> Iterator[list[Process]]:
    """Run the stand-ins in processes below a keeper's.

    Raises:
        RuntimeError: one could not start.
    """
    lifeline, our_end = os.pipe()
    report, keepers_end = os.pipe()
    sys.stdout.flush()
    keeper = os.fork()
    if keeper == 0:
        try:
            os.setpgid(0, 0)  # Ctrl-C on the terminal is for the process that started us; we see the lifeline end
            os.close(our_end)
            os.close(report)
            keep(lifeline, keepers_end, restart_after)
        finally:
            os._exit(0)
    os.close(lifeline)
    os.close(keepers_end)
    try:
        with os.fdopen(report) as lines:
            found = lines.read()
        if not found:
            raise RuntimeError("A stand-in service could not start")
        yield [Process(*each) for each in json.loads(found)]
    finally:
        os.close(our_end)
        os.waitpid(keeper, 0)


# The whole ------------------------------------------------------------------------------------------------------------


def demo(*, host: str = "127.0.0.1", port: int = 8080, restart_after: float = 90.0, dotenv: str | None = None) -> int:
    """Run stand-ins and gateway until SIGINT or SIGTERM; return the exit status.

    Args:
        host: where the gateway listens.
        port: where the gateway listens.
        restart_after: seconds that a dead stand-in stays dead.
        dotenv: settings for the gateway, which like those of the environment have no say in where its services are;
            there is no settings file, Redis or Qdrant.

    Raises:
        SettingsError: the settings of the environment, or of ``dotenv``, have mistakes.
    """
    from gateway.app import create_app
    from gateway.server.workers import serve

    fixed = {"HOST": host, "PORT": str(port), "ADMIN_TOKEN": token_urlsafe(9)}
    fixed |= dict.fromkeys(("GATEWAY_CONFIG", "REDIS_URL", "QDRANT_URL"), "")
    usual = {"CIRCUIT_BREAKER_TIMEOUT": str(BREAKER_TIMEOUT), "LOG_JSON": "false", "DRAIN_DELAY": "0"}

    def load() -> Settings:
        return Settings.from_environment(dotenv=dotenv, defaults=usual, overrides=fixed, supervised=True)

    load()  # mistakes before anything starts
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        print(f"Can't listen on {host} port {port}: {why}. Try another --port.", file=sys.stderr)
        return 1
    with stand_ins(restart_after) as processes:
        fixed |= {f"{each.name.upper()}_SERVICE_URL": f"http://127.0.0.1:{each.port}" for each in processes}
        print(what_to_try(load(), processes), flush=True)
        return serve(app=create_app, load=load, host=host, port=port, workers=1)


def what_to_try(settings: Settings, processes: list[Process]) -> str:
    """What there is, and commands that show what the gateway does with it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    gateway = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    timeout = settings.circuit_breaker.timeout
    per_minute = settings.rate_limit_per_minute
    paths = {key: f"{gateway}{prefix}" for key, (prefix, _) in BUILT_IN.items()}
    chat, price, breakers = paths["chatbot"], paths["pricing"], f"{gateway}/circuit-breakers"
    fraud = next(each for each in processes if each.name == "fraud")
    rows = [f"  {each.name + '-service':<24}127.0.0.1:{each.port:<8}pid {each.pid}" for each in processes]
    calls = [f"  curl {url} -d '{json.dumps(EXAMPLES[key])}'" for key, url in paths.items()]

    def loop(times: int, caller: str, url: str) -> str:  # a caller each, so that none uses up another's limit
        count = f"curl -s -o /dev/null -w '%{{http_code}}\\n' -H 'X-User-ID: {caller}' -d '{{}}'"
        return f"  {count} '{url}?n=[1-{times}]' | uniq -c"

    sections = {
        "Seven stand-in services are up:": rows,
        "Call each of them through the gateway:": calls,
        "A stream, token by token, and a WebSocket:": [
            f"  curl -N {chat}/stream -d '{json.dumps(EXAMPLES['chatbot'])}'",
            f"  {sys.executable} -m websockets {chat.replace('http', 'ws', 1)}/ws",
        ],
        f"Prices fail {FLAKY} times in {FLAKY_OF}, which opens their breaker for {timeout:g} s:": [
            loop(FLAKY_OF + 5, "bob", price),
            f"  curl {breakers}",
        ],
        "Close it at once, by hand:": [
            f"  curl -X POST -H 'Authorization: Bearer {settings.admin_token}' {breakers}/pricing-service/reset"
        ],
        "Kill a service, and see its breaker open; it is started again after a while:": [
            f"  kill {fraud.pid}",
            loop(10, "carol", paths["fraud"]),
        ],
    }
    if per_minute:
        sections[f"One request more than the {per_minute} a minute that a caller has:"] = [
            loop(per_minute + 1, "dave", paths["search"])
        ]
    text = "\n\n".join("\n".join([title, *lines]) for title, lines in sections.items())
    return f"{text}\n\nThe gateway is at {gateway}, its log follows. Ctrl-C ends everything.\n"
