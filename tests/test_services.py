"""Which service a path leads to, and which paths lead nowhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.services import REMEMBERED, Service, ServiceTable, UnsafePathError

TABLE = ServiceTable(
    Service(name=name, prefix=prefix, replicas=("http://x:1",))
    for name, prefix in [("chat", "/api/v1/chat"), ("deep", "/api/v1/chat/deep"), ("search", "/api/v1/search")]
)


def service_for(path: bytes) -> str | None:
    service = TABLE.match(path)
    return None if service is None else service.name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (b"/api/v1/chat", "chat"),
        (b"/api/v1/chat/", "chat"),
        (b"/api/v1/chat/x/y", "chat"),
        (b"/api/v1/chatter", None),
        (b"/api/v1/chat%2Fx", None),
        (b"/api/v1/%63hat", None),
        (b"/api/v1/CHAT", None),
        (b"//api/v1/chat", None),
        (b"/api/v1", None),
        (b"/", None),
        (b"", None),
        (b"*", None),
        (b"/api/v1/chat/deep", "deep"),
        (b"/api/v1/chat/deeper", "chat"),
        (b"/api/v1/search/a%2Fb%25%20", "search"),
        (b"/api/v1/search/a/../b", "search"),
        (b"/api/v1/search/.", "search"),
        (b"/api/v1/search/...", "search"),
        (b"/api/v1/search/.well-known", "search"),
        (b"/api/v1/search/a..b", "search"),
    ],
)
def test_a_prefix_matches_whole_segments_of_the_raw_path(path: bytes, name: str | None) -> None:
    assert service_for(path) == name


@pytest.mark.parametrize(
    "rest",
    [
        b"/..", b"/../x", b"/a/../..", b"/%2e%2e/x", b"/%2E./x", b"/.%2e", b"/..;a=b/x", b"/..%2fx", b"/..%5cx",
        b"/a%2f..%2f..%2fx", b"/%252e%252e/x", b"/%25252e%25252e%25252fx", b"//../..", b"/./../x", b"/x%00y",
        b"/%2500", b"/a\\b", b"/a\0b", b"/a//../../x", b"/%2525252525252525x",
    ],
)  # fmt: skip
def test_a_path_that_a_reader_could_take_out_of_its_prefix_is_refused(rest: bytes) -> None:
    with pytest.raises(UnsafePathError):
        TABLE.match(b"/api/v1/search" + rest)


@given(st.lists(st.sampled_from([b"..", b"%2e%2e", b".", b"a", b"", b"%2f", b"..;", b"%25", b"%5c"]), max_size=8))
def test_no_accepted_path_leaves_its_prefix_however_often_it_is_decoded(parts: list[bytes]) -> None:
    from urllib.parse import unquote_to_bytes

    path = b"/api/v1/search/" + b"/".join(parts)
    try:
        service = TABLE.match(path)
    except UnsafePathError:
        return
    assert service is not None
    for _ in range(5):
        kept: list[bytes] = []
        for segment in path.replace(b"\\", b"/").split(b"/"):
            name = segment.split(b";")[0]
            if name == b"..":
                kept = kept[:-1]
            elif name not in (b"", b"."):
                kept.append(name)
        assert kept[:3] == [b"api", b"v1", b"search"]
        path = unquote_to_bytes(path)


def test_a_service_at_the_root_takes_everything_left_over() -> None:
    table = ServiceTable([*TABLE.services, Service(name="rest", prefix="/", replicas=("http://x:1",))])
    assert [getattr(table.match(path), "name", None) for path in (b"/x", b"/", b"/api/v1/chat")] == [
        "rest",
        "rest",
        "chat",
    ]


def test_what_is_remembered_of_paths_is_bounded_and_a_refusal_stays_one() -> None:
    for number in range(2 * REMEMBERED):
        assert service_for(b"/api/v1/chat/%d" % number) == service_for(b"/api/v1/chat/%d" % number) == "chat"
        assert service_for(b"/api/v1/chat/%d" % number + b"x" * 300) == "chat"
        assert service_for(b"/nowhere/%d" % number) is None
    assert 0 < len(TABLE._matched) <= REMEMBERED
    assert max(map(len, TABLE._matched)) < 300
    for _ in range(2):
        with pytest.raises(UnsafePathError):
            service_for(b"/api/v1/chat/../search")
