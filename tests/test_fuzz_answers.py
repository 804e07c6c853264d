"""Answers of a hostile service that nearly make sense: refused or read, the same however they are cut."""

import h11
from hypothesis import given

from gateway.policies.framing import CONTROLS, TOKEN, MalformedError
from gateway.proxy.answers import MAX_FIELDS, MAX_HEAD_BYTES, read_head, refuse_early
from gateway.proxy.headers import HOP_BY_HOP
from gateway.proxy.http1 import Http1Connection
from tests.fuzz import PLACES, cut, mutated
from tests.test_answers import CHUNKS, LENGTH, SOUND, assert_same, read
from tests.test_fuzz_bodies import DIFFERENCES
from tests.test_fuzz_bodies import SEEDS as BODIES

FIELDS = [
    *(b"Content-Length: 5", b"Content-Length: 05", b"content-length:5", b"Content-Length: 5, 5", b"Content-Length: +5"),
    *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding:", b"TRANSFER-ENCODING: CHUNKED", b"X : y", b" folded"),
    *(b"Connection: content-length", b"Connection: close, x", b"Connection: \t,", b"Keep-Alive: x", b"Upgrade: h2c"),
    *(b"Set-Cookie: a=b", b"Trailer: X", b"X:", b"X: a\tb", b"X: \x80", b"X: \x0b", b"X\0: a", b": a", b"nothing"),
]
HEADS = [b"HTTP/1.1 200 OK\r\nServer: a\r\n%b\r\nX-A: b\r\n\r\nhello" % field for field in FIELDS]
LINES = [
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 101 x",
    b"HTTP/1.1 204",
    b"HTTP/1.1 304 x",
    b"HTTP/1.0 200 OK",
    b"HTTP/2 200",
]
LINES += [b"HTTP/1.1 999 ", b"HTTP/1.1 099 x", b"HTTP/1.1 20 x", b"HTTP/1.1\t200 OK", b"http/1.1 200 OK", b"ICY 200 OK"]
SEEDS = [*SOUND, *HEADS, *(line + b"\r\nContent-Length: 5\r\n\r\nhello" for line in LINES)]
SEEDS += [CHUNKS + body for body in BODIES if len(body) < 200]
SEEDS += [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * count + SOUND[0] for count in (8, 9)]


def outcome(pieces: list[bytes]) -> object:
    """What is told of an answer when all of it has come."""
    connection, body = read(pieces)
    if connection.complete:  # what follows it only ends the connection, at once or when it comes
        return connection.status, connection.headers, body, connection.reusable
    if connection.error is not None:
        return "refused"
    return (connection.status, connection.headers, body) if connection.head_complete else "incomplete"


def check_cuts(data: bytes, places: list[int]) -> None:
    assert outcome(cut(data, places)) == outcome([data])


def check_head(data: bytes) -> None:
    """A head is refused with the one error there is for it, and early only if it would be in the end."""
    head, ends, _ = data.partition(b"\r\n\r\n")
    accepted = is_accepted(head)
    if not ends:
        head = data
    for at in range(1, len(head) + 4):
        try:
            refuse_early((head + b"\r\n\r\n")[:at])
        except MalformedError:
            assert not accepted
            break


def is_accepted(head: bytes) -> bool:
    try:
        status, fields, _, _ = read_head(head)
    except MalformedError:
        return False
    assert 100 <= status <= 999
    for name, value in fields:
        assert name
        assert not name.translate(None, TOKEN)
        assert name == name.lower()
        assert value.translate(None, CONTROLS) == value == value.strip()
        assert name not in HOP_BY_HOP
    return True


def test_each_answer_of_the_corpus_is_the_same_wherever_it_is_cut() -> None:
    for seed in SEEDS:
        check_head(seed)
        for place in range(min(len(seed), 200)):
            check_cuts(seed, [place])


@given(mutated(SEEDS), PLACES)
def test_an_answer_is_the_same_however_it_is_cut(data: bytes, places: list[int]) -> None:
    if data:
        check_cuts(data, places)


@given(mutated(SEEDS))
def test_a_head_is_refused_early_only_if_it_would_be_in_the_end(data: bytes) -> None:
    check_head(data)


def test_a_head_of_exactly_the_largest_size_is_read_wherever_it_is_cut() -> None:
    head = LENGTH + b"X: "
    head += b"y" * (MAX_HEAD_BYTES - len(head))
    many = LENGTH + b"\r\n".join([b"X: y"] * (MAX_FIELDS - 1))
    for whole in (head + b"\r\n\r\nok", many + b"\r\n\r\nok"):
        for place in range(len(whole) - 8, len(whole)):
            connection, body = read([whole[:place], whole[place:]])
            assert (connection.error, connection.complete, body) == (None, True, b"ok")
    for whole in (head + b"y\r\n\r\nok", many + b"\r\nX: y\r\n\r\nok"):
        for place in range(len(whole) - 8, len(whole)):
            assert read([whole[:place], whole[place:]])[0].error is not None


# Beside other readers ------------------------------------------------------------------------------------------------


def check_beside_others(data: bytes) -> None:
    connection, body = read([data])
    if connection.error is not None or not connection.complete or connection.is_closing:
        return
    behind = data.partition(b"\r\n\r\n")[2]
    if connection.content_length is None and any(difference.known(behind) for difference in DIFFERENCES):
        return  # as with a request's body
    assert_same(data, connection, body)  # llhttp
    check_by_h11(data, connection, body)


def check_by_h11(data: bytes, connection: Http1Connection, body: bytes) -> None:
    client, theirs = h11.Connection(h11.CLIENT), b""
    client.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(data)
    while True:
        event = client.next_event()
        if isinstance(event, h11.Response):
            assert event.status_code == connection.status
            assert event.http_version in (b"1.0", b"1.1")
        elif isinstance(event, h11.Data):
            theirs += event.data
        elif isinstance(event, h11.EndOfMessage):
            break
        else:
            assert isinstance(event, h11.InformationalResponse)
    assert theirs == body
    assert client.trailing_data[0] == b""
    if connection.reusable and connection.content_length is not None:
        assert client.their_state in (h11.DONE, h11.MUST_CLOSE)


@given(mutated(SEEDS))
def test_what_is_accepted_others_read_in_the_same_way(data: bytes) -> None:
    check_beside_others(data)


def test_what_is_accepted_of_the_corpus_others_read_in_the_same_way() -> None:
    for seed in SEEDS:
        check_beside_others(seed)
