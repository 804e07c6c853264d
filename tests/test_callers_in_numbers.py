"""Many callers, true and made up: whoever claims to be many counts once, and those who are many fill no memory."""

import subprocess
import sys
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from gateway.middleware.rate_limit import RateLimitASGI
from tests.asgi_call import call, http
from tests.redis_server import redis_server

MEBIBYTE = 2**20


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"forwarded", b"x-user-id"])
async def test_a_stranger_who_claims_to_be_10_000_others_is_one_caller(header: bytes) -> None:
    passed = []

    async def service(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app = RateLimitASGI(service, per_minute=None, per_hour=7)
    form = b"for=10.%d.%d.1" if header == b"forwarded" else b"10.%d.%d.1"
    for number in range(10_000):
        claim = [(header, form % divmod(number, 256))]
        answer = await call(app, http(client=("203.0.113.9", 4711), headers=claim))
        assert answer.status == (200 if number < 7 else 429)
    assert len(passed) == 7


# More callers than are kept. In Redis there are as many as take seconds; a million, tried by hand, grow it no further.
GROWN = """
import asyncio, os, sys
from pathlib import Path

from gateway.backends.memory import MemoryLimiter
from gateway.backends.redis import RedisLimiter
from gateway.policies.callers import TrustedProxies, identify
from gateway.policies.token_bucket import Limits

LIMITS = Limits.of(60, 1000)


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_memory():
    limiter = MemoryLimiter(clock=lambda: 1_764_239_400_000_000)  # none is full again
    for number in range(1_000_000):
        limiter.take(f"user:{number}", LIMITS)
    return limiter


def as_identities():
    trusted = TrustedProxies()
    for number in range(12_000):
        identify([(b"x-user-id", b"%0200d" % number)], "127.0.0.1", trusted)
        identify([(b"x-forwarded-for", b"10.%d.%d.1" % divmod(number, 256))], "127.0.0.1", trusted)
        identify([], f"2001:db8:0:{number:x}::1", trusted)
    return trusted


async def in_redis_and_then_without():
    limiter = RedisLimiter(sys.argv[2], deadline=10)
    for first in range(0, 60_000, 1000):
        await asyncio.gather(*[limiter.take(f"user:{first + number}", LIMITS) for number in range(1000)])
    await asyncio.gather(*[limiter.take(f"user:denied-{number}", Limits.of(0, 0)) for number in range(10_000)])
    assert limiter.shared
    await limiter.aclose()
    for number in range(105_000):  # others than before
        await limiter.take(f"user:other-{number}", LIMITS)
    return limiter


before = rss()
kept = asyncio.run(in_redis_and_then_without()) if sys.argv[1] == "redis" else globals()[sys.argv[1]]()
print(rss() - before)
"""


@pytest.mark.parametrize(
    ("what", "bound"),
    [("in_memory", 64 * MEBIBYTE), ("as_identities", 24 * MEBIBYTE), ("redis", 128 * MEBIBYTE)],  # README.md, "Memory"
)
def test_no_number_of_callers_fills_more_memory_than_is_said(what: str, bound: int) -> None:
    with redis_server() as server:
        command = [sys.executable, "-c", GROWN, what, server.url]
        grown = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE).stdout
    assert int(grown) <= bound
