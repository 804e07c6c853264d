"""Circuit breakers over several gateways on one Redis: evidence, status and resets, whatever happens to Redis."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from redis import Redis

from gateway.app import Gateway, create_app
from gateway.backends import fleet as backend
from gateway.backends.fleet import Fleet
from gateway.circuit_breaker import CircuitBreakerRegistry, UnknownBreakerError
from gateway.settings import Settings
from tests.redis_server import RedisServer, redis_server
from tests.test_imports import loaded_by
from tests.wire import (
    OK,
    Answer,
    Reader,
    Request,
    Service,
    Writer,
    call,
    read_body,
    reply,
    reserved_port,
    service,
    serving,
    until,
)

NAME, PATH = "chatbot-service", "/api/v1/chat"
BROKEN = b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops"
TOKEN = "s3cret"
SECRET = "hunter2-€/@"
# README.md, "Redis": what breakers do there, and no more
NEEDED = ["resetkeys", "resetchannels", "&gateway:1:*", "nocommands", "+publish", "+subscribe", "+pubsub|numsub"]
NEEDED += ["~gateway:1:*", "+eval", "+evalsha", "+time", "+get", "+set"]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class Pod:
    """One gateway of several."""

    def __init__(self, app: Gateway, port: int) -> None:
        self.app, self.port = app, port

    async def call(self, target: str = PATH, method: str = "POST", **more: Any) -> Answer:
        return await call(self.port, target, method, **more)

    async def fails(self, times: int = 1) -> None:
        for _ in range(times):
            assert (await self.call()).status in (500, 502)

    async def refuses(self) -> bool:
        answer = await self.call()
        return answer.status == 503 and orjson.loads(answer.body)["error"]["reason"] == "breaker_open"

    async def status(self, query: str = "") -> dict[str, Any]:
        """The service's breaker, as this pod shows it: by then all peers have heard what it told before."""
        answer = await self.call(f"/circuit-breakers{query}", "GET")
        assert answer.status == 200
        status: dict[str, Any] = orjson.loads(answer.body)[NAME]
        return status

    async def shows(self, **expected: Any) -> None:
        """Wait until its status is as expected."""
        async with asyncio.timeout(15):
            while not (await self.status()).items() >= expected.items():  # noqa: ASYNC110  nor is there an event
                await asyncio.sleep(0.02)

    async def reset(self, name: str = NAME, body: bytes = b"") -> Answer:
        bearer = (("Authorization", f"Bearer {TOKEN}"),)
        return await self.call(f"/circuit-breakers/{name}/reset", headers=bearer, body=body)


@asynccontextmanager
async def pods(*urls: str, redis: str, **environ: str) -> AsyncIterator[list[Pod]]:
    """A gateway for each address of the service, all on one Redis."""
    environ = {"REDIS_URL": redis, "ADMIN_TOKEN": TOKEN, "RATE_LIMIT_PER_MINUTE": "off"} | environ
    environ = {"RATE_LIMIT_PER_HOUR": "off", "RETRIES": "0", "RATE_LIMIT_REDIS_DEADLINE_MS": "200"} | environ
    async with AsyncExitStack() as stack:
        started = []
        for url in urls:
            app = create_app(Settings.load({**environ, "CHATBOT_SERVICE_URL": url}))
            started.append(Pod(app, await stack.enter_async_context(serving(app))))
        for pod in started:
            await pod.shows(workers=f"{len(urls)} of {len(urls)}")
        yield started


@asynccontextmanager
async def three(redis: RedisServer, answer: bytes = BROKEN, **environ: str) -> AsyncIterator[tuple[list[Pod], Service]]:
    """Three gateways and the service behind all of them."""
    async with service(reply(answer)) as upstream, pods(*[upstream.url] * 3, redis=redis.url, **environ) as started:
        yield started, upstream


# Evidence


async def test_after_an_alarm_each_peer_opens_at_its_first_failing_call(redis: RedisServer) -> None:
    async with three(redis) as ((first, *others), upstream):
        await first.fails(5)
        assert (await first.status())["state"] == "open"
        for number, pod in enumerate(others, 1):
            await pod.fails(1)
            assert await pod.refuses()
            assert len(upstream.requests) == 5 + number
        await first.shows(total_calls=7, times_opened=3, workers="3 of 3")


async def test_a_peer_whose_last_call_has_just_failed_opens_at_once(redis: RedisServer) -> None:
    async with three(redis) as ((first, second, _), upstream):
        await second.fails(1)
        await first.fails(5)
        await first.status()
        assert await second.refuses()
        assert len(upstream.requests) == 6


async def test_a_success_ends_an_alarm(redis: RedisServer) -> None:
    async with three(redis) as ((first, second, _), upstream):
        await first.fails(5)
        await first.status()
        upstream.handler = reply(OK)
        assert (await second.call()).status == 200
        upstream.handler = reply(BROKEN)
        await second.fails(4)
        assert not await second.refuses()
        assert await second.refuses(), "by its own evidence it opens as ever"


async def test_a_pod_that_can_not_reach_the_service_opens_alone(redis: RedisServer, port: int) -> None:
    async with service() as upstream:
        urls = f"http://127.0.0.1:{port}", upstream.url, upstream.url
        async with pods(*urls, redis=redis.url, CIRCUIT_BREAKER_TIMEOUT="0.2") as (cut_off, *others):
            for _ in range(3):
                await cut_off.fails(1)
                while not await cut_off.refuses():
                    pass
                await cut_off.status()
                for pod in others * 10:
                    assert (await pod.call()).status == 200
                await cut_off.shows(state="half_open")
            assert (await cut_off.status())["times_opened"] == 3


async def all_open_and_one_recovers(first: Pod, others: Sequence[Pod], upstream: Service) -> None:
    await first.fails(5)
    await first.status()
    for pod in others:
        await pod.fails(1)
    for pod in (first, *others):  # none is open any more
        await pod.shows(state="half_open")
    upstream.handler = reply(OK)
    for _ in range(2):
        assert (await first.call()).status == 200


async def test_a_closing_closes_the_peers_that_were_half_open(redis: RedisServer) -> None:
    async with three(redis, CIRCUIT_BREAKER_TIMEOUT="0.3") as ((first, *others), upstream):
        await all_open_and_one_recovers(first, others, upstream)
        assert (await first.status()).items() >= {"state": "closed", "workers": "3 of 3"}.items()


async def test_what_was_heard_is_not_told_on(redis: RedisServer) -> None:
    async with three(redis, CIRCUIT_BREAKER_TIMEOUT="0.3") as ((first, *others), upstream):
        with Redis.from_url(redis.url) as client, client.pubsub(ignore_subscribe_messages=True) as overheard:
            overheard.psubscribe("gateway:1:breakers")
            overheard.get_message(timeout=1)

            async def told() -> list[str]:
                await asyncio.gather(*[pod.status() for pod in (first, *others)])  # so each has told all by then
                kinds = []
                while (message := overheard.get_message(timeout=0.1)) is not None:
                    kinds.append(orjson.loads(message["data"])["kind"])
                return [kind for kind in kinds if kind != "status"]

            await all_open_and_one_recovers(first, others, upstream)
            assert await told() == ["alarm", "closing"]
            assert (await first.status())["state"] == "closed"
            await others[0].reset()
            assert await told() == ["reset"]


async def test_a_probe_that_fails_alarms_again(redis: RedisServer) -> None:
    async with three(redis, CIRCUIT_BREAKER_TIMEOUT="0.3") as ((first, second, _), upstream):
        await first.fails(5)
        await first.shows(state="half_open")
        upstream.handler = reply(OK)
        assert (await second.call()).status == 200, "which ends the alarm"
        upstream.handler = reply(BROKEN)
        await first.fails(1)
        await first.status()
        await second.fails(1)
        assert await second.refuses()


async def test_two_prefixes_on_one_redis_hear_nothing_of_one_another(redis: RedisServer) -> None:
    async with (
        service(reply(BROKEN)) as upstream,
        pods(upstream.url, redis=redis.url, REDIS_KEY_PREFIX="blue:") as (blue,),
        pods(upstream.url, redis=redis.url, REDIS_KEY_PREFIX="green:") as (green,),
    ):
        await blue.fails(5)
        await blue.status()
        await green.fails(1)
        assert (await green.status()).items() >= {"state": "closed", "workers": "1 of 1"}.items()
        assert orjson.loads((await green.reset()).body)["workers"] == "1 of 1"
        assert await blue.refuses()


GARBAGE = [
    *(b"", b"\xff\xfe", b"[]", b"7", b"null", b"{}", b'"alarm"', b"[" * 100_000),
    b'{"v":2,"kind":"alarm","from":"x","service":"chatbot-service"}',
    b'{"v":1,"kind":"alarm","from":7,"service":"chatbot-service"}',
    b'{"v":1,"kind":"alarm","from":"x"}',
    b'{"v":1,"kind":"alarm","from":"x","service":"nobody"}',
    b'{"v":1,"kind":"alarm","from":"x","service":["chatbot-service"]}',
    b'{"v":1,"kind":["alarm"],"from":"x","service":"chatbot-service"}',
    b'{"v":1,"kind":"reset","from":"x","service":"chatbot-service"}',
    b'{"v":1,"kind":"reset","from":"x","service":"chatbot-service","by":"a\\nb","reason":""}',
    b'{"v":1,"kind":"status","from":"x"}',
    b'{"v":1,"kind":"answer","from":"x","number":{}}',
    *(b'{"v":1,"kind":"answer","from":"x","number":%d,"status":{"a":{"state":[]}}}' % number for number in range(9)),
    *(b'{"v":1,"kind":"answer","from":"x","number":%d,"status":7}' % number for number in range(9)),
]


async def test_what_nobody_of_them_says_is_ignored(redis: RedisServer) -> None:
    async with three(redis) as ((first, *others), _):
        await first.fails(5)
        assert first.app.fleet is not None
        with Redis.from_url(redis.url) as client:
            for message in GARBAGE:
                assert client.publish("gateway:1:breakers", message) == 3
                assert client.publish(first.app.fleet.own_channel, message) == 1
        assert (await first.status()).items() >= {"state": "open", "workers": "3 of 3"}.items()
        assert all(pod.app.fleet is not None and pod.app.fleet.connected for pod in (first, *others))


# Status


async def test_the_status_is_the_worst_state_and_the_sum_of_all(redis: RedisServer) -> None:
    async with three(redis, CIRCUIT_BREAKER_TIMEOUT="1") as ((first, second, third), upstream):
        await second.fails(1)
        upstream.handler = reply(OK)
        assert (await third.call()).status == 200
        upstream.handler = reply(BROKEN)
        await first.fails(4)
        sums = {"state": "closed", "failure_count": 5, "recent_failures": 5, "total_calls": 6, "recent_calls": 6}
        for pod in (first, second, third):
            await pod.shows(**sums, workers="3 of 3")
        await first.fails(1)
        for pod in (first, second, third):
            await pod.shows(state="open", total_calls=7, times_opened=2)
            assert 0 < (await pod.status())["retry_after"] <= 1
        await third.shows(state="half_open", retry_after=0)


async def test_status_asked_often_does_not_keep_peers_busy(redis: RedisServer) -> None:
    async with three(redis) as ((first, *_), _):
        before = int(redis.command("INFO", "commandstats").split(b"cmdstat_publish:calls=")[1].split(b",")[0])
        for _ in range(10):
            await asyncio.gather(*[first.status() for _ in range(10)])
        after = int(redis.command("INFO", "commandstats").split(b"cmdstat_publish:calls=")[1].split(b",")[0])
        assert after - before < 100


async def test_replicas_are_shown_where_asked_for(redis: RedisServer, port: int) -> None:
    async with service() as upstream:
        urls = f"{upstream.url},http://127.0.0.1:{port}"
        async with pods(urls, redis=redis.url) as (pod,):
            await pod.call()
            assert "replicas" not in await pod.status()
            replicas = (await pod.status("?replicas=1"))["replicas"]
            assert [one["address"] for one in replicas] == urls.split(",")
            assert all(one.keys() >= {"in_flight", "failure_count", "set_aside"} for one in replicas)
            other = orjson.loads((await pod.call("/circuit-breakers?replicas=1", "GET")).body)["search-service"]
            assert other["replicas"][0].items() >= {"address": "http://search:8002", "in_flight": 0}.items()


@asynccontextmanager
async def process(port: int, **environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A gateway in a process of its own."""
    command = ("-m", "uvicorn", "gateway.main:app", "--port", str(port), "--no-access-log", "--log-level", "error")
    started = await asyncio.create_subprocess_exec(
        sys.executable, *command, env={**os.environ, **environ}, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


async def test_a_worker_that_is_killed_vanishes_and_one_that_hangs_is_missed(redis: RedisServer) -> None:
    async with service(reply(OK)) as upstream, pods(upstream.url, redis=redis.url) as (here,):
        environ = {"REDIS_URL": redis.url, "CHATBOT_SERVICE_URL": upstream.url, "WEB_CONCURRENCY": "1"}
        with reserved_port() as one, reserved_port() as other:
            async with process(one, **environ), process(other, **environ) as victim:
                await here.shows(workers="3 of 3")
                for calls, port in enumerate((here.port, one, other), 1):
                    for _ in range(calls):
                        assert (await call(port, PATH, "POST")).status == 200
                await here.shows(workers="3 of 3", total_calls=6)
                victim.send_signal(signal.SIGSTOP)
                await here.shows(workers="2 of 3", total_calls=3)
                victim.send_signal(signal.SIGCONT)
                await here.shows(workers="3 of 3", total_calls=6)
                victim.kill()
                async with asyncio.timeout(6):
                    await here.shows(workers="2 of 2", total_calls=3)
            await here.shows(workers="1 of 1", total_calls=1)
        assert redis.command("KEYS", "*breaker*") == b"*0\r\n"


# Resets


async def test_a_reset_over_http_reaches_all_whatever_is_in_flight(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    go_on = asyncio.Event()

    async def hold(request: Request, reader: Reader, writer: Writer) -> None:
        await read_body(request, reader)
        await go_on.wait()
        writer.write(BROKEN)

    async with three(redis) as (all_pods, upstream):
        upstream.handler = hold
        in_flight = [asyncio.create_task(pod.call()) for pod in all_pods]
        await until(lambda: len(upstream.requests) == 3)
        upstream.handler = reply(BROKEN)
        for pod in all_pods:
            while not await pod.refuses():
                pass
        answer = await all_pods[1].reset(body='{"reason": "deployed 1.4 – fixed"}'.encode())
        assert orjson.loads(answer.body) == {"service": NAME, "state": "closed", "workers": "3 of 3"}
        go_on.set()
        assert [answer.status for answer in await asyncio.gather(*in_flight)] == [500] * 3
        expected = {"state": "closed", "failure_count": 0, "recent_failures": 0, "recent_calls": 0}
        assert (await all_pods[0].status()).items() >= expected.items()
        lines = [record.getMessage() for record in caplog.records if "reset" in record.getMessage()]
        assert lines == [f"Circuit breaker '{NAME}', open, was reset by 127.0.0.1: deployed 1.4 – fixed"] * 3
        assert (await all_pods[0].reset("nobody-service")).status == 404


async def test_a_reset_in_python_reaches_all(redis: RedisServer, registry: CircuitBreakerRegistry) -> None:
    async with three(redis) as (all_pods, _):
        for pod in all_pods:
            while not await pod.refuses():
                pass
        await asyncio.to_thread(registry.reset_breaker, NAME, reason="from a thread")
        await all_pods[0].shows(state="closed", workers="3 of 3")
        with pytest.raises(
            UnknownBreakerError, match="no circuit breaker 'nobody'; there are recommendation-service, "
        ):
            registry.reset_breaker("nobody")
        with pytest.raises(ValueError, match="no control characters"):
            registry.reset_breaker(NAME, reason="a\nb")


async def ran(*command: str, **environ: str) -> tuple[int | None, str, str]:
    """How a Python process ended, and what it said."""
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await started.communicate()
    return started.returncode, out.decode(), err.decode()


async def test_a_reset_from_another_process_reaches_all(
    redis: RedisServer, caplog: pytest.LogCaptureFixture, port: int
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    script = (
        "from gateway.circuit_breaker import circuit_breaker_registry as r; r.reset_breaker({!r}, reason='why not')"
    )
    async with three(redis) as (all_pods, _):
        by_python = ("-c", script.format(NAME))
        by_hand = ("-m", "gateway", "reset", NAME, "--reason", "by hand")
        for command, by, reason in ((by_python, "python", "why not"), (by_hand, "ai-gateway reset", "by hand")):
            for pod in all_pods:
                while not await pod.refuses():
                    pass
            caplog.clear()
            status, out, err = await ran(*command, REDIS_URL=redis.url)
            assert (status, err) == (0, "")
            assert out in ("", '{"service": "chatbot-service", "state": "closed", "workers": "3 of 3"}\n')
            assert (await all_pods[0].status())["state"] == "closed"
            lines = [record.getMessage() for record in caplog.records if "reset" in record.getMessage()]
            assert len(lines) == 3
            assert all(line.startswith(f"Circuit breaker '{NAME}', open, was reset by {by}, pid ") for line in lines)
            assert all(line.endswith(f" at {socket.gethostname()}: {reason}") for line in lines)

        unknown = await ran("-c", script.format("chat-service"), REDIS_URL=redis.url)
        assert "UnknownBreakerError: there is no circuit breaker 'chat-service'; there are " in unknown[2]
        assert NAME in unknown[2]
        status, _, err = await ran("-m", "gateway", "reset", "chat-service", REDIS_URL=redis.url)
        assert (status, err[:60]) == (1, "Error: Not reset: there is no circuit breaker 'chat-service'; there are"[:60])
        status, _, err = await ran("-m", "gateway", "reset", NAME, REDIS_URL=redis.url, REDIS_KEY_PREFIX="other:")
        assert (status, err) == (1, "Error: Not reset: no gateway listens in Redis under the prefix 'other:'\n")
        gone = f"redis://:{SECRET[:7]}@127.0.0.1:{port}/0"
        status, _, err = await ran("-m", "gateway", "reset", NAME, REDIS_URL=gone)
        assert status == 1
        assert err.startswith("Error: Not reset: the gateway's Redis does not do its part: ")
        assert err.count("\n") == 1
        assert "hunter2" not in err
        assert (await ran("-m", "gateway", "reset", NAME, "--reason", "x" * 201, REDIS_URL=redis.url))[0] == 2


# Whatever happens to Redis


async def stop(redis: RedisServer) -> None:
    redis.stop()


async def kill(redis: RedisServer) -> None:
    redis.kill()


async def forget(redis: RedisServer) -> None:
    redis.command("FLUSHALL")
    redis.command("SCRIPT", "FLUSH")
    redis.command("CLIENT", "KILL", "TYPE", "pubsub")


async def resume(redis: RedisServer) -> None:
    redis.resume()


async def start(redis: RedisServer) -> None:
    await asyncio.to_thread(redis.start)


async def nothing(redis: RedisServer) -> None: ...


@pytest.mark.parametrize(
    ("happens", "ends"), [(stop, resume), (kill, start), (forget, nothing)], ids=["stopped", "killed", "flushed"]
)
async def test_redis_is(
    happens: Callable[[RedisServer], Any],
    ends: Callable[[RedisServer], Any],
    redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gateway.fleet")
    async with three(redis, OK) as (all_pods, upstream):
        slow: list[tuple[int, float]] = []
        loop = asyncio.get_running_loop()

        enough = asyncio.Event()

        async def go_on(pod: Pod) -> None:
            while not enough.is_set():
                began = loop.time()
                answer = await pod.call("/api/v1/chat/x")
                if answer.status != 200 or loop.time() - began > 1:
                    slow.append((answer.status, loop.time() - began))
                await asyncio.sleep(0.01)

        callers = [asyncio.create_task(go_on(pod)) for pod in all_pods]
        await happens(redis)
        if happens is not forget:
            for pod in all_pods:
                await pod.shows(workers="1 of 3")
            assert orjson.loads((await all_pods[0].reset()).body)["workers"] == "1 of 3"
        await until(lambda: caplog.text.count("alone") == 3)
        await ends(redis)
        for pod in all_pods:
            await pod.shows(workers="3 of 3")
        enough.set()
        await asyncio.gather(*callers)  # none is given up, or it might count as a failure of what comes now
        assert slow == []
        upstream.handler = reply(BROKEN)
        await all_pods[0].fails(5)
        await all_pods[0].status()
        await all_pods[1].fails(1)
        assert await all_pods[1].refuses()
    lines = [record.levelname for record in caplog.records if record.name == "gateway.fleet"]
    assert lines == ["INFO"] * 3 + ["WARNING"] * 3 + ["INFO"] * 3


async def test_a_redis_that_is_gone_from_the_start_is_said_once_and_found_later(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.fleet")

    def said() -> list[str]:
        return [record.levelname for record in caplog.records if record.name == "gateway.fleet"]

    redis.kill()
    async with service(reply(BROKEN)) as upstream:
        app = create_app(Settings.load({"REDIS_URL": redis.url, "CHATBOT_SERVICE_URL": upstream.url}))
        async with serving(app) as port:
            pod = Pod(app, port)
            await pod.fails(5)
            await until(lambda: len(said()) == 1)
            assert (await pod.status()).items() >= {"state": "open", "workers": "1 of 1"}.items()
            await start(redis)
            await until(lambda: len(said()) == 2)
    assert said() == ["WARNING", "INFO"]


async def test_a_user_who_may_do_no_more_than_is_needed(redis: RedisServer) -> None:
    redis.command("ACL", "SETUSER", "gateway", "on", f">{SECRET}", *NEEDED)
    url = f"redis://gateway:{quote(SECRET, safe='')}@127.0.0.1:{redis.port}/0"
    async with service(reply(BROKEN)) as upstream, pods(upstream.url, upstream.url, redis=url) as (first, second):
        await first.fails(5)
        await first.status()
        await second.fails(1)
        assert await second.refuses()
        assert orjson.loads((await first.reset()).body)["workers"] == "2 of 2"
        assert (await ran("-m", "gateway", "reset", NAME, REDIS_URL=url))[0] == 0
        assert redis.command("ACL", "LOG") == b"*0\r\n"


async def test_without_redis_none_of_it_is_there() -> None:
    make = "from gateway import Settings, create_app; app = create_app(Settings.load({})); assert app.fleet is None"
    assert "redis" not in loaded_by(make)
    async with service() as upstream:
        app = create_app(Settings.load({"CHATBOT_SERVICE_URL": upstream.url, "WEB_CONCURRENCY": "4"}))
        async with serving(app) as port:
            assert (await Pod(app, port).status())["workers"] == "1 of 4"


async def test_it_can_be_left_at_any_moment(redis: RedisServer) -> None:
    for turns in range(120):
        fleet = Fleet(redis.url, {})
        fleet.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await fleet.aclose()
    await until(lambda: b"connected_clients:1\r" in redis.command("INFO", "clients"))


async def test_what_could_not_be_told_in_time_is_told_no_more(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with three(redis) as ((first, *others), upstream):
        monkeypatch.setattr(backend, "STALE", 0.2)
        redis.kill()
        await first.shows(workers="1 of 3")
        await first.fails(5)
        await asyncio.sleep(0.25)
        await start(redis)
        for pod in (first, *others):
            await pod.shows(workers="3 of 3")
        for pod in others:
            await pod.fails(2)
        assert len(upstream.requests) == 9


async def test_mounted_without_a_lifespan_it_starts_by_itself(redis: RedisServer) -> None:
    async with service() as upstream:
        app = create_app(Settings.load({"REDIS_URL": redis.url, "CHATBOT_SERVICE_URL": upstream.url}))
        async with serving(app, lifespan="off") as port:
            assert (await call(port, PATH)).status == 200
            assert app.fleet is not None
            fleet = app.fleet
            await until(lambda: fleet.connected)
            await fleet.aclose()
