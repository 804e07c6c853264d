"""The error answers of the gateway, over HTTP and over a refused WebSocket (SPEC.md, 8)."""

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.types import Message, Scope, Send

from gateway.context import Cause, RequestContext

TYPES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    414: "uri_too_long",
    417: "expectation_failed",
    429: "too_many_requests",
    431: "headers_too_large",
    500: "internal_server_error",
    501: "not_implemented",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
    505: "http_version_not_supported",
    508: "loop_detected",
}
Header = tuple[bytes, bytes]


# What each ending becomes where no answer has begun; the others have none to give: the client is gone.
STATUS_OF = {
    Cause.CONNECT_FAILED: 502,
    Cause.RESET: 502,
    Cause.GARBLED: 502,
    Cause.CUT_SHORT: 502,
    Cause.CONNECT_TIMEOUT: 504,
    Cause.WRITE_TIMEOUT: 504,
    Cause.FIRST_BYTE_TIMEOUT: 504,
    Cause.STALLED: 504,
    Cause.ANSWER_TIMEOUT: 504,
    Cause.CLIENT_DEADLINE: 504,
    Cause.CLIENT_TOO_SLOW: 408,
    Cause.NO_CONNECTION: 503,
    Cause.SHUTDOWN: 503,
    Cause.GATEWAY_FAULT: 500,
}


class ForwardingError(Exception):
    """A request could not be forwarded, or its answer not be had whole.

    Attributes:
        cause: why, for breaker, log and metric.
        message: one sentence for the caller.
        status: of the answer that says so.
        reason: a word for it where the gateway itself refused.
    """

    def __init__(self, cause: Cause, message: str, *, status: int | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.cause = cause
        self.message = message
        self.status = STATUS_OF.get(cause, 502) if status is None else status
        self.reason = reason


def error_body(status: int, message: str, correlation_id: str = "", **fields: Any) -> bytes:
    """The JSON of an error: type by status, message, correlation ID, and whatever helps the caller act."""
    error = {"type": TYPES[status], "message": message, "correlation_id": correlation_id, **fields}
    return orjson.dumps({"error": error})


async def answer(
    scope: Scope,
    send: Send,
    status: int,
    message: str,
    *,
    retry_after: int | None = None,
    headers: Iterable[Header] = (),
    **fields: Any,
) -> None:
    """Refuse a request, or a WebSocket before its handshake, in the gateway's error form.

    Args:
        scope: of the request; its context gives the correlation ID.
        send: the ASGI callable to answer through.
        status: one of ``TYPES``.
        message: one sentence for a person.
        retry_after: whole seconds after which to come back; sent as ``Retry-After`` and as a field.
        headers: further ones.
        fields: further fields of the error, such as ``reason``.
    """
    extra = list(headers)
    if retry_after is not None:
        extra.append((b"retry-after", str(retry_after).encode()))
        fields["retry_after"] = retry_after
    body = error_body(status, message, RequestContext.of(scope).correlation_id, **fields)
    await answer_json(scope, send, status, body, extra)


async def answer_json(
    scope: Scope, send: Send, status: int, body: bytes | Mapping[str, Any], headers: Iterable[Header] = ()
) -> None:
    """Answer with JSON: an HTTP answer, or the denial of a WebSocket's handshake where the server can send one."""
    if not isinstance(body, bytes):
        body = orjson.dumps(body)
    kind = "http.response"
    if scope["type"] == "websocket":
        kind = "websocket.http.response"
        if kind not in (scope.get("extensions") or {}):
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
    start: Message = {
        "type": f"{kind}.start",
        "status": status,
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *headers,
        ],
    }
    await send(start)
    await send({"type": f"{kind}.body", "body": body, "more_body": False})
