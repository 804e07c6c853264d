"""Admission: a bound on the requests in flight, so that a wave costs the callers beyond it one quick 503."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import Cause, RequestContext
from gateway.problems import answer


class AdmissionASGI:
    """Refuse what is beyond the bound at once, its body unread (RESILIENCE.md, 6).

    Args:
        app: the ASGI application to wrap.
        max_in_flight: requests and WebSockets at a time.
        service_max_in_flight: the same for a service by name, so that one slow service can't take all places.
        retry_after: whole seconds after which a refused caller may come back.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_in_flight: int = 1000,
        service_max_in_flight: Mapping[str, int] | None = None,
        retry_after: int = 1,
    ) -> None:
        self.app = app
        self.max_in_flight = max_in_flight
        self.service_max_in_flight = dict(service_max_in_flight or {})
        self.retry_after = retry_after
        self.in_flight = 0
        self._service_in_flight = dict.fromkeys(self.service_max_in_flight, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        if self.in_flight >= self.max_in_flight:
            await self._refuse(scope, send, "The gateway is at its limit of requests in flight", "full")
            return
        bounded = self._bounded_service(scope) if self.service_max_in_flight else None
        if bounded is not None:
            if self._service_in_flight[bounded] >= self.service_max_in_flight[bounded]:
                message = f"Service '{bounded}' is at its limit of requests in flight"
                await self._refuse(scope, send, message, "service_full")
                return
            self._service_in_flight[bounded] += 1
        self.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1
            if bounded is not None:
                self._service_in_flight[bounded] -= 1

    def _bounded_service(self, scope: Scope) -> str | None:
        """The name of the request's service, where that has a bound of its own."""
        service = RequestContext.of(scope).service
        return service.name if service is not None and service.name in self.service_max_in_flight else None

    async def _refuse(self, scope: Scope, send: Send, message: str, reason: str) -> None:
        context = RequestContext.of(scope)
        context.cause, context.reason = Cause.REFUSED, reason
        await answer(scope, send, 503, message, retry_after=self.retry_after, reason=reason)
