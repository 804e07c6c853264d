"""What the gateway keeps for one service while it runs: connections to its replicas, and what is known of them."""

import ssl
from collections.abc import Callable
from functools import cache

from gateway.policies.replicas import Replicas
from gateway.policies.retry import RetryBudget
from gateway.policies.services import Service
from gateway.proxy.pool import Address, ConnectionPool
from gateway.proxy.timers import TimerWheel


class Route:
    """One service's replicas, the connections to each, and its budget for retries.

    Args:
        service: the service.
        wheel: the deadlines of all requests on the running event loop.
        max_connections: to each replica.
        random: what the choice among replicas and the back-off draw from: numbers from 0 up to 1.
    """

    def __init__(
        self, service: Service, *, wheel: TimerWheel, max_connections: int, random: Callable[[], float]
    ) -> None:
        self.service = service
        self.wheel = wheel
        self.loop = wheel.loop
        self.random = random
        self.replicas = Replicas(service.replicas, random)
        self.budget = RetryBudget()
        self.tls = tls_context(service.ca_file) if any(url.startswith("https:") for url in service.replicas) else None
        limit = min(max_connections, service.max_in_flight or max_connections)
        self.pools = {url: ConnectionPool(Address.parse(url), limit=limit, tls=self.tls) for url in service.replicas}

    @property
    def open_connections(self) -> int:
        """Over all replicas."""
        return sum(pool.open for pool in self.pools.values())

    def close(self) -> None:
        """Close the connections that wait for a request."""
        for pool in self.pools.values():
            pool.close_idle()


@cache
def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """TLS as it should be: verified against the system's certificates, or those in ``ca_file``."""
    return ssl.create_default_context(cafile=ca_file)
