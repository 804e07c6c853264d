"""EDGE.md, line by line, from the client's bytes to the service's and back, through our own server and proxy.

``LINES`` says where each line is tested; ``here`` stands for the tests below whose names or IDs begin with it, and
``corpus`` for at least three cases of ``hostile_requests``.
"""

import ast
import asyncio
import gzip
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.app import create_app
from gateway.policies.edge import EdgeLimits
from gateway.policies.services import Service as Target
from gateway.proxy.app import ProxyApp
from gateway.proxy.pool import ConnectionPool
from gateway.server.protocol import GatewayProtocol
from gateway.settings import Settings
from tests.frames import TEXT, Frame, Raw, accepted, frame, handshake
from tests.hostile_requests import CASES
from tests.proxy_rig import Rig as ProxyRig
from tests.proxy_rig import Seen
from tests.wire import (
    OK,
    Handler,
    Reader,
    Request,
    Service,
    Writer,
    connected,
    parse,
    read_body,
    reply,
    send_raw,
    service,
    serving,
    until,
)

SOCKET = "test_websocket_proxy"
UNSENT = "test_outbox::test_a_post_that_waited_on_a_connection_that_was_lost_is_sent_on_another"
LEAVING = "test_cancellation::test_a_client_that_leaves_ends_its_request_within_250_ms"
LINES = {
    1: ["corpus", "here"],
    2: ["corpus", "here", "test_proxy_headers::test_what_of_a_request_crosses_as_it_is"],
    3: ["corpus", "here"],
    4: ["corpus", "here"],
    5: ["corpus"],
    6: ["corpus"],
    7: ["corpus"],
    8: ["corpus"],
    9: ["corpus", "test_server_refusals::test_a_malformed_head_is_refused_in_the_error_form_and_the_connection_closed"],
    10: ["corpus"],
    11: ["corpus", "here", "test_server_protocol::test_look_alikes_of_fields_that_matter_are_dropped_and_others_kept"],
    12: ["corpus", "test_fuzz_bodies::test_framing_up_to_the_limit_is_the_same_wherever_it_is_cut"],
    13: ["corpus", "test_fuzz_bodies::test_each_body_of_the_corpus_is_the_same_wherever_it_is_cut"],
    14: ["corpus", "test_server_protocol::test_trailers_never_become_headers"],
    15: ["here", "test_proxy::test_every_framing_of_an_answer_reaches_the_client_whole"],
    16: ["corpus", "test_server_answers::test_bytes_after_the_last_request_are_ignored"],
    17: ["corpus", "test_server_answers::test_requests_sent_at_once_are_answered_one_after_another_in_order"],
    18: ["corpus", "test_server_answers::test_garbage_behind_a_request_is_refused_only_after_its_answer"],
    19: ["corpus", "test_server_refusals::test_nothing_behind_a_refused_head_is_read"],
    20: ["corpus"],
    21: ["corpus"],
    22: ["corpus", "here", "test_server_protocol::test_the_authority_of_an_absolute_target_becomes_the_host"],
    23: ["corpus", "here", "test_server_refusals::test_a_405_says_what_is_allowed"],
    24: ["corpus", "here"],
    25: ["corpus", "here", "test_proxy::test_path_and_query_arrive_byte_for_byte"],
    26: ["corpus", "here", "test_services::test_no_accepted_path_leaves_its_prefix_however_often_it_is_decoded"],
    27: ["corpus", "here"],
    28: ["corpus", "here"],
    29: ["corpus", "here", "test_proxy_headers::test_a_trusted_proxys_claims_are_continued"],
    30: ["corpus", "here", "test_proxy_headers::test_a_strangers_claims_are_replaced"],
    31: ["corpus", "here", "test_proxy::test_a_request_that_came_through_this_gateway_before_is_508"],
    32: ["here"],
    33: ["here", "test_proxy::test_repeated_fields_keep_their_order"],
    34: ["corpus", "test_contract::test_a_well_formed_correlation_id_is_on_the_answer_and_at_the_service"],
    35: ["corpus", "here", "test_server_refusals::test_an_endless_head_is_refused_after_a_bounded_number_of_bytes"],
    36: ["here", "test_proxy_failures::test_an_answer_that_is_not_clean_http_becomes_502"],
    37: ["here"],
    38: ["test_server_clients::test_a_head_that_takes_too_long_is_408"],
    39: ["test_server_clients::test_a_body_that_stops_coming_is_408"],
    40: ["test_server_clients::test_a_client_that_does_not_read_is_cut"],
    41: ["test_server_clients::test_an_idle_connection_is_closed_silently"],
    42: [
        "test_proxy_failures::test_a_service_that_is_not_there_is_502_and_one_that_is_silent_504",
        "test_proxy_failures::test_a_stalled_answer_is_cut_and_a_stalled_stream_says_so_between_two_events",
        "test_proxy_failures::test_a_service_that_stops_taking_the_body_is_a_timeout_of_its_own",
        "test_proxy_failures::test_an_answer_that_drips_is_ended_by_the_time_for_the_whole",
    ],
    43: [
        "corpus",
        "here",
        "test_server_protocol::test_100_continue_is_sent_when_the_application_first_asks_for_the_body",
    ],
    44: [
        "corpus",
        "test_server_refusals::test_a_malformed_head_is_refused_in_the_error_form_and_the_connection_closed",
    ],
    45: ["here", "test_proxy::test_an_answer_before_the_body_is_up_passes"],
    46: ["corpus", LEAVING],
    47: [LEAVING],
    48: ["here", "test_server_clients::test_a_client_that_half_closes_after_its_requests_is_answered"],
    49: ["here", "test_server_protocol::test_a_body_that_nobody_reads_holds_its_sender_back"],
    50: ["test_proxy::test_each_event_leaves_as_it_arrives"],
    51: ["here"],
    52: [
        "test_proxy_failures::test_an_answer_that_breaks_off_anywhere_never_looks_whole",
        "test_proxy_failures::test_a_stalled_answer_is_cut_and_a_stalled_stream_says_so_between_two_events",
    ],
    53: ["here", "test_proxy_failures::test_an_answer_that_is_not_clean_http_becomes_502"],
    54: ["here"],
    55: ["here"],
    56: ["test_proxy_failures::test_bytes_behind_an_answer_never_reach_another_client", UNSENT],
    57: ["here", f"{SOCKET}::test_a_handshake_that_is_not_accepted_never_hangs"],
    58: [
        "corpus",
        "here",
        "test_server_websocket::test_frames_before_a_websocket_is_accepted_are_bounded_and_dropped_with_it",
    ],
    59: ["here", "test_proxy::test_head_and_304_keep_their_length_and_have_no_body"],
    60: ["here"],
    61: ["corpus", "here"],
    62: ["here"],
    63: ["here"],
    64: ["test_proxy_retries::test_a_stale_connection_costs_a_get_nothing_and_a_post_is_never_sent_twice", UNSENT],
    65: [
        "test_proxy_retries::test_a_stale_connection_costs_a_get_nothing_and_a_post_is_never_sent_twice",
        "test_retry::test_a_byte_sent_to_the_client_or_a_dispatched_post_means_no_second_sending",
    ],
    66: ["test_pool::test_a_connection_that_the_service_closed_is_not_used_again"],
    67: ["test_retry::test_retries_are_at_most_a_fifth_of_the_requests_and_twenty"],
    68: [
        "test_hostile_clients::test_a_hostile_request_is_refused_or_arrives_in_one_form_however_it_is_cut",
        "test_contract::test_garbage_and_departures_of_clients_move_no_breaker",
    ],
    69: ["here"],
    70: ["here"],
    71: [
        "corpus",
        f"{SOCKET}::test_close_codes_and_reasons_cross_both_ways",
        f"{SOCKET}::test_a_client_that_breaks_the_rules_is_told_how",
        f"{SOCKET}::test_only_a_subprotocol_that_the_client_offered_is_agreed_to",
        f"{SOCKET}::test_a_refusal_reaches_the_client_as_it_is_and_the_services_connection_is_closed",
        f"{SOCKET}::test_pings_are_answered_at_both_ends_even_within_a_message",
    ],
    72: ["test_server_drain::test_a_server_that_leaves_finishes_what_is_in_flight_and_closes_what_is_idle"],
    73: ["test_server_refusals::test_connections_beyond_the_cap_are_told_so"],
    74: ["test_access_log::test_a_query_is_never_logged"],
    75: ["test_access_log::test_whatever_a_path_holds_makes_one_short_line"],
}


def test_no_line_is_left_out() -> None:
    assert list(LINES) == list(range(1, 76))
    assert LINES.keys() >= {case.line for case in CASES}


@pytest.mark.parametrize("line", LINES)
def test_each_line_has_its_tests(line: int) -> None:
    assert LINES[line]
    for place in LINES[line]:
        if place == "corpus":
            assert sum(case.line == line for case in CASES) >= 3
            continue
        if place == "here":
            assert any(name.startswith(f"test_line_{line}_") for name in globals()) or any(
                number == line
                for number, *_ in [*REQUESTS.values(), *REFUSED.values(), *ANSWERS.values(), *GARBLED.values()]
            )
            continue
        module, name = place.split("::")
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert name in [getattr(node, "name", "") for node in tree.body], place


class Rig(ProxyRig):
    def __init__(self, port: int, upstream: Service, proxy: ProxyApp, seen: Seen) -> None:
        super().__init__(port, upstream, proxy, seen)
        self.connections: list[GatewayProtocol] = []

    async def send(self, data: bytes) -> bytes:
        return await send_raw(self.port, data)

    @property
    def arrived(self) -> Request:
        (request,) = self.upstream.requests
        return request


@asynccontextmanager
async def rig(handler: Handler | None = None, *, trusted: tuple[str, ...] = (), **options: Any) -> AsyncIterator[Rig]:
    """The proxy under the gateway's own server, for a peer that is a stranger unless it is trusted."""
    async with service(handler) as upstream:
        target = Target(name="api", prefix="/api", replicas=(upstream.url,), **options)
        proxy = ProxyApp([target], trusted_proxies=trusted)
        seen = Seen(proxy)

        def protocol(*args: Any, **kwargs: Any) -> GatewayProtocol:
            made = GatewayProtocol(*args, limits=EdgeLimits(), **kwargs)
            gw.connections.append(made)
            return made

        async with serving(seen, http=protocol) as port:
            gw = Rig(port, upstream, proxy, seen)
            yield gw


def get(*fields: bytes, target: bytes = b"/api/x", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join(
        (b"GET %b HTTP/%b" % (target, version), b"Host: shop.example", *fields, b"Connection: close", b"", b"")
    )


# What of a request arrives: fields of the client's; names that arrive with these values; names that do not arrive

Fields = dict[bytes, bytes]
REQUESTS: dict[str, tuple[int, list[bytes], Fields, list[bytes]]] = {
    "hop-by-hop fields": (
        1,
        [b"Keep-Alive: timeout=5", b"Proxy-Authorization: x", b"Proxy-Connection: x", b"Trailer: X", b"Upgrade: h2c",
         b"TE: gzip", b"X-Own: 1"],
        {b"x-own": b"1"},
        [b"connection", b"keep-alive", b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"upgrade"],
    ),
    "fields that Connection names": (
        2,
        [b"Connection: X-Own, X-Forwarded-For, Via, X-Real-IP", b"X-Own: 1", b"X-Other: 2"],
        {b"x-other": b"2", b"x-forwarded-for": b"127.0.0.1"},
        [b"x-own"],
    ),
    "Connection of several lines, the first one empty": (
        3,
        [b"Connection:", b"Connection: ,, x-one", b"Connection: X-Two", b"X-One: 1", b"X-Two: 2", b"X-Three: 3"],
        {b"x-three": b"3"},
        [b"x-one", b"x-two"],
    ),
    "TE: trailers": (4, [b"TE: trailers", b"Connection: TE"], {}, [b"te"]),
    "look-alikes": (
        11,
        [b"Content_Length: 5", b"Transfer_Encoding: chunked", b"X_Forwarded_For: 6.6.6.6", b"X_User_ID: a", b"a_b: 1"],
        {b"a_b": b"1"},
        [b"content_length", b"transfer_encoding", b"x_forwarded_for", b"x_user_id"],
    ),
    "X-Forwarded-For from a stranger": (
        29, [b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-For: 7.7.7.7"], {b"x-forwarded-for": b"127.0.0.1"}, [],
    ),
    "other claims of a stranger": (
        30,
        [b"Forwarded: for=6.6.6.6", b"X-Real-IP: 6.6.6.6", b"X-Forwarded-Host: evil", b"X-Forwarded-Proto: https",
         b"X-Forwarded-Port: 443", b"X-Forwarded-Prefix: /x", b"X-Forwarded-Server: evil"],
        {b"x-forwarded-host": b"shop.example", b"x-forwarded-proto": b"http", b"x-real-ip": b"127.0.0.1"},
        [b"forwarded", b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-server"],
    ),
    "Expect": (43, [b"Expect: 100-continue"], {}, [b"expect"]),
    "nothing invented": (70, [], {}, [b"accept", b"accept-encoding", b"user-agent", b"content-length", b"date"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
async def test_what_of_a_requests_head_reaches_the_service(name: str) -> None:
    _, fields, present, absent = REQUESTS[name]
    async with rig() as gw:
        assert parse(await gw.send(get(*fields))).status == 200
        assert {field: gw.arrived.values(field) for field in present} == {
            field: [value] for field, value in present.items()
        }
        assert [field for field in absent if gw.arrived.values(field)] == []


async def test_line_22_of_a_whole_url_path_and_host_arrive_and_never_a_mix() -> None:
    async with rig(preserve_host=True) as gw:
        assert parse(await gw.send(get(target=b"http://shop.example/api/x?a"))).status == 200
        assert gw.arrived.target == b"/api/x?a"
        assert gw.arrived.values(b"host") == [b"shop.example"]
        assert parse(await gw.send(get(target=b"http://other.example/api/x"))).status == 400
        assert len(gw.upstream.requests) == 1


async def test_line_25_a_path_arrives_byte_for_byte() -> None:
    for path in (b"/api/a%2Fb%25%20%7e%c3%a9/\xc3\xa9;v=1//", b"/api/a/../b/./c", b"/api"):
        async with rig() as gw:
            assert parse(await gw.send(get(target=path))).status == 200
            assert gw.arrived.target == path


async def test_line_28_a_query_arrives_byte_for_byte() -> None:
    for query in (b"b=2&a=1&a=1;c=+%20%2B&&=&\xc3\xa9?/..", b"=", b"%", b"?"):
        async with rig() as gw:
            assert parse(await gw.send(get(target=b"/api/x?" + query))).status == 200
            assert gw.arrived.target == b"/api/x?" + query


# What is refused, and never seen by the service

BIG = b"a" * 16384
REFUSED: dict[str, tuple[int, bytes, int]] = {
    "OPTIONS *": (23, b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "CONNECT": (23, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", 405),
    "TRACE": (23, b"TRACE /api/x HTTP/1.1\r\nHost: a\r\n\r\n", 405),
    "no slash": (24, get(target=b"api/x"), 400),
    "two slashes": (24, get(target=b"//api/x"), 404),
    "a host where a path should be": (24, get(target=b"//evil.example/api/x"), 404),
    "dots": (26, get(target=b"/api/../admin"), 400),
    "escaped dots": (26, get(target=b"/api/%2e%2E/admin"), 400),
    "dots with a parameter": (26, get(target=b"/api/..;/admin"), 400),
    "dots and an escaped backslash": (26, get(target=b"/api/..%5cadmin"), 400),
    "dots escaped twice": (26, get(target=b"/api/%252e%252e/admin"), 400),
    "NUL": (27, get(target=b"/api/\0"), 400),
    "escaped NUL": (27, get(target=b"/api/%00"), 400),
    "backslash": (27, get(target=b"/api\\x"), 400),
    "a line of 16 KiB": (35, get(target=b"/api/" + BIG), 414),
    "a field of 16 KiB": (35, get(b"X: " + BIG), 431),
    "a head of 64 KiB": (35, get(*[b"X: " + BIG[:8000]] * 9), 431),
    "fields beyond 100": (35, get(*[b"X: y"] * 99), 431),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_refused_is_not_seen_by_the_service(name: str) -> None:
    _, request, status = REFUSED[name]
    async with rig() as gw:
        assert parse(await gw.send(request)).status == status
        assert not gw.upstream.requests


async def test_line_35_what_is_just_within_the_limits_passes() -> None:
    async with rig() as gw:
        line = b"GET /api/" + b"a" * (16384 - 18) + b" HTTP/1.1"
        fields = [b"X: " + BIG[:16381], *[b"X: y"] * 97]
        assert len(line) == len(fields[0]) == 16384
        request = b"\r\n".join((line, b"Host: a", *fields, b"Connection: close", b"", b""))
        assert parse(await gw.send(request)).status == 200


async def test_line_29_and_30_a_trusted_proxys_claims_are_continued() -> None:
    async with rig(trusted=("127.0.0.0/8",)) as gw:
        claims = [b"X-Forwarded-For: 198.51.100.7", b"X-Forwarded-Proto: https", b"Forwarded: for=198.51.100.7"]
        assert parse(await gw.send(get(*claims))).status == 200
        assert gw.arrived.values(b"x-forwarded-for") == [b"198.51.100.7, 127.0.0.1"]
        assert gw.arrived.values(b"x-forwarded-proto") == [b"https"]
        assert gw.arrived.values(b"forwarded") == [b"for=198.51.100.7, for=127.0.0.1"]


async def test_line_31_our_name_is_added_to_via_and_found_there_is_a_loop() -> None:
    async with rig() as gw:
        assert parse(await gw.send(get(b"Via: 1.0 fred", b"Via: 1.1 p.example"))).status == 200
        (via,) = gw.arrived.values(b"via")
        assert via == b"1.0 fred, 1.1 p.example, 1.1 " + gw.proxy.via
        assert parse(await gw.send(get(b"Via: " + via))).status == 508
        assert len(gw.upstream.requests) == 1


# What of an answer reaches the client: what the service sends; what arrives behind the status line

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSE = b"connection: close\r\n\r\n"
ANSWERS: dict[str, tuple[int, bytes, bytes]] = {
    "hop-by-hop fields": (
        1,
        OK.replace(
            b"\r\n", b"\r\nKeep-Alive: timeout=5\r\nConnection: X-Own\r\nX-Own: 1\r\nTrailer: X\r\nUpgrade: h2c\r\n", 1
        ),
        b" 200 OK\r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "trailers": (
        15,
        CHUNKED + b"2;a=b\r\nok\r\n0\r\nContent-Length: 9\r\nSet-Cookie: a\r\n\r\n",
        b" 200 OK\r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "Date and Server": (
        32,
        b"HTTP/1.1 200 OK\r\nDate: then\r\nServer: theirs\r\nContent-Length: 2\r\n\r\nok",
        b" 200 OK\r\ndate: then\r\nserver: theirs\r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "no Date, no Server": (32, OK, b" 200 OK\r\ncontent-length: 2\r\n" + CLOSE + b"ok"),
    "repeated fields": (
        33,
        b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nX: 1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nok",
        b" 200 OK\r\nset-cookie: a=1\r\nx: 1\r\nset-cookie: b=2\r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "no body": (59, b"HTTP/1.1 204 No Content\r\n\r\n", b" 204 No Content\r\n" + CLOSE),
    "not modified": (
        59,
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 911\r\n\r\n",
        b" 304 Not Modified\r\ncontent-length: 911\r\n" + CLOSE,
    ),
    "interim answers": (
        60,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + OK,
        b" 200 OK\r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "no reason phrase": (
        63,
        b"HTTP/1.1 599 \r\nContent-Length: 2\r\n\r\nok",
        b" 599 \r\ncontent-length: 2\r\n" + CLOSE + b"ok",
    ),
    "a compressed body": (
        69,
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\0\xff",
        b" 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 4\r\n" + CLOSE + b"\x1f\x8b\0\xff",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_what_of_an_answer_reaches_the_client(name: str) -> None:
    _, sent, expected = ANSWERS[name]
    async with rig(reply(sent)) as gw:
        assert await gw.send(get()) == b"HTTP/1.1" + expected


# What a service garbles

GARBLED: dict[str, tuple[int, bytes]] = {
    "a head of 64 KiB": (36, b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 66_000 + b"\r\n\r\n"),
    "fields beyond 100": (36, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n"),
    "interim answers without end": (37, b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100),
    "two framings": (53, CHUNKED.replace(b"OK", b"OK\r\nContent-Length: 2") + b"2\r\nok\r\n0\r\n\r\n"),
    "two lengths": (53, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
    "a list of lengths": (53, b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok"),
    "a signed length": (53, b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
    "a bad chunk": (53, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\nok\r\n"),
    "garbage": (54, b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nothing": (54, b""),
    "a bare CR": (55, b"HTTP/1.1 200 OK\r\nX: a\rb\r\nContent-Length: 0\r\n\r\n"),
    "a NUL": (55, b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n"),
    "a switch nobody asked for": (
        57, b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GARBLED)
async def test_what_a_service_garbles_is_502_and_its_connection_dropped(name: str) -> None:
    _, sent = GARBLED[name]

    async def garble(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(sent)
        if not sent:
            writer.close()
        await reader.read(-1)
        raise ConnectionError

    async with rig(garble, retries=0) as gw:
        assert parse(await gw.send(get())).status == 502
        await until(lambda: gw.upstream.open == 0)


async def test_line_36_a_head_without_end_is_502_after_a_bounded_number_of_bytes() -> None:
    sent = 0

    async def endless(request: Request, reader: Reader, writer: Writer) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            writer.write(b"X-%d: " % sent + b"y" * 1000 + b"\r\n")
            sent += 1000
            await writer.drain()
            await asyncio.sleep(0)

    async with rig(endless, retries=0) as gw:
        assert parse(await gw.send(get())).status == 502
        await until(lambda: gw.upstream.open == 0)
        assert sent < 8 * 1024 * 1024, "no more than the kernel keeps"


# Bodies and connections


async def test_line_43_no_100_before_limiter_and_breaker_have_let_a_request_pass() -> None:
    async with service() as upstream:
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": upstream.url, "RATE_LIMIT_PER_MINUTE": "1"}))
        async with serving(app, http=partial(GatewayProtocol, limits=EdgeLimits())) as port:
            head = b"POST /api/v1/chat HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nConnection: close\r\n"
            head += b"Content-Length: 2\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            async with asyncio.timeout(5):
                assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                writer.write(b"{}")
                assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            assert (upstream.requests[0].body, upstream.requests[0].values(b"expect")) == (b"{}", [])
            assert (await send_raw(port, head)).startswith(b"HTTP/1.1 429 ")


async def test_line_45_an_answer_before_the_upload_ends_passes_and_both_connections_close() -> None:
    async def refuse(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        await reader.read(-1)
        raise ConnectionError

    async with rig(refuse) as gw:
        request = b"POST /api/x HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000
        answer = await gw.send(request)
        assert answer == b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n" + CLOSE + b"no"
        await until(lambda: gw.upstream.open == 0)


async def test_line_48_a_client_that_half_closes_behind_its_request_is_answered() -> None:
    asked = asyncio.Event()

    async def slowly(request: Request, reader: Reader, writer: Writer) -> None:
        await asked.wait()
        writer.write(OK)

    async with rig(slowly) as gw, connected(gw.port) as (reader, writer), asyncio.timeout(5):
        writer.write(get())
        writer.write_eof()
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n", "is it there?"
        asked.set()
        assert (await reader.read()).endswith(b"\r\n\r\nok")


async def test_line_49_a_service_that_does_not_read_holds_the_sender_of_a_body_back() -> None:
    release = asyncio.Event()
    size = 64 * 1024 * 1024

    async def read_late(request: Request, reader: Reader, writer: Writer) -> None:
        await release.wait()
        await read_body(request, reader)
        writer.write(OK)

    async with rig(read_late, max_body_bytes=size) as gw, connected(gw.port) as (reader, writer):
        writer.write(b"POST /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
        sent = 0
        with suppress(TimeoutError):
            while sent < size:
                sent += 65536
                writer.write(bytes(65536))
                await asyncio.wait_for(writer.drain(), 0.3)
        assert sent < 32 * 1024 * 1024, "no more than the kernel keeps"
        release.set()
        writer.write(bytes(size - sent))
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")
        assert len(gw.arrived.body) == size


async def test_line_51_small_writes_are_not_held_back_on_either_side() -> None:
    async with rig() as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(get().replace(b"Connection: close\r\n", b""))
        await reader.readuntil(b"ok")
        (route,) = gw.proxy._routes.values()
        (pool,) = route.pools.values()
        assert isinstance(pool, ConnectionPool)
        upstream = pool._idle[0].transport
        for transport in (gw.connections[0].transport, upstream):
            assert transport is not None
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.transport.abort()


async def test_line_57_an_upgraded_connection_is_never_used_for_another_request() -> None:
    async def both(request: Request, reader: Reader, writer: Writer) -> None:
        if request.values(b"upgrade"):
            writer.write(accepted(request))
            assert await Raw(reader, writer, masks=False).read() == Frame(TEXT, b"hi")
            writer.write(frame(8, b"\3\xe8", masked=False) + OK)
            await reader.read(-1)
            raise ConnectionError
        writer.write(OK)

    async with rig(both) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(handshake() + frame(TEXT, b"hi"))
        assert (await asyncio.wait_for(reader.readuntil(b"\x88\x02\x03\xe8"), 5)).startswith(b"HTTP/1.1 101 ")
        writer.transport.abort()
        assert parse(await gw.send(get())).body == b"ok"
        assert [request.connection for request in gw.upstream.requests] == [1, 2]


async def test_line_58_bytes_behind_a_handshake_wait_for_the_101_and_are_dropped_without_one() -> None:
    behind: list[Frame] = []

    async def accept_late(request: Request, reader: Reader, writer: Writer) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        if request.target.endswith(b"refused"):
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
            assert await reader.read(-1) == b""
            raise ConnectionError
        writer.write(accepted(request))
        behind.append(await Raw(reader, writer, masks=False).read())
        writer.close()

    async with rig(accept_late) as gw:
        smuggled = frame(TEXT, get())
        await gw.send(handshake() + smuggled + frame(8, b"\3\xe8"))
        await until(lambda: behind)
        assert behind == [Frame(TEXT, get())]
        answer = await gw.send(handshake("/api/refused") + smuggled)
        assert answer.count(b"HTTP/1.1") == 1
        assert parse(answer).body == b"no"
        assert len(gw.upstream.requests) == 2


async def test_line_61_a_client_of_http_1_0_gets_a_length_or_an_end_and_never_chunks() -> None:
    step = asyncio.Event()

    async def stream(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await step.wait()
        writer.write(b"3\r\n all\r\n0\r\n\r\n".replace(b"3", b"4"))

    async with rig(stream) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(get(version=b"1.0"))
        assert await asyncio.wait_for(reader.readuntil(b"hi"), 5) == b"HTTP/1.1 200 OK\r\n" + CLOSE + b"hi"
        step.set()
        assert await asyncio.wait_for(reader.read(), 5) == b" all"
        writer.close()
        gw.upstream.handler = reply(OK)
        assert await gw.send(get(version=b"1.0")) == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n" + CLOSE + b"ok"


async def test_line_62_an_answer_that_ends_with_its_connection_is_framed_anew() -> None:
    step = asyncio.Event()

    async def until_close(request: Request, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.0 200 OK\r\nX: 1\r\n\r\nhi")
        await step.wait()
        writer.write(b" all")
        writer.close()

    async with rig(until_close) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(get())
        head = b"HTTP/1.1 200 OK\r\nx: 1\r\ntransfer-encoding: chunked\r\n" + CLOSE
        assert await asyncio.wait_for(reader.readuntil(b"hi\r\n"), 5) == head + b"2\r\nhi\r\n"
        step.set()
        assert await asyncio.wait_for(reader.read(), 5) == b"4\r\n all\r\n0\r\n\r\n"
        writer.close()


async def test_line_69_a_compressed_body_arrives_as_it_was_sent() -> None:
    body = gzip.compress(b"x" * 1000)
    async with rig(reply(OK)) as gw:
        head = b"POST /api/x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Encoding: gzip\r\n"
        assert parse(await gw.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)).status == 200
        assert gw.arrived.body == body
        assert gw.arrived.values(b"content-encoding") == [b"gzip"]


async def test_line_70_no_field_is_invented_for_a_handshake() -> None:
    async with rig(reply(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")) as gw:
        await gw.send(handshake())
        names = {line.split(b":")[0].lower() for line in gw.arrived.head.split(b"\r\n")[1:] if line}
        assert names - {b"host", b"upgrade", b"connection", b"sec-websocket-key", b"sec-websocket-version", b"via"} == {
            b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto",
        }  # fmt: skip
