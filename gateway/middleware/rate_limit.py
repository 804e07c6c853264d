"""Rate limits: each caller its tokens, every answer saying what is left, and a refusal that says when to come back."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import KEY, Cause, Header, RequestContext, field_lines, fields_of
from gateway.policies.callers import LOCAL_PEERS, TrustedProxies, identify
from gateway.policies.token_bucket import CLOSED, LOCAL, NORMAL, OPEN, Decision, Limits
from gateway.problems import answer, answer_json
from gateway.watch import Watch

OURS = frozenset(
    {b"ratelimit", b"ratelimit-policy", b"x-ratelimit-mode"}
    | {
        b"x-ratelimit-%b-%b" % (what, per)
        for what in (b"limit", b"remaining", b"reset")
        for per in (b"minute", b"hour")
    }
)
# As applications spell them that do not mind ASGI, which has names in lower case: cheaper than to lower each name.
SPELLINGS = OURS.union(
    *({name.title().replace(b"Ratelimit", b"RateLimit"), name.title(), name.upper()} for name in OURS)
)
log = logging.getLogger("gateway.rate_limit")


class Limiter(Protocol):
    """What keeps the buckets."""

    def take(self, key: str, limits: Limits, cost: int, on_failure: str) -> Decision | Awaitable[Decision]:
        """Take ``cost`` tokens for ``key``, or none, at once or when awaited.

        ``on_failure`` is ``local``, ``open`` or ``closed``.
        """
        ...


class RateLimitASGI:
    """Limit each caller to so many requests a minute and an hour, in bursts of up to the whole limit.

    A caller is the user a trusted proxy names in ``X-User-ID``, else the client's address. A CORS preflight takes no
    token, a WebSocket takes one at its handshake. Beyond the limit: 429, and ``Retry-After`` is true.

    Args:
        app: the ASGI application to wrap.
        per_minute: requests; None: no such limit, 0: none pass.
        per_hour: the same.
        limiter: keeps the buckets; by default this process's memory.
        service_limits: by service name, limits with buckets of their own in place of the common ones.
        trusted_proxies: addresses, networks, ``unix``: who may say for whom a request is.
        on_redis_failure: what a limiter that has lost its store does: ``local``, ``open``, or ``closed`` (503).
        service_on_redis_failure: the same, by service name.
        exceeded: called with the caller at each 429.

    Raises:
        ValueError: a limit is negative or too large to be counted exactly, an entry of ``trusted_proxies`` is no
            address, or a way to fail is not one of the three.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        per_minute: int | None = 60,
        per_hour: int | None = 1000,
        limiter: Limiter | None = None,
        service_limits: Mapping[str, Limits] | None = None,
        trusted_proxies: Iterable[str] = LOCAL_PEERS,
        on_redis_failure: str = LOCAL,
        service_on_redis_failure: Mapping[str, str] | None = None,
        exceeded: Callable[[str], None] = lambda caller: None,
    ) -> None:
        self.app = app
        if limiter is None:
            from gateway.backends.memory import MemoryLimiter

            limiter = MemoryLimiter()
        self.limiter = limiter
        self.exceeded = exceeded
        self._trusted = TrustedProxies(trusted_proxies)
        self._warned = False

        common = Limits.of(per_minute, per_hour)
        limits, failing = service_limits or {}, service_on_redis_failure or {}
        self._common = _Plan("", common, on_redis_failure)
        self._plans = {
            name: _Plan(
                f"{name}|" if name in limits else "", limits.get(name, common), failing.get(name, on_redis_failure)
            )
            for name in {*limits, *failing}
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        if context is None or not context.watched:
            context, scope, receive, send = Watch.over(scope, receive, send)
        headers, client = scope["headers"], scope.get("client")
        identity = identify(headers, client[0] if client else None, self._trusted)
        context.caller = caller = identity.caller
        context.client_address = identity.address
        if identity.ignored and not self._warned:
            self._warn(identity.ignored, identity.address)
        if identity.user_id_is_false:
            scope = {**scope, "headers": [header for header in headers if header[0] != b"x-user-id"]}

        service = context.service
        plan = self._common if service is None else self._plans.get(service.name, self._common)
        if plan.is_off:
            await self.app(scope, receive, send)
            return

        cost = 0 if scope.get("method") == "OPTIONS" and _is_preflight(headers) else 1
        taken = self.limiter.take(plan.prefix + caller, plan.limits, cost, plan.on_failure)
        decision = taken if isinstance(taken, Decision) else await taken
        lines = plan.lines(decision)
        if not decision.admitted:
            await self._refuse(scope, send, context, plan, decision, fields_of(lines))
            return

        context.add(lines, SPELLINGS)
        await self.app(scope, receive, send)

    async def _refuse(
        self,
        scope: Scope,
        send: Send,
        context: RequestContext,
        plan: "_Plan",
        decision: Decision,
        fields: list[Header],
    ) -> None:
        context.cause = Cause.REFUSED
        retry_after = decision.retry_after
        if decision.mode == CLOSED:
            context.reason = "limiter_unavailable"
            message = "The rate limiter is unavailable"
            await answer(
                scope, send, 503, message, retry_after=retry_after, headers=fields, reason="limiter_unavailable"
            )
            return
        context.reason = "rate_limited"
        self.exceeded(context.caller)
        if retry_after is not None:
            fields = [*fields, (b"retry-after", b"%d" % retry_after)]
        await answer_json(scope, send, 429, plan.refusal(retry_after), fields)

    def _warn(self, ignored: bytes, peer: str) -> None:
        self._warned = True
        log.warning(
            "Ignored %s from %s, which is not among TRUSTED_PROXIES: add it there if it is a proxy of yours "
            "(said once; later ones are ignored in silence)",
            ignored.decode(),
            peer,
        )


class _Plan:
    """What one service's requests are held to, and the parts of their headers that never change."""

    def __init__(self, prefix: str, limits: Limits, on_failure: str) -> None:
        if on_failure not in (LOCAL, OPEN, CLOSED):
            raise ValueError(f"{on_failure!r} is not one of local, open, closed")
        self.prefix = prefix
        self.limits = limits
        self.on_failure = on_failure
        minute, hour = limits.minute, limits.hour
        self.is_off = minute is None and hour is None

        fixed: list[Header] = []
        policies, forms, standings = [], [], []  # figures of a decision go into the latter two
        names: list[str] = []
        for name, limit in (("minute", minute), ("hour", hour)):
            if limit is not None:
                tail = name.encode()
                fixed.append((b"x-ratelimit-limit-" + tail, b"%d" % limit.tokens))
                policies.append(b'"%b";q=%d;w=%d' % (tail, limit.tokens, limit.period_us // 1_000_000))
                forms += [(b"x-ratelimit-remaining-" + tail, b"%d"), (b"x-ratelimit-reset-" + tail, b"%d")]
                standings.append(b'"%b";r=%%d;t=%%d' % tail)
                names += [f"remaining_{name}", f"reset_{name}"]
        names += [name.replace("reset", "full") for name in names]
        fixed.append((b"ratelimit-policy", b", ".join(policies)))
        forms.append((b"ratelimit", b", ".join(standings)))
        self._form = field_lines(fixed) + field_lines(forms)
        self._figures = attrgetter(*names) if names else None
        self._refusal = (
            b'{"detail": {"error": "Rate limit exceeded", "limit_per_minute": %b, "limit_per_hour": %b, "retry_after": '
            % tuple(b"null" if limit is None else b"%d" % limit.tokens for limit in (minute, hour))
        )

    def lines(self, decision: Decision) -> bytes:
        """The header lines that tell a caller where it stands."""
        assert self._figures is not None
        lines = self._form % self._figures(decision)
        if decision.mode != NORMAL:
            lines += field_lines([(b"x-ratelimit-mode", decision.mode.encode())])
        return lines

    def refusal(self, retry_after: int | None) -> bytes:
        return self._refusal + (b"null}}" if retry_after is None else b"%d}}" % retry_after)


def _is_preflight(headers: Iterable[Sequence[bytes]]) -> bool:
    """A CORS preflight (Fetch standard): a browser's question, not the caller's request."""
    names = {name for name, _ in headers}
    return b"origin" in names and b"access-control-request-method" in names
