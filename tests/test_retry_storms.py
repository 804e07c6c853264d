"""What services see of retries: over real sockets, whatever goes wrong with them and wherever (RESILIENCE.md, 3)."""

import asyncio
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from random import Random
from time import monotonic
from typing import NamedTuple

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway_rig import NAME, NO_BREAKER, PATH, Rig, gateway
from tests.proxy_rig import rig
from tests.wire import (
    Answer,
    Reader,
    Request,
    Writer,
    read_answer,
    read_body,
    reset,
    service,
    until,
)

pytestmark = pytest.mark.usefixtures("registry")
PRICING = "/api/v1/pricing"


class Fault(Enum):
    """What a service does with a request that has come, from the good to the bad."""

    NONE = "answers"
    SLOW = "answers after a while"
    ANSWERS_AND_CLOSES = "answers as if the connection were kept, and closes it"
    RESETS_UNREAD = "resets before it has read the body"
    RESETS = "resets once it has read all"
    CLOSES = "closes in place of an answer"
    HALF_A_HEAD = "breaks off within the head"
    HEAD_ALONE = "breaks off behind the head"
    FIRST_BYTE = "resets behind the first byte of the body"
    GARBAGE = "answers nonsense"
    REFUSES = "503, Retry-After: 0"
    REFUSES_BY_429 = "429, Retry-After: 0"
    REFUSES_FOR_LONG = "503, Retry-After: 60"
    UNAVAILABLE = "503"
    FAILS = "500"


OUTRIGHT = {Fault.REFUSES, Fault.REFUSES_BY_429}
BREAKS_BEHIND_THE_HEAD = {Fault.HEAD_ALONE, Fault.FIRST_BYTE}
STATUS_LINES = {
    Fault.REFUSES: b"503 Busy\r\nRetry-After: 0",
    Fault.REFUSES_BY_429: b"429 Busy\r\nRetry-After: 0",
    Fault.REFUSES_FOR_LONG: b"503 Busy\r\nRetry-After: 60",
    Fault.UNAVAILABLE: b"503 Busy",
    Fault.FAILS: b"500 Oops",
}


class FaultyService:
    """A handler that counts how often each request is delivered, and fails it as it is told.

    Args:
        choose: what to do with a request, by its ID and how often it has come before.

    Attributes:
        deliveries: by ID, what was done with each.
    """

    def __init__(self, choose: Callable[[bytes, int], Fault]) -> None:
        self.choose = choose
        self.deliveries: defaultdict[bytes, list[Fault]] = defaultdict(list)

    async def __call__(self, request: Request, reader: Reader, writer: Writer) -> None:
        (name,) = request.values(b"x-id")
        before = self.deliveries[name]
        fault = self.choose(name, len(before))
        before.append(fault)
        assert request.values(b"x-gateway-attempt")[0] >= b"%d" % len(before)
        if fault is Fault.RESETS_UNREAD:
            reset(writer)
            return
        body = await read_body(request, reader)
        assert not body or body.startswith(name + b" "), "a body of its own"
        if fault is Fault.RESETS:
            reset(writer)
            return
        if fault is Fault.SLOW:
            await asyncio.sleep(0.03)
        said = b"HTTP/1.1 %b\r\nX-Delivery: %d\r\nContent-Length: %d\r\n\r\n%b" % (
            STATUS_LINES.get(fault, b"200 OK"),
            len(before),
            len(name),
            name,
        )
        end = said.index(b"\r\n\r\n") + 4
        cut = {Fault.CLOSES: 0, Fault.HALF_A_HEAD: 12, Fault.HEAD_ALONE: end, Fault.FIRST_BYTE: end + 1}.get(fault)
        writer.write(b"nonsense\r\n\r\n" if fault is Fault.GARBAGE else said[:cut])
        if fault is Fault.FIRST_BYTE:
            await asyncio.sleep(0)  # else the reset would overtake it
            reset(writer)
        elif cut is not None or fault in (Fault.GARBAGE, Fault.ANSWERS_AND_CLOSES):
            writer.close()


class Kind(NamedTuple):
    """A kind of request; one that is ``safe`` may be delivered twice."""

    method: bytes
    fields: bytes = b""
    path: str = PATH
    safe: bool = False


KINDS = (
    Kind(b"GET", safe=True),
    Kind(b"PUT", safe=True),
    Kind(b"POST"),
    Kind(b"POST", b"Idempotency-Key: k\r\n", safe=True),
    Kind(b"POST", path=PRICING, safe=True),  # declared so: RETRY_ALL_METHODS
)


def request(kind: Kind, name: bytes, padding: int, *, chunked: bool = False) -> bytes:
    """A request that carries its ID in its head and, but for a GET, in its body."""
    body = b"" if kind.method == b"GET" else name + b" " + b"." * padding
    framing = b"Content-Length: %d\r\n" % len(body) if body else b""
    if body and chunked:
        framing = b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    fields = b"Host: h\r\nX-Id: %b\r\nX-Correlation-ID: %b\r\n%b%b" % (name, name, kind.fields, framing)
    return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (kind.method, kind.path.encode(), fields, body)


def check(kind: Kind, done: list[Fault], answer: Answer | None, retries: int = 1) -> None:
    """T2 and T3, for one request: what was done with each delivery of it, and the answer that its client got."""
    assert len(done) <= 1 + retries
    if not kind.safe:
        assert OUTRIGHT.issuperset(done[:-1]), "a POST that may have been worked on is not sent again"
    told = answer.values(b"x-delivery") if answer is not None else []
    if told:
        assert int(told[0]) == len(done), "nothing is sent again once the client has been sent something"


class Client:
    """A client that keeps its connection as long as it is let."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.writer: Writer | None = None

    async def ask(self, data: bytes) -> Answer | None:
        """The one answer to a request; None where the connection was cut before there was one."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(data)
        answer = None
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            async with asyncio.timeout(20):
                answer = await read_answer(self.reader)
        if answer is None or not answer.whole or b"close" in answer.values(b"connection"):
            await self.leave()
        return answer

    async def leave(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
            self.writer = None


# T2 and T3, over a proxy


SENDING = st.tuples(
    st.sampled_from([kind for kind in KINDS if kind.path == PATH]),
    st.lists(st.sampled_from(Fault), min_size=4, max_size=4),
    st.sampled_from([0, 100, 60_000, 70_000]),
    st.booleans(),
)


@settings(max_examples=40)
@given(st.lists(SENDING, min_size=1, max_size=12), st.integers(0, 3), st.booleans())
async def test_t2_and_t3_hold_whatever_a_service_does_in_whatever_phase(
    sendings: list[tuple[Kind, list[Fault], int, bool]], retries: int, declared: bool
) -> None:
    faulty = FaultyService(lambda name, before: sendings[int(name)][1][before])
    async with rig(faulty, retries=retries, retry_all_methods=declared) as gw:
        client = Client(gw.port)
        for number, (kind, _, padding, chunked) in enumerate(sendings):
            name = b"%d" % number
            answer = await client.ask(request(kind, name, padding, chunked=chunked))
            await gw.cause()
            check(kind._replace(safe=kind.safe or declared), faulty.deliveries[name], answer, retries)
            assert len(faulty.deliveries[name]) <= gw.seen.last.attempts
        await client.leave()


# Many requests, before a whole gateway


REQUESTS, CLIENTS, OUTAGES = 10_000, 40, 12
BAD = sorted(set(Fault) - {Fault.NONE}, key=lambda fault: fault.name)


async def test_no_post_is_delivered_twice_and_all_get_one_answer_in_ten_thousand_requests_with_faults() -> None:
    random = Random(20_251_127)
    faults: defaultdict[bytes, list[Fault]] = defaultdict(list)

    def choose(name: bytes, before: int) -> Fault:
        while len(faults[name]) <= before:  # by seed and ID alone, in whatever order requests come
            chance = Random(f"{name!r} {len(faults[name])}")
            faults[name].append(chance.choice(BAD) if chance.random() < 0.2 else Fault.NONE)
        return faults[name][before]

    faulty = FaultyService(choose)
    names = [b"%06x-%04d" % (random.getrandbits(24), number) for number in range(REQUESTS)]
    kinds = {name: random.choice(KINDS) for name in names}
    sizes = {name: random.choice([0, 10, 1000, 1000, 20_000]) for name in names}
    chunked = {name: random.random() < 0.3 for name in names}
    answers: dict[bytes, Answer | None] = {}
    waiting = iter(names)

    async def client() -> None:
        one = Client(gw.port)
        for name in waiting:
            assert name not in answers
            answers[name] = answer = await one.ask(request(kinds[name], name, sizes[name], chunked=chunked[name]))
            if answer is not None:
                assert answer.values(b"x-correlation-id") == [name], "an answer to this request and no other"
                if answer.status == 200:
                    assert name.startswith(answer.body)
                    assert answer.whole == (answer.body == name)
        await one.leave()

    async def outages() -> None:
        """Now and then the service is gone: what is under way is reset, connections are refused for some time."""
        for number in range(1, OUTAGES):
            await until(lambda: len(answers) > number * REQUESTS // OUTAGES, 60)  # noqa: B023
            await upstream.stop()
            refused = len(answers)
            await until(lambda: len(answers) > refused + 10, 60)  # noqa: B023
            await upstream.start(upstream.port)

    more = {**NO_BREAKER, "PRICING_RETRY_ALL_METHODS": "true"}
    async with service(faulty) as upstream, gateway(upstream.url, more, PRICING_SERVICE_URL=upstream.url) as gw:
        breaks = asyncio.create_task(outages())
        async with asyncio.timeout(120):
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
        breaks.cancel()
        await asyncio.gather(breaks, return_exceptions=True)
    assert answers.keys() == set(names)
    attempts = {context.correlation_id.encode(): context.attempts for context in gw.contexts}
    assert len(gw.contexts) == len(attempts) == REQUESTS
    for name, kind in kinds.items():
        check(kind, faulty.deliveries[name], answers[name])
        assert len(faulty.deliveries[name]) <= attempts[name] <= 2
    twice = Counter(kinds[name].safe for name, done in faulty.deliveries.items() if len(done) == 2)
    causes = Counter(str(context.cause) for context in gw.contexts)
    met = Counter(fault.name for done in faulty.deliveries.values() for fault in done)
    assert met.keys() == {fault.name for fault in Fault}
    assert {"connect_failed", "reset", "garbled", "cut_short"} <= causes.keys()
    assert min(twice[True], twice[False]) > 10, "some were sent again, of either kind"


# A service that fails everything


async def storm(gw: Rig, requests: int, clients: int) -> float:
    """So many requests from so many clients at a time, none of which is answered well; how many seconds they took."""
    waiting = iter(range(requests))

    async def client() -> None:
        one = Client(gw.port)
        for number in waiting:
            answer = await one.ask(request(KINDS[0], b"%d" % number, 0))
            assert answer is None or answer.status >= 500
        await one.leave()

    began = monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return monotonic() - began


@pytest.mark.parametrize("retries", [1, 5])
@pytest.mark.parametrize("fault", [Fault.REFUSES, Fault.RESETS, None], ids=["refuses", "resets", "refuses connections"])
async def test_a_service_that_fails_everything_sees_a_fifth_and_one_a_second_more_at_most(
    fault: Fault | None, retries: int
) -> None:
    requests = 1500
    faulty = FaultyService(lambda name, before: fault or Fault.NONE)
    more = {**NO_BREAKER, "RETRIES": str(retries)}
    async with service(faulty) as upstream, gateway(upstream.url, more) as gw:
        if fault is None:
            await upstream.stop()
        took = await storm(gw, requests, clients=16)
        seen = sum(map(len, faulty.deliveries.values()))
        attempts = sum(context.attempts for context in gw.contexts)
        denied = sum(context.retry_denied for context in gw.contexts)
    assert seen == (attempts if fault else 0)
    extra = attempts - requests
    assert extra <= 0.2 * requests + took + 10, "the reserve is full at the start"
    assert extra >= 0.18 * requests, "and the budget is for use"
    assert denied == requests - extra if retries == 1 else denied <= requests


def shown(text: bytes, metric: str) -> float:
    """The value of a metric that the service has."""
    found = re.search(rf'^gateway_upstream_{metric}{{service="{NAME}"}} (.+)$', text.decode(), re.MULTILINE)
    assert found, metric
    return float(found[1])


async def test_two_attempts_are_in_the_services_head_in_the_log_and_in_the_metrics(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    faulty = FaultyService(lambda name, before: [Fault.RESETS, Fault.NONE][before])
    async with service(faulty) as upstream, gateway(upstream.url, NO_BREAKER) as gw:
        before = (await gw.call("/metrics")).body
        one = Client(gw.port)
        answer = await one.ask(request(KINDS[0], b"named", 0))
        assert answer is not None
        assert answer.status == 200
        assert [seen.values(b"x-gateway-attempt") for seen in upstream.requests] == [[b"1"], [b"2"]]
        for _ in range(9):
            faulty.deliveries.clear()
            await one.ask(request(KINDS[0], b"named", 0))
        after = (await gw.call("/metrics")).body
        await one.leave()
    lines = [orjson.loads(line) for line in capfdbinary.readouterr().out.splitlines() if b'"named"' in line]
    assert lines[0].items() >= {"correlation_id": "named", "attempts": 2, "status_code": 200}.items()
    for metric, more in (("attempts_total", 20), ("retries_total", 10), ("retries_denied_total", 0)):
        assert shown(after, metric) - shown(before, metric) == more
    assert shown(before, "retry_budget") == 10
    assert 10 + 2 - 10 <= shown(after, "retry_budget") <= 10 + 2 - 10 + 2, "ten requests pay for two, and time for some"


async def test_a_retry_that_the_budget_denies_is_counted() -> None:
    faulty = FaultyService(lambda name, before: Fault.RESETS)
    async with service(faulty) as upstream, gateway(upstream.url, NO_BREAKER) as gw:
        before = (await gw.call("/metrics")).body
        await storm(gw, 60, clients=1)
        after = (await gw.call("/metrics")).body
        denied = [context for context in gw.contexts if context.retry_denied]
    assert {context.attempts for context in denied} == {1}
    assert shown(after, "retries_denied_total") - shown(before, "retries_denied_total") == len(denied) > 20
    assert shown(after, "retries_total") - shown(before, "retries_total") == 60 - len(denied)
    assert shown(after, "retry_budget") <= 2
