"""Ways to reach Redis: TCP, TLS, a unix socket, as a user who may do no more than is needed, or who may not come in."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from gateway.backends import redis as backend
from gateway.backends.redis import RedisLimiter
from gateway.policies.token_bucket import Limits
from gateway.settings import Settings
from tests.redis_server import RedisServer, redis_server
from tests.wire import reserved_port, until

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


async def test_a_cluster_that_serves_some_keys_only_is_gone_until_it_serves_the_one_that_failed(port: int) -> None:
    said: list[str] = []
    with redis_server("--cluster-enabled", "yes", "--cluster-port", str(port)) as server:

        def serve(key: str) -> None:
            slot = server.command("CLUSTER", "KEYSLOT", key)[1:].strip()
            server.command("CLUSTER", "ADDSLOTS", slot.decode())

        def refused() -> int:
            return int(server.command("INFO", "stats").split(b"total_error_replies:")[1].split(b"\r\n")[0])

        server.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        serve("gateway:1:heartbeat")
        await until(lambda: b"cluster_state:ok" in server.command("CLUSTER", "INFO"))
        limiter = RedisLimiter(server.url, deadline=1, on_change=lambda shared, reason: said.append(reason))
        try:
            await limiter.start()
            assert limiter.shared
            assert (await limiter.take("user:a", LIMITS)).mode == "local"
            before = refused()
            await until(lambda: refused() >= before + 3)  # heartbeats
            assert len(said) == 2
            assert "CLUSTERDOWN" in said[1]
            serve("gateway:1:user:a")
            await until(lambda: limiter.shared)
            assert (await limiter.take("user:a", LIMITS)).mode == "normal"
        finally:
            await limiter.aclose()


async def test_a_name_that_is_looked_up_in_vain_leaves_others_to_be_looked_up(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver, look_up = threading.Event(), socket.getaddrinfo
    lookups: list[str] = []
    attempts: list[str] = []

    def counted(host: Any, *arguments: Any, **options: Any) -> Any:
        attempts.append(host)
        return look_up(host, *arguments, **options)

    def slow(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "redis.test" or options.get("flags") == socket.AI_NUMERICHOST:
            return look_up(host, *arguments, **options)
        lookups.append(host)
        resolver.wait(30)
        return look_up("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(backend, "getaddrinfo", counted)
    monkeypatch.setattr(backend, "PATIENCE", 0.01)
    monkeypatch.setattr(backend, "HEARTBEAT", 0.01)
    said: list[str] = []
    limiter = RedisLimiter(
        f"redis://redis.test:{server.port}", deadline=1, on_change=lambda shared, reason: said.append(reason)
    )
    try:
        await limiter.start()
        await until(lambda: len(attempts) > 40)  # the loop has at most 32 threads for them
        async with asyncio.timeout(5):
            await asyncio.get_running_loop().getaddrinfo("localhost", server.port)
        assert lookups == ["redis.test"]
        assert said == ["no connection within 10 ms"]
        monkeypatch.setattr(backend, "PATIENCE", 1)
        resolver.set()
        await until(lambda: limiter.shared)
    finally:
        resolver.set()
        await limiter.aclose()


async def test_a_user_who_is_thrown_out_is_told_and_let_in_again_is_back_within_a_second(server: RedisServer) -> None:
    changes: list[bool] = []
    server.command("ACL", "SETUSER", "guest", "reset", "on", f">{SECRET}", *NEEDED)
    url = f"redis://guest:{quote(SECRET, safe='')}@127.0.0.1:{server.port}/0"
    limiter = RedisLimiter(url, deadline=1, on_change=lambda shared, reason: changes.append(shared))
    try:
        await limiter.start()
        server.command("ACL", "DELUSER", "guest")  # which cuts its connections
        await until(lambda: not limiter.shared)
        assert (await limiter.take("ip:a", LIMITS)).mode == "local"
        server.command("ACL", "SETUSER", "guest", "reset", "on", f">{SECRET}", *NEEDED)
        await until(lambda: limiter.shared, timeout=1)
        server.command("CLIENT", "KILL", "USER", "guest")
        await until(lambda: not limiter.shared)
        await until(lambda: limiter.shared, timeout=1)
        server.command("ACL", "SETUSER", "guest", "resetpass", ">other")  # its connection stays as it is
        assert (await limiter.take("ip:a", LIMITS)).mode == "normal"
        assert changes == [True, False, True, False, True]
    finally:
        await limiter.aclose()
