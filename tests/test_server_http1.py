"""The parser of requests alone, beside llhttp."""

import httptools
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.edge import EdgeLimits
from gateway.server import http1
from gateway.server.http1 import METHODS, ChunkedBody, RefusedError, RequestHead, read_head, refuse_early

LIMITS = EdgeLimits()


class Reference:
    """What llhttp makes of a head."""

    def __init__(self, data: bytes) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = self.keeps_alive = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True
        self.keeps_alive = self.parser.should_keep_alive()  # once the message is over it has forgotten what was said


HOSTS = st.sampled_from([b"Host: a", b"Host: [::1]:80"])
FRAMING = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: 05",
        b"content-length:5 ",
        b"Transfer-Encoding: chunked",
        b"transfer-encoding: CHUNKED",
    ]
)


OTHERS = st.sampled_from(
    [
        b"Connection: close",
        b"Connection: keep-alive",
        b"Connection: keep-alive, x",
        b"connection:x ,\tClose ",
        b"Connection: ,close,",
        b"Connection: close x, closed, x-close",
        b"X: y",
        b"X_y:z",
        b"Expect: 100-continue",
        b"Cookie: a=b; c=d",
        b"Odd: \xff\t\x80",
    ]
)


FIELDS = HOSTS | FRAMING | OTHERS
LINES = st.one_of(FIELDS, st.binary(max_size=12), st.tuples(FIELDS, st.binary(max_size=2)).map(b"".join))
TARGETS = st.one_of(
    st.sampled_from([b"/", b"/a?b", b"//a", b"http://a/b", b"*"]), st.binary(max_size=5).map(lambda tail: b"/" + tail)
)


VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0"])
REQUEST_LINES = st.tuples(st.sampled_from([*METHODS, b"FOO"]), TARGETS, VERSIONS).map(b" ".join)
ANY_HEADS = st.tuples(REQUEST_LINES, st.lists(LINES, max_size=5)).map(lambda head: b"\r\n".join((head[0], *head[1])))
SOUND_HEADS = st.builds(
    lambda method, host, framing, others: b"\r\n".join((method + b" / HTTP/1.1", *others, host, *framing)),
    st.sampled_from([b"GET", b"POST", b"DELETE"]),
    HOSTS,
    st.lists(FRAMING, max_size=1),
    st.lists(OTHERS, max_size=4),
)


HEADS = ANY_HEADS | SOUND_HEADS


def accepted(head: bytes) -> RequestHead | None:
    try:
        return read_head(head, LIMITS)
    except RefusedError:
        return None


@given(HEADS)
def test_what_is_let_in_the_reference_parser_reads_in_the_same_way(head: bytes) -> None:
    request = accepted(head)
    if request is None:
        return
    (method, raw_path, _, query, version, _), headers, _, special = request
    if not raw_path.isascii() or not query.isascii():
        return  # where we are laxer: curl sends UTF-8 as it is
    reference = Reference(head + b"\r\n\r\n")
    assert reference.complete
    assert reference.parser.get_method().decode() == method
    assert reference.parser.get_http_version() == version
    target = raw_path + (b"?" + query if query else b"")
    assert reference.url.removeprefix(b"http://a").rstrip(b"?") == target.rstrip(b"?")
    theirs = [(name, value.strip(b" \t")) for name, value in reference.headers if b"_" not in name]
    ours = [field for field in headers if b"_" not in field[0]]
    assert ours == theirs or (version == "1.0" and ours[1:] == theirs)  # the authority became the Host
    if version == "1.1":
        assert reference.keeps_alive == (special is None or special.keep_alive)


@given(HEADS)
def test_a_head_means_the_same_when_its_lines_were_read_before(head: bytes) -> None:
    http1._FIELDS.clear()
    http1._REQUEST_LINES.clear()
    assert facts(accepted(head)) == facts(accepted(head))


def facts(request: RequestHead | None) -> object:
    if request is None:
        return None
    line, headers, length, special = request
    return line, headers, length, special and (special.keep_alive, special.expects_continue, special.websocket)


def test_requests_with_the_same_line_share_nothing_that_can_be_changed() -> None:
    first = read_head(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nConnection: close", LIMITS)
    second = read_head(b"POST /a HTTP/1.1\r\nHost: b", LIMITS)
    assert first[1][0] == (b"host", b"a")
    assert first[2] == 5
    assert first[3] is not None
    assert not first[3].keep_alive
    assert second[1:] == ([(b"host", b"b")], 0, None)


def test_what_is_remembered_of_requests_is_bounded_and_no_secret() -> None:
    for number in range(5000):
        read_head(b"GET /%d HTTP/1.1\r\nHost: a%d\r\nCookie: secret=%d" % (number, number, number), LIMITS)
        read_head(b"GET /?secret=%d HTTP/1.1\r\nHost: a\r\nAuthorization: secret %d" % (number, number), LIMITS)
        read_head(b"GET / HTTP/1.1\r\nHost: a\r\nX-User-ID: secret-%d\r\nX%d: secret" % (number, number), LIMITS)
        read_head(b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: %b%d" % (b"long" * 64, number), LIMITS)
    assert len(http1._FIELDS) <= 512
    assert len(http1._REQUEST_LINES) <= 256
    assert len(http1._PLAIN_NAMES) <= 1024
    remembered = [*http1._FIELDS, *http1._REQUEST_LINES, *http1._PLAIN_NAMES]
    assert not [line for line in remembered if b"secret" in line or len(line) > 256]


@given(HEADS, st.data())
def test_no_beginning_of_a_sound_head_is_refused_early(head: bytes, data: st.DataObject) -> None:
    if accepted(head) is not None:
        whole = head + b"\r\n\r\n"
        refuse_early(whole[: data.draw(st.integers(1, len(whole)))], LIMITS)


@given(
    st.lists(st.binary(min_size=1, max_size=30)),
    st.binary(max_size=10),
    st.sampled_from([b"", b";x=y"]),
    st.sampled_from([b"", b"A: b\r\n"]),
    st.data(),
)
def test_a_chunked_body_is_the_same_however_it_is_cut(
    chunks: list[bytes], rest: bytes, extension: bytes, trailer: bytes, data: st.DataObject
) -> None:
    coded = b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    coded += b"0" + extension + b"\r\n" + trailer + b"\r\n" + rest
    decoder = ChunkedBody()
    body, following, at = b"", None, 0
    while following is None:
        to = data.draw(st.integers(at + 1, len(coded)))
        piece, following = decoder.feed(coded[at:to])
        body += piece
        at = to
    assert body == b"".join(chunks)
    assert following + coded[at:] == rest
