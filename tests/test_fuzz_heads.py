"""Heads of requests that nearly make sense: read or refused, and read as other strict readers do.

``DIFFERENCES`` says where these read otherwise, and why.
"""

from collections.abc import Iterator

import h11
import httptools
import pytest
from hypothesis import given

from gateway.policies.edge import EdgeLimits
from gateway.policies.framing import TOKEN
from gateway.proxy.headers import HOP_BY_HOP, NOT_COPIED, OURS, RequestFields, connection_named, joined
from gateway.server.http1 import RefusedError, RequestHead, glimpse, read_head, refuse_early
from tests.fuzz import PLACES, Difference, mutated
from tests.hostile_requests import CASES
from tests.test_server_http1 import facts

LIMITS = EdgeLimits(max_request_line_bytes=300, max_field_bytes=200, max_head_bytes=800, max_fields=20)
SEEDS = sorted({case.data.partition(b"\r\n\r\n")[0] for case in CASES if len(case.data) < 600})
STATUSES = {400, 405, 414, 417, 431, 501, 505}
FOLLOWING = b"next"


def read(head: bytes) -> RequestHead | int:
    """What a head says, or the status that it is refused with."""
    try:
        return read_head(head, LIMITS)
    except RefusedError as refusal:
        return refusal.status


def is_refused_early(beginning: bytes) -> bool:
    try:
        refuse_early(beginning, LIMITS)
    except RefusedError as refusal:
        return refusal.status in STATUSES
    return False


def check_reading(head: bytes, places: list[int]) -> None:
    understood = read(head)
    again = read(head)
    if isinstance(understood, int) or isinstance(again, int):
        assert understood == again
        assert understood in STATUSES
    else:
        assert facts(understood) == facts(again), "remembered, it means something else"
    correlation_id, method, path = glimpse(head, whole=True)
    assert (correlation_id + method + path).isascii()
    whole = head + b"\r\n\r\n"
    if whole.find(b"\r\n\r\n") < len(head) or whole.startswith(b"\r\n"):
        return  # it ends earlier, or begins later
    for place in places:
        beginning = whole[: 1 + place % (len(whole) - 1)]
        if is_refused_early(beginning):
            assert isinstance(understood, int), f"refused early at {beginning!r}"
        glimpse(beginning, whole=False)


@given(mutated(SEEDS), PLACES)
def test_a_head_is_read_or_refused_as_documented_and_early_only_if_it_would_be_in_the_end(
    head: bytes, places: list[int]
) -> None:
    check_reading(head, places)


def test_the_corpus_is_read_or_refused_as_documented_wherever_it_is_cut() -> None:
    for seed in SEEDS:
        check_reading(seed, list(range(len(seed) + 4)))


# Beside other readers ------------------------------------------------------------------------------------------------


class Reading:
    """What a reader makes of a request: its head, its body, and whether something follows right behind that."""

    def __init__(self) -> None:
        self.method = self.target = self.version = b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.goes_on = False


def by_h11(data: bytes) -> Reading | None:
    connection, reading = h11.Connection(h11.SERVER), Reading()
    try:
        connection.receive_data(data)
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Request):
                reading.method, reading.target, reading.version = event.method, event.target, event.http_version
                reading.fields = [(bytes(name), bytes(value)) for name, value in event.headers]
            elif isinstance(event, h11.Data):
                reading.body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert connection.trailing_data[0] == FOLLOWING
                reading.goes_on = connection.their_state is not h11.MUST_CLOSE
                return reading
            else:
                raise AssertionError(f"{event} in place of the end of a request")
    except h11.RemoteProtocolError:
        return None


class Llhttp(Reading):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.complete = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.method:  # else it is a trailer
            self.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.method, self.version = self.parser.get_method(), self.parser.get_http_version().encode()
        self.goes_on = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


def by_llhttp(data: bytes) -> Reading | None:
    try:
        reading = Llhttp(data.removesuffix(FOLLOWING))  # it would refuse these
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    assert reading.complete
    return reading


def says(head: bytes, *names: bytes) -> bool:
    return any(line.partition(b":")[0].lower() in names for line in head.split(b"\r\n")[1:])


def has_raw_bytes(head: bytes) -> bool:
    return not head.partition(b"\r\n")[0].isascii()


DIFFERENCES = [
    Difference(
        "h11",
        "refuses a target with bytes above 127",
        "curl and others send UTF-8 as it is; it arrives at the service byte for byte",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a",
        has_raw_bytes,
    ),
    Difference(
        "llhttp",
        "refuses a target with bytes above 127",
        "the same",
        b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a",
        has_raw_bytes,
    ),
    Difference(
        "llhttp",
        "hands the connection over, a body unread, where there is an Upgrade that Connection names",
        "an upgrade that we take no part in is an ordinary request (RFC 9110, 7.8), as to h11; neither field crosses",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c",
        lambda head: says(head, b"upgrade") and says(head, b"connection"),
    ),
    Difference(
        "llhttp",
        "refuses a coding with a tab behind it",
        "a tab there means what a space does (RFC 9110, 5.6.3), which it allows; the service gets the body framed anew",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\t",
        lambda head: b"chunked\t" in head.lower().replace(b" ", b""),
    ),
]
READERS = {"h11": by_h11, "llhttp": by_llhttp}


def differing(reader: str, head: bytes) -> bool:
    return any(difference.reader == reader and difference.known(head) for difference in DIFFERENCES)


def comparable(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without look-alikes, and with the coding as h11 gives it, in lower case."""
    coding = b"transfer-encoding"
    return [(name, value.lower() if name == coding else value) for name, value in fields if b"_" not in name]


def check_beside_others(head: bytes) -> None:
    understood = read(head)
    if isinstance(understood, int):
        return
    (method, raw_path, _, query, version, authority), headers, length, special = understood
    if length is None:
        body, framed = b"xyz", b"3;a\r\nxyz\r\n0\r\nX: y\r\n\r\n"
    else:
        body = framed = b"x" * min(length, 1000)
    if len(body) < (length or 0):
        return
    for name, reader in READERS.items():
        if differing(name, head):
            continue
        theirs = reader(head + b"\r\n\r\n" + framed + FOLLOWING)
        assert theirs is not None, f"{name} refuses it"
        assert (theirs.method.decode(), theirs.version.decode()) == (method, version)
        target = raw_path + (b"?" + query if query else b"")
        if authority is None:
            assert theirs.target.removesuffix(b"?") == target.removesuffix(b"?")
        else:
            rest = theirs.target.partition(b"://")[2].removesuffix(b"?")
            assert rest in [(authority + path).removesuffix(b"?") for path in (target, target[1:])]
        fields, ours = comparable(theirs.fields), comparable(headers)
        assert ours == fields or ours[1:] == fields, "only the authority may have become the Host"
        assert theirs.body == body
        if version == "1.1":
            assert theirs.goes_on == (special is None or special.keep_alive)


@given(mutated(SEEDS))
def test_what_is_let_in_others_read_in_the_same_way_to_its_last_byte(head: bytes) -> None:
    check_beside_others(head)


def test_what_is_let_in_of_the_corpus_others_read_in_the_same_way_to_its_last_byte() -> None:
    for seed in SEEDS:
        check_beside_others(seed)


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: f"{difference.reader} {difference.does}")
def test_each_known_difference_is_still_one(difference: Difference) -> None:
    head = difference.example
    understood = read(head)
    assert not isinstance(understood, int)
    framed = b"0\r\n\r\n" if understood[2] is None else b""
    assert difference.known(head)
    assert READERS[difference.reader](head + b"\r\n\r\n" + framed + FOLLOWING) is None


# What of the fields crosses ------------------------------------------------------------------------------------------


def lines_of(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert block.endswith(b"\r\n")
    for line in block[:-2].split(b"\r\n"):
        name, colon, value = line.partition(b": ")
        assert colon
        yield name, value


def check_fields(head: bytes) -> None:
    understood = read(head)
    if isinstance(understood, int):
        return
    headers = understood[1]
    lines = list(lines_of(RequestFields(headers).block("192.0.2.1", lambda _: False, b"http", b"us")))
    by_name = joined(headers)
    assert not any(name.translate(None, TOKEN) or name != name.lower() for name, _ in lines)
    assert not any(character in value for _, value in lines for character in b"\r\n\0")
    names = [name for name, _ in lines]
    assert HOP_BY_HOP.isdisjoint(names)
    crossed = [line for line in lines if line[0] not in OURS]
    options = connection_named(by_name.get(b"connection", b""))
    assert options.isdisjoint(name for name, _ in crossed)
    wanted = [field for field in headers if field[0] not in NOT_COPIED | options]
    look_alikes = [field for field in wanted if field not in crossed]
    assert [field for field in wanted if field not in look_alikes] == crossed
    assert all(b"_" in name for name, _ in look_alikes)
    said = {
        b"x-forwarded-for": b"192.0.2.1",
        b"x-forwarded-proto": b"http",
        b"x-forwarded-host": by_name.get(b"host", b""),
        b"x-real-ip": b"192.0.2.1" if b"x-real-ip" in by_name else b"",
        b"via": by_name[b"via"] + b", 1.1 us" if by_name.get(b"via") else b"1.1 us",
    }
    assert [line for line in lines if line[0] in OURS] == [line for line in said.items() if line[1]]


@given(mutated(SEEDS))
def test_of_a_strangers_fields_those_cross_that_may_and_ours_are_added_once(head: bytes) -> None:
    check_fields(head)


def test_of_the_corpus_those_fields_cross_that_may() -> None:
    for seed in SEEDS:
        check_fields(seed)
