"""WebSockets through the proxy: the handshake with the service first, then messages both ways until one side closes."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from starlette.types import Message, Receive, Scope, Send
from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Response
from websockets.protocol import Event, State
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from gateway.context import DROP_CODES, OUTCOMES, Cause, RequestContext, is_failure
from gateway.policies.circuit_breaker import Outcome
from gateway.policies.edge import MAX_MESSAGE_BYTES
from gateway.policies.retry import may_resend
from gateway.policies.services import Address
from gateway.problems import ForwardingError, answer
from gateway.proxy.headers import RequestFields, answer_fields, joined
from gateway.proxy.pool import connect
from gateway.proxy.route import Route

if TYPE_CHECKING:
    from gateway.proxy.app import ProxyApp

# Whatever the others' level: below, websockets tells messages and header fields, secrets among them.
logger = logging.getLogger("gateway.proxy.websocket")
logger.setLevel(logging.WARNING)

UNREACHED = frozenset({Cause.CONNECT_FAILED, Cause.CONNECT_TIMEOUT})  # so that another replica may well be tried
QUICKLY = 5.0  # seconds: a service that drops a WebSocket sooner has failed (RESILIENCE.md, 1)
CLOSE_TIMEOUT = 1.0  # seconds a service gets to answer our close, and to hang up
LAST_MESSAGES = 0.1  # seconds for what a client had sent to reach the service once the client has vanished
MAX_PONGS = 1000  # that wait for a service which sends pings and reads nothing, before it is read no further
A_TURN = 64  # messages that pass before others have their turn
LOOKS = 4  # at how a session gets on, in the shortest time that it may stand still
NEVER = float("inf")
GOING_AWAY, NO_STATUS, ABNORMAL, NO_TLS = 1001, 1005, 1006, 1015  # close codes (RFC 6455 7.4, and its registry)
INVALID_DATA, TOO_BIG, SERVICE_RESTART, BAD_GATEWAY = 1007, 1009, 1012, 1014
# What the other side is told for codes that may not be sent.
TO_SERVICE = {NO_STATUS: 1000, NO_TLS: 1000}
TO_CLIENT = {NO_STATUS: 1000, ABNORMAL: BAD_GATEWAY, NO_TLS: BAD_GATEWAY}
# What websockets' own handshake says; the client's is for us, not for the service.
HANDSHAKE = frozenset(
    {b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions", b"sec-websocket-protocol"}
)


async def relay(
    proxy: "ProxyApp", route: Route, scope: Scope, receive: Receive, send: Send, context: RequestContext
) -> None:
    """Carry one WebSocket to its service: close codes and reasons, and a refused handshake, reach the other side.

    A client that vanishes, in the handshake or after it, ends the service's connection at once.
    """
    if (await receive())["type"] != "websocket.connect":
        context.cause = Cause.CLIENT_LEFT
        return
    fields = RequestFields([header for header in scope["headers"] if header[0] not in HANDSHAKE])
    if proxy.via in fields.by_name.get(b"via", b""):
        context.cause, context.reason = Cause.REFUSED, "loop"
        await answer(scope, send, 508, "The request has come through this gateway before", reason="loop")
        return
    # For the client's leaving: in good order, nothing else comes before it is let in.
    listening: asyncio.Future[Message] = asyncio.ensure_future(receive())
    route.budget.deposit(route.loop.time())
    tried: tuple[str, ...] = ()
    try:
        while (
            wait := await _attempt(proxy, route, scope, receive, send, context, fields, listening, tried)
        ) is not None:
            tried += (context.replica,)
            await asyncio.sleep(wait)
    except asyncio.CancelledError:
        context.cause = Cause.SHUTDOWN  # a server cancels when it stops, not when a client leaves
        raise
    finally:
        listening.cancel()


async def _attempt(
    proxy: "ProxyApp",
    route: Route,
    scope: Scope,
    receive: Receive,
    send: Send,
    context: RequestContext,
    fields: RequestFields,
    listening: asyncio.Future[Message],
    tried: tuple[str, ...],
) -> float | None:
    """Carry the WebSocket to one replica, where ``tried`` could not be reached.

    Returns:
        None where it is over; seconds to wait where this one can't be reached either and another may be tried.
    """
    now = route.loop.time
    place = route.replicas.choose(now(), tried, context.probe)
    context.attempts += 1
    context.replica = place.address
    outcome = Outcome.NEUTRAL
    upstream: Upstream | None = None
    try:
        upstream = _upstream(proxy, route, route.pools[place.address].address, scope, fields)
        await _open(upstream, listening)
        began = now()
        place.succeed_so_far(began)  # as for the breaker, what may come of it in an hour is another matter
        cause = await _Session(upstream, scope, receive, send, context, listening).run()
        if cause is Cause.DROPPED or (OUTCOMES[cause] is Outcome.FAILURE and now() - began < QUICKLY):
            outcome = Outcome.FAILURE
        context.cause = cause
    except asyncio.CancelledError:
        if upstream is not None:
            upstream.say_goodbye(SERVICE_RESTART)
        raise
    except InvalidStatus as refusal:
        outcome = Outcome.FAILURE if is_failure(refusal.response.status_code) else Outcome.SUCCESS
        context.cause, context.status = Cause.COMPLETED, refusal.response.status_code
        await _deny(scope, send, refusal.response)
    except ForwardingError as error:
        outcome = OUTCOMES[error.cause]
        if error.cause in UNREACHED and (wait := _wait_to_resend(route, context)) is not None:
            return wait
        context.cause, context.reason = error.cause, error.reason
        if error.cause is not Cause.CLIENT_LEFT:
            await answer(scope, send, error.status, error.message, reason=error.reason or error.cause.value)
    finally:
        if upstream is not None:
            upstream.end()
        place.finish(outcome, now())
    return None


def _wait_to_resend(route: Route, context: RequestContext) -> float | None:
    """Seconds after which a handshake that no replica has seen is sent to another; None: it is not."""
    wait = may_resend(
        method="GET",
        retried=context.attempts - 1,
        retries=route.service.retries,
        time_left=NEVER,
        random=route.random,
        dispatched=False,
        probe=context.probe,
    )
    return wait if wait is not None and route.budget.take(route.loop.time()) else None


class Upstream(ClientConnection):
    """The connection to the service: bounded in what it keeps, and quick to say that the service is done.

    Attributes:
        heard_at: when anything came from the service, or last could not, seconds on the event loop's clock.
        over: what still comes from the service is for nobody.
    """

    over = False
    _pongs = 0  # written since the service last read

    def __init__(self, protocol: ClientProtocol, address: Address, route: Route, headers: Sequence[str]) -> None:
        # No deadline for pongs: while a slow client holds the service back they can't be read. `_Session` has its own.
        super().__init__(
            protocol,
            ping_interval=route.service.timeouts.websocket_ping or None,
            ping_timeout=None,
            close_timeout=CLOSE_TIMEOUT,
            max_queue=1,  # frames, of up to 10 MiB
        )
        self.address = address
        self.route = route
        self.headers = headers
        self.heard_at = self.loop.time()

    async def open(self) -> None:
        """Connect and shake hands.

        Raises:
            ForwardingError: it did not come to that.
            InvalidStatus: the service refused, with an answer of its own.
        """
        address, timeouts = self.address, self.route.service.timeouts
        try:
            async with asyncio.timeout(timeouts.connect):
                await connect(address, lambda: self, self.route.tls)
            async with asyncio.timeout(timeouts.first_byte):
                await self.handshake([_split(line) for line in self.headers], None)
        except TimeoutError as error:
            cause = Cause.CONNECT_TIMEOUT if self.request is None else Cause.FIRST_BYTE_TIMEOUT
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
            message = "The service's answer to the WebSocket handshake is not valid"
            raise ForwardingError(Cause.GARBLED, message) from error
        self.heard_at = self.loop.time()
        self.start_keepalive()

    async def next(self) -> str | bytes | Close:
        """The service's next message; in the end, at once, its code and reason, or ours where it broke the rules."""
        protocol = self.protocol
        try:
            return await self.recv_messages.get()
        except EOFError:
            pass
        except WebSocketException as error:
            protocol.fail(TOO_BIG, str(error))  # too many fragments
        except UnicodeDecodeError as error:
            protocol.fail(INVALID_DATA, f"{error.reason} at position {error.start}")
        self.send_data()
        if protocol.close_rcvd is not None:
            return protocol.close_rcvd
        sent = protocol.close_sent
        # The client may have asked for a message that is too big, and must be able to open no breaker.
        return sent if sent is not None and sent.code == TOO_BIG else Close(ABNORMAL, "")

    def say_goodbye(self, code: int, reason: str = "") -> None:
        """Send a close frame, where none was sent yet; without waiting."""
        if self.protocol.state is State.OPEN:
            self.protocol.send_close(code, reason)
            self.send_data()

    async def hung_up(self) -> None:
        """Wait for the service to hang up, as is its part after close frames (RFC 6455, 7.1.1), a second at most."""
        self.over = True
        if not self.transport.is_closing():
            self.transport.resume_reading()  # its agreement may be behind messages that nobody wants any more
        await asyncio.wait((self.connection_lost_waiter,), timeout=CLOSE_TIMEOUT)

    def end(self) -> None:
        """Hang up, though not on a goodbye that is still on its way."""
        transport: asyncio.Transport | None = getattr(self, "transport", None)  # it comes with the connection
        if transport is None or transport.is_closing():
            return
        if self.protocol.state is State.CLOSING and not self.paused:  # else the service would not read it
            transport.close()
            self.loop.call_later(CLOSE_TIMEOUT, transport.abort)
        else:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)
        if self.protocol.state is not State.OPEN and self.response is not None:
            self.recv_messages.close()  # nothing more comes, though the service may keep the connection for a while

    def process_event(self, event: Event) -> None:
        if self.over or self.recv_messages.closed:
            return
        super().process_event(event)
        if self.paused and isinstance(event, Frame) and event.opcode is Opcode.PING:
            self._pongs += 1
            if self._pongs > MAX_PONGS:
                self.transport.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._pongs > MAX_PONGS and not self.recv_messages.paused:
            self.transport.resume_reading()
        self._pongs = 0


class _Session:
    """Messages both ways, until one side closes, leaves, or stands still for too long.

    Args:
        upstream: the open connection to the service.
        listening: the client's next message.
    """

    def __init__(
        self,
        upstream: Upstream,
        scope: Scope,
        receive: Receive,
        send: Send,
        context: RequestContext,
        listening: asyncio.Future[Message],
    ) -> None:
        self.upstream = upstream
        self.receive = receive
        self.send = send
        self.context = context
        self.listening = listening
        server: dict[str, Any] = (scope.get("extensions") or {}).get("gateway.server", {})
        self.left: asyncio.Future[None] | None = server.get("left")  # ours tells at once that a client has vanished
        self.now = upstream.loop.time
        self.timeouts = upstream.route.service.timeouts
        self.ping = self.timeouts.websocket_ping or NEVER
        self.messages = self.seen = 0  # that passed, and at the last look
        self.used_at = self.taken_at = self.now()  # when the last of them did, and when the service last took a byte
        self.unsent = 0  # bytes for it, at the last look

    async def run(self) -> Cause:
        """Accept the client's handshake and carry what follows; returns why it ended."""
        upstream, context = self.upstream, self.context
        try:
            await self.send(_accepted(upstream))
        except OSError:  # how a server says that the client is gone
            return Cause.CLIENT_LEFT
        context.status = 101
        began = self.now()
        to_service = upstream.loop.create_task(self._to_service())
        to_client = upstream.loop.create_task(self._to_client())
        try:
            stands_still = await self._watch(to_service, to_client)
            if to_service.done():
                code, reason = to_service.result()
                if code == ABNORMAL:
                    return Cause.CLIENT_LEFT
                upstream.say_goodbye(TO_SERVICE.get(code, code), reason)
                await upstream.hung_up()
                return Cause.COMPLETED
            if stands_still is not None:
                return await self._end(stands_still)
            end = to_client.result() if to_client.done() else None
            if end is None:
                return Cause.CLIENT_LEFT
            upstream.loop.call_later(CLOSE_TIMEOUT, upstream.transport.abort)  # a slow client is not its concern
            await self._close_client(TO_CLIENT.get(end.code, end.code), end.reason)
            await upstream.hung_up()
            if end.code not in DROP_CODES:
                return Cause.COMPLETED
            return Cause.DROPPED if self.now() - began < QUICKLY else Cause.CUT_SHORT
        finally:
            to_service.cancel()
            to_client.cancel()
            await asyncio.gather(to_service, to_client, return_exceptions=True)

    async def _watch(
        self, to_service: "asyncio.Task[tuple[int, str]]", to_client: "asyncio.Task[Close | None]"
    ) -> Cause | None:
        """Wait until a side has closed or the client is gone, or return what it means that nothing moves."""
        timeouts, left = self.timeouts, self.left
        between_looks = min(timeouts.websocket_idle, timeouts.write, 2 * self.ping) / LOOKS
        waiting: set[asyncio.Future[Any]] = {to_service, to_client}
        if left is not None:
            waiting.add(left)
        while not to_service.done() and not to_client.done():
            if left is not None and left.done():
                break
            await asyncio.wait(waiting, timeout=between_looks, return_when=asyncio.FIRST_COMPLETED)
            if not to_service.done() and not to_client.done() and (cause := self._stands_still()) is not None:
                return cause
        if not to_service.done() and (not to_client.done() or to_client.result() is None):
            # The client has vanished, and `receive` says so only behind what is still to pass.
            await asyncio.wait((to_service,), timeout=LAST_MESSAGES)
        return None

    def _stands_still(self) -> Cause | None:
        now, upstream = self.now(), self.upstream
        if self.messages != self.seen:
            self.seen, self.used_at = self.messages, now
        unsent = upstream.transport.get_write_buffer_size()
        if unsent < self.unsent or not upstream.paused:
            self.taken_at = now
        self.unsent = unsent
        if upstream.recv_messages.paused:  # it is the client who does not let it speak
            upstream.heard_at = now
        if now - self.taken_at > self.timeouts.write:
            return Cause.WRITE_TIMEOUT
        if now - upstream.heard_at > 2 * self.ping:  # nothing came, and not even an answer to a ping
            return Cause.STALLED
        return Cause.COMPLETED if now - self.used_at >= self.timeouts.websocket_idle else None

    async def _end(self, cause: Cause) -> Cause:
        """End what stands still: politely where it is only idle."""
        if cause is Cause.COMPLETED:
            self.upstream.say_goodbye(GOING_AWAY, "idle")
            await self._close_client(GOING_AWAY, "idle")
            await self.upstream.hung_up()
        else:
            self.upstream.end()
            await self._close_client(BAD_GATEWAY, "")
        return cause

    async def _close_client(self, code: int, reason: str) -> None:
        with suppress(OSError):  # it is gone
            await self.send({"type": "websocket.close", "code": code, "reason": reason})

    async def _count(self) -> None:
        """Count a message, and after some make way for others: a thousand may have come in one packet."""
        self.messages += 1
        if self.messages % A_TURN == 0:
            await asyncio.sleep(0)

    async def _to_service(self) -> tuple[int, str]:
        """Pass messages on until the client closes; returns its code and reason."""
        upstream, context = self.upstream, self.context
        message = await self.listening
        while message["type"] != "websocket.disconnect":
            data = message.get("text")
            if data is None:
                data = message.get("bytes") or b""
            context.bytes_in += len(data)
            await self._count()
            try:
                await upstream.send(data)
            except ConnectionClosed:
                await asyncio.Event().wait()  # the other direction knows why, and ends this one
            message = await self.receive()
        return message.get("code") or NO_STATUS, message.get("reason") or ""

    async def _to_client(self) -> Close | None:
        """Pass messages on until the service closes; returns its code and reason, or None if the client is gone."""
        context = self.context
        while not isinstance(data := await self.upstream.next(), Close):
            context.bytes_out += len(data)
            await self._count()
            try:
                await self.send({"type": "websocket.send", "text" if isinstance(data, str) else "bytes": data})
            except OSError:  # how a server says that the client is gone
                return None
        return data


def _upstream(proxy: "ProxyApp", route: Route, address: Address, scope: Scope, fields: RequestFields) -> Upstream:
    """The connection to the service, with the handshake that is to be sent.

    Raises:
        ForwardingError: there can't be one for this request.
    """
    if not route.direct:
        raise ForwardingError(Cause.REFUSED, "No WebSockets reach this service", status=501, reason="no_websockets")
    client = scope.get("client")
    scheme = b"https" if scope.get("scheme") == "wss" else b"http"
    lines = fields.block(client[0] if client else "", proxy.trusted.trusts, scheme, proxy.via)
    path = address.path + (scope.get("raw_path") or quote(scope["path"]).encode())
    query: bytes = scope.get("query_string", b"")
    if not (path.isascii() and query.isascii()):
        raise ForwardingError(Cause.REFUSED, "The target has bytes outside ASCII", status=400, reason="bad_target")
    host, port = address.host, address.port
    if route.service.preserve_host and fields.host:
        host, port = _host_and_port(fields.host, address)
    uri = WebSocketURI(address.tls, host, port, path.decode(), query.decode())
    subprotocols = [Subprotocol(name) for name in scope.get("subprotocols", ())] or None
    protocol = ClientProtocol(uri, subprotocols=subprotocols, max_size=MAX_MESSAGE_BYTES, logger=logger)
    return Upstream(protocol, address, route, lines.decode("latin-1").split("\r\n")[:-1])


async def _open(upstream: Upstream, listening: asyncio.Future[Message]) -> None:
    """Open the connection to the service, unless the client leaves meanwhile."""
    opening = upstream.loop.create_task(upstream.open())
    try:
        await asyncio.wait((opening, listening), return_when=asyncio.FIRST_COMPLETED)
        if not opening.done() and listening.result()["type"] == "websocket.disconnect":
            raise ForwardingError(Cause.CLIENT_LEFT, "The client left")
        await opening
    finally:
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)


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
