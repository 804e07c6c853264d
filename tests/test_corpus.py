"""Hundreds of generated exchanges through the gateway: what it does not have to change arrives as it was sent.

Both sides are read by the letter of RFC 9112, over kept-alive connections, with every write cut at random places. A
request names its number, its body and its answer's repeat it, so that bytes of one exchange in another show.

What the gateway changes, all of it: field names come in lower case and values without the space around them; fields
that are for one hop, and look-alikes of those that matter, are gone (EDGE.md, 1 to 4, 11); ``Host`` and what tells of
forwarding is its own (29 to 31); a body may come in the other framing, without extensions and trailers (12, 14, 15,
62); interim answers stay behind (60); the words behind a status are the usual ones or none, for ASGI has no place for
others; an absolute target becomes a path (22), and a ``?`` with nothing behind it may go (SPEC.md, 2).
"""

import asyncio
import gzip
import shutil
import socket
import subprocess
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.app import create_app
from gateway.policies.services import Service as Target
from gateway.proxy.app import ProxyApp
from gateway.server.http1 import METHODS
from gateway.settings import Settings
from tests.wire import (
    Answer,
    Reader,
    Request,
    Service,
    Writer,
    both_event_loops,
    connected,
    read_answer,
    read_body,
    service,
    serving_at_the_edge,
    until,
)

COUNT = 640
PATIENCE = 20  # seconds for an answer
PREFIX = b"/api/v1/search"
SIZES = [0, 1, 2, 15, 4095, 4096, 4097, 16383, 16384, 16385, 65535, 65536, 65537, 131073]
STATUSES = [200] * 8 + [201, 202, 203, 206, 206, 207, 226, 300, 301, 302, 303, 307, 308, 400, 401, 402, 403, 404, 404]
STATUSES += [405, 406, 409, 410, 412, 413, 415, 416, 418, 418, 422, 426, 429, 431, 451, 499, 500, 501, 502, 503, 503]
STATUSES += [504, 505, 511, 599, 204, 204, 205, 304, 304]
BODILESS = (204, 304)
FORWARDING = {b"via", b"forwarded", b"x-real-ip", b"x-gateway-attempt"} | {
    b"x-forwarded-%b" % rest for rest in (b"for", b"proto", b"host", b"port", b"prefix")
}
FRAMING = {b"content-length", b"transfer-encoding"}
Pair = tuple[bytes, bytes]
anyio_backend = both_event_loops


# What is exchanged


@dataclass(frozen=True, slots=True)
class Field:
    """A header field as it is sent; ``crosses``: it is to arrive on the other side."""

    name: bytes
    value: bytes
    crosses: bool = True


SPACE = (*[(b" ", b"")] * 6, (b"", b""), (b" \t ", b""), (b" ", b" "), (b"", b"\t"), (b"\t", b" \t "))  # RFC 9112, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request or an answer: its start line, its fields, its body as meant and as framed."""

    line: bytes
    fields: list[Field]
    body: bytes
    framing: str  # none, length, chunked or close
    framed: bytes
    before: bytes = b""  # interim answers
    space: tuple[Pair, ...] = SPACE

    @property
    def crossing(self) -> list[Pair]:
        return [(each.name.lower(), each.value) for each in self.fields if each.crosses]

    def wire(self, random: Random) -> bytes:
        """As it is sent, with the space around values that RFC 9112 5 allows."""
        lines = [self.line]
        for each in self.fields:
            before, after = random.choice(self.space)
            lines.append(each.name + b":" + before + each.value + after)
        return self.before + b"\r\n".join(lines) + b"\r\n\r\n" + self.framed


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A request, what it is to be at the service, and the answer.

    Attributes:
        targets: the forms in which the target may arrive.
        forwarding: what the gateway is to say of whom the request is from, but for its own name in ``Via``.
        closes: the client's connection ends with it.
        waits: for a 100 before it sends its body.
        hangs_up: the service closes its connection behind the answer.
    """

    number: int
    method: bytes
    targets: tuple[bytes, ...]
    request: Sent
    forwarding: dict[bytes, bytes]
    answer: Sent
    status: int
    closes: bool
    waits: bool
    hangs_up: bool


NOBODY: dict[bytes, bytes] = {}
GROUPS: list[list[Field]] = [  # of a request; those of a group come together
    [Field(b"Accept", b"*/*"), Field(b"Accept-Encoding", b"gzip;q=0.5, br, *;q=0")],
    [Field(b"User-Agent", b"curl/8.0 (odd; \xc3\xa9)")],
    [Field(b"X-Empty", b""), Field(b"X-Empty", b"")],
    [Field(b"X-Repeat", b"2"), Field(b"X-Other", b"-"), Field(b"x-repeat", b"1"), Field(b"X-REPEAT", b"2")],
    [Field(b"Cookie", b"a=b; c=d"), Field(b"Cookie", b'e="f"')],
    [Field(b"X-Tab", b"a\tb\t\tc"), Field(b"X-Spaces", b"a  b   c")],
    [Field(b"X-Obs-Text", bytes(range(0x80, 0x100)))],
    [Field(b"X-Visible", bytes(range(0x21, 0x7F)))],
    [Field(b"!#$%&'*+-.^_`|~09AZaz", b"a name of every kind of character")],
    [Field(b"X_Underscore", b"kept"), Field(b"x__", b"")],
    [Field(b"Content_Length", b"7", crosses=False), Field(b"Transfer_Encoding", b"chunked", crosses=False)],
    [Field(b"X_User_ID", b"root", crosses=False), Field(b"Authorization", b"Bearer a.b-c_d~e+f/g=")],
    [Field(b"X-User-ID", b"alice"), Field(b"Idempotency-Key", b"8e03978e-40d5-43dd-bc93-6894a57f9324")],
    [Field(b"Traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"), Field(b"Tracestate", b"a=1")],
    [Field(b"Content-Type", b'multipart/form-data; boundary="a b"'), Field(b"Content-Language", b"de, en")],
    [Field(b"Range", b"bytes=0-1,-2"), Field(b"If-None-Match", b'"a,b", W/"c"'), Field(b"If-Range", b'"a"')],
    [Field(b"X-Quoted", b'"a\\"b", c'), Field(b"X-List", b",, a,,b , ,"), Field(b"X-Colons", b":a:b::")],
    [Field(b"X-Long", b"0123456789abcdef" * 500)],
    [Field(b"X-Number-%d" % each, b"%d" % each) for each in range(70)],
    [Field(b"TE", b"trailers, deflate;q=0.5", crosses=False), Field(b"Trailer", b"X-Sum", crosses=False)],
    [Field(b"Keep-Alive", b"timeout=5", crosses=False), Field(b"Connection", b"Keep-Alive", crosses=False)],
    [Field(b"Proxy-Authorization", b"Basic YQ==", crosses=False), Field(b"Proxy-Connection", b"x", crosses=False)],
    [
        Field(b"X-Hop", b"1", crosses=False),
        Field(b"Connection", b"keep-alive, X-HOP,", crosses=False),
        Field(b"x-hop", b"2", crosses=False),
    ],
    [
        Field(b"Connection", b"", crosses=False),
        Field(b"Connection", b", x-second ,", crosses=False),
        Field(b"X-Second", b"", crosses=False),
    ],
    [
        Field(b"Connection", b"Upgrade, HTTP2-Settings", crosses=False),
        Field(b"Upgrade", b"h2c", crosses=False),
        Field(b"HTTP2-Settings", b"AAMAAABkAAQAAP__", crosses=False),
    ],
]
ANSWER_GROUPS: list[list[Field]] = [
    [Field(b"Server", b"odd/1 (\xe9)"), Field(b"Date", b"Thu, 27 Nov 2025 10:30:00 GMT")],
    [Field(b"Set-Cookie", b"a=b; Path=/; Expires=Thu, 27 Nov 2025 10:30:00 GMT"), Field(b"Set-Cookie", b"c=d")],
    [Field(b"X-Empty", b""), Field(b"x-empty", b"")],
    [Field(b"X-Repeat", b"2"), Field(b"Vary", b"*"), Field(b"x-repeat", b"1"), Field(b"X-REPEAT", b"2")],
    [Field(b"X-Tab", b"a\tb\t\tc"), Field(b"X-Spaces", b"a  b   c")],
    [Field(b"X-Obs-Text", bytes(range(0x80, 0x100)))],
    [Field(b"X-Visible", bytes(range(0x21, 0x7F)))],
    [Field(b"!#$%&'*+-.^_`|~09AZaz", b"a name of every kind of character"), Field(b"Content_Length", b"7")],
    [Field(b"X-Long", b"0123456789abcdef" * 1500)],
    [Field(b"X-Number-%d" % each, b"%d" % each) for each in range(70)],
    [Field(b"Location", b"/a%2Fb?c=d&e#f"), Field(b"Link", b"</a>; rel=next, </b>; rel=last")],
    [Field(b"Content-Type", b"text/html; charset=ISO-8859-1"), Field(b"ETag", b'W/"\xe4"')],
    [Field(b"Content-Type", b"text/event-stream"), Field(b"Cache-Control", b"no-cache")],
    [Field(b"Content-Range", b"bytes 0-1/2"), Field(b"Accept-Ranges", b"none"), Field(b"Age", b"0")],
    [Field(b"WWW-Authenticate", b'Basic realm="a,b"'), Field(b"WWW-Authenticate", b"Bearer")],
    [Field(b"Via", b"1.0 fred"), Field(b"X-Forwarded-For", b"of the service's own"), Field(b"Retry-After", b"7")],
    [Field(b"Keep-Alive", b"timeout=5", crosses=False), Field(b"Connection", b"keep-alive", crosses=False)],
    [Field(b"Proxy-Authenticate", b"Basic", crosses=False), Field(b"Trailer", b"X-Sum", crosses=False)],
    [Field(b"Upgrade", b"h2c", crosses=False), Field(b"Connection", b"upgrade", crosses=False)],
    [
        Field(b"X-Hop", b"1", crosses=False),
        Field(b"Connection", b"X-HOP, ,", crosses=False),
        Field(b"Connection", b"x-second", crosses=False),
        Field(b"X-Second", b"", crosses=False),
        Field(b"x-hop", b"2", crosses=False),
    ],
]
US = b"127.0.0.1"
SAID = {
    b"x-forwarded-for": US,
    b"x-forwarded-proto": b"http",
    b"x-forwarded-host": b"gateway.test",
    b"x-gateway-attempt": b"1",
    b"via": b"",
}
FORWARDED: list[tuple[list[Pair], dict[bytes, bytes]]] = [  # what a trusted peer says, and what comes of it
    *[([], {})] * 6,
    ([(b"X-Forwarded-For", b"203.0.113.9")], {b"x-forwarded-for": b"203.0.113.9, " + US}),
    ([(b"X-Real-IP", b"203.0.113.9"), (b"X-Forwarded-Port", b"443")], {}),
    ([(b"Via", b"1.0 fred"), (b"Via", b"1.1 nginx")], {b"via": b"1.0 fred, 1.1 nginx, "}),
    (
        [
            (b"X-Forwarded-For", b"203.0.113.9, 198.51.100.1"),
            (b"X-Forwarded-Proto", b"https"),
            (b"X-Forwarded-For", b"198.51.100.2"),
            (b"X-Forwarded-Host", b"a.example"),
            (b"X-Forwarded-Prefix", b"/p"),
            (b"Forwarded", b'for=203.0.113.9;by="[::1]"'),
        ],
        {
            b"x-forwarded-for": b"203.0.113.9, 198.51.100.1, 198.51.100.2, " + US,
            b"forwarded": b'for=203.0.113.9;by="[::1]", for=' + US,
        },
    ),
]
ESCAPED = [b"%%%02x" % byte for byte in range(1, 256)] + [b"%%%02X" % byte for byte in range(1, 256)]
SEGMENTS = [
    b"",
    b"",
    b".",
    b"a",
    b"a.b",
    b"...",
    b"..a",
    b"a..",
    b"%2e%2e%2e",
    b"a;p=1",
    b";",
    b";a=b;c",
    b"~",
    b"-._~",
]
SEGMENTS += [
    b"!$&'()*+,;=:@",
    b'"<>^`{|}',
    b"a+b",
    b"%2B",
    b"%20",
    b"a%2Fb",
    b"%252F",
    b"%25",
    b"\xc3\xa9",
    b"\xff\x80",
]
SEGMENTS += ["日本語".encode(), b"%E6%97%A5", b"%c3%28", b"a" * 300, b"b/../c", b"b/%2e%2e/c", b"b/..;x/c"]
QUERIES = [b"a=1", b"a=1&a=1&b=2&a=0", b"b=2;a=1", b"&&=&=a&a=", b"q=a+b%20c", b"?a?b?", b"a=/../b//c", b"%", b"%zz%1"]
QUERIES += [b"u=http://a.example/?b=c%26d", b"[]={}|\\^`\"<>'", b"\xc3\xa9=\xff", "日=本".encode(), b"a", b"%00%0d%0a"]


def body_of(number: int, size: int) -> bytes:
    return (b"<%d>" % number * (size // 3 + 1))[:size]


def chunked(body: bytes, random: Random) -> bytes:
    """Frame a body in chunks, from single bytes to one for all, with extensions and trailers."""
    longest = random.choice([1, 7, 1000, 16384, 1 << 30])
    if longest == 1 and len(body) > 5000:
        longest = 5000
    framed = bytearray()
    at = extended = 0
    while at < len(body):
        piece = body[at : at + (longest if longest in (1, 1 << 30) else random.randint(1, longest))]
        at += len(piece)
        size = random.choice([b"%x", b"%x", b"%X", b"00%x"]) % len(piece)
        if random.random() < 0.2 and extended < 20:
            extended += 1
            size += random.choice([b";a", b";a=b;c=d", b';q="x; y\t\xe9"', b';q="a\\"b"'])
        framed += size + b"\r\n" + piece + b"\r\n"
    framed += random.choice([b"0\r\n\r\n", b"0\r\n\r\n", b"000;last\r\n\r\n", b"0\r\nX-Sum: 1\r\nX-Number: 9\r\n\r\n"])
    return bytes(framed)


def fields_of(groups: list[list[Field]], number: int, random: Random, own: list[Field]) -> list[Field]:
    """Some groups of fields, each in its order, and one's own at some places among them."""
    chosen = [groups[number % len(groups)]]
    if random.random() < 0.7:
        chosen += random.sample(groups[:9] + groups[10:18], random.randint(0, 4))
    if any(len(group) > 50 for group in chosen):
        chosen = chosen[:1]
    fields: list[Field] = []
    for group in chosen:
        fields += [each for each in group if not any(each is there for there in fields)]
    for each in own:
        fields.insert(random.randint(0, len(fields)), each)
    return fields


def target_of(number: int, random: Random) -> bytes:
    segments = [random.choice(SEGMENTS) for _ in range(random.choice([0, 1, 1, 2, 3, 6]))]
    segments.append(b"".join(ESCAPED[(number * 3 + each) % len(ESCAPED)] for each in range(3)))
    segments.append(SEGMENTS[number % len(SEGMENTS)])
    path = PREFIX + b"/" + b"/".join(segments)
    path = path.replace(b"%5c", b"").replace(b"%5C", b"")  # with dots about it, a way out of the prefix
    if number % 40 == 7:
        path += b"/" + b"long" * 3700
    if random.random() < 0.6:
        path += b"?" + b"&".join(random.choice(QUERIES) for _ in range(random.randint(1, 3)))
    return path


def exchange(number: int, random: Random) -> Exchange:
    methods = sorted({*map(str.encode, METHODS.values())} - {b"CONNECT", b"TRACE"})
    method = random.choice([b"GET", b"POST", b"POST", b"PUT", b"HEAD"])
    if number % 4 == 1:
        method = methods[number // 4 % len(methods)]
    target = sent_target = target_of(number, random)
    targets: tuple[bytes, ...] = (target,)
    if number % 31 == 5:
        sent_target = b"http://gateway.test" + target
    elif number % 31 == 6 and b"?" not in target:
        sent_target, targets = target + b"?", (target, target + b"?")
    said, differs = random.choice(FORWARDED)
    forwarding = SAID | {name.lower(): value for name, value in said} | differs

    # The request
    version = b"1.0" if number % 37 == 3 else b"1.1"
    closes = version == b"1.0" or random.random() < 0.05
    bodied = method in (b"POST", b"PUT", b"PATCH") or random.random() < 0.1
    size = SIZES[(number // 3) % len(SIZES)]
    body = body_of(number, size) if bodied else b""
    if bodied and number % 11 == 0:
        body = gzip.compress(body, mtime=0)
    own = [Field(b"Host", b"gateway.test", crosses=False), Field(b"X-Number", b"%d" % number)]
    own += [Field(name, value, crosses=False) for name, value in said[:1]]
    framing, framed = "none", b""
    if bodied and version == b"1.1" and random.random() < 0.5:
        framing, framed = "chunked", chunked(body, random)
        own.append(Field(b"Transfer-Encoding", random.choice([b"chunked", b"Chunked"]), crosses=False))
    elif bodied:
        framing, framed = "length", body
        own.append(Field(b"Content-Length", b"%d" % len(body), crosses=False))
    if bodied and number % 11 == 0:
        own.append(Field(b"Content-Encoding", b"gzip"))
    if closes and version == b"1.1":
        own.append(Field(b"Connection", random.choice([b"close", b"Close", b"x, close"]), crosses=False))
    waits = bool(framed) and version == b"1.1" and random.random() < 0.1
    if waits:
        own.append(Field(b"Expect", b"100-continue", crosses=False))
    fields = fields_of(GROUPS, number, random, own)
    fields += [Field(name, value, crosses=False) for name, value in said[1:]]
    line = b"%b %b HTTP/%b" % (method, sent_target, version)
    request = Sent(line=line, fields=fields, body=body, framing=framing, framed=framed)

    # The answer
    status = random.choice(STATUSES)
    size = SIZES[(number // 5) % len(SIZES)]
    nothing = method == b"HEAD" or status in BODILESS
    body = b"" if status == 205 else body_of(number, size)
    own = [Field(b"X-Number", b"%d" % number)]
    if number % 13 == 0:
        body = gzip.compress(body, mtime=0)
        own.append(Field(b"Content-Encoding", b"gzip"))
    framing = random.choice(["length", "length", "chunked", "chunked", "close"])
    if status == 204 or (nothing and framing == "close"):
        framing = "none"
    hangs_up = framing == "close"
    version = b"1.1"
    framed = body
    if framing == "length":
        own.append(Field(b"Content-Length", b"%d" % len(body)))
        if random.random() < 0.1:
            own.append(Field(b"Connection", b"close", crosses=False))
            hangs_up = random.random() < 0.5
        elif random.random() < 0.1:
            version = b"1.0"
            own.append(Field(b"Connection", b"keep-alive", crosses=False))
    elif framing == "chunked":
        own.append(Field(b"Transfer-Encoding", random.choice([b"chunked", b"CHUNKED"]), crosses=False))
        framed = chunked(body, random)
    elif framing == "close":
        version = random.choice([b"1.0", b"1.1"])
        if version == b"1.1" and random.random() < 0.5:
            own.append(Field(b"Connection", b"close", crosses=False))
    line = b"HTTP/%b %d" % (version, status) + random.choice([b" OK", b" ", b" Odd\t(\xe9) words", b""])
    interim = [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        b"HTTP/1.1 199\r\n\r\n",
    ]
    before = b"".join(random.choices(interim, k=random.randint(1, 8))) if number % 7 == 0 else b""
    fields = fields_of(ANSWER_GROUPS, number, random, own)
    if nothing:
        body = framed = b""
    answer = Sent(line=line, fields=fields, body=body, framing=framing, framed=framed, before=before)
    return Exchange(
        number=number,
        method=method,
        targets=targets,
        request=request,
        forwarding=forwarding,
        answer=answer,
        status=status,
        closes=closes,
        waits=waits,
        hangs_up=hangs_up,
    )


@cache
def corpus() -> list[Exchange]:
    random = Random(20251127)
    return [exchange(number, random) for number in range(COUNT)]


def test_the_corpus_has_a_case_of_everything_and_is_the_same_each_time() -> None:
    cases = corpus()
    assert cases == corpus.__wrapped__()
    assert {case.method.decode() for case in cases} == set(METHODS.values()) - {"CONNECT", "TRACE"}
    targets = b" ".join(case.targets[0] for case in cases)
    assert all(escape in targets for escape in ESCAPED if escape.upper() != b"%5C")
    for sent in ([case.request for case in cases], [case.answer for case in cases]):
        kinds = Counter((each.framing, len(each.body)) for each in sent)
        assert all(kinds["length", size] and kinds["chunked", size] for size in SIZES)
    assert {case.status for case in cases} == set(STATUSES)
    assert sum(case.answer.framing == "close" for case in cases) > 50
    assert sum(case.waits for case in cases) > 5


# How it is exchanged


def pieces(data: bytes, random: Random) -> Iterator[bytes]:
    """Cut bytes at random places: into one, a few, or all single ones."""
    if len(data) < 400 and random.random() < 0.1:
        places = list(range(1, len(data)))
    else:
        places = sorted(random.randint(0, len(data)) for _ in range(random.choice([0, 0, 1, 1, 2, 3, 8])))
    for begin, end in zip([0, *places], [*places, len(data)], strict=True):
        if begin < end:
            yield data[begin:end]


async def write_in_pieces(writer: Writer, data: bytes, random: Random) -> None:
    for piece in pieces(data, random):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # the reader's turn, so that it sees this piece by itself


@dataclass
class Arrived:
    """What came of the exchanges, by number."""

    requests: dict[int, list[Request]] = field(default_factory=dict)
    answers: dict[int, Answer] = field(default_factory=dict)


async def serve(
    cases: Sequence[Exchange], arrived: Arrived, random: Random, request: Request, reader: Reader, writer: Writer
) -> None:
    """The service: note the request, and answer by its number."""
    await read_body(request, reader)
    number = int(request.values(b"x-number")[0])
    arrived.requests.setdefault(number, []).append(request)
    case = cases[number]
    await write_in_pieces(writer, case.answer.wire(random), random)
    if case.hangs_up:
        writer.close()
        await writer.wait_closed()


async def ask(port: int, cases: Sequence[Exchange], arrived: Arrived, random: Random) -> None:
    """A client: have these exchanges in order, over few connections, some sent before the last answer."""
    waiting = deque(cases)
    while waiting:
        async with connected(port) as (reader, writer):
            while waiting:
                at_once = [waiting.popleft()]
                while waiting and not (at_once[-1].closes or waiting[0].waits) and random.random() < 0.2:
                    at_once.append(waiting.popleft())
                async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as both:
                    first = at_once[0]
                    if first.waits:
                        head, _, body = first.request.wire(random).partition(b"\r\n\r\n")
                        await write_in_pieces(writer, head + b"\r\n\r\n", random)
                        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
                    else:
                        body = first.request.wire(random)
                    data = body + b"".join(case.request.wire(random) for case in at_once[1:])
                    both.create_task(write_in_pieces(writer, data, random))
                    for case in at_once:
                        answer = await read_answer(reader, case.method)
                        assert answer.whole, case
                        assert case.number not in arrived.answers
                        arrived.answers[case.number] = answer
                if at_once[-1].closes:
                    async with asyncio.timeout(PATIENCE):
                        assert await reader.read() == b"", "nothing follows the last answer"
                    break


def differences(case: Exchange, requests: list[Request], answer: Answer, own: frozenset[bytes]) -> set[str]:
    """In what an exchange arrived otherwise than it was sent; ``own`` are fields that the proxy adds."""
    found: set[str] = set()
    if len(requests) != 1:
        return {"sent more than once" if requests else "never sent"}
    (request,) = requests
    sent = case.request
    found |= {"method"} if request.method != case.method else set()
    found |= {"target"} if request.target not in case.targets else set()
    not_ours = [pair for pair in request.fields if pair[0] not in FORWARDING | FRAMING | own | {b"host"}]
    found |= {f"request: {what}" for what in changes(not_ours, sent.crossing)}
    found |= {"request body"} if request.body != sent.body else set()
    framing = [value for name, value in request.fields if name in FRAMING]
    if sent.framing == "none":
        as_sent = not framing
    else:
        chunks = sent.framing == "chunked" and framing == [b"chunked"]
        as_sent = chunks or framing == [b"%d" % len(sent.body)]
    found |= set() if as_sent else {"request framing"}

    sent = case.answer
    found |= {"status"} if answer.status != case.status else set()
    left_out = own | {b"connection", b"transfer-encoding"}
    if sent.framing != "length":  # else its length is a field like others
        left_out |= {b"content-length"}
    fields = [pair for pair in answer.headers if pair[0] not in left_out]
    found |= {f"answer: {what}" for what in changes(fields, sent.crossing)}
    found |= {"answer body"} if answer.body != sent.body else set()
    found |= {"interim answer"} if answer.raw.count(b"\r\n\r\n") != 1 else set()
    return found


def changes(fields: list[Pair], sent: list[Pair]) -> set[str]:
    """How fields differ from what was sent: by name, those gone and those that came, else their order."""
    gone, more = Counter(sent) - Counter(fields), Counter(fields) - Counter(sent)
    named = {f"less {name.decode()}" for name, _ in gone} | {f"more {name.decode()}" for name, _ in more}
    return named or ({"order"} if fields != sent else set())


def describe(case: Exchange, arrived: Arrived) -> str:
    request = arrived.requests.get(case.number, [])
    answer = arrived.answers[case.number]
    return "\n".join(
        [
            f"number {case.number}: {case.request.line!r} {case.request.framing} {len(case.request.body)}",
            f"  sent     {[(each.name, each.value, each.crosses) for each in case.request.fields]}",
            f"  arrived  {[(each.method, each.target, each.fields, len(each.body)) for each in request]}",
            f"  answered {case.answer.line!r} {case.answer.framing} {len(case.answer.body)} {case.answer.fields}",
            f"  arrived  {answer.status} {answer.headers} {len(answer.body)}",
        ]
    )[:6000]


async def have_all(port: int, arrived: Arrived, cases: Sequence[Exchange], *, clients: int) -> None:
    async with asyncio.TaskGroup() as talks:
        for client in range(clients):
            talks.create_task(ask(port, cases[client::clients], arrived, Random(client)))


# Through the gateway


@asynccontextmanager
async def the_proxy(upstream: Service) -> AsyncIterator[tuple[int, frozenset[bytes], Callable[[], int]]]:
    """ProxyApp alone: its port, the fields it adds, and how many connections it holds."""
    target = Target(name="search", prefix=PREFIX.decode(), replicas=(upstream.url,), retries=0)
    proxy = ProxyApp([target], max_connections=6)
    async with serving_at_the_edge(proxy) as port:
        yield port, frozenset(), lambda: proxy.open_connections


@asynccontextmanager
async def the_whole_stack(upstream: Service) -> AsyncIterator[tuple[int, frozenset[bytes], Callable[[], int]]]:
    environ = {"SEARCH_SERVICE_URL": upstream.url, "RETRIES": "0", "CIRCUIT_BREAKER_FAILURE_THRESHOLD": "1000"}
    app = create_app(Settings.load({**environ, "RATE_LIMIT_PER_MINUTE": "off", "RATE_LIMIT_PER_HOUR": "off"}))
    app.proxy.max_connections = 6
    async with serving_at_the_edge(app) as port:
        yield port, frozenset({b"x-correlation-id"}), lambda: app.proxy.open_connections


@pytest.mark.parametrize(
    ("gateway", "clients"),
    [(the_proxy, 1), (the_proxy, 16), (the_whole_stack, 16)],
    ids=["proxy, one after another", "proxy, sixteen at once", "whole stack, sixteen at once"],
)
async def test_every_exchange_arrives_as_it_was_sent(gateway: Any, clients: int) -> None:
    cases = corpus()
    arrived = Arrived()
    async with service(partial(serve, cases, arrived, Random(1))) as upstream, gateway(upstream) as (port, own, open_):
        await have_all(port, arrived, cases, clients=clients)
        await until(lambda: open_() == upstream.open)
        assert upstream.connections <= sum(map(ends, cases)) + 6, "the others went over connections used before"
    wrong = {case.number: found for case in cases if (found := look(case, arrived, own))}
    assert not wrong, "\n".join(describe(cases[number], arrived) for number in list(wrong)[:3])
    for case in cases:
        assert_forwarding(case, arrived.requests[case.number][0])
        assert_framing(case, arrived.answers[case.number])


def ends(case: Exchange) -> bool:
    """The service's connection may not be used again."""
    said = any((each.name, each.value) == (b"Connection", b"close") for each in case.answer.fields)
    return case.hangs_up or said


def look(case: Exchange, arrived: Arrived, own: frozenset[bytes]) -> set[str]:
    return differences(case, arrived.requests.get(case.number, []), arrived.answers[case.number], own)


def assert_forwarding(case: Exchange, request: Request) -> None:
    """What the gateway says of the client, each once."""
    said = dict(case.forwarding)
    told = [(name, value) for name, value in request.fields if name in FORWARDING]
    via = dict(told)[b"via"]
    assert via.startswith(said[b"via"] + b"1.1 ai-gateway-"), case
    assert sorted(told) == sorted((said | {b"via": via}).items()), case
    assert request.values(b"host")[0].startswith(b"127.0.0.1:")
    assert len(request.values(b"host")) == 1


def assert_framing(case: Exchange, answer: Answer) -> None:
    """Each answer says in one way where it ends, and whether its connection does."""
    framing = [name for name, _ in answer.headers if name in FRAMING]
    if case.answer.framing != "length" and (case.method == b"HEAD" or case.status in BODILESS):
        assert framing == [], case
    elif case.request.line.endswith(b"1.0"):
        assert framing in ([], [b"content-length"]), case
    else:
        assert len(framing) == 1, case
    assert answer.values(b"connection") == ([b"close"] if case.closes else []), case


# Through nginx, as a control: what it does not change either is no peculiar demand of ours.
#
# Left out, for nginx 1.22 can't do it: tabs around a value (it takes them for a part of it, so that a Host or a length
# is malformed: 400), interim answers (it takes the first for the answer, before 1.29 but for 103), and
# connections that are to end by one of several Connection lines (it hears one of them), or in HTTP/1.0 with keep-alive.

NGINX_CHANGES = {
    "look-alikes of framing and identity pass, once underscores in names do at all (by default all such fields go)": {
        *("request: more content_length", "request: more transfer_encoding", "request: more x_user_id"),
    },
    "fields for one hop cross: all but Connection, Keep-Alive, TE, and Upgrade of a request": {
        *("request: more x-hop", "request: more x-second", "request: more http2-settings", "request: more trailer"),
        *("request: more proxy-authorization", "request: more proxy-connection"),
        *("answer: more x-hop", "answer: more x-second", "answer: more trailer", "answer: more upgrade"),
        "answer: more proxy-authenticate",
    },
    "Date and Server are its own": {"answer: less date", "answer: less server"},
    "of an answer's fields, those that it knows go first; of two Content-Types the last, with a charset": {
        *("answer: order", "answer: less content-type", "answer: more content-type"),
    },
}

NGINX = """
daemon off; master_process off; worker_processes 1; pid nginx.pid; error_log stderr crit;
events { worker_connections 256; }
http {
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    client_header_buffer_size 64k; large_client_header_buffers 4 64k; client_max_body_size 0;
    proxy_buffer_size 128k; proxy_buffers 8 128k; proxy_busy_buffers_size 256k;
    ignore_invalid_headers off; underscores_in_headers on; keepalive_requests 100000; server_tokens off;
    upstream service { server 127.0.0.1:%d; keepalive 6; keepalive_requests 100000; }
    server {
        listen 127.0.0.1:%d;
        location / {
            proxy_pass http://service; proxy_http_version 1.1; proxy_set_header Connection "";
            proxy_next_upstream off; proxy_request_buffering off;
        }
    }
}
"""


@asynccontextmanager
async def nginx(upstream: Service, directory: Path, port: int) -> AsyncIterator[None]:
    (directory / "nginx.conf").write_text(NGINX % (upstream.port, port))
    quiet = subprocess.DEVNULL
    command = ["nginx", "-p", str(directory), "-c", "nginx.conf"]
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)  # noqa: ASYNC220  it takes no time
    try:
        await until(lambda: is_listening(port) or process.poll() is not None, 10)
        assert process.poll() is None
        yield
    finally:
        process.kill()
        process.wait()


def says_more(request: Sent) -> bool:
    """It has several Connection lines, or one in HTTP/1.0."""
    lines = sum(each.name == b"Connection" for each in request.fields)
    return lines > 1 or (lines == 1 and request.line.endswith(b"1.0"))


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: no control to compare with")
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nginx_changes_only_what_is_listed(tmp_path: Path, port: int) -> None:
    spaces = ((b" ", b""), (b"", b""), (b"  ", b" "))
    cases = [
        replace(
            case, request=replace(case.request, space=spaces), answer=replace(case.answer, space=spaces, before=b"")
        )
        for case in corpus()
    ]
    arrived = Arrived()
    async with service(partial(serve, cases, arrived, Random(1))) as upstream, nginx(upstream, tmp_path, port):
        cases = [case for case in cases if not (case.closes and says_more(case.request))]
        await have_all(port, arrived, cases, clients=4)
    listed = set().union(*NGINX_CHANGES.values())
    own = frozenset({b"server", b"date"})
    wrong = [(found, describe(case, arrived)) for case in cases if (found := look(case, arrived, own) - listed)]
    assert not wrong, wrong[:3]
