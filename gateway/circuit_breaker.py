"""Circuit breakers from Python: how they are configured, and the registry of those at work in this process."""

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gateway.policies.circuit_breaker import CircuitBreaker, CircuitBreakerConfig

LONGEST_REASON = 200  # characters
logger = logging.getLogger("gateway")

__all__ = ["CircuitBreakerConfig", "CircuitBreakerRegistry", "UnknownBreakerError", "circuit_breaker_registry"]


class UnknownBreakerError(KeyError):
    """There is no breaker of that name in this process. Says which there are, or how to reach those elsewhere."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:  # a KeyError would show it in quotes
        return self.message


class Peers(Protocol):
    """The same breakers in other processes."""

    def tell_reset(self, service: str, *, by: str, reason: str) -> None: ...


class CircuitBreakerRegistry:
    """The circuit breakers of this process by name.

    Args:
        clock: the monotonic clock, in seconds, that the breakers are used with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._breakers: dict[str, CircuitBreaker] = {}
        self._peers: Peers | None = None

    def register(self, breaker: CircuitBreaker) -> None:
        """Add a breaker, in place of one of the same name."""
        self._breakers[breaker.name] = breaker

    def replace_all(self, breakers: Mapping[str, CircuitBreaker], peers: Peers | None = None) -> None:
        """Hold these and no others: the breakers of the application that was created last, and who else has them."""
        self._breakers = dict(breakers)
        self._peers = peers

    def get(self, name: str) -> CircuitBreaker | None:
        """The breaker of that name, or None."""
        return self._breakers.get(name)

    def names(self) -> list[str]:
        """The names of all breakers, in the order in which they were registered."""
        return list(self._breakers)

    def reset_breaker(self, name: str, *, reason: str = "", by: str = "") -> None:
        """Close a breaker by hand, forgetting what it has seen; calls in flight have no say in it any more.

        With Redis that reaches every worker and pod of the gateway. A process that has no such breaker, and is none of
        the gateway's own, reaches them too where ``REDIS_URL`` is set; that may take a few seconds.

        Args:
            name: of the breaker.
            reason: for the log of each worker, printable and at most 200 characters.
            by: who resets it, likewise; this process if empty.

        Raises:
            UnknownBreakerError: no breaker has that name.
            ConnectionError: Redis, or the gateway through it, did not answer.
            SettingsError: of a process that would go through Redis, the settings have mistakes.
            ValueError: the reason is too long or not printable.
        """
        check_reason(reason)
        by = check_reason(by) or this_process("python")
        breaker = self._breakers.get(name)
        if breaker is not None:
            reset_by_hand(breaker, self.clock(), by=by, reason=reason)
            if self._peers is not None:
                self._peers.tell_reset(name, by=by, reason=reason)
        elif self._peers is not None or not _reset_elsewhere(name, by, reason):
            raise UnknownBreakerError(self._unknown(name))

    def status(self) -> dict[str, dict[str, Any]]:
        """Every breaker's state and counts by name, as ``GET /circuit-breakers`` shows them (SPEC.md, 5)."""
        now = self.clock()
        return {name: breaker.status(now) for name, breaker in self._breakers.items()}

    def _unknown(self, name: str) -> str:
        if self._breakers:
            return f"there is no circuit breaker {name!r}; there are {', '.join(self._breakers)}"
        return (
            "no circuit breaker is registered in this process: to reset one in a running gateway, set REDIS_URL, or "
            f"send it POST /circuit-breakers/{name}/reset with the header 'Authorization: Bearer' and its ADMIN_TOKEN"
        )


def check_reason(reason: str) -> str:
    """The same text, fit for a log.

    Raises:
        ValueError: it is longer than 200 characters, or one of them is not printable.
    """
    if len(reason) > LONGEST_REASON or not reason.isprintable():
        raise ValueError(f"a reason has at most {LONGEST_REASON} characters, and no control characters")
    return reason


def this_process(kind: str) -> str:
    """Who resets a breaker, for the log."""
    return f"{kind}, pid {os.getpid()} at {socket.gethostname()}"


def reset_by_hand(breaker: CircuitBreaker, now: float, *, by: str, reason: str) -> None:
    """Reset a breaker, and log who did and why."""
    state = breaker.state(now)
    breaker.reset(now)
    why = f": {reason}" if reason else ""
    logger.info(
        "Circuit breaker '%s', %s, was reset by %s%s", breaker.name, state, by, why, extra={"service": breaker.name}
    )


def _reset_elsewhere(name: str, by: str, reason: str) -> bool:
    """Reset a breaker of a gateway that this process is none of; False where the settings name no Redis."""
    from gateway.settings import Settings  # only here: layers that use the registry load neither

    settings = Settings.from_environment()
    if settings.redis_url is None:
        return False
    from gateway.backends.fleet import reset_through_redis

    reset_through_redis(settings.redis_url, settings.redis_key_prefix, name, by=by, reason=reason)
    return True


circuit_breaker_registry = CircuitBreakerRegistry()
