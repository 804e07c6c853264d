"""Ways to reach Redis: TCP, TLS, a unix socket, as a user who may do no more than is needed, or who may not come in."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from gateway.backends.redis import RedisLimiter
from gateway.policies.token_bucket import Limits
from gateway.settings import Settings
from tests.redis_server import RedisServer, redis_server
from tests.wire import reserved_port

LIMITS = Limits.of(60, 1000)
CERTIFICATE, KEY = (str(Path(__file__).parent / "tls" / name) for name in ("cert.pem", "key.pem"))
SECRET = "hunter2-€/@"
# README.md, "Redis": what the gateway does there, and no more
NEEDED = ["resetkeys", "~gateway:1:*", "resetchannels", "nocommands", "+eval", "+evalsha", "+time", "+get", "+set"]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        server.command("ACL", "SETUSER", "gateway", "on", f">{SECRET}", *NEEDED)
        yield server


@pytest.fixture(scope="module")
def tls_port() -> Iterator[int]:
    """Of a server that has one."""
    with reserved_port() as port:
        options = ("--tls-port", str(port), "--tls-cert-file", CERTIFICATE, "--tls-key-file", KEY)
        with redis_server(*options, "--tls-ca-cert-file", CERTIFICATE, "--tls-auth-clients", "no") as server:
            server.command("ACL", "SETUSER", "gateway", "on", f">{SECRET}", *NEEDED)
            yield port


async def reached(url: str) -> str:
    """Take a token at a Redis that the settings allow; returns the mode, or what was said."""
    redis_url = Settings.load({"REDIS_URL": url}).redis_url
    assert redis_url is not None
    said: list[str] = []
    limiter = RedisLimiter(redis_url, deadline=1, on_change=lambda shared, reason: said.append(reason))
    try:
        await limiter.start()
        return (await limiter.take("ip:a", LIMITS)).mode if limiter.shared else said[0]
    finally:
        await limiter.aclose()


async def test_over_tcp_and_a_unix_socket(server: RedisServer) -> None:
    assert await reached(server.url) == "normal"
    assert await reached(server.unix_url) == "normal"
    assert await reached(f"{server.unix_url}?db=3") == "normal"


async def test_over_tls_with_a_certificate_that_is_known(tls_port: int) -> None:
    assert await reached(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={CERTIFICATE}") == "normal"
    user = f"gateway:{quote(SECRET, safe='')}"
    assert await reached(f"rediss://{user}@127.0.0.1:{tls_port}/0?ssl_ca_certs={CERTIFICATE}") == "normal"


async def test_a_certificate_that_is_not_known_is_not_believed(tls_port: int) -> None:
    said = await reached(f"rediss://gateway:{quote(SECRET, safe='')}@localhost:{tls_port}/0")
    assert "certificate verify failed" in said
    assert "hunter2" not in said


async def test_a_user_who_may_do_no_more_than_is_needed(server: RedisServer) -> None:
    user = f"gateway:{quote(SECRET, safe='')}"
    before = server.command("ACL", "LOG")
    assert await reached(f"redis://{user}@127.0.0.1:{server.port}/0") == "normal"
    server.command("SCRIPT", "FLUSH")
    assert await reached(f"{server.unix_url}?username=gateway&password={quote(SECRET, safe='')}") == "normal"
    assert server.command("ACL", "LOG") == before == b"*0\r\n"


@pytest.mark.parametrize("missing", ["+eval", "+evalsha", "+time", "+get", "+set"])
async def test_without_any_of_the_commands_limits_are_the_workers_own_and_it_says_why(
    server: RedisServer, missing: str
) -> None:
    rules = [rule for rule in NEEDED if rule != missing]
    server.command("SCRIPT", "FLUSH")
    server.command("ACL", "SETUSER", "limited", "reset", "on", f">{SECRET}", *rules)
    said = await reached(f"redis://limited:{quote(SECRET, safe='')}@127.0.0.1:{server.port}/0")
    assert said.startswith("Redis does not run the limiter's script: ")
    assert "user" in said.lower()  # who has no permission, or can't run this command
    assert "hunter2" not in said


@pytest.mark.parametrize("user", ["gateway", "nobody", ""])
async def test_a_wrong_password_is_told_and_never_shown(server: RedisServer, user: str) -> None:
    said = await reached(f"redis://{user}:wrong-{quote(SECRET, safe='')}@127.0.0.1:{server.port}/0")
    assert "password" in said
    assert "hunter2" not in said
