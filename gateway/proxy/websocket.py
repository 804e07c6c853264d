"""WebSockets through the proxy: the handshake with the service first, then messages both ways until one side closes."""

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from gateway.context import DROP_CODES, OUTCOMES, Cause, RequestContext, is_failure
from gateway.policies.circuit_breaker import Outcome
from gateway.policies.services import Address
from gateway.problems import ForwardingError, answer
from gateway.proxy.headers import RequestFields, answer_fields, forwarding_fields, joined
from gateway.proxy.pool import connect
from gateway.proxy.route import Route

if TYPE_CHECKING:
    from gateway.proxy.app import ProxyApp

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
QUICKLY = 5.0  # seconds: a service that drops a WebSocket sooner has failed (RESILIENCE.md, 1)
CLOSE_TIMEOUT = 1.0  # seconds a service gets to answer our close
BAD_GATEWAY = 1014  # close codes (RFC 6455 7.4, and its registry)
NO_STATUS = 1005
ABNORMAL = 1006
GOING_AWAY = 1001
NOT_TO_BE_SENT = frozenset({NO_STATUS, ABNORMAL, 1015})
# What websockets' own handshake says; the client's is for us, not for the service.
HANDSHAKE = frozenset(
    {b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-protocol"}
)


async def relay(
    proxy: "ProxyApp", route: Route, scope: Scope, receive: Receive, send: Send, context: RequestContext
) -> None:
    """Carry one WebSocket to its service: close codes and reasons, and a refused handshake, reach the other side."""
    if (await receive())["type"] != "websocket.connect":
        context.cause = Cause.CLIENT_LEFT
        return
    place = route.replicas.choose(route.loop.time())
    context.attempts, context.replica = 1, place.address
    outcome = Outcome.NEUTRAL
    try:
        upstream = await _open(proxy, route, route.pools[place.address].address, scope)
    except InvalidStatus as refusal:
        outcome = Outcome.FAILURE if is_failure(refusal.response.status_code) else Outcome.SUCCESS
        context.cause, context.status = Cause.COMPLETED, refusal.response.status_code
        await _deny(scope, send, refusal.response)
    except ForwardingError as error:
        outcome = OUTCOMES[error.cause]
        context.cause, context.reason = error.cause, error.reason
        await answer(scope, send, error.status, error.message, reason=error.reason or error.cause.value)
    else:
        outcome = Outcome.SUCCESS
        try:
            await send(_accepted(upstream))
            context.status = 101
            context.cause = await _carry(upstream, receive, send, context, route.service.timeouts.websocket_idle)
        finally:
            upstream.transport.abort()
    finally:
        place.finish(outcome, route.loop.time())


async def _open(proxy: "ProxyApp", route: Route, address: Address, scope: Scope) -> ClientConnection:
    if not route.direct:
        raise ForwardingError(Cause.REFUSED, "No WebSockets reach this service", status=501, reason="no_websockets")
    timeouts = route.service.timeouts
    fields = RequestFields([header for header in scope["headers"] if header[0] not in HANDSHAKE])
    client = scope.get("client")
    peer = client[0] if client else ""
    scheme = "https" if scope.get("scheme") == "wss" else "http"
    forwarding = forwarding_fields(
        fields, peer=peer.encode(), trusted=proxy.trusted.trusts(peer), scheme=scheme.encode(), via=proxy.via
    )
    lines = (fields.kept + forwarding).decode("latin-1").split("\r\n")[:-1]
    path = address.path + (scope.get("raw_path") or quote(scope["path"]).encode())
    query: bytes = scope.get("query_string", b"")
    if not (path.isascii() and query.isascii()):
        raise ForwardingError(Cause.REFUSED, "The target has bytes outside ASCII", status=400, reason="bad_target")
    host, port = address.host, address.port
    if route.service.preserve_host and fields.host:
        host, port = _host_and_port(fields.host, address)
    uri = WebSocketURI(address.tls, host, port, path.decode(), query.decode())
    protocol = ClientProtocol(
        uri,
        subprotocols=[Subprotocol(name) for name in scope.get("subprotocols", ())] or None,
        max_size=MAX_MESSAGE_BYTES,
    )
    connection: ClientConnection | None = None

    def make() -> ClientConnection:
        ping = timeouts.websocket_ping or None
        return ClientConnection(protocol, ping_interval=ping, ping_timeout=ping, close_timeout=CLOSE_TIMEOUT)

    try:
        async with asyncio.timeout(timeouts.connect):
            connection = await connect(address, make, route.tls)
        async with asyncio.timeout(timeouts.first_byte):
            await connection.handshake([_split(line) for line in lines], None)
    except TimeoutError as error:
        cause = Cause.CONNECT_TIMEOUT if connection is None else Cause.FIRST_BYTE_TIMEOUT
        raise ForwardingError(cause, "The service did not answer the WebSocket handshake in time") from error
    except OSError as error:
        raise ForwardingError(Cause.CONNECT_FAILED, "The service can't be reached") from error
    except InvalidStatus as refusal:
        if refusal.response.status_code >= 300:
            raise
        # No failure of the service's: it may not know Upgrade, and any client can ask it for one (EDGE.md, 57, 68).
        message = "The service took the WebSocket handshake for a plain request"
        raise ForwardingError(Cause.REFUSED, message, status=502, reason="not_a_websocket") from None
    except (InvalidHandshake, WebSocketException, EOFError) as error:
        raise ForwardingError(Cause.GARBLED, "The service's answer to the WebSocket handshake is not valid") from error
    finally:
        if connection is not None and connection.response is None:
            connection.transport.abort()
    connection.start_keepalive()
    return connection


def _host_and_port(host: bytes, address: Address) -> tuple[str, int]:
    """The client's ``Host`` as the handshake takes it; the connection goes to the address all the same."""
    parts = urlsplit(b"//" + host)
    try:
        return (parts.hostname or b"").decode(), parts.port or (443 if address.tls else 80)
    except ValueError as error:
        raise ForwardingError(Cause.REFUSED, "Host is not valid", status=400, reason="bad_host") from error


def _split(line: str) -> tuple[str, str]:
    name, _, value = line.partition(": ")
    return name, value


def _accepted(upstream: ClientConnection) -> Message:
    assert upstream.response is not None
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in upstream.response.headers.raw_items()]
    own = {b"sec-websocket-accept", b"sec-websocket-extensions", b"sec-websocket-protocol", b"date", b"server"}
    headers = [header for header in answer_fields(raw, joined(raw)) if header[0] not in own]
    return {"type": "websocket.accept", "subprotocol": upstream.subprotocol, "headers": headers}


async def _deny(scope: Scope, send: Send, response: Response) -> None:
    """The service said no: its own answer reaches the client."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008, "reason": ""})
        return
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in response.headers.raw_items()]
    body = bytes(response.body or b"")
    headers = [header for header in answer_fields(raw, joined(raw)) if header[0] != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "websocket.http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


async def _carry(
    upstream: ClientConnection, receive: Receive, send: Send, context: RequestContext, idle: float
) -> Cause:
    """Messages both ways, until one side closes or neither has said anything for ``idle`` seconds."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    to_service = loop.create_task(_to_service(upstream, receive, context))
    to_client = loop.create_task(_to_client(upstream, send, context))
    try:
        said = -1
        while not to_service.done() and not to_client.done():
            if context.bytes_in + context.bytes_out == said:
                await upstream.close(GOING_AWAY, "idle")
                await send({"type": "websocket.close", "code": GOING_AWAY, "reason": "idle"})
                return Cause.COMPLETED
            said = context.bytes_in + context.bytes_out
            await asyncio.wait((to_service, to_client), timeout=idle, return_when=asyncio.FIRST_COMPLETED)
        if to_service.done():
            code, reason = to_service.result()
            await upstream.close(1000 if code in NOT_TO_BE_SENT else code, reason)
            return Cause.CLIENT_LEFT if code == ABNORMAL else Cause.COMPLETED
        code, reason = to_client.result()
        sent = {NO_STATUS: 1000, ABNORMAL: BAD_GATEWAY, 1015: BAD_GATEWAY}.get(code, code)
        await send({"type": "websocket.close", "code": sent, "reason": reason})
        if code not in DROP_CODES:
            return Cause.COMPLETED
        return Cause.DROPPED if loop.time() - began < QUICKLY else Cause.CUT_SHORT
    finally:
        to_service.cancel()
        to_client.cancel()
        await asyncio.gather(to_service, to_client, return_exceptions=True)


async def _to_service(upstream: ClientConnection, receive: Receive, context: RequestContext) -> tuple[int, str]:
    """Pass messages on until the client closes; returns its code and reason."""
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return message.get("code") or NO_STATUS, message.get("reason") or ""
        data = message.get("text")
        if data is None:
            data = message.get("bytes") or b""
        context.bytes_in += len(data)
        try:
            await upstream.send(data)
        except ConnectionClosed:
            await asyncio.Event().wait()  # the other direction knows why, and ends this one


async def _to_client(upstream: ClientConnection, send: Send, context: RequestContext) -> tuple[int, str]:
    """Pass messages on until the service closes; returns its code and reason."""
    while True:
        try:
            data = await upstream.recv()
        except ConnectionClosed as closed:
            said = closed.rcvd or (closed.sent if closed.sent is not None and closed.sent.code == 1009 else None)
            return (said.code, said.reason) if said is not None else (ABNORMAL, "")
        context.bytes_out += len(data)
        await send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})
