"""How the gateway writes a moment: RFC 3339, UTC, whole seconds, in logs and health reports alike."""

from functools import lru_cache
from time import gmtime, strftime


@lru_cache(maxsize=4)
def timestamp(second: int) -> str:
    """``2025-11-27T10:30:00Z`` for a Unix time in whole seconds; a second's many log lines share one string."""
    return strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(second))
