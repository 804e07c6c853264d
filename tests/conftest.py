"""What all tests share: one event loop backend, and (as fixtures) real servers on loopback."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from gateway.circuit_breaker import CircuitBreakerRegistry, circuit_breaker_registry
from gateway.server import protocol, worker
from tests.clocks import FakeClock
from tests.proxy_rig import CLIENT
from tests.wire import reserved_port

# How long an example takes says how busy the machine is, no more: a pause of 200 ms would fail a test that is right.
settings.register_profile(
    "untimed",
    settings.get_profile(settings.get_current_profile_name()),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("untimed")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that leaves grants a tenth of the time that it else would, where no setting says how much."""
    monkeypatch.setattr(protocol, "GRACE", protocol.GRACE / 10)
    monkeypatch.setattr(worker, "LAST_WORDS", worker.LAST_WORDS / 10)


@pytest.fixture(params=["http1", "httpx"])
def either_client(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests of what holds whichever client the proxy has."""
    token = CLIENT.set(request.param)
    yield
    CLIENT.reset(token)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def registry() -> Iterator[CircuitBreakerRegistry]:
    """Of breakers, which is one for the whole process; afterwards it holds what it held before."""
    before = {name: circuit_breaker_registry.get(name) for name in circuit_breaker_registry.names()}
    yield circuit_breaker_registry
    circuit_breaker_registry.replace_all({name: breaker for name, breaker in before.items() if breaker})


@pytest.fixture
def port() -> Iterator[int]:
    """Of 127.0.0.1, reserved for this test: see ``reserved_port``."""
    with reserved_port() as port:
        yield port
