"""What all tests share: one event loop backend, and (as fixtures) real servers on loopback."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
