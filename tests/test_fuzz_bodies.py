"""Chunked bodies that nearly make sense: the same however they are cut, and as other readers take them."""

import re

import h11
import httptools
import pytest
from hypothesis import given

from gateway.policies.framing import ALLOWED_PER_CHUNK, MAX_CHUNK_OVERHEAD, ChunkedBody, MalformedError
from tests.fuzz import PLACES, Difference, cut, mutated
from tests.hostile_requests import CASES

HEAD = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
SEEDS = sorted(
    {body for case in CASES if b"chunked\r\n" in case.data for body in [case.data.partition(b"\r\n\r\n")[2]] if body}
)
Outcome = tuple[bytes, bytes | None] | None


def decode(pieces: list[bytes]) -> Outcome:
    """The body, and what follows it (None: it has not ended); or None where it is refused."""
    decoder, body = ChunkedBody(), b""
    try:
        for number, piece in enumerate(pieces):
            data, rest = decoder.feed(piece)
            body += data
            if rest is not None:
                return body, rest + b"".join(pieces[number + 1 :])
    except MalformedError:
        return None
    return body, None


def check_cuts(data: bytes, places: list[int]) -> None:
    whole = decode([data])
    assert decode(cut(data, places)) == whole
    assert decode([data[at : at + 1] for at in range(len(data))]) == whole


def test_each_body_of_the_corpus_is_the_same_wherever_it_is_cut() -> None:
    for seed in SEEDS:
        check_cuts(seed, [])
        for place in range(min(len(seed), 300)):
            assert decode(cut(seed, [place])) == decode([seed])


def test_framing_up_to_the_limit_is_the_same_wherever_it_is_cut() -> None:
    for size in range(MAX_CHUNK_OVERHEAD - 4, MAX_CHUNK_OVERHEAD + ALLOWED_PER_CHUNK + 4):
        line = b"5;" + b"a" * (size - 2)
        for data in (
            line + b"\r\nhello\r\n0\r\n\r\n",
            b"0\r\nX:" + line + b"\r\n\r\n",
            b"1;b\r\nx\r\n" + line + b"\r\n",
        ):
            for place in (len(data) - 1, data.index(line) + size, data.index(line) + size + 1):
                assert decode(cut(data, [place])) == decode([data])


@given(mutated(SEEDS), PLACES)
def test_a_body_is_the_same_however_it_is_cut(data: bytes, places: list[int]) -> None:
    check_cuts(data, places)


# Beside other readers ----------------------------------------------------------------------------------------------


def by_h11(data: bytes) -> Outcome:
    connection, body = h11.Connection(h11.SERVER), b""
    try:
        connection.receive_data(HEAD + data)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                return body, None
            if isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return body, connection.trailing_data[0]
    except h11.RemoteProtocolError:
        return None


class Llhttp:
    """What llhttp makes of a request with that body, byte by byte until it is over."""

    def __init__(self, data: bytes) -> None:
        self.body = b""
        self.complete = False
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(HEAD)
        self.read = 0
        while self.read < len(data) and not self.complete:
            parser.feed_data(data[self.read : self.read + 1])
            self.read += 1

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.complete = True


def by_llhttp(data: bytes) -> Outcome:
    try:
        reader = Llhttp(data)
    except httptools.HttpParserError:
        return None
    return reader.body, data[reader.read :] if reader.complete else None


FRAMING_TRAILER = re.compile(rb"\n(content-length|transfer-encoding):", re.IGNORECASE)
EXTENDED = re.compile(rb"^[0-9a-f]+;.*(?=\r$)", re.IGNORECASE | re.MULTILINE)
SOUNDLY_EXTENDED = re.compile(rb"[0-9a-f]+(;[\w-]+(=([\w-]+|\"[\w -]*\"))?)+", re.IGNORECASE)


def is_oddly_extended(data: bytes) -> bool:
    return not all(map(SOUNDLY_EXTENDED.fullmatch, EXTENDED.findall(data)))


DIFFERENCES = [
    *(
        Difference(
            reader,
            "refuses a trailer that would say how the body is framed",
            "the body is over by then, and no trailer becomes a field, here or at the service: it is read over",
            b"0\r\nTransfer-Encoding: x\r\n\r\n",
            FRAMING_TRAILER.search,
        )
        for reader in ("h11", "llhttp")
    ),
    Difference(
        "llhttp",
        "refuses extensions that are not of the form in RFC 9112, 7.1.1",
        "what ends their line is never in doubt, and none crosses",
        b"5;;; a = b\r\nhello\r\n0\r\n\r\n",
        is_oddly_extended,
    ),
]
READERS = {"h11": by_h11, "llhttp": by_llhttp}


def check_beside_others(data: bytes) -> None:
    """A body that we take whole they take to be the same; so all see the same next request."""
    outcome = decode([data])
    if outcome is not None and outcome[1] is not None:
        for name, reader in READERS.items():
            theirs = reader(data)
            known = [difference for difference in DIFFERENCES if difference.reader == name and difference.known(data)]
            assert theirs == outcome or (theirs is None and known), name


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: f"{difference.reader} {difference.does}")
def test_each_known_difference_is_still_one(difference: Difference) -> None:
    data = difference.example
    outcome = decode([data])
    assert outcome is not None
    assert outcome[1] == b""
    assert difference.known(data)
    assert READERS[difference.reader](data) is None


def test_what_is_accepted_of_the_corpus_others_read_in_the_same_way() -> None:
    for seed in SEEDS:
        check_beside_others(seed)


@given(mutated(SEEDS))
def test_what_is_accepted_others_read_in_the_same_way_to_the_last_byte(data: bytes) -> None:
    check_beside_others(data)
