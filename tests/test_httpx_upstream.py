"""An httpx transport in place of our own client: mocks, applications, HTTP/2, forward proxies; what it may not add."""

import asyncio
import base64
import gzip
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.context import Cause
from gateway.policies.services import Address, Timeouts
from gateway.policies.services import Service as Target
from gateway.proxy.app import ProxyApp
from gateway.proxy.httpx_upstream import ExclusiveTransport
from tests.asgi_call import call as ask
from tests.asgi_call import http
from tests.proxy_rig import Seen
from tests.wire import Answer, Reader, Writer, call, parse, send_raw, service, serving, until

TLS = Path(__file__).parent / "tls"  # a certificate for localhost and 127.0.0.1 that is its own authority
Handle = Callable[[httpx.Request], httpx.Response]


@asynccontextmanager
async def through(upstream: httpx.AsyncBaseTransport | httpx.AsyncClient, **options: Any) -> AsyncIterator["Gateway"]:
    """A proxy that reaches the service ``http://api.test`` through a transport."""
    target = Target(name="api", prefix="/api", replicas=("http://api.test/base",), retries=0, **options)
    proxy = ProxyApp([target], upstreams={"api": upstream})
    seen = Seen(proxy)
    async with serving(seen) as port:
        yield Gateway(port, proxy, seen)
        await until(lambda: not proxy.exchanges and not proxy.open_connections)


class Gateway:
    def __init__(self, port: int, proxy: ProxyApp, seen: Seen) -> None:
        self.port, self.proxy, self.seen = port, proxy, seen

    async def call(self, target: str = "/api/x", method: str = "GET", **more: Any) -> Answer:
        return await call(self.port, target, method, **more)

    async def cause(self) -> Cause | None:
        await until(lambda: self.seen.contexts and self.seen.last.cause is not None)
        return self.seen.last.cause


class Stream(httpx.AsyncByteStream):
    """A body in parts, at the end of which an error may be raised."""

    def __init__(self, *parts: bytes, error: Exception | None = None) -> None:
        self.parts, self.error, self.closed = parts, error, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.closed = True


# Mocks, clients and applications


async def test_a_mock_sees_the_request_as_the_client_sent_it_and_nothing_that_httpx_adds() -> None:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, content=b"ok")

    async with through(httpx.MockTransport(handle)) as gw:
        head = b"POST /api/a/./%2f?x=1&x=2 HTTP/1.1\r\nHost: h\r\nX: 1\r\nY: 2\r\nX: 3\r\nConnection: close\r\n"
        framed = b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
        assert parse(await send_raw(gw.port, head + framed)).body == b"ok"
    (request,) = requests
    assert (request.method, request.content) == ("POST", b"hello")
    assert request.url.raw_path == b"/base/api/a/./%2f?x=1&x=2"
    assert (request.url.host, request.url.params.get_list("x")) == ("api.test", ["1", "2"])
    names = [name for name, _ in request.headers.raw if not name.startswith(b"x-forwarded")]
    assert names == [
        b"host",
        b"x",
        b"y",
        b"x",
        b"via",
        b"x-gateway-attempt",
        b"content-length",
    ]  # small, so it was whole
    assert request.headers["host"] == "api.test"


async def test_an_answers_bytes_cross_unchanged_and_its_fields_keep_their_order_and_repeats() -> None:
    zipped = gzip.compress(b"hello")
    fields = [("Set-Cookie", "a=1"), ("X", "1"), ("Content-Encoding", "gzip"), ("Set-Cookie", "b=2")]

    def handle(request: httpx.Request) -> httpx.Response:
        body = zipped if request.url.path.endswith("bytes") else Stream(zipped[:5], b"", zipped[5:])
        return httpx.Response(200, headers=[*fields, ("Keep-Alive", "timeout=5")], content=body)

    async with through(httpx.MockTransport(handle)) as gw:
        for path in ("/api/bytes", "/api/stream"):
            answer = await gw.call(path)
            assert (answer.body, answer.whole) == (zipped, True)
            assert [(name.title(), value) for name, value in answer.headers][:4] == [
                (name.encode(), value.encode()) for name, value in fields
            ]
            assert not answer.values(b"keep-alive")


async def test_of_a_client_only_its_transport_takes_part() -> None:
    requests: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(302, headers={"Location": "https://[", "Set-Cookie": "a=1"})

    client = httpx.AsyncClient(
        transport=httpx.MockTransport(handle),
        auth=("me", "secret"),
        headers={"X-Mine": "1"},
        cookies={"b": "2"},
        follow_redirects=True,
    )
    async with client, through(client) as gw:
        for _ in range(2):
            answer = await gw.call()
            assert (answer.status, answer.values(b"location")) == (302, [b"https://["])
        assert dict(client.cookies) == {"b": "2"}
    for request in requests:
        assert not {"authorization", "x-mine", "cookie", "user-agent", "accept", "accept-encoding"} & {*request.headers}


async def test_an_application_is_a_service_without_a_socket() -> None:
    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-path", scope["raw_path"])]})
        await send({"type": "http.response.body", "body": body})

    async with through(httpx.ASGITransport(echo)) as gw:
        answer = await gw.call("/api/%41", "POST", body=b"hello" * 30_000)
        assert (answer.status, answer.body, answer.whole) == (201, b"hello" * 30_000, True)
        assert answer.values(b"x-path") == [b"/base/api/%41"]


async def test_an_application_that_raises_is_an_unexpected_error_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret")

    async with through(httpx.ASGITransport(fail)) as gw:
        answer = await gw.call()
        assert (answer.status, b"secret" in answer.body) == (500, False)
        assert await gw.cause() is Cause.GATEWAY_FAULT
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


async def test_an_application_that_answers_without_reading_ends_the_upload() -> None:
    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b"no"})

    async with through(httpx.ASGITransport(refuse)) as gw:
        reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
        writer.write(b"POST /api/x HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\nstart")
        assert b"403" in await asyncio.wait_for(reader.readuntil(b"no"), 2)
        writer.transport.abort()
        assert await gw.cause() is Cause.COMPLETED


def test_an_upstream_for_a_service_that_is_not_there_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="No service is called ap1"):
        ProxyApp({"/api": "http://api.test"}, upstreams={"ap1": httpx.MockTransport(lambda _: httpx.Response(200))})


# What goes wrong


@pytest.mark.parametrize(
    ("error", "cause", "status"),
    [
        (httpx.ConnectError("refused"), Cause.CONNECT_FAILED, 502),
        (httpx.ProxyError("407"), Cause.CONNECT_FAILED, 502),
        (httpx.UnsupportedProtocol("ftp"), Cause.CONNECT_FAILED, 502),
        (httpx.ConnectTimeout("slow"), Cause.CONNECT_TIMEOUT, 504),
        (httpx.PoolTimeout("full"), Cause.NO_CONNECTION, 503),
        (httpx.ReadTimeout("slow"), Cause.FIRST_BYTE_TIMEOUT, 504),
        (httpx.WriteTimeout("slow"), Cause.WRITE_TIMEOUT, 504),
        (httpx.ReadError("reset"), Cause.RESET, 502),
        (httpx.WriteError("reset"), Cause.RESET, 502),
        (httpx.RemoteProtocolError("garbage"), Cause.GARBLED, 502),
        (httpx.LocalProtocolError("state"), Cause.GARBLED, 502),
    ],
)
async def test_an_error_of_httpx_before_the_answer_has_its_cause_and_status(
    error: Exception, cause: Cause, status: int
) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        raise error

    async with through(httpx.MockTransport(handle)) as gw:
        answer = await gw.call()
        assert (answer.status, await gw.cause()) == (status, cause)
        assert b'"error":{"type":' in answer.body


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (httpx.ReadError("reset"), Cause.CUT_SHORT),
        (httpx.RemoteProtocolError("garbage"), Cause.CUT_SHORT),
        (httpx.ReadTimeout("slow"), Cause.STALLED),
        (ValueError("surprise"), Cause.GATEWAY_FAULT),
        (None, Cause.CUT_SHORT),
    ],
)
async def test_an_error_within_the_answer_cuts_it(error: Exception | None, cause: Cause) -> None:
    body = Stream(b"hel", error=error)
    answered = httpx.Response(200, headers={"Content-Length": "5"}, stream=body)
    async with through(httpx.MockTransport(lambda _: answered)) as gw:
        answer = await gw.call()
        assert not answer.whole or answer.status >= 500
        assert await gw.cause() is cause
        assert body.closed


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (101, {"Upgrade": "h2c"}),
        (200, {"Content-Length": "two"}),
        (200, {"Content-Length": "2", "Transfer-Encoding": "chunked"}),
        (200, [("Content-Length", "2"), ("Content-Length", "2")]),
        (200, {"X": "a\r\nSet-Cookie: b"}),
        (200, {"X": "a\0b"}),
        (200, {"X y": "a"}),
        (200, {"X": "y" * 70_000}),
        (200, [("X", "y")] * 101),
    ],
)
async def test_a_head_that_may_not_be_passed_on_is_garbled(status: int, headers: Any) -> None:
    body = Stream(b"ok")
    answered = httpx.Response(status, headers=headers, stream=body)
    async with through(httpx.MockTransport(lambda _: answered)) as gw:
        assert (await gw.call()).status == 502
        assert await gw.cause() is Cause.GARBLED
        assert body.closed


async def test_more_than_the_length_that_was_announced_is_not_passed_on() -> None:
    answered = httpx.Response(200, headers={"Content-Length": "2"}, stream=Stream(b"o", b"kay"))
    async with through(httpx.MockTransport(lambda _: answered)) as gw:
        assert b"kay" not in (await gw.call()).raw


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 304), ("GET", 204)])
async def test_where_there_is_no_body_none_is_passed_on(method: str, status: int) -> None:
    length = {} if status == 204 else {"Content-Length": "911"}
    answered = httpx.Response(status, headers={**length, "ETag": "e"}, stream=Stream(b"not to be seen"))
    async with through(httpx.MockTransport(lambda _: answered)) as gw:
        answer = await gw.call(method=method)
        assert (answer.status, answer.body, answer.values(b"etag")) == (status, b"", [b"e"])
        if method == "HEAD":
            assert answer.values(b"content-length") == [b"911"]


@pytest.mark.parametrize(
    ("raw_path", "headers"), [(b"/api/\xff", []), (b"/api/x#y", []), (b"/api/x", [(b"x", b"a\rb")])]
)
async def test_what_no_transport_could_send_is_the_clients_mistake(raw_path: bytes, headers: list[Any]) -> None:
    async with through(httpx.MockTransport(lambda _: httpx.Response(200))) as gw:
        got = await ask(gw.seen, http("/api/x", raw_path=raw_path, headers=headers))
        assert got.status == 400
        assert await gw.cause() is Cause.REFUSED


async def test_requests_that_are_given_up_leave_no_connection_and_no_task_behind() -> None:
    async def hang(request: object, reader: Reader, writer: Writer) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n")
        await reader.read(-1)
        raise ConnectionError

    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=20))
    async with service(hang) as upstream, transport:
        target = Target(name="api", prefix="/api", replicas=(upstream.url,), timeouts=Timeouts(pool=5))
        proxy = ProxyApp([target], upstreams={"api": transport})
        async with serving(proxy) as port:
            for _ in range(5):
                clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
                for reader, writer in clients:
                    writer.write(b"GET /api/x HTTP/1.1\r\nHost: h\r\n\r\n")
                    await reader.readuntil(b"hi")
                    writer.transport.abort()
                await until(lambda: upstream.open == 0 and proxy.open_connections == 0)


# HTTP/2


class Http2Server(asyncio.Protocol):
    """A connection to a service that speaks HTTP/2 alone: it echoes bodies, but never ends an answer to ``/api/hang``,
    and never begins one to ``/api/silent``."""

    def __init__(self, connections: list["Http2Server"]) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        self.requests: dict[int, list[tuple[bytes, bytes]]] = {}
        self.bodies: dict[int, bytes] = {}
        self.reset: list[int] = []
        self.lost = False
        connections.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.h2.initiate_connection()
        transport.write(self.h2.data_to_send())

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            self.transport.abort()
            return
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                self.requests[event.stream_id] = [(bytes(name), bytes(value)) for name, value in event.headers]
                self.bodies[event.stream_id] = b""
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self.answer(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.reset.append(event.stream_id)
        self.transport.write(self.h2.data_to_send())

    def answer(self, stream: int) -> None:
        if (b":path", b"/api/silent") in self.requests[stream]:
            return
        body = self.bodies[stream]
        fields = [(":status", "200"), ("set-cookie", "a=1"), ("set-cookie", "b=2")]
        self.h2.send_headers(stream, [*fields, ("x-stream", str(stream))])
        for start in range(0, len(body), 16_384):
            self.h2.send_data(stream, body[start : start + 16_384])
        if (b":path", b"/api/hang") in self.requests[stream]:
            self.h2.send_data(stream, b"hi")
        else:
            self.h2.end_stream(stream)


@asynccontextmanager
async def http2_service(tls: bool) -> AsyncIterator[tuple[str, list[Http2Server]]]:
    connections: list[Http2Server] = []
    context = None
    if tls:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        context.set_alpn_protocols(["h2"])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Http2Server(connections), "127.0.0.1", 0, ssl=context)
    try:
        yield f"http{'s' * tls}://localhost:{server.sockets[0].getsockname()[1]}", connections
    finally:
        server.close()
        for connection in connections:
            connection.transport.abort()


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
async def test_http2_carries_requests_and_answers_as_they_are(tls: bool) -> None:
    async with http2_service(tls) as (url, connections):
        ca = str(TLS / "cert.pem") if tls else None
        proxy = ProxyApp([Target(name="api", prefix="/api", replicas=(url,), http2=True, ca_file=ca)])
        async with serving(proxy) as port:
            assert (await call(port, "/api/%2F?a=1&a=2")).status == 200
            body = b"0123456789" * 3_000  # less than the first window: the server here does not wait for the next
            answer = await call(port, "/api/x", "POST", body=body)
            assert (answer.status, answer.body, answer.whole) == (200, body, True)
            assert answer.values(b"set-cookie") == [b"a=1", b"b=2"]
            assert len(connections) == 1
            answers = await asyncio.gather(*(call(port, "/api/x", "POST", body=body) for _ in range(10)))
            assert {answer.body for answer in answers} == {body}
        assert {len(connection.reset) for connection in connections} == {0}
        fields = connections[0].requests[1]
        assert [field for field in fields if field[0].startswith(b":")] == [
            (b":method", b"GET"),
            (b":authority", url.split("//")[1].encode()),
            (b":scheme", b"https" if tls else b"http"),
            (b":path", b"/api/%2F?a=1&a=2"),
        ]
        assert {name for name, _ in fields if not name.startswith((b":", b"x-forwarded"))} == {
            b"via",
            b"x-gateway-attempt",
        }
        await until(lambda: all(connection.lost for connection in connections))


@pytest.mark.parametrize("path", ["/api/hang", "/api/silent"])
async def test_a_client_that_leaves_ends_its_http2_exchange_at_the_service_and_no_other(path: str) -> None:
    async with http2_service(tls=False) as (url, connections):
        proxy = ProxyApp([Target(name="api", prefix="/api", replicas=(url,), http2=True)])
        async with serving(proxy) as port:
            staying, leaving = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for number, (_, writer) in enumerate((staying, leaving), 1):
                writer.write(b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % path.encode())
                await until(lambda: len(connections) == number and connections[-1].requests)  # noqa: B023
            leaving[1].transport.abort()
            await until(lambda: connections[1].lost)
            assert not connections[0].lost
            staying[1].transport.abort()
            await until(lambda: connections[0].lost and proxy.open_connections == 0)


@pytest.mark.parametrize(("option", "connections"), [({}, 1), ({"max_age": -1.0}, 3), ({"idle_timeout": -1.0}, 3)])
async def test_a_connection_that_is_too_old_or_idle_for_too_long_is_not_used_again(
    option: dict[str, float], connections: int
) -> None:
    async with http2_service(tls=False) as (url, made):
        target = Target(name="api", prefix="/api", replicas=(url,), http2=True)
        transport = ExclusiveTransport(target, Address.parse(url), limit=1, **option)
        async with transport, serving(ProxyApp([target], upstreams={"api": transport})) as port:
            for _ in range(3):
                answer = await call(port, "/api/x", "POST", body=b"hi")
                assert (answer.body, answer.whole) == (b"hi", True)
        assert len(made) == connections
        await until(lambda: all(connection.lost for connection in made))


async def test_more_exchanges_than_may_be_at_a_time_are_refused_at_once() -> None:
    async with http2_service(tls=False) as (url, connections):
        proxy = ProxyApp([Target(name="api", prefix="/api", replicas=(url,), http2=True, max_in_flight=1)])
        async with serving(proxy) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /api/hang HTTP/1.1\r\nHost: h\r\n\r\n")
            await until(lambda: connections and connections[0].requests)
            assert (await call(port, "/api/x")).status == 503
            writer.transport.abort()
            await until(lambda: proxy.open_connections == 0)
            assert (await call(port, "/api/x")).status == 200


async def test_a_service_that_knows_no_http2_is_spoken_to_in_http1_over_tls() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /api/x HTTP/1.1\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.read()
        writer.close()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    context.set_alpn_protocols(["http/1.1"])
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    targets = [
        Target(name=name, prefix=f"/{name}", replicas=(url,), http2=name == "api", ca_file=str(TLS / "cert.pem"))
        for name in ("api", "own")
    ]
    async with serving(ProxyApp(targets)) as port:
        assert (await call(port, "/api/x")).body == b"ok"
    server.close()


# Forward proxies


class ForwardProxy:
    """A forward proxy on loopback: connects as asked to by CONNECT, answers all else itself; remembers the heads."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.writers: set[Writer] = set()

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.writers.add(writer)
        try:
            self.heads.append(head := await reader.readuntil(b"\r\n\r\n"))
            if not head.startswith(b"CONNECT"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await reader.read()
                return
            host, _, port = head.split(b" ")[1].decode().rpartition(":")
            onward_reader, onward = await asyncio.open_connection(host, int(port))
            self.writers.add(onward)
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            await asyncio.gather(pass_on(reader, onward), pass_on(onward_reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            self.writers.discard(writer)


async def pass_on(reader: Reader, writer: Writer) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
    writer.transport.abort()


@asynccontextmanager
async def forward_proxy() -> AsyncIterator[tuple[ForwardProxy, str]]:
    proxy = ForwardProxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    try:
        yield proxy, f"http://me:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in list(proxy.writers):
            writer.transport.abort()
        await asyncio.sleep(0)


async def test_a_forward_proxy_is_asked_for_the_whole_url_and_told_who_asks() -> None:
    async with forward_proxy() as (proxy, url):
        target = Target(name="api", prefix="/api", replicas=("http://no-such-name.invalid:81/v1",), proxy=url)
        async with serving(ProxyApp([target])) as port:
            assert (await call(port, "/api/a%2Fb?x")).body == b"ok"
        (head,) = proxy.heads
        assert head.startswith(b"GET http://no-such-name.invalid:81/v1/api/a%2Fb?x HTTP/1.1\r\n")
        assert b"\r\nhost: no-such-name.invalid:81\r\n" in head
        assert b"\r\nProxy-Authorization: Basic " + base64.b64encode(b"me:secret") + b"\r\n" in head


@pytest.mark.parametrize("http2", [True, False], ids=["http2", "http1"])
async def test_through_a_forward_proxy_tls_reaches_from_us_to_the_service(http2: bool) -> None:
    async with forward_proxy() as (proxy, proxy_url), http2_service(tls=True) as (url, connections):
        ca = str(TLS / "cert.pem")
        target = Target(name="api", prefix="/api", replicas=(url,), proxy=proxy_url, http2=http2, ca_file=ca, retries=0)
        async with serving(ProxyApp([target])) as port:
            answer = await call(port, "/api/secret")
            assert answer.status == (200 if http2 else 502)  # the service here knows nothing but HTTP/2
        (head,) = proxy.heads
        assert head.startswith(b"CONNECT " + url.removeprefix("https://").encode() + b" HTTP/1.1\r\n")
        assert b"secret" not in head
        if http2:
            assert (b":path", b"/api/secret") in connections[0].requests[1]


async def test_no_websocket_goes_around_a_forward_proxy_or_a_mock() -> None:
    handshake = (
        b"GET /api/ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    async with service() as upstream:
        for proxy in (
            ProxyApp([Target(name="api", prefix="/api", replicas=(upstream.url,), proxy="http://127.0.0.1:1")]),
            ProxyApp({"/api": upstream.url}, upstreams={"api": httpx.MockTransport(lambda _: httpx.Response(200))}),
        ):
            async with serving(proxy) as port:
                assert b" 501 " in (await send_raw(port, handshake)).split(b"\r\n")[0]
        assert upstream.connections == 0
