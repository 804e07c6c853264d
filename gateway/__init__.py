"""An API gateway for AI services: a stack of raw ASGI layers, each of which also works alone.

The names below load what they need at first use, so that embedding one layer costs no more than that layer.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gateway.app import create_app as create_app
    from gateway.circuit_breaker import circuit_breaker_registry as circuit_breaker_registry
    from gateway.middleware.access_log import LoggingASGI as LoggingASGI
    from gateway.middleware.admission import AdmissionASGI as AdmissionASGI
    from gateway.middleware.breaker import BreakerASGI as BreakerASGI
    from gateway.middleware.correlation import CorrelationASGI as CorrelationASGI
    from gateway.middleware.errors import ErrorsASGI as ErrorsASGI
    from gateway.middleware.metrics import MetricsASGI as MetricsASGI
    from gateway.middleware.rate_limit import RateLimitASGI as RateLimitASGI
    from gateway.middleware.system import SystemASGI as SystemASGI
    from gateway.policies.circuit_breaker import CircuitBreakerConfig as CircuitBreakerConfig
    from gateway.proxy.app import ProxyApp as ProxyApp
    from gateway.settings import Settings as Settings

_HOMES = {
    "AdmissionASGI": "gateway.middleware.admission",
    "BreakerASGI": "gateway.middleware.breaker",
    "CircuitBreakerConfig": "gateway.policies.circuit_breaker",
    "CorrelationASGI": "gateway.middleware.correlation",
    "ErrorsASGI": "gateway.middleware.errors",
    "LoggingASGI": "gateway.middleware.access_log",
    "MetricsASGI": "gateway.middleware.metrics",
    "ProxyApp": "gateway.proxy.app",
    "RateLimitASGI": "gateway.middleware.rate_limit",
    "Settings": "gateway.settings",
    "SystemASGI": "gateway.middleware.system",
    "circuit_breaker_registry": "gateway.circuit_breaker",
    "create_app": "gateway.app",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
