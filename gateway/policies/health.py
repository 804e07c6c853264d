"""Whether the gateway is well, and fit to be sent requests, from what was last seen of it."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from gateway.policies.timestamps import timestamp


class Phase(StrEnum):
    """Where the process is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"


class Check(StrEnum):
    """What was last seen of a part that the gateway can go on without."""

    OK = "ok"
    ERROR = "error"
    DISABLED = "disabled"


class Health:
    """The gateway's health, in the form of SPEC.md, 7.

    Only starting and draining make it unfit. A dead optional part makes it ``degraded`` and still 200: the gateway goes
    on without it, and Kubernetes must not kill it for that.

    Args:
        enabled: the parts that are checked; each is in error until it was seen.
        parts: all that are named in a report.
        service: the name in a report.
    """

    def __init__(
        self, enabled: Iterable[str] = (), *, parts: Iterable[str] = ("redis", "qdrant"), service: str = "api_gateway"
    ) -> None:
        self.phase = Phase.STARTING
        self.service = service
        self.checks = dict.fromkeys(parts, Check.DISABLED) | dict.fromkeys(enabled, Check.ERROR)

    def serve(self) -> None:
        """Starting is over; a gateway that drains already goes on draining."""
        if self.phase is Phase.STARTING:
            self.phase = Phase.SERVING

    def drain(self) -> None:
        """Ask to be sent no more requests."""
        self.phase = Phase.DRAINING

    def saw(self, part: str, well: bool) -> None:
        """Note what a check saw."""
        self.checks[part] = Check.OK if well else Check.ERROR

    @property
    def status(self) -> str:
        """``healthy``, ``degraded``, ``starting`` or ``draining``."""
        if self.phase is not Phase.SERVING:
            return self.phase
        return "degraded" if Check.ERROR in self.checks.values() else "healthy"

    def report(self, now: float) -> tuple[int, dict[str, Any]]:
        """Whether to send requests here: the HTTP status and the body.

        Args:
            now: seconds since 1970.
        """
        return 200 if self.phase is Phase.SERVING else 503, self._body(now)

    def liveness(self, now: float) -> tuple[int, dict[str, Any]]:
        """Whether to let the process live: always, for one that can't answer won't."""
        return 200, self._body(now)

    def _body(self, now: float) -> dict[str, Any]:
        return {
            "status": self.status,
            "timestamp": timestamp(int(now)),
            "service": self.service,
            "checks": dict(self.checks),
        }
