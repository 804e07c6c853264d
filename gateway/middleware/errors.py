"""Unexpected errors: an answer without detail for the client, a traceback in the log for us."""

import logging
from collections.abc import Awaitable
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext
from gateway.problems import answer

logger = logging.getLogger("gateway.errors")
MESSAGE = "An unexpected error occurred"
INTERNAL_ERROR = 1011  # "a server is terminating the connection because it encountered an unexpected condition"


class ErrorsASGI:
    """Turn what an application raises into a 500 in the gateway's error form, or a cut connection once it has begun.

    Each error is logged once, with its traceback, by the logger ``gateway.errors``. ``ConnectionAbortedError`` passes
    unlogged: it is how an application asks for its connection to be cut.

    Args:
        app: the ASGI application to wrap.

    Raises:
        ConnectionAbortedError: from the error that came after the answer had begun, for the server to cut it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await self._over_websocket(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return

        scope, context = _with_context(scope)
        response_started = response_complete = False

        def send_noted(message: Message) -> Awaitable[None]:
            nonlocal response_started, response_complete
            response_started = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                response_complete = True
            return send(message)

        try:
            await self.app(scope, receive, send_noted)
        except ConnectionAbortedError:
            raise
        except Exception as error:
            self._log(scope, context, error)
            if response_complete:  # the client has its answer; what failed came behind it
                return
            context.cause = Cause.GATEWAY_FAULT
            if response_started:
                raise ConnectionAbortedError(MESSAGE) from error
            await answer(scope, send, 500, MESSAGE)

    async def _over_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope, context = _with_context(scope)
        accepted = refused = closed = False

        async def receive_noted() -> Message:
            nonlocal closed
            message = await receive()
            if message["type"] == "websocket.disconnect":
                closed = True
            return message

        async def send_noted(message: Message) -> None:
            nonlocal accepted, refused, closed
            kind = message["type"]
            if kind == "websocket.accept":
                accepted = True
            elif kind == "websocket.http.response.start":
                refused = True
            elif kind == "websocket.close" or (refused and not message.get("more_body", False)):
                closed = True
            await send(message)

        try:
            await self.app(scope, receive_noted, send_noted)
        except ConnectionAbortedError:
            raise
        except Exception as error:
            self._log(scope, context, error)
            if closed:
                return
            context.cause = Cause.GATEWAY_FAULT
            if refused:  # half a refusal
                raise ConnectionAbortedError(MESSAGE) from error
            if not accepted:
                await answer(scope, send, 500, MESSAGE)
                return
            with suppress(OSError, RuntimeError):  # the peer may be gone already, and the server may say so
                await send({"type": "websocket.close", "code": INTERNAL_ERROR, "reason": ""})

    def _log(self, scope: Scope, context: RequestContext, error: Exception) -> None:
        logger.error(
            "%s in %s %r",
            type(error).__name__,
            scope.get("method", "WebSocket"),
            scope["path"],
            exc_info=error,
            extra={"correlation_id": context.correlation_id or None},
        )


def _with_context(scope: Scope) -> tuple[Scope, RequestContext]:
    context: RequestContext | None = scope.get(KEY)
    if context is not None:
        return scope, context
    context = RequestContext()
    return {**scope, KEY: context}, context
