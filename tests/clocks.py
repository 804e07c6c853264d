"""Clocks that stand still until they are told to go on."""


class FakeClock:
    """In seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeMicroseconds:
    """In microseconds of Unix time."""

    def __init__(self, now: int = 1_764_239_400_000_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += round(seconds * 1_000_000)
