"""Which fields cross the gateway, as a table."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.headers import (
    NOT_COPIED,
    REMEMBERED,
    RequestFields,
    _first_forwarding,
    _shapes,
    answer_fields,
    forwarding_fields,
    joined,
)

Headers = list[tuple[bytes, bytes]]


def crossing(headers: Headers) -> Headers:
    lines = RequestFields(headers).kept.split(b"\r\n")[:-1]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"accept", b"a"), (b"x-a", b"1"), (b"x-a", b"2")], [(b"accept", b"a"), (b"x-a", b"1"), (b"x-a", b"2")]),
        ([(b"connection", b"keep-alive, x-a"), (b"x-a", b"1"), (b"x-b", b"2")], [(b"x-b", b"2")]),
        ([(b"connection", b""), (b"connection", b"X-A"), (b"x-a", b"1")], []),
        ([(b"connection", b"X-Correlation-ID, x-user-id"), (b"x-correlation-id", b"1"), (b"x-user-id", b"u")],
         [(b"x-correlation-id", b"1"), (b"x-user-id", b"u")]),
        ([(b"te", b"trailers"), (b"trailer", b"x"), (b"upgrade", b"h2c"), (b"keep-alive", b"timeout=5")], []),
        ([(b"proxy-authorization", b"s"), (b"proxy-connection", b"close")], []),
        ([(b"content_length", b"5"), (b"transfer_encoding", b"chunked"), (b"x_user_id", b"root")], []),
        ([(b"x_own", b"kept")], [(b"x_own", b"kept")]),
        ([(b"expect", b"100-continue"), (b"host", b"h"), (b"content-length", b"3")], []),
        ([(b"connection", b"content-length"), (b"content-length", b"3"), (b"authorization", b"b")],
         [(b"authorization", b"b")]),
        ([(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-server", b"evil"), (b"forwarded", b"for=6.6.6.6")], []),
    ],
)  # fmt: skip
def test_what_of_a_request_crosses_as_it_is(headers: Headers, expected: Headers) -> None:
    assert crossing(headers) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"set-cookie", b"a"), (b"set-cookie", b"b")], [(b"set-cookie", b"a"), (b"set-cookie", b"b")]),
        ([(b"connection", b"x-internal"), (b"x-internal", b"1"), (b"date", b"d")], [(b"date", b"d")]),
        ([(b"transfer-encoding", b"chunked"), (b"trailer", b"x"), (b"server", b"s")], [(b"server", b"s")]),
        ([(b"connection", b"content-length"), (b"content-length", b"5")], [(b"content-length", b"5")]),
        ([(b"proxy-authenticate", b"Basic"), (b"keep-alive", b"timeout=5")], []),
        ([(b"connection", b"x-a"), (b"x-a", b"1"), (b"connection", b"keep-alive"), (b"x-b", b"2")], [(b"x-b", b"2")]),
    ],
)
def test_what_of_an_answer_reaches_the_client(headers: Headers, expected: Headers) -> None:
    assert answer_fields(headers, joined(headers)) == expected


def forwarded(
    headers: Headers, *, peer: bytes = b"203.0.113.9", trusted: bool, scheme: bytes = b"http"
) -> dict[bytes, bytes]:
    block = forwarding_fields(RequestFields(headers), peer=peer, trusted=trusted, scheme=scheme, via=b"gw")
    lines = [line.partition(b": ") for line in block.split(b"\r\n")[:-1]]
    fields = {name: value for name, _, value in lines}
    assert len(fields) == len(lines), "no field twice"
    return fields


CLAIMS = [
    (b"host", b"api.example"),
    (b"x-forwarded-for", b"198.51.100.1"),
    (b"x-forwarded-for", b"198.51.100.2"),
    (b"x-forwarded-proto", b"https"),
    (b"x-forwarded-host", b"shop.example"),
    (b"x-real-ip", b"198.51.100.1"),
    (b"forwarded", b"for=198.51.100.1"),
    (b"via", b"1.1 edge"),
]


def test_a_strangers_claims_are_replaced() -> None:
    assert forwarded(CLAIMS, trusted=False) == {
        b"x-forwarded-proto": b"http",
        b"via": b"1.1 edge, 1.1 gw",
        b"x-forwarded-for": b"203.0.113.9",
        b"x-real-ip": b"203.0.113.9",
        b"x-forwarded-host": b"api.example",
    }


def test_a_trusted_proxys_claims_are_continued() -> None:
    assert forwarded(CLAIMS, trusted=True) == {
        b"x-forwarded-proto": b"https",
        b"via": b"1.1 edge, 1.1 gw",
        b"x-forwarded-for": b"198.51.100.1, 198.51.100.2, 203.0.113.9",
        b"x-forwarded-host": b"shop.example",
        b"x-real-ip": b"198.51.100.1",
        b"forwarded": b"for=198.51.100.1, for=203.0.113.9",
    }


def test_a_unix_socket_has_no_address_to_add() -> None:
    assert forwarded([(b"host", b"h")], peer=b"", trusted=True) == {
        b"x-forwarded-proto": b"http",
        b"via": b"1.1 gw",
        b"x-forwarded-host": b"h",
    }


def test_an_ipv6_hop_is_quoted_in_forwarded() -> None:
    fields = forwarded([(b"forwarded", b"for=a")], peer=b"2001:db8::1", trusted=True, scheme=b"https")
    assert fields[b"forwarded"] == b'for=a, for="[2001:db8::1]"'
    assert fields[b"x-forwarded-proto"] == b"https"


def test_an_idempotency_key_is_seen_only_as_a_field() -> None:
    assert RequestFields([(b"idempotency-key", b"1")]).keyed
    assert RequestFields([(b"a", b"b"), (b"idempotency-key", b"1")]).keyed
    assert not RequestFields([(b"a", b"idempotency-key: 1")]).keyed


NAMES = st.sampled_from([b"accept", b"x-a", b"%b", b"x%", b"host", b"te", b"via", b"content-length", b"x-own"])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=5)), max_size=6))
def test_fields_cross_in_their_order_whatever_their_names_and_values(headers: Headers) -> None:
    fields = RequestFields(headers)
    crossing = [b"%b: %b\r\n" % header for header in headers if header[0] not in NOT_COPIED]
    assert fields.kept == b"".join(crossing)
    for name, value in ((b"host", fields.host or None), (b"content-length", fields.length)):
        lines = [value for other, value in headers if other == name]
        assert (value or b"") == b", ".join(lines)
    for trusted in (True, False):
        block = fields.block("203.0.113.9", lambda peer: trusted, b"http", b"gw")  # noqa: B023
        told = forwarding_fields(fields, peer=b"203.0.113.9", trusted=trusted, scheme=b"http", via=b"gw")
        assert block == fields.kept + told


def test_what_is_remembered_of_requests_is_bounded_and_holds_no_value_but_hosts_of_some_length() -> None:
    for number in range(2 * REMEMBERED):
        for host in (b"h%d" % number, b"long" * 300):
            headers = [(b"host", host), (b"x-%d" % number, b""), (b"authorization", b"secret")]
            RequestFields(headers).block("192.0.2.1", bool, b"http", b"gw")
            RequestFields([*headers, (b"x-" + b"long" * 300, b"")])
    assert 0 < len(_shapes) <= REMEMBERED
    assert not any(b"long" in name for names in _shapes for name in names)
    kept = [getattr(shape, name) for shape in _shapes.values() for name in dir(shape)]
    assert "secret" not in repr(kept)
    assert _first_forwarding.cache_info().currsize <= REMEMBERED
