"""Reading a service's answers: strict where two readers could differ; what is accepted llhttp reads the same."""

import asyncio
from collections.abc import Iterable

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.context import Cause
from gateway.outbox import Outbox
from gateway.proxy import answers
from gateway.proxy.answers import REMEMBERED, read_head
from gateway.proxy.headers import Header, answer_fields, joined
from gateway.proxy.http1 import Http1Connection


class Wire(asyncio.Transport):
    """The transport under a connection that is fed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


LOOP = asyncio.new_event_loop()
LOOP.close()  # only its clock is needed


def read(pieces: Iterable[bytes], *, method: bytes = b"GET", closes: bool = False) -> tuple[Http1Connection, bytes]:
    """A connection that got these pieces as its answer, and the body; ``closes``: then the service closed it."""
    connection, wire = Http1Connection(LOOP, Outbox(LOOP)), Wire()
    connection.connection_made(wire)
    connection.request(method, b"/", b"h", b"", b"", b"")
    body = b""
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
            body += connection.take()
    if closes:
        connection.connection_lost(None)
    return connection, body


CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY = b"Content-Length: 0\r\n\r\n"
NGINX = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Sun, 22 Nov 2026 00:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b'Content-Length: 5\r\nConnection: keep-alive\r\nETag: "1"\r\n\r\nhello'
)
SOUND = [
    NGINX,
    b"HTTP/1.1 200 OK\r\ndate: x\r\nserver: uvicorn\r\n" + EMPTY,
    b"HTTP/1.1 200 OK\r\nConnection: Keep-Alive, X-Own\r\nX-Own: 1\r\nX-B: 2\r\nContent-Length: 1\r\n\r\nx",
    b"HTTP/1.1 200 OK\r\nUpgrade: h2,h2c\r\nConnection: Upgrade, Keep-Alive\r\nKeep-Alive: timeout=5\r\n" + EMPTY,
    CHUNKS + b"5;a=b\r\nhello\r\n0A\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\n" + EMPTY,
    b"HTTP/1.1 200\r\n" + EMPTY,
    b"HTTP/1.1 200 \r\n" + EMPTY,
    b"HTTP/1.1 599 \xc3\xa9\r\n" + EMPTY,
    b"HTTP/1.1 404 Not Found\r\nX:\r\nY: \t a\tb \t\r\nZ: \xff\r\ncontent-length:3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n" + EMPTY,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
]


class Reference:
    """What llhttp makes of an answer."""

    def __init__(self, data: bytes) -> None:
        self.headers: list[Header] = []
        self.body = b""
        self.head_complete = self.complete = False
        self.parser = httptools.HttpResponseParser(self)
        self.parser.feed_data(data)
        self.status = self.parser.get_status_code()

    def on_message_begin(self) -> None:
        assert not self.complete, "a second answer"

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_complete:
            self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.goes_on = self.parser.should_keep_alive()
        if self.parser.get_status_code() < 200:
            self.headers = []
        else:
            self.head_complete = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = self.head_complete


def assert_same(data: bytes, connection: Http1Connection, body: bytes) -> None:
    reference = Reference(data)
    assert reference.head_complete
    assert (connection.status, connection.headers) == (
        reference.status,
        answer_fields(reference.headers, joined(reference.headers)),
    )
    assert (body, connection.complete) == (reference.body, reference.complete)
    if connection.complete:
        assert connection.reusable <= reference.goes_on


@pytest.mark.parametrize("data", SOUND)
def test_what_servers_send_is_read_as_the_reference_parser_reads_it_however_it_is_cut(data: bytes) -> None:
    connection, body = read([data])
    assert connection.complete
    assert connection.error is None
    assert_same(data, connection, body)
    for at in range(1, len(data)):
        again, its_body = read([data[:at], data[at:]])
        assert (again.headers, its_body, again.complete) == (connection.headers, body, True)
    singly, its_body = read(bytes([byte]) for byte in data)
    assert (singly.headers, its_body, singly.reusable) == (connection.headers, body, connection.reusable)


@pytest.mark.parametrize(
    ("data", "reusable"),
    [
        (NGINX, True),
        (NGINX + b"more", False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.1 200 OK\r\nConnection: x\r\nConnection: CLOSE\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 2\r\n\r\nok", True),
        (b"HTTP/1.1 204 No Content\r\n\r\nbody", False),
    ],
)
def test_a_connection_is_used_again_only_where_the_answer_allows_it_and_nothing_followed(
    data: bytes, reusable: bool
) -> None:
    connection, _ = read([data])
    assert (connection.complete, connection.reusable, connection.served) == (True, reusable, 1)


def test_an_answer_to_head_ends_with_its_head_and_keeps_its_length() -> None:
    connection, body = read([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"], method=b"HEAD")
    assert (connection.complete, connection.reusable, body) == (True, True, b"")
    assert connection.headers == [(b"content-length", b"5")]


def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    connection, body = read([b"HTTP/1.1 200 OK\r\n\r\nhel", b"lo"], closes=True)
    assert (connection.complete, connection.reusable, body, connection.error) == (True, False, b"hello", None)


LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\r\nHTTP/1.1 200 OK\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.2 200 OK\r\n\r\n",
        b"http/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 200 O\rK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        LENGTH + b"X: a\n\r\n",
        LENGTH + b"X: a\rb",
        LENGTH + b"X: a\0b",
        LENGTH + b"X: a\x7fb\r\n\r\n",
        LENGTH + b" folded\r\n",
        LENGTH + b"X : a\r\n",
        LENGTH + b"X\r\n\r\n",
        LENGTH + b": a\r\n\r\n",
        LENGTH + b"X\xe9: a\r\n\r\n",
        LENGTH + b"content-length: 2\r\n\r\nok",
        LENGTH + b"Transfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1234567890123456789\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
        CHUNKS + b"+5\r\n",
        CHUNKS + b"0x5\r\n",
        CHUNKS + b"5 \r\n",
        CHUNKS + b"hello",
        CHUNKS + b"5\nhello",
        CHUNKS + b"\r\n",
        CHUNKS + b"1234567890123456\r\n",
        CHUNKS + b"5\r\nhelloX\r\n",
        CHUNKS + b"0\r\nX : 1\r\n",
        CHUNKS + b"0\r\nX\r\n\r\n",
        CHUNKS + b"0\r\nX: \0\r\n",
        LENGTH + b"X: y\r\n" * 101,
        LENGTH + b"X: " + b"y" * 65_536,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
    ],
)
def test_what_two_readers_could_take_differently_is_garbled_at_once(data: bytes) -> None:
    """Without waiting for more: a service that waits as well must not hold the request until a deadline."""
    connection, _ = read([data])
    assert connection.error is not None
    assert connection.error.cause is Cause.GARBLED
    assert connection.is_closing
    assert not connection.reusable


LINES = st.sampled_from(
    [
        b"Server: nginx",
        b"Content-Length: 5",
        b"content-length:05 ",
        b"Content-Length: 5, 5",
        b"Transfer-Encoding: chunked",
        b"transfer-encoding: CHUNKED",
        b"Transfer-Encoding: identity",
        b"Connection: close",
        b"Connection: keep-alive, x-a",
        b"Connection: upgrade",
        b"Upgrade: h2c",
        b"X-A: \xff\t\x80",
        b"Trailer: x",
        b"Set-Cookie: a=b",
    ]
)
DATA = st.builds(
    lambda status, lines, body: b"\r\n".join((status, *lines)) + b"\r\n\r\n" + body,
    st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 204", b"HTTP/1.0 200 ", b"HTTP/1.1 100 c", b"HTTP/1.1 304 x"]),
    st.lists(LINES | st.binary(max_size=12) | st.tuples(LINES, st.binary(max_size=2)).map(b"".join), max_size=5),
    st.sampled_from([b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"5;x\r\nhello\r\n0\r\nT: 1\r\n\r\n", b"hel"])
    | st.binary(max_size=12),
)


@given(DATA)
def test_what_is_accepted_the_reference_parser_reads_in_the_same_way(data: bytes) -> None:
    connection, body = read([data])
    if connection.error is None and connection.complete and not connection.is_closing:
        assert_same(data, connection, body)


@given(DATA, st.data())
def test_an_answer_is_the_same_however_it_is_cut(data: bytes, draw: st.DataObject) -> None:
    connection, body = read([data])
    at = draw.draw(st.integers(1, len(data)))
    again, its_body = read([data[:at], data[at:]])
    assert again.complete == connection.complete
    if connection.complete:
        assert (again.headers, its_body) == (connection.headers, body)
    else:
        assert (again.error is None) == (connection.error is None)


def test_what_is_remembered_of_answers_is_bounded_and_holds_no_secret() -> None:
    for number in range(3 * REMEMBERED):
        read_head(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX-Token: secret%d" % (number, number))
        read_head(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nSet-Cookie: secret=%d" % number)
        read_head(b"HTTP/1.1 200 OK\r\nServer: %d\r\nVary: %b" % (number, b"long" * 300))
        read_head(b"HTTP/1.1 200 OK\r\nServer: %d" % number)
        read_head(b"HTTP/1.1 200 %d\r\nConnection: x-%d\r\nX-%d: y\r\n%b: z" % (number, number, number, b"long" * 300))
    readers = (answers.read_status_line, answers.read_name, answers.read_field_line, answers.read_connection, read_head)
    for reader in readers:
        memory = reader.__self__  # type: ignore[union-attr]
        assert 0 < len(memory) <= REMEMBERED
        assert "secret" not in repr(memory)
        assert "longlong" not in repr(memory)


def test_a_head_that_comes_again_is_a_list_of_its_own_for_each_answer() -> None:
    first, _ = read([NGINX])
    first.headers.append((b"x", b"y"))
    second, _ = read([NGINX])
    assert (b"x", b"y") not in second.headers
