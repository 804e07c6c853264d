"""Requests that a stranger would send to find out where two readers differ, and what is to become of each: data only.

Every case is followed on its connection by ``FOLLOWING``. Whether that one is a request, a body or nothing at all says
where the gateway believes the case to end. ``PSEUDONYM`` stands for the gateway's own name in ``Via``.
"""

from collections.abc import Iterator
from typing import NamedTuple

PATH = b"/api/v1/chat/x"
HOST = b"Host: shop.example"
FOLLOWING = b"GET /api/v1/chat/smuggled HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n"
PSEUDONYM = b"@PSEUDONYM@"
KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


class Arrives(NamedTuple):
    """A request as the service is to get it, but for what the gateway says of itself and of its peer.

    Attributes:
        fields: the client's that cross, each a line.
        body: None where the request says nothing of one.
        host: what the client called us, for ``X-Forwarded-Host``.
        named: by its correlation ID; empty where that is one of the gateway's making.
        via: what ``Via`` says before the gateway's own name.
        real_ip: it has an ``X-Real-IP``.
    """

    method: bytes = b"GET"
    target: bytes = PATH
    fields: tuple[bytes, ...] = ()
    body: bytes | None = None
    host: bytes = b"shop.example"
    named: bytes = b""
    via: bytes = b""
    real_ip: bool = False


class Case(NamedTuple):
    """What is sent, and what becomes of it.

    Attributes:
        line: of EDGE.md.
        answers: the statuses of all answers but that to ``FOLLOWING``.
        arrives: all requests that the service gets, but that one.
        goes_on: ``FOLLOWING`` is answered and arrives; else the connection is closed before it.
        may_begin: the service may see the beginning of one more request, and then its connection lost.
        leaves: the client sends nothing behind the case, and closes its side.
    """

    name: str
    line: int
    data: bytes
    answers: tuple[int, ...]
    arrives: tuple[Arrives, ...] = ()
    goes_on: bool = False
    may_begin: bool = False
    leaves: bool = False


def get(
    *lines: bytes, method: bytes = b"GET", target: bytes = PATH, version: bytes = b"HTTP/1.1", host: bytes = HOST
) -> bytes:
    return b"\r\n".join((b" ".join((method, target, version)), *([host] if host else []), *lines, b"", b""))


def post(*lines: bytes, body: bytes = b"", method: bytes = b"POST", version: bytes = b"HTTP/1.1") -> bytes:
    return get(*lines, method=method, version=version) + body


def chunked(*framed: bytes, lines: tuple[bytes, ...] = ()) -> bytes:
    return post(b"Transfer-Encoding: chunked", *lines, body=b"".join(framed))


def raw(*lines: bytes) -> bytes:
    """A GET whose lines are ended as given: nothing is added but the line before and the empty one behind."""
    return b"GET %b HTTP/1.1\r\n%b\r\n" % (PATH, HOST) + b"".join(lines)


HELLO = Arrives(method=b"POST", body=b"hello")
ONE_CHUNK = b"5\r\nhello\r\n0\r\n\r\n"
INNER = b"GET /api/v1/chat/inner HTTP/1.1\r\nHost: shop.example\r\n\r\n"
BIG = b"a" * 16_384
WEBSOCKET = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13", KEY)

# What is refused on sight: (name, bytes, status), by line of EDGE.md -------------------------------------------------

REFUSED: dict[int, list[tuple[str, bytes, int]]] = {
    5: [
        ("length, then chunked", post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=ONE_CHUNK), 400),
        ("chunked, then length", post(b"Transfer-Encoding: chunked", b"Content-Length: 15", body=ONE_CHUNK), 400),
        ("length 0 and chunked", post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=ONE_CHUNK), 400),
        (
            "a request within what one of the two counts",
            post(b"Content-Length: 60", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + INNER),
            400,
        ),
        (
            "a request within a chunk that the other cuts",
            post(b"Content-Length: 4", b"Transfer-Encoding: chunked", body=b"37\r\n" + INNER + b"\r\n0\r\n\r\n"),
            400,
        ),
        ("length and CHUNKED", post(b"Content-Length: 5", b"TRANSFER-ENCODING: CHUNKED", body=b"hello"), 400),
        ("length and gzip", post(b"Content-Length: 5", b"Transfer-Encoding: gzip", body=b"hello"), 400),
        ("length and identity", post(b"Content-Length: 5", b"Transfer-Encoding: identity", body=b"hello"), 400),
        ("length and an empty coding", post(b"Content-Length: 5", b"Transfer-Encoding:", body=b"hello"), 400),
        ("length and two codings", post(b"Content-Length: 5", *[b"Transfer-Encoding: chunked"] * 2), 400),
        ("both in a GET", get(b"Content-Length: 5", b"Transfer-Encoding: chunked") + ONE_CHUNK, 400),
        (
            "both, and Connection names the one",
            post(b"Connection: Content-Length", b"Content-Length: 5", b"Transfer-Encoding: chunked", body=ONE_CHUNK),
            400,
        ),
        (
            "both, far apart",
            post(b"Content-Length: 5", *[b"X: y"] * 60, b"Transfer-Encoding: chunked", body=ONE_CHUNK),
            400,
        ),
    ],
    6: [
        *(
            (f"length {value!r}", post(b"Content-Length:" + value, body=b"hello"), 400)
            for value in (
                b"",
                b" ",
                b" \t ",
                b" +5",
                b" -5",
                b" -0",
                b" +0",
                b" 0x5",
                b" 0X5",
                b" 0b101",
                b" 0o5",
                b" 5_0",
                b" 5.0",
                b" 5e0",
                b" 5 5",
                b" 5\t5",
                b" 5, 5",
                b" 5,5",
                b" 5,6",
                b" 5,",
                b" ,5",
                b" 5;a",
                b' "5"',
                b" 5h",
                b" five",
                b" \xc2\xb2",  # a digit to `str.isdigit`
                b" \xd9\xa5",  # the digit five, in Arabic
                b" \xef\xbc\x95",  # and fullwidth
                b" 5\xa0",
                b" \xa05",
                b" 0000000000000000005",
                b" 9223372036854775808",
                b" 18446744073709551621",  # 5 to who counts in 64 bits
                b" " + b"9" * 400,
            )
        ),
        ("two equal lengths", post(b"Content-Length: 5", b"Content-Length: 5", body=b"hello"), 400),
        ("two equal lengths, spelt differently", post(b"Content-Length: 5", b"content-length:5", body=b"hello"), 400),
        ("two equal lengths, one with a zero before", post(b"Content-Length: 5", b"Content-Length: 05"), 400),
        ("two lengths", post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello"), 400),
        ("two lengths, the first 0", post(b"Content-Length: 0", b"Content-Length: 55", body=INNER), 400),
        ("two lengths, the second 0", post(b"Content-Length: 55", b"Content-Length: 0", body=INNER), 400),
        ("two lengths of 0", get(b"Content-Length: 0", b"Content-Length: 0"), 400),
        ("three lengths", post(*[b"Content-Length: 5"] * 3, body=b"hello"), 400),
        ("a length and an empty one", post(b"Content-Length: 5", b"Content-Length:", body=b"hello"), 400),
        ("two lengths in HTTP/1.0", post(*[b"Content-Length: 5"] * 2, body=b"hello", version=b"HTTP/1.0"), 400),
        ("a length beyond what any service takes", post(b"Content-Length: 10485761", body=b"hello"), 413),
        ("a length beyond all memory", post(b"Content-Length: 999999999999999999", body=b"hello"), 413),
    ],
    7: [
        *(
            (f"coding {value!r}", post(b"Transfer-Encoding:" + value, body=ONE_CHUNK), 501)
            for value in (
                b"",
                b" gzip",
                b" identity",
                b" cow",
                b" trailers",
                b" gzip, chunked",
                b" chunked, gzip",
                b" chunked, identity",
                b" identity, chunked",
                b" chunked, chunked",
                b" chunked,",
                b" ,chunked",
                b" , chunked ,",
                b" chunked;",
                b" chunked;q=1",
                b" chunked;foo=bar",
                b' "chunked"',
                b" 'chunked'",
                b" chunked chunked",
                b" chun ked",
                b" chunked\tx",
                b" chunke",
                b" xchunked",
                b" chunkedx",
                b" chunked\xa0",
                b" \xa0chunked",
                b" chun\xe2\x84\xaaed",  # the sign of the kelvin, whose lower case is a k
                b" \xef\xbb\xbfchunked",
                b" =?utf-8?q?chunked?=",
            )
        ),
        ("chunked twice", post(*[b"Transfer-Encoding: chunked"] * 2, body=ONE_CHUNK), 501),
        ("chunked, then identity", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), 501),
        ("identity, then chunked", post(b"Transfer-Encoding: identity", b"transfer-encoding: chunked"), 501),
        ("nothing, then chunked", post(b"Transfer-Encoding:", b"Transfer-Encoding: chunked", body=ONE_CHUNK), 501),
        ("chunked, then nothing", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding:", body=ONE_CHUNK), 501),
        ("chunked and an unknown one in a GET", get(b"Transfer-Encoding: chunked, x") + ONE_CHUNK, 501),
    ],
    8: [
        ("chunked in HTTP/1.0", post(b"Transfer-Encoding: chunked", body=ONE_CHUNK, version=b"HTTP/1.0"), 400),
        (
            "chunked in HTTP/1.0 that would go on",
            post(b"Transfer-Encoding: chunked", b"Connection: keep-alive", body=ONE_CHUNK, version=b"HTTP/1.0"),
            400,
        ),
        ("an unknown coding in HTTP/1.0", post(b"Transfer-Encoding: gzip", version=b"HTTP/1.0"), 400),
        ("two codings in HTTP/1.0", post(*[b"Transfer-Encoding: chunked"] * 2, version=b"HTTP/1.0"), 400),
        (
            "chunked and a length in HTTP/1.0",
            post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=ONE_CHUNK, version=b"HTTP/1.0"),
            400,
        ),
    ],
    9: [
        ("a folded field", get(b"X: a", b" b"), 400),
        ("a field folded by a tab", get(b"X: a", b"\tb"), 400),
        ("a fold before the first field", b"GET %b HTTP/1.1\r\n Host: shop.example\r\n\r\n" % PATH, 400),
        ("a folded Host", get(host=b"Host:\r\n shop.example"), 400),
        ("a folded coding", post(b"Transfer-Encoding:", b" chunked", body=ONE_CHUNK), 400),
        ("a coding folded behind its name", post(b"Transfer-Encoding", b" : chunked", body=ONE_CHUNK), 400),
        ("a coding with a fold behind it", post(b"Transfer-Encoding: chunked", b" , identity", body=ONE_CHUNK), 400),
        ("a length in a fold", post(b"X: a", b" Content-Length: 5", body=b"hello"), 400),
        ("a fold of nothing", get(b"X: a", b" "), 400),
        ("a space before the colon of a length", post(b"Content-Length : 5", body=b"hello"), 400),
        ("a tab before the colon of a length", post(b"Content-Length\t: 5", body=b"hello"), 400),
        ("a space before the colon of a coding", post(b"Transfer-Encoding : chunked", body=ONE_CHUNK), 400),
        ("a space before the colon of Host", get(host=b"Host : shop.example"), 400),
        ("a space before a name", get(b" Content-Length: 5"), 400),
        ("a space within a name", get(b"Content Length: 5"), 400),
        ("a name of nothing", get(b": x"), 400),
        ("a name of a space", get(b" : x"), 400),
        ("nothing but a colon", get(b":"), 400),
        ("no colon", get(b"nothing"), 400),
        ("a request where a field should be", get(b"GET /api/v1/chat/inner HTTP/1.1"), 400),
        ("a line of a space", get(b" "), 400),
        ("a line feed for a line end behind the request line", b"GET %b HTTP/1.1\nHost: a\r\n\r\n" % PATH, 400),
        ("line feeds for all line ends", b"GET %b HTTP/1.1\nHost: a\n\n" % PATH, 400),
        ("a line feed between two fields", raw(b"X: a\nTransfer-Encoding: chunked\r\n\r\n"), 400),
        ("a line feed for the empty line", raw(b"X: a\r\n\n"), 400),
        ("two line feeds for the head's end", raw(b"X: a\n\n"), 400),
        ("a carriage return and two line feeds", raw(b"X: a\r\n\n\r\n"), 400),
        ("two carriage returns and a line feed", raw(b"X: a\r\r\n\r\n"), 400),
        ("a carriage return between two fields", raw(b"X: a\rTransfer-Encoding: chunked\r\n\r\n"), 400),
        ("a carriage return before a name", raw(b"\rX: a\r\n\r\n"), 400),
        ("a carriage return before a colon", raw(b"Content-Length\r: 5\r\n\r\n"), 400),
        ("a carriage return behind a colon", raw(b"Transfer-Encoding:\rchunked\r\n\r\n"), 400),
        ("carriage returns for the head's end", raw(b"X: a\r\r"), 400),
        ("a line feed and a carriage return", raw(b"X: a\n\r\n\r"), 400),
        ("a line feed before the request", b"\n" + get(), 400),
        ("a carriage return before the request", b"\r" + get(), 400),
        ("two carriage returns before the request", b"\r\r\n" + get(), 400),
        ("an empty line and a line feed before the request", b"\r\n\n" + get(), 400),
        ("a space before the request", b" " + get(), 400),
        ("an empty line and a space before the request", b"\r\n " + get(), 400),
        ("a line of a space before the request", b" \r\n" + get(), 400),
        ("a byte order mark before the request", b"\xef\xbb\xbf" + get(), 400),
        ("a NUL in a value", get(b"X: a\0b"), 400),
        ("a NUL behind a name", get(b"Content-Length\0: 5"), 400),
        ("a NUL before a name", get(b"\0Content-Length: 5"), 400),
        ("a NUL behind a length", post(b"Content-Length: 5\0", body=b"hello"), 400),
        ("a NUL in Host", get(host=b"Host: shop.example\0.evil.example"), 400),
        *((f"{byte!r} in a name", get(b"X%bY: a" % byte), 400) for byte in map(bytes, zip(b'"(),/;<=>?@[\\]{}'))),
        *((f"{byte!r} in a name", get(b"X%bY: a" % byte), 400) for byte in (b"\x01", b"\t", b"\x0b", b"\x1f", b"\x7f")),
        *((f"{byte!r} in a name", get(b"X%bY: a" % byte), 400) for byte in (b"\x80", b"\xa0", b"\xc3\xa9", b"\xff")),
    ],
    10: [
        *(
            (f"{bytes([byte])!r} in a value", get(b"X: a%bb" % bytes([byte])), 400)
            for byte in (1, 2, 7, 8, 11, 12, 14, 27, 30, 31, 127)
        ),
        *((f"{byte!r} before a value", get(b"X:%ba" % byte), 400) for byte in (b"\x0b", b"\x0c", b"\x1c", b"\x1f")),
        *((f"{byte!r} behind a value", get(b"X: a%b" % byte), 400) for byte in (b"\x0b", b"\x0c", b"\x1d", b"\x7f")),
        ("a vertical tab before a coding", post(b"Transfer-Encoding: \x0bchunked", body=ONE_CHUNK), 400),
        ("a form feed behind a coding", post(b"Transfer-Encoding: chunked\x0c", body=ONE_CHUNK), 400),
        ("a form feed before a length", post(b"Content-Length: \x0c5", body=b"hello"), 400),
        ("a DEL in Host", get(host=b"Host: shop\x7f.example"), 400),
        ("an escape in a correlation ID", get(b"X-Correlation-ID: \x1b[31m"), 400),
        ("a bell in a field that comes often", get(b"User-Agent: \x07"), 400),
    ],
    11: [
        ("a name with a no-break space", post(b"Transfer-Encoding\xa0: chunked", body=ONE_CHUNK), 400),
        ("a name with a no-break space in UTF-8", post(b"Content-Length\xc2\xa0: 5", body=b"hello"), 400),
        ("a name with a vertical tab", post(b"Transfer-Encoding\x0b: chunked", body=ONE_CHUNK), 400),
        ("a name with a long s", post(b"Tran\xc5\xbffer-Encoding: chunked", body=ONE_CHUNK), 400),
        ("a name with a fullwidth hyphen", post(b"Content\xef\xbc\x8dLength: 5", body=b"hello"), 400),
        ("a name with a semicolon for the colon", post(b"Content-Length; 5", body=b"hello"), 400),
        ("a length that only looks like one, and a coding", post(b"Content_Length: 5", b"Transfer-Encoding: x"), 501),
    ],
    16: [("garbage before a close", get(b"Connection: close", b"Content-Length: x"), 400)],
    18: [
        ("garbage behind garbage", b"\0\0\0\0\r\n\r\n" + get(), 400),
        ("an answer in place of a request", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400),
    ],
    19: [
        ("a bad head and 100,000 bytes behind it", post(b"Content-Length: x", body=bytes(100_000)), 400),
        ("a bad head and a hundred requests behind it", get(b"X : y") + INNER * 100, 400),
        ("a bad coding and its body", post(b"Transfer-Encoding: x", body=INNER), 501),
        ("a bad expectation and its body", post(b"Expect: x", b"Content-Length: 55", body=INNER), 417),
        ("a method that is not allowed and its body", post(b"Content-Length: 55", body=INNER, method=b"TRACE"), 405),
        ("a version that is not ours and its body", post(b"Content-Length: 55", body=INNER, version=b"HTTP/2"), 505),
        ("a bad target and a request", get(target=b"/a b") + INNER, 400),
    ],
    20: [
        ("HTTP/0.9", b"GET /\r\n", 400),
        ("HTTP/0.9 and an empty line", b"GET %b\r\n\r\n" % PATH, 400),
        ("HTTP/0.9 by name", get(version=b"HTTP/0.9"), 505),
        *(
            (f"version {version!r}", get(version=version), 505)
            for version in (
                b"HTTP/1.2",
                b"HTTP/1.10",
                b"HTTP/1.01",
                b"HTTP/01.1",
                b"HTTP/1",
                b"HTTP/1.",
                b"HTTP/.1",
                b"HTTP/11",
                b"HTTP/1.1.1",
                b"HTTP/2",
                b"HTTP/2.0",
                b"HTTP/3",
                b"HTTP/9.9",
                b"HTTP/99999999999999999999.1",
            )
        ),
        *(
            (f"version {version!r}", get(version=version), 400)
            for version in (
                b"",
                b"http/1.1",
                b"Http/1.1",
                b"HTTP/1.1 ",
                b" HTTP/1.1",
                b"HTTP/1.1\t",
                b"HTTP/1,1",
                b"HTTP/+1.1",
                b"HTTP/-1.1",
                b"HTTP/1.1x",
                b"HTTP/1.1;",
                b"HTTP/1.\xb9",
                b"HTTP/x",
                b"HTTP 1.1",
                b"HTTPS/1.1",
                b"HTTP\\1.1",
                b"HTTP/1.1 HTTP/1.1",
                b"RTSP/1.0",
                b"ICAP/1.0",
                b"SIP/2.0",
            )
        ),
        ("tabs for spaces", b"GET\t%b\tHTTP/1.1\r\n%b\r\n\r\n" % (PATH, HOST), 400),
        ("two spaces behind the method", b"GET  %b HTTP/1.1\r\n%b\r\n\r\n" % (PATH, HOST), 400),
        ("no space", b"GET%bHTTP/1.1\r\n%b\r\n\r\n" % (PATH, HOST), 400),
        ("only a method", b"GET\r\n\r\n", 400),
        ("only a method and a space", b"GET \r\n\r\n", 400),
        ("only two spaces", b"  \r\n\r\n", 400),
        ("only a version", b"HTTP/1.1\r\n\r\n", 400),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 505),
        ("TLS", bytes.fromhex("16030100f5010000f10303") + bytes(range(240)), 400),
        ("TLS that looks like an end of a head", bytes.fromhex("160301000d0a0d0a0d0a"), 400),
        ("SSL 2", bytes.fromhex("802e0100020015000000100100800200"), 400),
        ("SMTP", b"EHLO mail.example\r\n", 400),
        ("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", 400),
        ("Redis", b"*1\r\n$8\r\nFLUSHALL\r\n", 400),
        ("SOCKS", b"\x05\x01\x00", 400),
        ("the PROXY protocol", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + get(), 400),
        ("the PROXY protocol, version 2", b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + get(), 400),
        *(
            (f"method {method!r}", get(method=method), 400)
            for method in (
                b"",
                b"get",
                b"Get",
                b"GETS",
                b"GE",
                b"FROB",
                b"GET,POST",
                b"GET:",
                b'"GET"',
                b"\xefGET",
                b"G\xc9T",
                b"GET\0",
                b"G\rET",
                b"PRI",
                b"POST\x0b",
                b"-",
                b"!",
                b"A" * 300,
            )
        ),
    ],
    21: [
        ("no Host", get(host=b""), 400),
        ("no Host, but a look-alike", get(host=b"Host_: shop.example"), 400),
        ("no Host, but an X-Forwarded-Host", get(b"X-Forwarded-Host: shop.example", host=b""), 400),
        ("two equal Hosts", get(HOST), 400),
        ("two equal Hosts, spelt differently", get(b"hOST:shop.example"), 400),
        ("two Hosts", get(b"Host: evil.example"), 400),
        ("two Hosts, far apart", get(*[b"X: y"] * 60, b"Host: evil.example"), 400),
        ("a Host and an empty one", get(b"Host:"), 400),
        ("two Hosts in HTTP/1.0", get(HOST, version=b"HTTP/1.0"), 400),
        *(
            (f"Host {value!r}", get(host=b"Host:" + value), 400)
            for value in (
                b"",
                b" ",
                b" shop example",
                b" shop.example evil.example",
                b" shop.example\tevil.example",
                b" shop.example/",
                b" shop.example/evil.example",
                b" http://shop.example",
                b" user@shop.example",
                b" evil.example:80@shop.example",
                b" shop.example, evil.example",
                b" shop.example,",
                b" shop.example:http",
                b" shop.example:-80",
                b" shop.example:+80",
                b" shop.example:8_0",
                b" shop.example:80:80",
                b" shop.example: 80",
                b" :80",
                b" :",
                b" ::1",
                b" [::1",
                b" ::1]",
                b" []",
                b" [::1]x",
                b" [::1]:x",
                b" [::1]:80:80",
                b" [::1][::1]",
                b" [[::1]]",
                b" [shop.example]",
                b" shop[.]example",
                b" shop.example?",
                b" shop.example#",
                b" shop.example\\",
                b' "shop.example"',
                b" <shop.example>",
                b" {shop}",
                b" shop|evil",
                b" shop^example",
                b" sh\xc3\xb6p.example",
                b" \xff",
            )
        ),
    ],
    22: [
        *(
            (f"target {target!r}", get(target=target), 400)
            for target in (
                b"http://evil.example/api/v1/chat/x",
                b"http://shop.example:80/api/v1/chat/x",
                b"http://shop.example./api/v1/chat/x",
                b"http://shop.example,evil.example/api/v1/chat/x",
                b"http://user@shop.example/api/v1/chat/x",
                b"http://shop.example@evil.example/api/v1/chat/x",
                b"http://evil.example\\@shop.example/api/v1/chat/x",
                b"http://shop.example%2fapi/v1/chat/x",
                b"http:///api/v1/chat/x",
                b"http://",
                b"http:",
                b"http:/api/v1/chat/x",
                b"http:shop.example/api/v1/chat/x",
                b"://shop.example/api/v1/chat/x",
                b"ftp://shop.example/api/v1/chat/x",
                b"ws://shop.example/api/v1/chat/x",
                b"file:///api/v1/chat/x",
                b"javascript://shop.example/api/v1/chat/x",
                b"http ://shop.example/api/v1/chat/x",
                b"http://shop.example/api/v1/chat/x#part",
                b"http://shop.example#part",
                b"http://[::1/api/v1/chat/x",
                b"http://:80/api/v1/chat/x",
                b"shop.example:80",
                b"shop.example",
                b"shop.example/api/v1/chat/x",
            )
        ),
        ("a whole URL and no Host", get(target=b"http://shop.example/api/v1/chat/x", host=b""), 400),
        ("a whole URL and two Hosts", get(HOST, target=b"http://shop.example/api/v1/chat/x"), 400),
        ("a whole URL and an empty Host", get(target=b"http://shop.example/api/v1/chat/x", host=b"Host:"), 400),
        ("a whole URL whose port Host lacks", get(target=b"http://shop.example:8080/api/v1/chat/x"), 400),
        (
            "a whole URL and another Host, in HTTP/1.0",
            get(target=b"http://evil.example/api/v1/chat/x", version=b"HTTP/1.0"),
            400,
        ),
    ],
    23: [
        ("OPTIONS *", get(method=b"OPTIONS", target=b"*"), 405),
        ("OPTIONS * with a body", get(b"Content-Length: 5", method=b"OPTIONS", target=b"*") + b"hello", 405),
        ("OPTIONS * in HTTP/1.0", get(method=b"OPTIONS", target=b"*", version=b"HTTP/1.0"), 405),
        ("OPTIONS **", get(method=b"OPTIONS", target=b"**"), 400),
        ("OPTIONS *?a", get(method=b"OPTIONS", target=b"*?a"), 400),
        ("OPTIONS */", get(method=b"OPTIONS", target=b"*/"), 400),
        ("GET *", get(target=b"*"), 400),
        ("POST *", get(method=b"POST", target=b"*"), 400),
        ("CONNECT an authority", get(method=b"CONNECT", target=b"shop.example:443"), 405),
        ("CONNECT the gateway itself", get(method=b"CONNECT", target=b"127.0.0.1:8080"), 405),
        ("CONNECT a path", get(method=b"CONNECT"), 405),
        ("CONNECT a URL", get(method=b"CONNECT", target=b"http://shop.example/"), 405),
        ("CONNECT and a request within the tunnel", get(method=b"CONNECT", target=b"a:80") + INNER, 405),
        ("TRACE", get(method=b"TRACE"), 405),
        ("TRACE with Max-Forwards", get(b"Max-Forwards: 0", method=b"TRACE"), 405),
    ],
    24: [
        *(
            (f"target {target!r}", get(target=target), 400)
            for target in (
                b"",
                b"api/v1/chat/x",
                b"./api/v1/chat/x",
                b"../api/v1/chat/x",
                b"%2fapi/v1/chat/x",
                b";/api/v1/chat/x",
                b"?/api/v1/chat/x",
                b"\\api\\v1\\chat\\x",
                b"\\\\evil.example/api/v1/chat/x",
                b"@shop.example/api/v1/chat/x",
                b":80/api/v1/chat/x",
                b"x:/api/v1/chat/x",
                b'"/api/v1/chat/x"',
                b"</api/v1/chat/x>",
                b"\xef\xbc\x8fapi/v1/chat/x",
            )
        ),
    ],
    27: [
        *(
            (f"{bytes([byte])!r} in a path", get(target=PATH + bytes([byte]) + b"y"), 400)
            for byte in (0, 1, 8, 9, 11, 12, 27, 31, 32, 35, 127)
        ),
        *(
            (f"{bytes([byte])!r} in a query", get(target=PATH + b"?a" + bytes([byte]) + b"b"), 400)
            for byte in (0, 9, 11, 32, 35, 127)
        ),
        ("a carriage return in a path", get(target=PATH + b"\ry"), 400),
        ("a line feed in a path", get(target=PATH + b"\ny"), 400),
        ("a line end in a path", get(target=PATH + b"\r\ny"), 400),
        ("a request in a path", get(target=PATH + b" HTTP/1.1\r\nX: y\r\n\r\nGET " + PATH, host=b""), 400),
    ],
    35: [
        ("a line of 16 KiB", get(target=PATH + BIG), 414),
        ("a line that never ends", b"GET /" + BIG * 2, 414),
        ("a query of 20,000 bytes", get(target=PATH + b"?" + b"a" * 20_000), 414),
        ("a method of 20,000 bytes", get(method=b"A" * 20_000), 414),
        ("a version of 20,000 bytes", get(version=b"HTTP/" + b"1" * 20_000), 414),
        ("a URL of 20,000 bytes", get(target=b"http://" + b"a" * 20_000 + b"/"), 414),
        ("a value of 16 KiB", get(b"X: " + BIG), 431),
        ("a name of 16 KiB", get(BIG + b": x"), 431),
        ("a field of 16 KiB of spaces", get(b"X:" + b" " * 16_384), 431),
        ("a Host of 16 KiB", get(host=b"Host: " + BIG), 431),
        ("a length of 16 KiB", get(b"Content-Length: " + b"0" * 16_384 + b"5"), 431),
        ("a field that never ends", raw(b"X: " + BIG * 2), 431),
        ("a head of 64 KiB", get(*[b"X: " + BIG[:8_000]] * 9), 431),
        ("a head of 64 KiB of short fields", get(*[b"X: " + BIG[:700]] * 98), 431),
        ("a head that never ends", raw((b"X: " + BIG[:8_000] + b"\r\n") * 9), 431),
        ("101 fields", get(*[b"X: y"] * 100), 431),
        ("1,000 fields", get(*[b"X: y"] * 999), 431),
        ("10,000 fields of a letter", get(*[b"X:"] * 10_000), 431),
        ("101 fields without an end", raw(b"X: y\r\n" * 101), 431),
    ],
    44: [
        *(
            (f"expectation {value!r}", post(b"Expect:" + value, b"Content-Length: 5", body=b"hello"), 417)
            for value in (
                b"",
                b" 200-ok",
                b" 100-continued",
                b" 100 continue",
                b" 100-continue, 100-continue",
                b" 100-continue, x",
                b" 100-continue;q=1",
                b' "100-continue"',
                b" 1OO-continue",
                b" \xa0100-continue",
            )
        ),
        ("a good expectation, then a bad one", post(b"Expect: 100-continue", b"Expect: x", b"Content-Length: 5"), 417),
        ("a bad expectation, then a good one", post(b"Expect: x", b"Expect: 100-continue", b"Content-Length: 5"), 417),
        ("a bad expectation of a GET", get(b"Expect: x"), 417),
        ("a bad expectation in HTTP/1.0", get(b"Expect: x", version=b"HTTP/1.0"), 417),
    ],
    71: [
        ("a handshake without a key", get(*WEBSOCKET[:3]), 400),
        *(
            (f"a handshake with the key {key!r}", get(*WEBSOCKET[:3], b"Sec-WebSocket-Key:" + key), 400)
            for key in (
                b"",
                b" a",
                b" dGhlIHNhbXBsZSBub25j",
                b" dGhlIHNhbXBsZSBub25jZSBhbmQgbW9yZQ==",
                b" dGhlIHNhbXBsZSBub25jZQ",
                b" dGhlIHNhbXBsZSBub25jZQ==, x",
                b" dGhlIHNhbXBsZSBub25jZQ===",
                b" dGhl IHNhbXBsZSBub25jZQ==",
                b" dGhlIHNhbXBsZSBub25jZ_==",
                b" \xff",
            )
        ),
        ("a handshake with two keys", get(*WEBSOCKET, KEY), 400),
        ("a handshake without a version", get(*WEBSOCKET[:2], KEY), 400),
        *(
            (f"a handshake of version {version!r}", get(*WEBSOCKET[:2], KEY, b"Sec-WebSocket-Version:" + version), 400)
            for version in (b"", b" 8", b" 14", b" 013", b" 13, 8", b" 13.0", b" +13", b" -1")
        ),
        ("a handshake of two versions", get(*WEBSOCKET, b"Sec-WebSocket-Version: 8"), 400),
        ("a handshake with the same version twice", get(*WEBSOCKET, b"Sec-WebSocket-Version: 13"), 400),
        ("a handshake with a body", get(*WEBSOCKET, b"Content-Length: 5") + b"hello", 400),
        ("a handshake with a chunked body", get(*WEBSOCKET, b"Transfer-Encoding: chunked") + ONE_CHUNK, 400),
        ("a handshake with two framings", get(*WEBSOCKET, b"Content-Length: 0", b"Transfer-Encoding: chunked"), 400),
        ("a handshake to another protocol first", get(b"Upgrade: h2c", *WEBSOCKET), 400),
        ("a handshake with a malformed extension", get(*WEBSOCKET, b"Sec-WebSocket-Extensions: ;;"), 400),
        ("a handshake with a malformed subprotocol", get(*WEBSOCKET, b"Sec-WebSocket-Protocol: a b"), 400),
        ("a handshake with a target in UTF-8", get(*WEBSOCKET, target=b"/api/v1/chat/\xc3\xa9"), 400),
        ("a handshake with a query in UTF-8", get(*WEBSOCKET, target=b"/api/v1/chat/x?\xc3\xa9"), 400),
        ("a handshake without a Host", get(*WEBSOCKET, host=b""), 400),
        ("a handshake with a large field", get(*WEBSOCKET, b"Sec-WebSocket-Protocol: " + BIG[:9_000]), 431),
        ("a handshake in HTTP/2", get(*WEBSOCKET, version=b"HTTP/2.0"), 505),
    ],
}

# What shows its unsoundness only within the body; the service may see the request's beginning, never its end -----

BAD_BODIES: dict[int, list[tuple[str, bytes]]] = {
    12: [
        ("an extension of 4 KiB", chunked(b"5;" + b"a" * 4_200 + b"\r\nhello\r\n0\r\n\r\n")),
        ("an extension that never ends", chunked(b"5;" + b"a" * 5_000)),
        ("an extension of the last chunk of 4 KiB", chunked(b"5\r\nhello\r\n0;" + b"a" * 4_200 + b"\r\n\r\n")),
        ("many extensions, 4 KiB together", chunked((b"1;" + b"a" * 50 + b"\r\nx\r\n") * 200 + b"0\r\n\r\n")),
        ("a line feed in an extension", chunked(b"5;a\nhello\r\n0\r\n\r\n")),
        ("a line feed at the end of an extension", chunked(b"5;a\nb\r\nhello\r\n0\r\n\r\n")),
        ("a carriage return in an extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n")),
        ("a carriage return at the end of an extension", chunked(b"5;a\r\r\nhello\r\n0\r\n\r\n")),
        ("a NUL in an extension", chunked(b"5;a=\0\r\nhello\r\n0\r\n\r\n")),
        ("a DEL in an extension", chunked(b"5;a=\x7f\r\nhello\r\n0\r\n\r\n")),
        ("a line end in a quoted extension", chunked(b'5;a="\r\n"\r\nhello\r\n0\r\n\r\n')),
        ("an extension and no size", chunked(b";a=b\r\nhello\r\n0\r\n\r\n")),
        ("a space before the semicolon of an extension", chunked(b"5 ;a\r\nhello\r\n0\r\n\r\n")),
        ("a tab before the semicolon of an extension", chunked(b"5\t;a\r\nhello\r\n0\r\n\r\n")),
        ("an extension of the last chunk with a line feed", chunked(b"5\r\nhello\r\n0;a\n\r\n\r\n")),
    ],
    13: [
        *(
            (f"size {size!r}", chunked(size + b"\r\nhello\r\n0\r\n\r\n"))
            for size in (
                b"",
                b" ",
                b" 5",
                b"5 ",
                b"5\t",
                b"\t5",
                b"+5",
                b"-5",
                b"--5",
                b"0x5",
                b"0X5",
                b"x5",
                b"5h",
                b"5_0",
                b"5.",
                b"5,5",
                b"5 5",
                b"5:",
                b"5=5",
                b'"5"',
                b"g",
                b"five",
                b"\0005",
                b"\x0b5",
                b"5\x0c",
                b"5\0",
                b"5\r",
                b"\r5",
                b"\n5",
                b"5\n",
                b"\xc2\xb2",
                b"\xef\xbc\x95",
                b"\xa05",
                b"0000000000000005",
                b"10000000000000005",
                b"FFFFFFFFFFFFFFFF",
                b"7FFFFFFFFFFFFFFF",
                b"8000000000000000",
                b"-FFFFFFFFFFFFFFFB",
                b"f" * 400,
            )
        ),
        *(
            (f"last size {size!r}", chunked(b"5\r\nhello\r\n" + size + b"\r\n\r\n"))
            for size in (b"", b" 0", b"0 ", b"+0", b"-0", b"0x0", b"0\n", b"0\r", b"0000000000000000", b"0,")
        ),
        ("a line feed behind a size", chunked(b"5\nhello\r\n0\r\n\r\n")),
        ("a carriage return behind a size", chunked(b"5\rhello\r\n0\r\n\r\n")),
        ("a line feed and a carriage return behind a size", chunked(b"5\n\rhello\r\n0\r\n\r\n")),
        ("nothing behind a size", chunked(b"5hello\r\n0\r\n\r\n")),
        ("a byte too many in a chunk", chunked(b"5\r\nhelloX\r\n0\r\n\r\n")),
        ("two bytes too many in a chunk", chunked(b"5\r\nhelloXX0\r\n\r\n")),
        ("a byte too few in a chunk", chunked(b"5\r\nhell\r\n0\r\n\r\n")),
        ("a line feed behind a chunk", chunked(b"5\r\nhello\n0\r\n\r\n")),
        ("a carriage return behind a chunk", chunked(b"5\r\nhello\r0\r\n\r\n")),
        ("two carriage returns behind a chunk", chunked(b"5\r\nhello\r\r\n0\r\n\r\n")),
        ("a line feed and a carriage return behind a chunk", chunked(b"5\r\nhello\n\r0\r\n\r\n")),
        ("a space behind a chunk", chunked(b"5\r\nhello \r\n0\r\n\r\n")),
        ("nothing behind a chunk", chunked(b"5\r\nhello0\r\n\r\n")),
        ("two line ends behind a chunk", chunked(b"5\r\nhello\r\n\r\n0\r\n\r\n")),
        ("a line end before the first size", chunked(b"\r\n5\r\nhello\r\n0\r\n\r\n")),
        ("a request where a size should be", chunked(INNER)),
        ("a request where the next size should be", chunked(b"5\r\nhello\r\n" + INNER)),
        ("a field where a size should be", chunked(b"Content-Length: 5\r\n\r\nhello")),
        ("a line feed for each line end", chunked(b"5\nhello\n0\n\n")),
        ("line feeds for the end of a body", chunked(b"5\r\nhello\r\n0\n\n")),
        ("a chunk that an expectation comes with", chunked(b"0x5\r\nhello\r\n", lines=(b"Expect: 100-continue",))),
        ("a size in a GET", get(b"Transfer-Encoding: chunked") + b"-5\r\nhello\r\n0\r\n\r\n"),
        ("a body that is not chunked", chunked(b"hello")),
    ],
    14: [
        ("no line end behind the last chunk", chunked(b"5\r\nhello\r\n0\r\n")),
        ("a carriage return behind the last chunk", chunked(b"5\r\nhello\r\n0\r\n\r")),
        ("a line feed behind the last chunk", chunked(b"5\r\nhello\r\n0\r\n\n")),
        ("two other bytes behind the last chunk", chunked(b"5\r\nhello\r\n0\r\nXX")),
        ("a request behind the last chunk", chunked(b"5\r\nhello\r\n0\r\n" + INNER)),
        ("a trailer without a name", chunked(b"0\r\n: a\r\n\r\n")),
        ("a trailer with a space before its colon", chunked(b"0\r\nX : a\r\n\r\n")),
        ("a trailer with a space before its name", chunked(b"0\r\n X: a\r\n\r\n")),
        ("a folded trailer", chunked(b"0\r\nX: a\r\n b\r\n\r\n")),
        ("a trailer without a colon", chunked(b"0\r\nX\r\n\r\n")),
        ("a trailer that is a size", chunked(b"0\r\n5\r\nhello\r\n0\r\n\r\n")),
        ("a trailer with a slash in its name", chunked(b"0\r\nX/Y: a\r\n\r\n")),
        ("a trailer with a name in Latin-1", chunked(b"0\r\nX\xe9: a\r\n\r\n")),
        ("a NUL in a trailer", chunked(b"0\r\nX: \0\r\n\r\n")),
        ("a line feed in a trailer", chunked(b"0\r\nX: a\nY: b\r\n\r\n")),
        ("a carriage return in a trailer", chunked(b"0\r\nX: a\rY: b\r\n\r\n")),
        ("a vertical tab in a trailer", chunked(b"0\r\nX: \x0ba\r\n\r\n")),
        ("line feeds behind a trailer", chunked(b"0\r\nX: a\n\n")),
        ("a trailer of 4 KiB", chunked(b"0\r\nX: " + b"a" * 4_200 + b"\r\n\r\n")),
        ("a trailer that never ends", chunked(b"0\r\nX: " + b"a" * 5_000)),
        ("trailers of 4 KiB", chunked(b"0\r\n" + b"X: a\r\n" * 800 + b"\r\n")),
        ("trailers that never end", chunked(b"0\r\n" + b"X: a\r\n" * 800)),
        ("extensions and trailers of 4 KiB", chunked(b"0;" + b"a" * 2_100 + b"\r\nX: " + b"a" * 2_100 + b"\r\n\r\n")),
    ],
}

# What the application turns away; where such a request ends was never in doubt, so the connection goes on ------------

TURNED_AWAY: dict[int, list[tuple[str, bytes, int]]] = {
    22: [
        ("a whole URL without a path", get(target=b"http://shop.example"), 404),
        ("a whole URL with a query and no path", get(target=b"http://shop.example?/api/v1/chat/x"), 404),
    ],
    24: [
        *(
            (f"target {target!r}", get(target=target), 404)
            for target in (
                b"/",
                b"//api/v1/chat/x",
                b"///api/v1/chat/x",
                b"/api//v1/chat/x",
                b"/api/v1//chat/x",
                b"//evil.example/api/v1/chat/x",
                b"//evil.example@shop.example/api/v1/chat/x",
                b"/http://shop.example/api/v1/chat/x",
                b"/api/v1/chatter",
                b"/api/v1/chat;x",
                b"/api/v1/chat%20",
                b"/*",
            )
        ),
        ("two slashes within a whole URL", get(target=b"http://shop.example//api/v1/chat/x"), 404),
    ],
    26: [
        *(
            (f"target {target!r}", get(target=target), 400)
            for target in (
                b"/api/v1/chat/..",
                b"/api/v1/chat/../",
                b"/api/v1/chat/../search/x",
                b"/api/v1/chat/./../search/x",
                b"/api/v1/chat/a/../../search/x",
                b"/api/v1/chat//../search/x",
                b"/api/v1/chat/../../../health",
                b"/api/v1/chat/%2e%2e/search/x",
                b"/api/v1/chat/%2E./search/x",
                b"/api/v1/chat/.%2e/search/x",
                b"/api/v1/chat/..%2fsearch/x",
                b"/api/v1/chat/%2e%2e%2fsearch%2fx",
                b"/api/v1/chat/%252e%252e/search/x",
                b"/api/v1/chat/%25%32%65%25%32%65/search/x",
                b"/api/v1/chat/%25252e%25252e/search/x",
                b"/api/v1/chat/%2525252525252e/x",
                b"/api/v1/chat/..;/search/x",
                b"/api/v1/chat/..;a=b/search/x",
                b"/api/v1/chat/..%3b/search/x",
                b"/api/v1/chat/%2e%2e;/search/x",
                b"/api/v1/chat/..%5csearch/x",
                b"/api/v1/chat/%5c..%5csearch",
                b"/api/v1/chat/%255c..%255csearch",
                b"/api/v1/chat/..\\search\\x",
            )
        ),
        *(
            (f"target {target!r}", get(target=target), 404)
            for target in (
                b"/health/../api/v1/chat/x",
                b"/circuit-breakers/../api/v1/chat/x",
                b"/x/../api/v1/chat/x",
                b"/./api/v1/chat/x",
                b"/%61pi/v1/chat/x",
                b"/api%2fv1%2fchat%2fx",
                b"/api/v1/%63hat/x",
                b"/api/v1/CHAT/x",
                b"/api/v1/chat%2f..%2fsearch",
                b"/api/v1/chat%00/x",
            )
        ),
        ("a way out of the prefix of a service that is not ours", get(target=b"/api/v1/search/../chat/x"), 400),
        ("a way out within a whole URL", get(target=b"http://shop.example/api/v1/chat/../search/x"), 400),
        ("a way out, with a body", post(b"Content-Length: 5", body=b"hello").replace(PATH, b"/api/v1/chat/.."), 400),
    ],
    27: [
        *(
            (f"target {target!r}", get(target=target), 400)
            for target in (
                b"/api/v1/chat/%00",
                b"/api/v1/chat/a%00b",
                b"/api/v1/chat/%2500",
                b"/api/v1/chat/%252500",
                b"/api/v1/chat/\\",
                b"/api/v1/chat/a\\b",
                b"/\\evil.example/api/v1/chat/x",
            )
        ),
    ],
    31: [
        ("a loop", get(b"Via: 1.1 " + PSEUDONYM), 508),
        ("a loop over others", get(b"Via: 1.0 fred, 1.1 " + PSEUDONYM, b"Via: 1.1 p.example"), 508),
    ],
}

# What is let in, and in which one form it arrives --------------------------------------------------------------------

PASSED: dict[int, list[tuple[str, bytes, Arrives]]] = {
    1: [
        ("Keep-Alive", get(b"Keep-Alive: timeout=5, max=1000"), Arrives()),
        ("fields for proxies", get(b"Proxy-Authorization: Basic YQ==", b"Proxy-Connection: keep-alive"), Arrives()),
        ("a challenge for proxies", get(b"Proxy-Authenticate: Basic", b"Proxy-Authentication-Info: x"), Arrives()),
        ("Trailer", get(b"Trailer: Content-Length, Authorization"), Arrives()),
        ("Upgrade alone", get(b"Upgrade: h2c"), Arrives()),
        ("an upgrade to HTTP/2", get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
                                     b"HTTP2-Settings: AAMAAABkAAQAAP__"), Arrives()),
        ("HTTP2-Settings alone", get(b"HTTP2-Settings: AAMAAABkAAQAAP__"), Arrives()),
        ("an upgrade to TLS", get(b"Connection: Upgrade", b"Upgrade: TLS/1.2, HTTP/1.1"), Arrives()),
        ("an upgrade of a POST", post(b"Connection: upgrade", b"Upgrade: h2c", b"Content-Length: 5", body=b"hello"),
         HELLO),
        ("half a handshake: no Connection", get(*WEBSOCKET[1:]),
         Arrives(fields=(b"sec-websocket-version: 13", KEY.replace(b"Sec-WebSocket-K", b"sec-websocket-k")))),
        ("Connection: upgrade alone", get(b"Connection: upgrade"), Arrives()),
    ],
    2: [
        ("Connection names a field", get(b"Connection: X-Own", b"X-Own: 1", b"X-Other: 2"),
         Arrives(fields=(b"x-other: 2",))),
        ("Connection names the way here", get(b"Connection: X-Forwarded-For, X-Forwarded-Host, Via, X-Real-IP"),
         Arrives()),
        ("Connection names the length", post(b"Connection: Content-Length", b"Content-Length: 5", body=b"hello"),
         HELLO),
        ("Connection names the coding", chunked(ONE_CHUNK, lines=(b"Connection: Transfer-Encoding",)), HELLO),
        ("Connection names Host", get(b"Connection: Host"), Arrives()),
        ("Connection names the correlation ID", get(b"Connection: X-Correlation-ID", b"X-Correlation-ID: a-1"),
         Arrives(named=b"a-1")),
        ("Connection names itself", get(b"Connection: Connection"), Arrives()),
        ("Connection names what authorises", get(b"Connection: Authorization, Cookie", b"Authorization: a",
                                                 b"Cookie: b"), Arrives()),
        ("Connection names what is not there", get(b"Connection: keep-alive, X-Absent"), Arrives()),
        ("Connection says what is no name", get(b'Connection: "X-Own", *, x y', b"X-Own: 1"),
         Arrives(fields=(b"x-own: 1",))),
        ("Connection names a field twice", get(b"X-Own: 1", b"Connection: x-own, X-OWN", b"x-own: 2"), Arrives()),
        ("Connection names the allowed time", get(b"Connection: X-Request-Timeout-Ms"), Arrives()),
    ],
    3: [
        ("Connection empty", get(b"Connection:", b"X-Own: 1"), Arrives(fields=(b"x-own: 1",))),
        ("Connection first empty, then not", get(b"Connection:", b"Connection: X-Own", b"X-Own: 1"), Arrives()),
        ("Connection of commas", get(b"Connection: ,,, ,", b"X-Own: 1"), Arrives(fields=(b"x-own: 1",))),
        ("Connection of three lines", get(b"Connection: X-One", b"connection:", b"CONNECTION: ,X-Two ,",
                                          b"X-One: 1", b"X-Two: 2", b"X-Three: 3"),
         Arrives(fields=(b"x-three: 3",))),
        ("Connection behind what it names", get(b"X-Own: 1", b"Connection: keep-alive", b"Connection:\tX-Own\t"),
         Arrives()),
    ],
    4: [
        ("TE: trailers", get(b"TE: trailers"), Arrives()),
        ("TE of more", get(b"Connection: TE", b"TE: trailers, deflate;q=0.5"), Arrives()),
        ("TE like a coding", get(b"TE: chunked"), Arrives()),
    ],
    6: [
        ("a length with a zero before", post(b"Content-Length: 05", body=b"hello"), HELLO),
        ("a length of 18 digits", post(b"Content-Length: 000000000000000005", body=b"hello"), HELLO),
        ("a length in capitals", post(b"CONTENT-LENGTH: 5", body=b"hello"), HELLO),
        ("a length without a space", post(b"content-length:5", body=b"hello"), HELLO),
        ("a length among spaces and tabs", post(b"Content-Length: \t 5 \t ", body=b"hello"), HELLO),
        ("a length of 0", post(b"Content-Length: 0"), Arrives(method=b"POST", body=b"")),
        ("a length of many zeros", post(b"Content-Length: 000"), Arrives(method=b"POST", body=b"")),
        ("a length in a GET", get(b"Content-Length: 5") + b"hello", Arrives(body=b"hello")),
        ("a length in a DELETE", get(b"Content-Length: 5", method=b"DELETE") + b"hello",
         Arrives(method=b"DELETE", body=b"hello")),
        ("a body that looks like a request", post(b"Content-Length: 55", body=INNER),
         Arrives(method=b"POST", body=INNER)),
        ("a body that looks like a head's end", post(b"Content-Length: 4", body=b"\r\n\r\n"),
         Arrives(method=b"POST", body=b"\r\n\r\n")),
        ("a POST without a length", post(), Arrives(method=b"POST")),
    ],
    7: [
        ("CHUNKED", post(b"Transfer-Encoding: CHUNKED", body=ONE_CHUNK), HELLO),
        ("cHuNkEd", post(b"transfer-ENCODING:cHuNkEd", body=ONE_CHUNK), HELLO),
        ("chunked among spaces and tabs", post(b"Transfer-Encoding: \tchunked\t ", body=ONE_CHUNK), HELLO),
        ("a chunked GET", get(b"Transfer-Encoding: chunked") + ONE_CHUNK, Arrives(body=b"hello")),
        ("a chunked body of nothing", chunked(b"0\r\n\r\n"), Arrives(method=b"POST", body=b"")),
        ("a chunked body that looks like a request", chunked(b"37\r\n" + INNER + b"\r\n0\r\n\r\n"),
         Arrives(method=b"POST", body=INNER)),
    ],
    9: [
        ("an empty line before the request", b"\r\n" + get(), Arrives()),
        ("five empty lines before the request", b"\r\n" * 5 + get(), Arrives()),
        ("a value of nothing", get(b"X:"), Arrives(fields=(b"x: ",))),
        ("a value of spaces", get(b"X: \t "), Arrives(fields=(b"x: ",))),
        ("spaces about a value", get(b"X:\t a \t"), Arrives(fields=(b"x: a",))),
        ("a colon in a value", get(b"X::a: b"), Arrives(fields=(b"x: :a: b",))),
        ("a name of every kind of character", get(b"!#$%&'*+-.^_`|~09AZaz: b"),
         Arrives(fields=(b"!#$%&'*+-.^_`|~09azaz: b",))),
        ("a name with %b in it", get(b"X%bY%%: %b%s"), Arrives(fields=(b"x%by%%: %b%s",))),
    ],
    10: [
        ("a tab in a value", get(b"X: a\tb"), Arrives(fields=(b"x: a\tb",))),
        ("bytes above 127 in a value", get(b"X: \x80\xa0\xff"), Arrives(fields=(b"x: \x80\xa0\xff",))),
        ("all visible characters in a value", get(b"X: " + bytes(range(33, 127))),
         Arrives(fields=(b"x: " + bytes(range(33, 127)),))),
    ],
    11: [
        ("Content_Length alone", get(b"Content_Length: 82"), Arrives()),
        ("Content_Length beside the real one", post(b"Content_Length: 50", b"Content-Length: 5", body=b"hello"), HELLO),
        ("CONTENT_LENGTH", get(b"CONTENT_LENGTH: 82"), Arrives()),
        ("Transfer_Encoding alone", get(b"Transfer_Encoding: chunked"), Arrives()),
        ("Transfer_Encoding beside a length", post(b"Transfer_Encoding: chunked", b"Content-Length: 5", body=b"hello"),
         HELLO),
        ("look-alikes of who the caller is", get(b"X_User_ID: root", b"X-User_ID: root", b"X_Forwarded-For: 6.6.6.6",
                                                 b"X_Real_IP: 6.6.6.6", b"X_API_Key: k"), Arrives()),
        ("look-alikes of the way here", get(b"X_Forwarded_Proto: https", b"X_Forwarded_Host: evil.example",
                                            b"X_Forwarded_Prefix: /x", b"X_Forwarded_Port: 1"), Arrives()),
        ("look-alikes of what authorises", get(b"Keep_Alive: x", b"Proxy_Authorization: x"), Arrives()),
        ("a look-alike of the correlation ID", get(b"X_Correlation_ID: evil"), Arrives()),
        ("a look-alike of Connection", get(b"Proxy_Connection: close", b"HTTP2_Settings: AA"), Arrives()),
        ("names that are near", get(b"X-Content-Length: 82", b"Content-Lengt: 82", b"Content-Length-: 82"),
         Arrives(fields=(b"x-content-length: 82", b"content-lengt: 82", b"content-length-: 82"))),
        ("names with underscores of their own", get(b"My_Field: 1", b"_: 2"),
         Arrives(fields=(b"my_field: 1", b"_: 2"))),
    ],
    12: [
        *(
            (f"extension {extension!r}", chunked(b"5%b\r\nhello\r\n0\r\n\r\n" % extension), HELLO)
            for extension in (
                b";", b";a", b";a=b", b";a=b;c=d", b'; a = "b c"', b';a="\\"5\\r"', b";;;", b";\t", b";5", b";\xff",
                b";" + b"a" * 4_000,
            )
        ),
        ("an extension of the last chunk", chunked(b"5\r\nhello\r\n0;a=b\r\n\r\n"), HELLO),
        ("an extension that looks like a framing", chunked(b"5;Content-Length: 5\r\nhello\r\n0;0\r\n\r\n"), HELLO),
    ],
    13: [
        ("a size with zeros before", chunked(b"000000000000005\r\nhello\r\n0\r\n\r\n"), HELLO),
        ("a last size of zeros", chunked(b"5\r\nhello\r\n000\r\n\r\n"), HELLO),
        ("sizes in either case", chunked(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"),
         Arrives(method=b"POST", body=b"01234567890123456789")),
        ("chunks of a byte", chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in b"hello") + b"0\r\n\r\n"), HELLO),
        ("a chunk of line ends", chunked(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"),
         Arrives(method=b"POST", body=b"\r\n\r\n")),
        ("a chunk that looks like a last one", chunked(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n"),
         Arrives(method=b"POST", body=b"0\r\n\r\n")),
    ],
    14: [
        ("trailers", chunked(b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-Sum: 2\r\n\r\n", lines=(b"Trailer: X-Sum",)), HELLO),
        ("a trailer of nothing", chunked(b"5\r\nhello\r\n0\r\nX:\r\n\r\n"), HELLO),
        *(
            (f"trailer {name.decode()}", chunked(b"5\r\nhello\r\n0\r\n%b: 5\r\n\r\n" % name), HELLO)
            for name in (b"Content-Length", b"Transfer-Encoding", b"Host", b"Authorization", b"X-User-ID",
                         b"X-Forwarded-For", b"X-Correlation-ID", b"Connection", b"Via", b"Expect")
        ),
    ],
    21: [
        *(
            (f"Host {value!r}", get(host=b"Host: " + value), Arrives(host=value))
            for value in (b"shop.example:", b"shop.example:8080", b"SHOP.example", b"127.0.0.1:80", b"[::1]",
                          b"[::ffff:127.0.0.1]:80", b"a_b", b"shop.example.", b"a%2eb", b"x" * 255)
        ),
        ("Host without a space", get(host=b"host:shop.example"), Arrives()),
    ],
    22: [
        ("a whole URL", get(target=b"http://shop.example/api/v1/chat/x?a#"[:-1]), Arrives(target=PATH + b"?a")),
        ("a whole URL in capitals", get(target=b"HTTP://SHOP.EXAMPLE/api/v1/chat/x"), Arrives()),
        ("a whole URL of https", get(target=b"https://shop.example/api/v1/chat/x"), Arrives()),
        ("a whole URL with a port", get(target=b"http://shop.example:81/api/v1/chat/x", host=b"Host: shop.example:81"),
         Arrives(host=b"shop.example:81")),
        ("a whole URL with an address of IPv6", get(target=b"http://[::1]/api/v1/chat/x", host=b"Host: [::1]"),
         Arrives(host=b"[::1]")),
        ("a whole URL in a path", get(target=PATH + b"/http://evil.example/"),
         Arrives(target=PATH + b"/http://evil.example/")),
    ],
    23: [
        ("OPTIONS of a path", get(method=b"OPTIONS"), Arrives(method=b"OPTIONS")),
        ("OPTIONS of a star within", get(method=b"OPTIONS", target=PATH + b"/*"),
         Arrives(method=b"OPTIONS", target=PATH + b"/*")),
        *(
            (f"{method.decode()}", get(method=method), Arrives(method=method))
            for method in (b"PURGE", b"M-SEARCH", b"PROPFIND", b"LINK", b"QUERY")
        ),
    ],
    25: [
        *(
            (f"path {rest!r}", get(target=PATH + rest), Arrives(target=PATH + rest))
            for rest in (
                b"/a%2Fb", b"/%25", b"/%20", b"/%7e%c3%a9", b"/\xc3\xa9", b"/\xff\xfe", b"/%", b"/%zz", b"/%2",
                b"/%25%32%66", b"/%c0%ae%c0%ae/%c0%af", b"/a;b=c;d", b"/:@!$&'()*+,;=", b"/\"<>^`{|}", b"/~", b"/+",
                b"//", b"/a//b///", b"/...", b"/..a", b"/a..", b"/%2e%2e%2e", b"/%5c", b"/%0d%0aX:%20y", b"/%3f",
                b"/%23",
            )
        ),
        ("the prefix alone", get(target=b"/api/v1/chat"), Arrives(target=b"/api/v1/chat")),
    ],
    26: [
        *(
            (f"target {target!r}", get(target=target), Arrives(target=target))
            for target in (b"/api/v1/chat/a/../b", b"/api/v1/chat/.", b"/api/v1/chat/./x", b"/api/v1/chat/a/%2e%2e/b",
                           b"/api/v1/chat/a/..", b"/api/v1/chat/;/x")
        ),
        ("dots in a query", get(target=PATH + b"?../../x"), Arrives(target=PATH + b"?../../x")),
    ],
    28: [
        *(
            (f"query {query!r}", get(target=PATH + query), Arrives(target=PATH + query))
            for query in (b"?b=2&a=1&a=1;c=+%20%2B&&=&", b"??", b"?=", b"?%", b"?%00%0d%0a", b"?\\..\\", b"?a=http://evil/",
                          b"?\xc3\xa9=\xff", b"?[]{}|^`\"<>'", b"?a?b?", b"?%23", b"?" + b"a=b&" * 1_000)
        ),
        ("a query of nothing", get(target=PATH + b"?"), Arrives()),
    ],
    29: [
        ("X-Forwarded-For", get(b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-For: 7.7.7.7"), Arrives()),
        ("X-Forwarded-For of garbage", get(b"X-Forwarded-For: 127.0.0.1, <script>, \xff"), Arrives()),
        ("X-User-ID", get(b"X-User-ID: root"), Arrives()),
    ],
    30: [
        ("X-Forwarded-*", get(b"X-Forwarded-Host: evil.example", b"X-Forwarded-Proto: https", b"X-Forwarded-Port: 1",
                              b"X-Forwarded-Prefix: /x", b"X-Forwarded-Server: evil"), Arrives()),
        ("Forwarded", get(b"Forwarded: for=6.6.6.6;host=evil.example"), Arrives()),
        ("X-Real-IP", get(b"X-Real-IP: 6.6.6.6"), Arrives(real_ip=True)),
        ("X-Gateway-Attempt", get(b"X-Gateway-Attempt: 9"), Arrives()),
    ],
    31: [
        ("Via", get(b"Via: 1.0 fred", b"Via: 1.1 p.example"), Arrives(via=b"1.0 fred, 1.1 p.example, ")),
        ("Via that nearly names us", get(b"Via: 1.1 ai-gateway"), Arrives(via=b"1.1 ai-gateway, ")),
    ],
    34: [
        ("an ID", get(b"X-Correlation-ID: Abc-1_2.3"), Arrives(named=b"Abc-1_2.3")),
        *(
            (f"ID {value!r}", get(b"X-Correlation-ID:" + value), Arrives())
            for value in (b"", b" a b", b' "a"', b" a,b", b" a/b", b" \xc3\xa9", b" {}", b" " + b"a" * 129)
        ),
        ("an ID of 128 characters", get(b"X-Correlation-ID: " + b"a" * 128), Arrives(named=b"a" * 128)),
    ],
    35: [
        ("a line just short enough", get(target=PATH + b"/" + b"a" * (16_384 - 28)),
         Arrives(target=PATH + b"/" + b"a" * (16_384 - 28))),
        ("a field just short enough", get(b"X: " + BIG[3:]), Arrives(fields=(b"x: " + BIG[3:],))),
        ("100 fields", get(*[b"X: y"] * 99), Arrives(fields=(b"x: y",) * 99)),
    ],
    43: [
        ("an expectation", post(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"), HELLO),
        ("an expectation in capitals", post(b"EXPECT: 100-CONTINUE", b"Content-Length: 5", body=b"hello"), HELLO),
        ("an expectation twice", post(*[b"Expect: 100-continue"] * 2, b"Content-Length: 5", body=b"hello"), HELLO),
        ("an expectation of a chunked body", chunked(ONE_CHUNK, lines=(b"Expect:\t100-continue",)), HELLO),
        ("an expectation of no body", get(b"Expect: 100-continue"), Arrives()),
        ("an expectation that Connection names",
         post(b"Connection: Expect", b"Expect: 100-continue", b"Content-Length: 5", body=b"hello"), HELLO),
    ],
    71: [
        ("a handshake by POST", post(*WEBSOCKET[:2], b"Content-Length: 5", body=b"hello"), HELLO),
        ("a handshake to another protocol behind", get(*WEBSOCKET[:2], b"Upgrade: h2c"), Arrives()),
        ("a handshake to a list of protocols", get(b"Connection: Upgrade", b"Upgrade: websocket, h2c"), Arrives()),
        ("a handshake to websocket/13", get(b"Connection: Upgrade", b"Upgrade: websocket/13"), Arrives()),
        ("a handshake by PUT", get(*WEBSOCKET[:2], method=b"PUT"), Arrives(method=b"PUT")),
        ("a handshake without an upgrade", get(b"Connection: Upgrade"), Arrives()),
    ],
}  # fmt: skip

# Several requests, or none that is whole -----------------------------------------------------------------------------

CLOSED = get(b"Connection: close")
TOLD_APART = [
    Case("close", 16, CLOSED, (200,), (Arrives(),)),
    Case("close and another request", 16, CLOSED + INNER, (200,), (Arrives(),)),
    Case("close and garbage", 16, CLOSED + b"\0\r\n\r\n", (200,), (Arrives(),)),
    Case("CLOSE among others", 16, get(b"Connection: x, CLOSE ,y") + INNER, (200,), (Arrives(),)),
    Case("close in a second line", 16, get(b"Connection: keep-alive", b"Connection: close"), (200,), (Arrives(),)),
    Case("close with a body", 16, post(b"Connection: close", b"Content-Length: 5", body=b"hello"), (200,), (HELLO,)),
    Case("close with chunks", 16, chunked(ONE_CHUNK, lines=(b"Connection: close",)), (200,), (HELLO,)),
    Case("HTTP/1.0", 61, get(version=b"HTTP/1.0"), (200,), (Arrives(),)),
    Case("HTTP/1.0 that would go on", 61, get(b"Connection: keep-alive", version=b"HTTP/1.0"), (200,), (Arrives(),)),
    Case("HTTP/1.0 without a Host", 61, get(version=b"HTTP/1.0", host=b""), (200,), (Arrives(host=b""),)),
    Case("HTTP/1.0 with a body", 61, post(b"Content-Length: 5", body=b"hello", version=b"HTTP/1.0"), (200,), (HELLO,)),
    Case("HTTP/1.0 with an expectation", 61,
         post(b"Expect: 100-continue", b"Content-Length: 5", body=b"hello", version=b"HTTP/1.0"), (200,), (HELLO,)),
    Case("HTTP/1.0 with a handshake", 61, get(*WEBSOCKET[:2], version=b"HTTP/1.0"), (200,), (Arrives(),)),
    Case("HTTP/1.0 with a whole URL", 22, get(target=b"http://shop.example/api/v1/chat/x", version=b"HTTP/1.0",
                                              host=b""), (200,), (Arrives(),)),
    Case("two requests", 17, get() + get(target=PATH + b"?2"), (200, 200),
         (Arrives(), Arrives(target=PATH + b"?2")), goes_on=True),
    Case("two requests and an empty line between", 17, get() + b"\r\n" + get(), (200, 200), (Arrives(),) * 2,
         goes_on=True),
    Case("five requests", 17, get() * 5, (200,) * 5, (Arrives(),) * 5, goes_on=True),
    Case("a body and a request", 17, post(b"Content-Length: 5", body=b"hello") + get(), (200, 200),
         (HELLO, Arrives()), goes_on=True),
    Case("chunks and a request", 17, chunked(ONE_CHUNK) + get(), (200, 200), (HELLO, Arrives()), goes_on=True),
    Case("a length of 0 and a request", 17, post(b"Content-Length: 0") + get(), (200, 200),
         (Arrives(method=b"POST", body=b""), Arrives()), goes_on=True),
    Case("HEAD and a request", 17, get(method=b"HEAD") + get(), (200, 200), (Arrives(method=b"HEAD"), Arrives()),
         goes_on=True),
    Case("a request that is turned away between two", 17, get() + get(target=b"/") + get(), (200, 404, 200),
         (Arrives(), Arrives()), goes_on=True),
    Case("a request, then a bad length", 17, get() + post(b"Content-Length: x"), (200, 400), (Arrives(),)),
    Case("a request, then no Host", 17, get() + get(host=b""), (200, 400), (Arrives(),)),
    Case("a request, then two framings, then a request", 17,
         get() + post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=ONE_CHUNK) + get(), (200, 400),
         (Arrives(),)),
    Case("a request, then an unknown version", 17, get() + get(version=b"HTTP/2.0") + get(), (200, 505), (Arrives(),)),
    Case("a body, then one that is unsound", 17, chunked(ONE_CHUNK) + chunked(b"0x5\r\nhello\r\n0\r\n\r\n"),
         (200, 400), (HELLO,), may_begin=True),
    Case("a body longer than its length", 18, post(b"Content-Length: 4", body=b"hello"), (200, 400),
         (HELLO._replace(body=b"hell"),)),
    Case("a body where none was announced", 18, post(body=b"hello\r\n\r\n"), (200, 400), (Arrives(method=b"POST"),)),
    Case("chunks behind a length of 0", 18, post(b"Content-Length: 0", body=ONE_CHUNK), (200, 400),
         (Arrives(method=b"POST", body=b""),)),
    Case("a length and a chunked body", 18, post(b"Content-Length: 5", body=ONE_CHUNK), (200, 400),
         (HELLO._replace(body=b"5\r\nhe"),)),
    Case("bytes behind the last chunk", 18, chunked(ONE_CHUNK, b"X"), (200, 400), (HELLO,)),
    Case("a line feed behind a request", 18, get() + b"\n", (200, 400), (Arrives(),)),
    Case("a NUL behind a request", 18, get() + b"\0", (200, 400), (Arrives(),)),
    Case("TLS behind a request", 18, get() + bytes.fromhex("16030100f5010000f10303"), (200, 400), (Arrives(),)),
    Case("an answer behind a request", 18, get() + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", (200, 400),
         (Arrives(),)),
    Case("HTTP/2 behind an upgrade to it", 58, get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c",
         b"HTTP2-Settings: AAMAAABkAAQAAP__") + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (200, 505), (Arrives(),)),
    Case("TLS behind an upgrade to it", 58, get(b"Connection: Upgrade", b"Upgrade: TLS/1.2") + b"\x16\x03\x01\0\0",
         (200, 400), (Arrives(),)),
    Case("a frame behind half a handshake", 58, get(*WEBSOCKET[:1]) + b"\x81\x80abcd", (200, 400), (Arrives(),)),
    Case("a request behind half a handshake", 58, get(*WEBSOCKET[:1]) + get(), (200, 200), (Arrives(), Arrives()),
         goes_on=True),
    Case("a frame behind a refused handshake", 58, get(*WEBSOCKET[:3]) + b"\x81\x80abcd", (400,)),
    Case("nothing", 46, b"", (), leaves=True),
    Case("an empty line", 46, b"\r\n", (), leaves=True),
    Case("half a line", 46, b"GET /api/v1", (), leaves=True),
    Case("half a head", 46, get()[:-2], (), leaves=True),
    Case("a head but for its last byte", 46, get()[:-1], (), leaves=True),
    Case("half a body", 46, post(b"Content-Length: 5", body=b"hel"), (), may_begin=True, leaves=True),
    Case("a head and no body", 46, post(b"Content-Length: 5"), (), may_begin=True, leaves=True),
    Case("half a size", 46, chunked(b"5"), (), may_begin=True, leaves=True),
    Case("half a chunk", 46, chunked(b"5\r\nhel"), (), may_begin=True, leaves=True),
    Case("a chunk of 2**60 - 1 bytes", 46, chunked(b"FFFFFFFFFFFFFFF\r\nhello"), (), may_begin=True, leaves=True),
    Case("chunks without the last", 46, chunked(b"5\r\nhello\r\n"), (), may_begin=True, leaves=True),
    Case("a last chunk without its end", 46, chunked(b"5\r\nhello\r\n0\r\n"), (), may_begin=True, leaves=True),
    Case("half a line end behind the last chunk", 46, chunked(ONE_CHUNK[:-1]), (), may_begin=True, leaves=True),
    Case("half a trailer", 46, chunked(b"5\r\nhello\r\n0\r\nX: y"), (), may_begin=True, leaves=True),
]  # fmt: skip


def _cases() -> Iterator[Case]:
    for line, refused in REFUSED.items():
        yield from (Case(name, line, data, (status,)) for name, data, status in refused)
    for line, bodies in BAD_BODIES.items():
        yield from (Case(name, line, data, (400,), may_begin=True) for name, data in bodies)
    for line, turned_away in TURNED_AWAY.items():
        yield from (Case(name, line, data, (status,), goes_on=True) for name, data, status in turned_away)
    for line, passed in PASSED.items():
        yield from (Case(name, line, data, (200,), (arrives,), goes_on=True) for name, data, arrives in passed)
    yield from TOLD_APART


CASES = tuple(_cases())
