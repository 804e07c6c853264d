"""Unexpected errors: an answer without detail for the client, a traceback in the log for us."""

import logging
from contextlib import suppress

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext
from gateway.problems import answer
from gateway.watch import Watch

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
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        if context is None or not context.watched:
            context, scope, receive, send = Watch.over(scope, receive, send)
        try:
            await self.app(scope, receive, send)
        except ConnectionAbortedError:
            raise
        except Exception as error:
            _log(scope, context, error)
            is_websocket = scope["type"] == "websocket"
            if context.whole or (is_websocket and context.client_left):
                return  # the client has its answer; what failed came behind it
            context.cause = Cause.GATEWAY_FAULT
            if context.answered_at is None:
                await answer(scope, send, 500, MESSAGE)
            elif is_websocket and context.status == 101:
                with suppress(OSError, RuntimeError):  # the peer may be gone already, and the server may say so
                    await send({"type": "websocket.close", "code": INTERNAL_ERROR, "reason": ""})
            else:
                aborted = ConnectionAbortedError(MESSAGE)
                aborted.__cause__ = error  # compiled, `from` alone would lose it
                raise aborted from error


def _log(scope: Scope, context: RequestContext, error: Exception) -> None:
    logger.error(
        "%s in %s %r",
        type(error).__name__,
        scope.get("method", "WebSocket"),
        scope["path"],
        exc_info=error,
        extra={"correlation_id": context.correlation_id or None},
    )
