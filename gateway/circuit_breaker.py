"""Circuit breakers from Python: how they are configured, and the registry of those at work in this process."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway.policies.circuit_breaker import CircuitBreaker, CircuitBreakerConfig

__all__ = ["CircuitBreakerConfig", "CircuitBreakerRegistry", "UnknownBreakerError", "circuit_breaker_registry"]


class UnknownBreakerError(KeyError):
    """There is no breaker of that name in this process. Says which there are, or how to reach those elsewhere."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:  # a KeyError would show it in quotes
        return self.message


class CircuitBreakerRegistry:
    """The circuit breakers of this process by name.

    Args:
        clock: the monotonic clock, in seconds, that the breakers are used with.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._breakers: dict[str, CircuitBreaker] = {}

    def register(self, breaker: CircuitBreaker) -> None:
        """Add a breaker, in place of one of the same name."""
        self._breakers[breaker.name] = breaker

    def replace_all(self, breakers: Mapping[str, CircuitBreaker]) -> None:
        """Hold these and no others: the breakers of the application that was created last."""
        self._breakers = dict(breakers)

    def get(self, name: str) -> CircuitBreaker | None:
        """The breaker of that name, or None."""
        return self._breakers.get(name)

    def names(self) -> list[str]:
        """The names of all breakers, in the order in which they were registered."""
        return list(self._breakers)

    def reset_breaker(self, name: str) -> None:
        """Close a breaker by hand, forgetting what it has seen; calls in flight have no say in it any more.

        Raises:
            UnknownBreakerError: no breaker in this process has that name.
        """
        breaker = self._breakers.get(name)
        if breaker is None:
            raise UnknownBreakerError(self._unknown(name))
        breaker.reset(self.clock())

    def status(self) -> dict[str, dict[str, Any]]:
        """Every breaker's state and counts by name, as ``GET /circuit-breakers`` shows them (SPEC.md, 5)."""
        now = self.clock()
        return {name: breaker.status(now) for name, breaker in self._breakers.items()}

    def _unknown(self, name: str) -> str:
        if self._breakers:
            return f"there is no circuit breaker {name!r}; there are {', '.join(self._breakers)}"
        return (
            "no circuit breaker is registered in this process: to reset one in a running gateway, send it "
            f"POST /circuit-breakers/{name}/reset with the header 'Authorization: Bearer' and its ADMIN_TOKEN"
        )


circuit_breaker_registry = CircuitBreakerRegistry()
