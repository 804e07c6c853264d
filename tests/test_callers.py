"""Who is calling: whose word counts, which address is the client's, and what it is counted by."""

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.callers import Header, Identity, Networks, TrustedProxies, identify

LOCAL = TrustedProxies()
BEHIND = TrustedProxies(["10.0.0.0/8", "2001:db8:ffff::/48", "unix"])


def forwarded_for(*values: str) -> list[Header]:
    return [(b"x-forwarded-for", value.encode()) for value in values]


def forwarded(*values: str) -> list[Header]:
    return [(b"forwarded", value.encode()) for value in values]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", None, "", "unix"])
def test_loopback_and_unix_sockets_are_trusted_by_default(host: str | None) -> None:
    assert LOCAL.trusts(host)


@pytest.mark.parametrize("host", ["128.0.0.1", "10.0.0.1", "::2", "localhost", "testclient", "127.0.0.1.example"])
def test_others_are_not(host: str) -> None:
    assert not LOCAL.trusts(host)


def test_a_unix_socket_is_in_a_set_only_where_the_word_is() -> None:
    assert not Networks(["127.0.0.0/8"]).contains(None)
    assert Networks(["unix"]).contains(None)


def test_a_network_written_as_mapped_ipv4_means_the_ipv4_one() -> None:
    networks = Networks(["::ffff:10.0.0.0/104"])
    assert networks.contains("10.1.2.3")
    assert networks.contains("::ffff:10.1.2.3")
    assert not networks.contains("11.1.2.3")


def test_a_zone_does_not_change_an_address() -> None:
    assert Networks(["fe80::/10"]).contains("fe80::1%eth0")


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "10.0.0.0/33", "proxy.internal", "*", "", "10.0.0.0-10.0.0.9"])
def test_a_malformed_entry_is_named(entry: str) -> None:
    with pytest.raises(ValueError, match="is not an address") as raised:
        TrustedProxies(["127.0.0.1", entry])
    assert repr(entry) in str(raised.value)


def test_what_is_remembered_of_peers_is_bounded() -> None:
    networks = Networks(["10.0.0.0/8"])
    for number in range(20_000):
        networks.contains(f"192.0.{number // 256}.{number % 256}")
    assert len(networks._known) <= 8192
    assert networks.contains("10.0.0.1")


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ([], "10.0.0.1"),
        (forwarded_for("203.0.113.7"), "203.0.113.7"),
        (forwarded_for("203.0.113.7, 10.0.0.2"), "203.0.113.7"),
        (forwarded_for("6.6.6.6, 203.0.113.7, 10.0.0.2"), "203.0.113.7"),
        (forwarded_for("6.6.6.6", "203.0.113.7 ,10.0.0.2"), "203.0.113.7"),
        (forwarded_for("10.0.0.3, 10.0.0.2"), "10.0.0.3"),
        (forwarded_for("203.0.113.7:4711"), "203.0.113.7"),
        (forwarded_for("2001:DB8:0::1"), "2001:db8::1"),
        (forwarded_for("[2001:db8::1]:4711"), "2001:db8::1"),
        (forwarded_for("[2001:db8::1]"), "2001:db8::1"),
        (forwarded_for("::ffff:203.0.113.7"), "203.0.113.7"),
        (forwarded_for("203.0.113.7, garbage, 10.0.0.2"), "10.0.0.2"),
        (forwarded_for("203.0.113.7, , 10.0.0.2"), "10.0.0.2"),
        (forwarded_for("203.0.113.7, unix"), "10.0.0.1"),
        (forwarded_for("203.0.113.7:x"), "10.0.0.1"),
        (forwarded_for("[2001:db8::1]x80"), "10.0.0.1"),
        (forwarded_for("[2001:db8::1"), "10.0.0.1"),
        (forwarded_for(""), "10.0.0.1"),
        (forwarded("for=203.0.113.7"), "203.0.113.7"),
        (forwarded('for="[2001:db8::1]:4711";proto=https'), "2001:db8::1"),
        (forwarded("proto=https;For=203.0.113.7 , for=10.0.0.2;by=x"), "203.0.113.7"),
        (forwarded('for="203.0.113.7:_hidden"'), "203.0.113.7"),
        (forwarded("for=_hidden, for=10.0.0.2"), "10.0.0.2"),
        (forwarded("for=unknown"), "10.0.0.1"),
        (forwarded("proto=https"), "10.0.0.1"),
        (forwarded('for="6.6.6.6', "for=203.0.113.7"), "203.0.113.7"),  # an open quote swallows nothing
        ([*forwarded("for=6.6.6.6"), *forwarded_for("203.0.113.7")], "203.0.113.7"),
    ],
)
def test_the_client_is_the_first_hop_from_the_right_that_is_not_trusted(headers: list[Header], address: str) -> None:
    assert BEHIND.client_address("10.0.0.1", headers) == address


def test_a_stranger_is_the_client_whatever_it_says() -> None:
    assert BEHIND.client_address("198.51.100.9", forwarded_for("203.0.113.7")) == "198.51.100.9"
    assert LOCAL.client_address("::ffff:198.51.100.9", forwarded("for=203.0.113.7")) == "198.51.100.9"


def test_behind_a_unix_socket_the_header_names_the_client() -> None:
    assert BEHIND.client_address(None, forwarded_for("203.0.113.7")) == "203.0.113.7"
    assert BEHIND.client_address(None, []) == "unix"
    assert BEHIND.client_address("", []) == "unix"


@given(st.lists(st.binary(max_size=40), max_size=5), st.sampled_from([b"x-forwarded-for", b"forwarded"]))
def test_no_list_of_hops_raises_or_yields_what_is_no_address(values: list[bytes], name: bytes) -> None:
    address = BEHIND.client_address("10.0.0.1", [(name, value) for value in values])
    assert Networks(["0.0.0.0/0", "::/0"]).contains(address)


@given(st.binary(max_size=60))
def test_what_a_client_wrote_to_the_left_never_counts(written: bytes) -> None:
    for name, appended in ((b"x-forwarded-for", b", 203.0.113.7"), (b"forwarded", b", for=203.0.113.7")):
        assert BEHIND.client_address("10.0.0.1", [(name, written + appended)]) == "203.0.113.7"


@pytest.mark.parametrize(
    ("peer", "headers", "caller"),
    [
        ("198.51.100.9", [], "ip:198.51.100.9"),
        ("::ffff:198.51.100.9", [], "ip:198.51.100.9"),
        ("2001:db8:1:2:3:4:5:6", [], "ip:2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", [], "ip:2001:db8:1:2::/64"),
        ("fe80::1%eth0", [], "ip:fe80::/64"),
        (None, [], "ip:unix"),
        ("testclient", [], "ip:testclient"),
        ("127.0.0.1", forwarded_for("203.0.113.7"), "ip:203.0.113.7"),
        ("127.0.0.1", [(b"x-user-id", b"alice")], "user:alice"),
        ("127.0.0.1", [(b"x-user-id", b"alice@example.com|7=")], "user:alice@example.com|7="),
        (None, [(b"x-user-id", b"alice")], "user:alice"),
        ("127.0.0.1", [(b"x-user-id", b"alice"), *forwarded_for("203.0.113.7")], "user:alice"),
        ("127.0.0.1", [(b"x-user-id", b"a" * 64)], "user:" + "a" * 64),
        ("127.0.0.1", [(b"x-user-id", b"a" * 65)], "user:sha256:" + sha256(b"a" * 65).hexdigest()),
        ("127.0.0.1", [(b"x-user-id", b"a b")], "user:sha256:" + sha256(b"a b").hexdigest()),
        ("127.0.0.1", [(b"x-user-id", "zoë".encode())], "user:sha256:" + sha256("zoë".encode()).hexdigest()),
        ("x" * 65, [], "ip:sha256:" + sha256(b"x" * 65).hexdigest()),
    ],
)
def test_a_caller_is_the_user_where_one_can_be_trusted_else_the_address(
    peer: str | None, headers: list[Header], caller: str
) -> None:
    identity = identify(headers, peer, LOCAL)
    assert (identity.caller, identity.user_id_is_false, identity.ignored) == (caller, False, b"")


@pytest.mark.parametrize("user_id", [b"", b"a\x00b", b"\x7f", b"a" * 1025, "é\n".encode(), b"a\tb"])
def test_a_malformed_user_id_is_not_believed_even_from_a_trusted_proxy(user_id: bytes) -> None:
    identity = identify([(b"x-user-id", user_id)], "127.0.0.1", LOCAL)
    assert (identity.caller, identity.user_id_is_false) == ("ip:127.0.0.1", True)


def test_of_two_user_ids_one_could_be_the_clients_so_neither_is_believed() -> None:
    identity = identify([(b"x-user-id", b"mallory"), (b"x-user-id", b"alice")], "127.0.0.1", LOCAL)
    assert (identity.caller, identity.user_id_is_false) == ("ip:127.0.0.1", True)


@pytest.mark.parametrize(
    ("headers", "is_false", "ignored"),
    [
        ([(b"x-user-id", b"alice"), *forwarded_for("10.0.0.1")], True, b"x-user-id"),
        (forwarded_for("10.0.0.1"), False, b"x-forwarded-for"),
        (forwarded("for=10.0.0.1"), False, b"forwarded"),
    ],
)
def test_a_stranger_is_counted_by_its_own_address(headers: list[Header], is_false: bool, ignored: bytes) -> None:
    identity = identify(headers, "198.51.100.9", LOCAL)
    assert identity == Identity("ip:198.51.100.9", "198.51.100.9", is_false, ignored)


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_two_user_ids_never_share_a_key(one: bytes, other: bytes) -> None:
    keys = [identify([(b"x-user-id", user_id)], None, LOCAL).caller for user_id in (one, other)]
    assert all(key.startswith(("user:", "ip:unix")) for key in keys)
    if one != other and keys[0] == keys[1]:
        assert keys[0] == "ip:unix"


def test_what_is_remembered_of_callers_is_bounded_in_number_and_length() -> None:
    trusted = TrustedProxies()
    for number in range(10_000):
        identify([(b"x-user-id", b"user-%d" % number)], "127.0.0.1", trusted)
        identify([(b"x-forwarded-for", b"203.0.113.7, " * 100)], "127.0.0.1", trusted)
        identify([(b"forwarded", b"")] * 100, "127.0.0.1", trusted)
    assert len(trusted.identities) <= 8192
    assert all(sum(len(part or b"") for part in said) <= 256 for _, *said in trusted.identities)


def test_headers_may_be_lists_and_are_read_afresh_for_each_peer() -> None:
    headers: list[Any] = [[b"host", b"a"], [b"x-user-id", b"alice"]]
    for _ in range(2):
        assert identify(headers, "127.0.0.1", LOCAL).caller == "user:alice"
        assert identify(headers, "198.51.100.9", LOCAL).caller == "ip:198.51.100.9"
        assert identify([*headers, headers[1]], "127.0.0.1", LOCAL).caller == "ip:127.0.0.1"
