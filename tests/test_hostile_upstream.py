"""A service that dies, lies, rambles or drips, at any byte: the client can tell, and the next one is not harmed."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from random import Random

import pytest
from starlette.types import Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.policies.services import Service as Target
from gateway.policies.services import Timeouts
from gateway.proxy.app import ProxyApp
from tests.wire import (
    OK,
    Answer,
    Reader,
    Request,
    Service,
    UnsoundError,
    Writer,
    connected,
    read_answer,
    reset,
    service,
    serving_at_the_edge,
    until,
)

QUICK = Timeouts(connect=1, pool=5, write=0.3, first_byte=0.3, between_bytes=0.3, answer=0.6, stream=0.6, client=1)
AT_ONCE = 40

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 11\r\n\r\nhello world"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n"
EVENTS = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"
)
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nX-A: b\r\n\r\nhello world"
INTERIM = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + LENGTH
EMPTY = b"HTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n"
ANSWERS = {
    "length": LENGTH,
    "chunked": CHUNKED,
    "events": EVENTS,
    "until close": UNTIL_CLOSE,
    "interim": INTERIM,
    "empty": EMPTY,
}

Act = Callable[[Writer], Awaitable[None]]


BOTH = [("asyncio", {"use_uvloop": True}), ("asyncio", {"use_uvloop": False})]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return BOTH[0]


class Rig:
    """A proxy under the gateway's server; the service does with the n-th request what ``acts[n]`` says."""

    proxy: ProxyApp
    upstream: Service
    port: int

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self.contexts: dict[str, RequestContext] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.contexts[scope["path"]] = context = RequestContext()
            scope = {**scope, "gateway": context}
        await self.proxy(scope, receive, send)

    async def handle(self, request: Request, reader: Reader, writer: Writer) -> None:
        name = request.target.rpartition(b"/")[2]
        if name == b"clean":
            writer.write(OK)
        else:
            await self.acts[int(name)](writer)

    async def ask(self, number: int) -> tuple[Answer, Cause | None]:
        """The answer to a request, and its cause; what follows on the same connection is seen to be clean."""
        async with asyncio.timeout(5), connected(self.port) as (reader, writer):
            writer.write(b"POST /api/%d HTTP/1.1\r\nHost: h\r\n\r\n" % number)  # never sent twice
            answer = await read_answer(reader)
            context = self.contexts[f"/api/{number}"]
            await until(lambda: context.cause is not None)
            if answer.whole and not answer.values(b"connection"):
                writer.write(b"GET /api/clean HTTP/1.1\r\nHost: h\r\n\r\n")
                clean = await read_answer(reader)
                assert (clean.status, clean.body, clean.whole) == (200, b"ok", True), (number, clean)
            else:
                assert await reader.read() == b"", "a cut connection stays cut"
            return answer, context.cause

    async def ask_all(self, acts: Iterable[Act]) -> list[tuple[Answer, Cause | None]]:
        begin = len(self.acts)
        self.acts += acts
        found: list[tuple[Answer, Cause | None]] = []
        for first in range(begin, len(self.acts), AT_ONCE):
            numbers = range(first, min(first + AT_ONCE, len(self.acts)))
            found += await asyncio.gather(*map(self.ask, numbers))
        return found


@asynccontextmanager
async def rig(timeouts: Timeouts = QUICK) -> AsyncIterator[Rig]:
    gw = Rig()
    async with service(gw.handle) as upstream:
        gw.upstream = upstream
        target = Target(name="api", prefix="/api", replicas=(upstream.url,), timeouts=timeouts)
        gw.proxy = ProxyApp([target])
        async with serving_at_the_edge(gw) as gw.port:
            yield gw
            await until(lambda: not gw.proxy.exchanges and gw.proxy.open_connections == upstream.open)


def is_error(answer: Answer) -> bool:
    """The gateway's own."""
    return answer.status in (502, 504) and answer.whole and answer.body.startswith(b'{"error":{"type":')


def says(data: bytes, then: Callable[[Writer], object]) -> Act:
    async def act(writer: Writer) -> None:
        writer.write(data)
        then(writer)

    return act


def byte_by_byte(data: bytes, then: Callable[[Writer], object] = Writer.close) -> Act:
    async def act(writer: Writer) -> None:
        for byte in data:
            if writer.is_closing():
                return
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        then(writer)

    return act


def stays(writer: Writer) -> None:
    """Do nothing more."""


# Death


@pytest.mark.parametrize("end", [Writer.close, reset], ids=["FIN", "RST"])
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("anyio_backend", BOTH, ids=["uvloop", "asyncio"])
async def test_death_at_any_byte_is_an_error_or_a_cut_never_a_whole_answer(
    name: str, end: Callable[[Writer], object]
) -> None:
    whole = ANSWERS[name]
    starts = whole.rindex(b"HTTP/1.1")
    head_ends = whole.index(b"\r\n\r\n", starts) + 4
    async with rig() as gw:
        found = await gw.ask_all(says(whole[:offset], end) for offset in range(len(whole) + 1))
        for offset, (answer, cause) in enumerate(found):
            case = (offset, answer, cause)
            if offset == 0:
                assert (answer.status, cause) == (502, Cause.RESET), case
                assert is_error(answer), case
            elif offset < head_ends:
                assert answer.status == 502, case
                assert is_error(answer), case
                assert cause is Cause.GARBLED, case
            elif name == "until close":
                if end is reset:
                    assert cause is Cause.CUT_SHORT, case
                    assert is_error(answer) or not answer.whole, case
                else:
                    assert cause is Cause.COMPLETED, case
                    assert (answer.status, answer.body, answer.whole) == (200, whole[head_ends:offset], True), case
            elif offset < len(whole):
                assert cause is Cause.CUT_SHORT, case
                assert is_error(answer) or (answer.status == 200 and not answer.whole), case
                if name == "events" and not is_error(answer):
                    told = b"".join(answer.body.partition(b"event: error\n")[1:])
                    events = answer.body.removesuffix(told)
                    assert bool(told) == (not events or events.endswith(b"\n\n")), case
            else:
                assert cause is Cause.COMPLETED, case
                assert answer.whole, case
                assert answer.body in (b"hello world", b"data: 1\n\ndata: 2\n\n", b""), case


@pytest.mark.parametrize("name", ANSWERS)
async def test_every_answer_passes_byte_by_byte(name: str) -> None:
    whole = ANSWERS[name]
    async with rig() as gw:
        [(answer, cause)] = await gw.ask_all([byte_by_byte(whole)])
        assert cause is Cause.COMPLETED
        expected = await read(whole)
        assert expected is not None
        assert (answer.status, answer.body, answer.whole) == (expected.status, expected.body, True)


# Lies


async def read(sent: bytes) -> Answer | None:
    """What a reader by the letter takes these bytes, and the connection's end, for; None for no whole answer.

    Line ends before a status line are read over: they harm nobody.
    """
    reader = asyncio.StreamReader(limit=1 << 20)
    reader.feed_data(re.sub(rb"(\A|\r\n\r\n)[\r\n]+(?=HTTP/)", rb"\1", sent))
    reader.feed_eof()
    try:
        answer = await read_answer(reader)
    except (UnsoundError, asyncio.IncompleteReadError):
        return None
    return answer if answer.whole else None


def judge(sent: bytes, expected: Answer | None, answer: Answer, cause: Cause | None) -> None:
    """A whole answer that reached the client is what the letter says; whatever else came is an error or a cut."""
    case = (sent, answer, cause)
    if is_error(answer) or not answer.whole:
        assert cause in (Cause.GARBLED, Cause.CUT_SHORT, Cause.RESET, Cause.STALLED, Cause.FIRST_BYTE_TIMEOUT), case
        return
    assert expected is not None, case
    assert cause in (Cause.COMPLETED, Cause.ERROR_EVENT), case
    assert (answer.status, answer.body) == (expected.status, expected.body), case
    hidden = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"trailer", b"upgrade"}
    here = [field for field in answer.headers if field[0] not in hidden]
    assert here == [field for field in expected.headers if field[0] not in hidden], case


JUNK = [
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\x80\xff",
    b":",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno",
    b"0",
]


@pytest.mark.parametrize("name", ANSWERS)
async def test_garbage_at_any_byte_never_passes_for_more_than_the_letter_allows(name: str) -> None:
    whole = ANSWERS[name]
    random = Random(name)
    sent = [
        whole[:offset] + junk + whole[offset:] for offset in range(len(whole) + 1) for junk in random.sample(JUNK, 4)
    ]
    sent += [whole[:offset] + random.randbytes(9) + whole[offset + 9 :] for offset in range(len(whole))]
    sent += [whole[:offset] + whole[offset + 1 :] for offset in range(len(whole))]
    async with rig() as gw:
        found = await gw.ask_all(says(data, Writer.close) for data in sent)
        for data, (answer, cause) in zip(sent, found, strict=True):
            judge(data, await read(data), answer, cause)


@pytest.mark.parametrize("name", ANSWERS)
async def test_garbage_and_then_silence_is_ended_by_its_timer(name: str) -> None:
    whole = ANSWERS[name]
    random = Random(name)
    sent = [
        whole[:offset] + random.choice(JUNK) + whole[offset:] * random.randint(0, 1)
        for offset in range(0, len(whole), 2)
    ]
    async with rig() as gw:
        found = await gw.ask_all(says(data, stays) for data in sent)
        for data, (answer, cause) in zip(sent, found, strict=True):
            if cause is not Cause.ANSWER_TIMEOUT:
                judge(data, await read(data), answer, cause)


HEAD = b"HTTP/1.1 200 OK\r\n"
MALFORMED = [
    *(b"%b\r\nContent-Length: 2\r\n\r\nok" % line for line in (
        b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 099 OK", b"HTTP/1.1 +20 OK",
        b"HTTP/1.1 2x0 OK", b"HTTP/1.1  200 OK", b"http/1.1 200 OK",
        b"HTTP/1.1\t200 OK", b"HTTP/11 200 OK", b"HTTP/1.10 200 OK", b"HTTP /1.1 200 OK", b" HTTP/1.1 200 OK",
        b"ICY 200 OK", b"GET / HTTP/1.1", b"HTTP/1.1 200 O\rK",
        b"HTTP/1.1 000 OK", b"HTTP/1.1 200OK", b"HTTP/2.0 200 OK", b"HTTP/0.9 200 OK",
        b"RTSP/1.0 200 OK", b"HTTP/1.1 200 O\0K", b"\xef\xbb\xbfHTTP/1.1 200 OK",
    )),
    *(HEAD + b"Content-Length:%b\r\n\r\nok" % value for value in (
        b"", b" ", b" 2, 2", b" 2,3", b" +2", b" -2", b" 0x2", b" 2_0", b" 2 2", b" 2.0", b" 2;", b" \xb2", b" two",
        b" 2\0", b" 2\r\n 3", b" 99999999999999999999999999",
    )),
    *(HEAD + b"Transfer-Encoding:%b\r\n\r\n2\r\nok\r\n0\r\n\r\n" % value for value in (
        b"", b" gzip", b" gzip, chunked", b" chunked, gzip", b" chunked, chunked", b" xchunked", b" chunkedx",
        b" \"chunked\"", b" chunked;q=1", b" identity", b" identity, chunked", b" chunked,", b" ,chunked",
        b" \x0bchunked", b" chunked\0", b" chunked\r\n gzip", b" chunked\r\nTransfer-Encoding: chunked",
        b" chunked\r\nContent-Length: 2",
        b" chunked\r\nTransfer-Encoding: identity", b" identity\r\nTransfer-Encoding: chunked",
    )),
    b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    HEAD + b"Content-Length: 2\r\ncontent-length: 3\r\n\r\nok",
    *(HEAD + b"%b\r\nContent-Length: 2\r\n\r\nok" % line for line in (
        b"X-A : b", b" X-A: b", b"\tX-A: b", b"X-A: b\r\n c", b"X-A: b\r\n\tc", b": b", b"X-A", b"X A: b", b"X-\0A: b",
        b"X-A: \0", b"X-A: b\rc", b"X-A: b\nX-B: c", b"X-A: \x01", b"X-A: \x7f", b"X-\xe9: b", b"X(A): b", b"X-A\r: b",
        b"X-A: b\n", b"\n", b"\r", b"X-A: b\r", b"X\"A: b", b"X@A: b", b"X,A: b", b"X/A: b",
        b"Transfer-Encoding : chunked",
    )),
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\n\r\nok",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + LENGTH,
    b"HTTP/1.1 100 Continue\r\nContent-Length: 2\r\n\r\nok" + LENGTH,
    b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + LENGTH,
    b"HTTP/1.1 100 Continue\r\n\r\nnot an answer",
]  # fmt: skip


@pytest.mark.parametrize("way", [says, byte_by_byte], ids=["at once", "byte by byte"])
async def test_a_malformed_or_ambiguous_head_is_502_however_it_comes(way: Callable[..., Act]) -> None:
    async with rig() as gw:
        found = await gw.ask_all(way(data, Writer.close) for data in MALFORMED)
        passed = [
            (data, answer.status, answer.body, cause)
            for data, (answer, cause) in zip(MALFORMED, found, strict=True)
            if not (answer.status == 502 and is_error(answer) and cause is Cause.GARBLED)
        ]
        assert not passed


BAD_CHUNKS = [
    *(b"%b\r\nok\r\n0\r\n\r\n" % size for size in (
        b"", b" ", b"-2", b"+2", b"0x2", b"2 ", b" 2", b"2_", b"g", b"2\0", b"10000000000000002", b"fffffffffffffffff",
        b"2\r", b"2;\0", b"2;a\rb", b"2;a\nb", b"2,a", b"\xb2", b"two",
    )),
    b"2\nok\r\n0\r\n\r\n", b"2\r\nok\n0\r\n\r\n", b"2\r\nok0\r\n\r\n", b"2\r\nokay\r\n0\r\n\r\n",
    b"2\r\nok\r\r\n0\r\n\r\n",
    b"2\r\no\r\n0\r\n\r\n", b"2\r\nok\r\n0\n\n", b"2\r\nok\r\n\r\n",
    b"2\r\nok\r\n0\r\n X-A: b\r\n\r\n", b"2\r\nok\r\n0\r\nX-A: \0\r\n\r\n", b"2\r\nok\r\n0\r\nX A: b\r\n\r\n",
    b"2\r\nok\r\n0\r\nX-A: b\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("way", [says, byte_by_byte], ids=["at once", "byte by byte"])
async def test_unsound_chunks_never_look_whole(way: Callable[..., Act]) -> None:
    async with rig() as gw:
        head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        found = await gw.ask_all(way(head + data, Writer.close) for data in BAD_CHUNKS)
        passed = [
            (data[:50], answer, cause)
            for data, (answer, cause) in zip(BAD_CHUNKS, found, strict=True)
            if cause not in (Cause.GARBLED, Cause.CUT_SHORT) or not (is_error(answer) or not answer.whole)
        ]
        assert not passed


@pytest.mark.parametrize(
    ("answer", "behind"),
    [
        (LENGTH, b"!"),
        (LENGTH, b"\r\n\r\n!"),
        (LENGTH, OK),
        (CHUNKED, OK),
        (CHUNKED, b"0\r\n\r\n"),
        (EMPTY, OK),
        (EMPTY, b"body"),
        (INTERIM, b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
@pytest.mark.parametrize("later", [False, True], ids=["along", "later"])
async def test_bytes_behind_an_answer_end_its_connection_and_reach_nobody(
    answer: bytes, behind: bytes, later: bool
) -> None:
    async def act(writer: Writer) -> None:
        writer.write(answer if later else answer + behind)
        if later:
            await until(lambda: idle(gw) == 1)
            writer.write(behind)

    async with rig(Timeouts()) as gw:
        gw.acts.append(act)
        async with asyncio.timeout(5), connected(gw.port) as (reader, writer):
            for number in (b"0", b"clean", b"clean"):
                writer.write(b"POST /api/%b HTTP/1.1\r\nHost: h\r\n\r\n" % number)
                got = await read_answer(reader)
                assert (got.body, got.whole) == (b"ok" if number == b"clean" else body_of(answer), True)
                if number == b"0":
                    await until(lambda: gw.proxy.open_connections == 0)
        assert [request.connection for request in gw.upstream.requests] == [1, 2, 2]


def body_of(answer: bytes) -> bytes:
    return b"" if answer is EMPTY else b"hello world"


def idle(gw: Rig) -> int:
    return sum(pool.idle for route in gw.proxy._routes.values() for pool in route.pools.values())


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (b"", Cause.FIRST_BYTE_TIMEOUT),
        (b"HTTP/1.1 200 OK\r\nX-A", Cause.FIRST_BYTE_TIMEOUT),
        (b"HTTP/1.1 100 Continue\r\n\r\n", Cause.FIRST_BYTE_TIMEOUT),
        (HEAD + b"Content-Length: 12\r\n\r\nhello world", Cause.STALLED),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", Cause.STALLED),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", Cause.STALLED),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", Cause.STALLED),
        (HEAD + b"\r\nhello", Cause.STALLED),
    ],
)
async def test_silence_in_any_place_is_ended_by_the_timer_of_that_place(answer: bytes, cause: Cause) -> None:
    async with rig() as gw:
        began = asyncio.get_running_loop().time()
        [(got, told)] = await gw.ask_all([says(answer, stays)])
        assert told is cause
        assert got.status == 504 if cause is Cause.FIRST_BYTE_TIMEOUT else not got.whole
        assert 0.3 <= asyncio.get_running_loop().time() - began < 2


# Rambling


ENDLESS = 16 << 20  # bytes


async def ramble(writer: Writer, start: bytes, again: bytes, told: list[int]) -> None:
    writer.write(start)
    while told[0] < ENDLESS and not writer.is_closing():
        writer.write(again)
        told[0] += len(again)
        await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    ("start", "again"),
    [
        (b"", b"x" * 4096),
        (b"HTTP/1.1 200 ", b"x" * 4096),
        (HEAD, b"X-A: b\r\n"),
        (HEAD, b"X-Long: " + b"b" * 4000 + b"\r\n"),
        (HEAD + b"X-A: ", b"b" * 4096),
        (HEAD, b"x" * 4096),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </" + b"a" * 4000 + b">\r\n\r\n"),
        (b"HTTP/1.1 103 Early Hints\r\n", b"Link: </a>\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2;", b"a" * 4096),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 4096),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-A: ", b"b" * 4096),
    ],
)
async def test_an_endless_head_or_framing_is_cut_off_after_a_bounded_number_of_bytes(
    start: bytes, again: bytes
) -> None:
    told = [0]
    async with rig(Timeouts()) as gw:
        [(answer, cause)] = await gw.ask_all([lambda writer: ramble(writer, start, again, told)])
        assert cause is Cause.GARBLED
        assert is_error(answer) or not answer.whole
        assert told[0] < ENDLESS, "it was cut off, though not at once: the kernel holds much between the two"


# Dripping


async def drip(writer: Writer, start: bytes, again: bytes) -> None:
    writer.write(start)
    while not writer.is_closing():
        writer.write(again)
        await writer.drain()
        await asyncio.sleep(0.01)  # a tick of the gateway's timers


@pytest.mark.parametrize(
    ("start", "again", "cause"),
    [
        (b"HTTP/1.1 200 OK\r\nX-A: ", b"b", Cause.FIRST_BYTE_TIMEOUT),
        (HEAD + b"Content-Length: 100000\r\n\r\n", b"x", Cause.ANSWER_TIMEOUT),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", Cause.ANSWER_TIMEOUT),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffff\r\n", b"x", Cause.ANSWER_TIMEOUT),
        (HEAD + b"\r\n", b"x", Cause.ANSWER_TIMEOUT),
    ],
)
async def test_a_drip_is_ended_by_the_time_for_the_whole(start: bytes, again: bytes, cause: Cause) -> None:
    async with rig(Timeouts(first_byte=0.5, answer=0.5, stream=0.5)) as gw:
        [(answer, told)] = await gw.ask_all([lambda writer: drip(writer, start, again)])
        assert told is cause
        assert answer.status == 504 if cause is Cause.FIRST_BYTE_TIMEOUT else not answer.whole
