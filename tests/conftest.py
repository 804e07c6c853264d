"""What all tests share: one event loop backend, and (as fixtures) real servers on loopback."""

import pytest
from hypothesis import HealthCheck, settings

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
