"""Writes that wait for company (decision 10): each connection's bytes leave once and in order, or not at all."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVarTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.context import Cause
from gateway.outbox import FEW, RUN, Outbox
from gateway.policies.edge import EdgeLimits
from gateway.policies.services import Service as Target
from gateway.proxy.app import ProxyApp
from gateway.proxy.http1 import Http1Connection
from gateway.server.protocol import Edge, GatewayProtocol
from gateway.server.worker import GatewayServer, server_config
from gateway.server.workers import bind
from tests.frames import handshake
from tests.proxy_rig import Rig, rig
from tests.served import CLOSE, GET, Application, answer, read_body
from tests.wire import OK, Reader, Request, Service, Writer, connected, read_answer, reset, service, until
from tests.wire import read_body as read_request

MANY = FEW + 1  # requests under way, with which writes are held back
TLS = Path(__file__).parent / "tls"  # a certificate for localhost and 127.0.0.1 that is its own authority


@pytest.fixture(params=[True, False], ids=["uvloop", "asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


Ts = TypeVarTuple("Ts")


class Turns(asyncio.SelectorEventLoop):
    """An event loop whose turns are made by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[asyncio.Handle] = []
        self.failures: list[dict[str, Any]] = []

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Any = None) -> asyncio.Handle:
        self.due.append(asyncio.Handle(callback, args, self))
        return self.due[-1]

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failures.append(context)

    def turn(self) -> None:
        due, self.due = self.due, []
        for handle in due:
            handle._run()

    def outbox(self, under_way: int = MANY) -> Outbox:
        outbox = Outbox(self)
        outbox.under_way = under_way
        return outbox


@pytest.fixture
def turns() -> Iterator[Turns]:
    with closing(Turns()) as turns:
        yield turns


class Letter:
    """Something to send, and how that ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.ends: list[str] = []

    def flush(self) -> None:
        if self.error is not None:
            raise self.error
        self.ends.append("sent")

    def abort(self) -> None:
        self.ends.append("aborted")


def test_what_is_held_leaves_in_the_next_turn_but_one(turns: Turns) -> None:
    letters = [Letter(), Letter()]
    outbox = turns.outbox()
    assert outbox.holds(letters[0], MANY)
    turns.turn()
    assert outbox.holds(letters[1], MANY)
    assert letters[0].ends == []
    turns.turn()
    assert [letter.ends for letter in letters] == [["sent"], ["sent"]]
    assert not turns.due, "an outbox that is empty costs nothing"


def test_few_requests_are_not_held_but_for_a_run_after_there_were_many(turns: Turns) -> None:
    outbox = turns.outbox()
    assert not outbox.holds(Letter(), FEW)
    assert outbox.holds(Letter(), MANY)
    assert [outbox.holds(Letter(), FEW) for _ in range(RUN + 1)] == [True] * RUN + [False]


def test_one_that_fails_to_send_is_closed_and_takes_nobody_with_it(turns: Turns) -> None:
    failing, letter = Letter(MemoryError()), Letter()
    outbox = turns.outbox()
    for each in (failing, letter):
        outbox.holds(each, MANY)
    for _ in range(2):
        turns.turn()
    assert failing.ends == ["aborted"]
    assert letter.ends == ["sent"]
    assert [failure["exception"] for failure in turns.failures] == [failing.error]


# Any interleaving


class Wire(asyncio.Transport):
    """A transport that keeps what it is given, and is given nothing once it closes."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closing = self.half_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert data
        assert not self.closing
        assert not self.half_closed
        self.sent += data

    def writelines(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(pieces))

    def write_eof(self) -> None:
        self.half_closed = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0


def turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


@contextmanager
def new_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in whose callbacks nothing may be raised."""
    loop = asyncio.new_event_loop()
    failures: list[Any] = []
    loop.set_exception_handler(lambda _, context: failures.append(context))
    try:
        yield loop
        assert not failures
    finally:
        loop.close()


OFTEN = settings(max_examples=1000)
CONNECTIONS = st.integers(0, 2)
OF_CLIENTS = st.sampled_from(
    ["write", "write", "write", "write all", "flush", "close", "half-close", "linger", "abort"]
)
OF_ALL = st.tuples(st.just(-1), st.sampled_from(["turn", "turn", "busy", "quiet"]))


@OFTEN
@given(st.lists(OF_ALL | st.tuples(CONNECTIONS, OF_CLIENTS)))
def test_a_clients_bytes_leave_once_and_in_order(steps: list[tuple[int, str]]) -> None:
    with new_loop() as loop:
        state, config = ServerState(), Config(Application(lambda *_: answer(_[2])), ws="none", log_config=None)
        wires = [Wire() for _ in range(3)]
        clients = [GatewayProtocol(config, state, {}, loop) for _ in wires]
        others = {loop.create_future() for _ in range(MANY)}
        state.tasks.update(cast("Any", others))
        written = [b""] * 3
        aborted, ended = set[int](), set[int]()
        for client, wire in zip(clients, wires, strict=True):
            client.connection_made(wire)
        for number, (at, step) in enumerate(steps):
            if step == "turn":
                turn(loop)
            elif step == "busy":
                state.tasks.update(cast("Any", others))
            elif step == "quiet":
                state.tasks.clear()
            if at < 0 or at in ended:
                continue
            client, piece = clients[at], b"<%d>" % number
            if step.startswith("write"):
                written[at] += piece
                client.write_all([piece[:1], piece[1:]]) if step == "write all" else client.write(piece)
            elif step == "flush":
                client.flush()
            elif step == "close":
                client.close()
            elif step == "linger":
                client._linger()
            elif step == "half-close":
                assert not client.eof_received(), "it has no request"
                wires[at].close()
            elif step == "abort":
                client.abort()
                aborted.add(at)
            if step in ("close", "linger", "half-close", "abort"):
                ended.add(at)
            if at not in aborted:
                assert wires[at].sent + client.held == written[at]
                assert client.written == len(written[at])
                assert client.held in (b"", piece), "no more than the last piece is held"
                assert not client.held or at not in ended
        for _ in range(2):
            turn(loop)
        for at, wire in enumerate(wires):
            assert written[at].startswith(wire.sent) if at in aborted else wire.sent == written[at]
        for client in clients:
            client.connection_lost(None)
        clients[0].edge._sweep()


OF_SERVICES = st.sampled_from(["request", "request", "part", "part", "answer", "bytes", "end", "lost", "abort"])


@OFTEN
@given(st.lists(OF_ALL | st.tuples(CONNECTIONS, OF_SERVICES)))
def test_a_requests_bytes_leave_once_and_in_order_and_none_behind_one_that_did_not(
    steps: list[tuple[int, str]],
) -> None:
    with new_loop() as loop:
        outbox = Outbox(loop)
        outbox.under_way = MANY
        wires = [Wire() for _ in range(3)]
        connections = [Http1Connection(loop, outbox) for _ in wires]
        pieces: list[list[bytes]] = [[], [], []]
        begun = [0] * 3  # pieces before the latest request's
        for connection, wire in zip(connections, wires, strict=True):
            connection.connection_made(wire)
        for number, (at, step) in enumerate(steps):
            if step == "turn":
                turn(loop)
            elif step in ("busy", "quiet"):
                outbox.under_way = MANY if step == "busy" else 0
            if at < 0:
                continue
            connection, wire = connections[at], wires[at]
            was_complete = connection.complete
            fresh = not connection.awaited and connection.error is None
            if step == "request" and fresh:
                begun[at] = len(pieces[at])
                pieces[at].append(b"POST /%d HTTP/1.1\r\nhost: h\r\ncontent-length: 9\r\n\r\n" % number)
                was_closing = connection.is_closing
                connection.request(b"POST", b"/%d" % number, b"h", b"", b"content-length: 9\r\n", b"")
                assert not was_closing or (connection.error is not None and not connection.dispatched)
            elif step == "part" and pieces[at]:
                pieces[at].append(b"<%d>" % number)
                connection.write(pieces[at][-1])
            elif step == "answer" and connection.awaited and connection.dispatched:
                connection.data_received(OK)
                assert connection.complete
            elif step == "bytes" and not (connection.awaited and connection.dispatched):
                connection.data_received(OK)
                assert connection.is_closing, "an answer to nothing ends the connection"
                assert connection.complete == was_complete
            elif step == "end" and not connection.is_closing:
                assert not connection.eof_received()
                wire.close()
            elif step == "lost" and connection.is_closing:
                connection.connection_lost(None)
            elif step == "abort":
                connection.abort()
            all_of_it = b"".join(pieces[at])
            before = b"".join(pieces[at][: begun[at]])
            if not connection.is_closing and connection.dispatched:
                assert wire.sent == all_of_it
            if not connection.dispatched:
                assert before.startswith(wire.sent), "nothing of it has left"
            assert all_of_it.startswith(wire.sent)
        for _ in range(2):
            turn(loop)
        for connection, wire, sent in zip(connections, wires, pieces, strict=True):
            assert connection.is_closing or wire.sent == b"".join(sent)


# Requests that wait, and never leave


class Holding:
    """A proxy whose connection to its service, which waits for a request, holds the next one until the test says so."""

    def __init__(self, gw: Rig, turns: Turns) -> None:
        [route] = gw.proxy._routes.values()
        [pool] = route.pools.values()
        self.turns = turns
        connection = pool.take_idle(asyncio.get_running_loop().time())
        assert isinstance(connection, Http1Connection)
        self.connection = connection
        connection._outbox = self.turns.outbox()
        pool.give_back(connection)

    def let_go(self) -> None:
        for _ in range(2):
            self.turns.turn()


@asynccontextmanager
async def holding(**options: Any) -> AsyncIterator[tuple[Rig, Holding, list[Writer]]]:
    """A proxy that holds its second request; and the service's side of its connections."""
    writers: list[Writer] = []

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        writers.append(writer)
        await read_request(request, reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(request.body), request.body))

    async with rig(handle, **options) as gw:
        assert (await gw.call()).status == 200
        with closing(Turns()) as turns:
            yield gw, Holding(gw, turns), writers


@pytest.mark.parametrize("end", [Writer.close, reset, lambda writer: writer.write(OK)], ids=["FIN", "RST", "bytes"])
async def test_a_post_that_waited_on_a_connection_that_was_lost_is_sent_on_another(
    end: Callable[[Writer], Any],
) -> None:
    async with holding() as (gw, held, writers):
        calling = asyncio.create_task(gw.call(method="POST", body=b"pay"))
        await until(lambda: not held.connection.dispatched)
        end(writers[0])
        answer = await calling
        assert (answer.status, answer.body) == (200, b"pay"), "not what the service said before it was asked"
        assert gw.seen.last.attempts == 2
        held.let_go()
        await gw.call()
        assert [(request.method, request.connection) for request in gw.upstream.requests] == [
            (b"GET", 1),
            (b"POST", 2),
            (b"GET", 2),
        ]


async def test_a_post_that_never_left_is_lost_where_no_retry_is_allowed() -> None:
    async with holding(retries=0) as (gw, held, writers):
        calling = asyncio.create_task(gw.call(method="POST", body=b"pay"))
        await until(lambda: not held.connection.dispatched)
        writers[0].close()
        assert (await calling).status == 502
        assert gw.seen.last.cause is Cause.RESET
        held.let_go()
        assert len(gw.upstream.requests) == 1


async def test_a_service_that_dies_while_a_request_waits_is_a_502() -> None:
    async with holding() as (gw, held, _):
        calling = asyncio.create_task(gw.call(method="POST", body=b"pay"))
        await until(lambda: not held.connection.dispatched)
        await gw.upstream.stop()
        assert (await calling).status == 502
        assert gw.seen.last.cause is Cause.CONNECT_FAILED
        held.let_go()


async def test_a_request_whose_client_left_while_it_waited_never_leaves() -> None:
    async with holding() as (gw, held, _):
        async with connected(gw.port) as (_, writer):
            writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\npay")
            await until(lambda: not held.connection.dispatched)
        await gw.cause()
        held.let_go()
        await gw.settle()
        await until(lambda: gw.upstream.open == 0)
        assert len(gw.upstream.requests) == 1


async def test_the_parts_of_a_body_come_behind_their_head_and_make_it_leave() -> None:
    async with holding() as (gw, held, _):
        async with connected(gw.port) as (reader, writer):
            writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\npay\r\n")
            await until(lambda: len(gw.upstream.requests) == 2)
            assert held.turns.due, "it was held"
            held.let_go()
            writer.write(b"3\r\n me\r\n0\r\n\r\n")
            assert (await read_answer(reader)).body == b"pay me"
        assert gw.upstream.connections == 1


# Over real sockets, with many requests under way


async def write_back(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers the request's path and body."""
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        return
    await answer(send, scope["raw_path"] + b" " + await read_body(receive))


class Busy:
    """A server that has requests under way which wait."""

    def __init__(self, port: int, server: GatewayServer, waiting: list[tuple[Reader, Writer]]) -> None:
        self.port, self.server, self.waiting = port, server, waiting

    @property
    def edge(self) -> Edge:
        edge: Edge = cast("Any", self.server.server_state).edge
        return edge

    async def until_held(self) -> GatewayProtocol:
        """Wait, turn by turn, for an answer that is held back."""
        async with asyncio.timeout(5):
            while True:
                for client in self.edge.connections:
                    if client.held:
                        return client
                await asyncio.sleep(0)


@asynccontextmanager
async def busy(handler: Any = write_back, *, tls: bool = False, waiting: int = MANY) -> AsyncIterator[Busy]:
    """Serve an application, in which requests wait beside those that its handler is for."""
    let_go = asyncio.Event()

    async def wait_or_handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/wait":
            await let_go.wait()
            await answer(send)
        else:
            await handler(scope, receive, send)

    edge = EdgeLimits()
    listeners, ready = bind("127.0.0.1", 0), asyncio.Event()
    files = {"certfile": str(TLS / "cert.pem"), "keyfile": str(TLS / "key.pem")} if tls else {}
    config = server_config(Application(wait_or_handle), edge, **files)
    server = GatewayServer(config, edge, on_ready=ready.set)
    running = asyncio.create_task(server.serve(sockets=listeners))
    await ready.wait()
    port = listeners[0].getsockname()[1]
    clients = []
    try:
        for _ in range(waiting):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting() if tls else None)
            writer.write(b"GET /wait HTTP/1.1\r\nHost: a\r\n\r\n")
            clients.append((reader, writer))
        await until(lambda: len(server.server_state.tasks) == waiting)
        yield Busy(port, server, clients)
        let_go.set()
        for reader, _ in clients:
            if not server._leaving.is_set():
                assert (await read_answer(reader)).body == b"ok"
    finally:
        for _, writer in clients:
            writer.transport.abort()
        server.quit()
        await running


def trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=TLS / "cert.pem")


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_every_client_gets_its_own_answers_in_order(tls: bool) -> None:
    async def ask(port: int, name: int) -> None:
        """Pipelined requests, with bodies that are copied behind the head and such that are not."""
        bodies = [b"%d:%d" % (name, size) * size for size in (1, 0, 5000, 1, 2, 0, 100)]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting() if tls else None)
        try:
            for number, body in enumerate(bodies):
                head = b"POST /%d/%d HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (name, number, len(body))
                writer.write(head + body)
            for number, body in enumerate(bodies):
                assert (await read_answer(reader)).body == b"/%d/%d %b" % (name, number, body)
        finally:
            writer.transport.abort()

    async with busy(tls=tls) as server, asyncio.timeout(10):
        await asyncio.gather(*(ask(server.port, name) for name in range(12)))


HEAD = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n"
ENDINGS = {
    "one": (GET, [200]),
    "two in a row": (GET + GET, [200, 200]),
    "HEAD": (HEAD, [200]),
    "the last": (CLOSE, [200]),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", [200]),
    "HTTP/1.0 that stays": (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200]),
    "an error behind it": (GET + b"GET / HTTP/9\r\n\r\n", [200, 505]),
    "an error": (b"?\r\n\r\n", [400]),
}


@pytest.mark.parametrize(("sent", "statuses"), ENDINGS.values(), ids=ENDINGS)
async def test_who_half_closes_along_with_a_request_gets_its_answer(sent: bytes, statuses: list[int]) -> None:
    async with busy() as server:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setblocking(False)
                client.send(sent)
                client.shutdown(socket.SHUT_WR)
                reader, writer = await asyncio.open_connection(sock=client)
                try:
                    method = sent.split(b" ")[0]
                    async with asyncio.timeout(5):
                        assert [(await read_answer(reader, method)).status for _ in statuses] == statuses
                        assert await reader.read() == b""
                finally:
                    writer.transport.abort()


@pytest.mark.parametrize("turns", range(4))
async def test_who_half_closes_after_a_request_gets_its_answer(turns: int) -> None:
    async with busy() as server, connected(server.port) as (reader, writer):
        writer.write(GET)
        for _ in range(turns):
            await asyncio.sleep(0)
        writer.write_eof()
        assert (await read_answer(reader)).body == b"/ "


async def test_a_websocket_begins_behind_the_answer_before_it() -> None:
    async with busy() as server, connected(server.port) as (reader, writer):
        writer.write(GET + handshake())
        assert (await read_answer(reader)).body == b"/ "
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")


async def test_who_waits_to_send_its_body_is_told_to_go_on() -> None:
    async with busy() as server, connected(server.port) as (reader, writer):
        writer.write(GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await read_answer(reader)).body == b"/ "
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await read_answer(reader)).body == b"/ hi"


async def test_of_a_stream_no_more_than_one_piece_is_held() -> None:
    pieces = [b"%d," % number for number in range(500)]
    held = set[int]()

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-y", b"z")]})
        for number, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            [client] = [client for client in server.edge.connections if client.client == scope["client"]]
            assert client.held.count(b",") <= 1
            held.add(len(client.held) > 0)
            if number % 10 == 0:
                await asyncio.sleep(0)
        await send({"type": "http.response.body"})

    async with busy(stream) as server, connected(server.port) as (reader, writer):
        writer.write(GET)
        assert (await read_answer(reader)).body == b"".join(pieces)
    assert held == {False, True}


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_of_an_answer_that_is_cut_the_client_gets_what_was_held(version: bytes) -> None:
    async def break_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise ConnectionAbortedError

    async with busy(break_off) as server:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.setblocking(False)
                client.send(GET.replace(b"1.1", version))
                reader, writer = await asyncio.open_connection(sock=client)
                cut = await read_answer(reader)
                assert (cut.body, cut.whole) == (b"half", False)
                writer.close()


async def test_a_client_that_leaves_while_its_answer_waits_harms_nobody() -> None:
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    async with busy() as server, connected(server.port) as (reader, writer):
        for _ in range(20):
            async with connected(server.port) as (_, leaver):
                leaver.write(GET)
                await server.until_held()
                writer.write(GET)
                reset(leaver)
                assert (await read_answer(reader)).body == b"/ "
    assert not failures


@pytest.mark.parametrize("leave", [GatewayServer.quit, GatewayServer.retire])
async def test_an_answer_that_waits_when_the_server_leaves_is_sent(leave: Callable[[GatewayServer], None]) -> None:
    async with busy() as server, connected(server.port) as (reader, writer):
        writer.write(GET)
        await server.until_held()
        leave(server.server)
        assert (await read_answer(reader)).body == b"/ "
        if leave is GatewayServer.quit:  # the other lets them finish
            for waiting, _ in server.waiting:
                refused = await read_answer(waiting)
                assert (refused.status, refused.whole) == (503, True)
                assert await waiting.read() == b""


async def test_requests_reach_their_service_whole_whatever_else_is_under_way() -> None:
    let_go = asyncio.Event()

    async def handle(request: Request, reader: Reader, writer: Writer) -> None:
        await read_request(request, reader)
        if request.target == b"/api/wait":
            await let_go.wait()
        said = request.target + b" " + request.body
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said))

    names = count()

    async def ask(port: int) -> None:
        async with connected(port) as (reader, writer):
            for size in (0, 1, 20_000, 300_000) * 2:
                for chunked in (False, True):
                    path, body = b"/api/%d" % next(names), b"x" * size
                    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % size
                    writer.write(b"POST %b HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n" % (path, framing))
                    ends = b"\r\n0\r\n\r\n" if size else b"0\r\n\r\n"
                    writer.write(b"%b%b%b" % (b"%x\r\n" % size if size else b"", body, ends) if chunked else body)
                    assert (await read_answer(reader)).body == path + b" " + body

    async with service(handle) as upstream, forwarding(upstream) as (port, proxy):
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MANY)]
        for _, writer in waiting:
            writer.write(b"GET /api/wait HTTP/1.1\r\nHost: h\r\n\r\n")
        await until(lambda: len(upstream.requests) == MANY)
        assert proxy._outbox is not None
        assert proxy._outbox.under_way == MANY
        async with asyncio.timeout(20):
            await asyncio.gather(*(ask(port) for _ in range(6)))
        assert len(upstream.requests) == MANY + next(names), "each came once"
        let_go.set()
        for reader, writer in waiting:
            assert (await read_answer(reader)).body == b"/api/wait "
            writer.close()
        assert proxy._outbox.under_way == 0


@asynccontextmanager
async def forwarding(upstream: Service) -> AsyncIterator[tuple[int, ProxyApp]]:
    """A proxy behind our own server."""
    proxy = ProxyApp([Target(name="api", prefix="/api", replicas=(upstream.url,))])
    edge = EdgeLimits()
    listeners, ready = bind("127.0.0.1", 0), asyncio.Event()
    server = GatewayServer(server_config(proxy, edge), edge, on_ready=ready.set)
    running = asyncio.create_task(server.serve(sockets=listeners))
    await ready.wait()
    try:
        yield listeners[0].getsockname()[1], proxy
    finally:
        server.quit()
        await running
