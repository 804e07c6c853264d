"""Byte strings that nearly make sense; and, as a program, the tests in ``test_fuzz_*.py`` for as long as one likes.

``python -m tests.fuzz [NAME ...]`` runs each of them, or those whose names have one of these words in them, for
``FUZZ_SECONDS`` (60), says how far it is, and ends at the first falsifying example, with status 1.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ROUND = 500  # inputs
PIECES = [
    *(b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\0", b" ", b"\t", b"\x0b", b"\x7f", b"\x80", b"\xff", b"\xc3\xa9"),
    *(b":", b",", b";", b"=", b'"', b"/", b"?", b"#", b"@", b"[", b"]", b"\\", b"%", b"%2e", b"%00", b"..", b"_", b"-"),
    *(b"0", b"5", b"00", b"+", b"0x", b"f" * 15, b"9" * 18, b"9" * 19, b"a" * 40, b"\r\n ", b"0\r\n\r\n", b"5;a=b\r\n"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"http://", b"chunked", b"close", b"keep-alive", b"upgrade", b"websocket"),
    *(b"Content-Length: 5\r\n", b"Content-Length: 05\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n"),
    *(b"Host: a\r\n", b"Connection: x, host\r\n", b"Expect: 100-continue\r\n", b"Via: 1.1 a\r\n", b"X_User_ID: a\r\n"),
]


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, changed in up to four places."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        to = min(len(data), at + draw(st.integers(0, 12)))
        change = draw(st.integers(0, 4))
        if change == 0:
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[at:]
        elif change == 1:
            data = data[:at] + draw(st.sampled_from(PIECES)) + data[to:]
        elif change == 2:
            data = data[:at] + data[to:]
        elif change == 3:
            data = data[:to] + data[at:]  # what is between comes twice
        else:
            data = data[:at] + draw(st.binary(max_size=3)) + data[at + 1 :]
    return data


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The pieces of ``data`` between these places, wherever they are; none is empty."""
    if not data:
        return []
    inside = sorted({place % len(data) for place in places} | {0})
    return [data[at:to] for at, to in zip(inside, [*inside[1:], len(data)], strict=True)]


class Difference(NamedTuple):
    """What another reader does with bytes that we accept, why that is no hole of ours, and how to know such bytes."""

    reader: str
    does: str
    why: str
    example: bytes
    known: Callable[[bytes], object]


PLACES = st.lists(st.integers(0, 100_000), max_size=6)


def targets() -> Iterator[tuple[str, Any]]:
    """The property tests, by module and name."""
    for path in sorted(Path(__file__).parent.glob("test_fuzz_*.py")):
        module = import_module(f"tests.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_") and getattr(test, "is_hypothesis_test", False):
                yield f"{path.stem}::{name}", test


def say(words: str, end: str = "\n") -> None:
    sys.stdout.write(words + end)
    sys.stdout.flush()


def run(name: str, test: Any, seconds: float) -> bool:
    """Run one test with new inputs for so long; whether it held."""
    tried = 0
    inner = test.hypothesis.inner_test

    @wraps(inner)
    def counted(*args: Any, **kwargs: Any) -> None:
        nonlocal tried
        tried += 1
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counted
    begun = told = monotonic()
    while (now := monotonic()) < begun + seconds:
        if now > told + 5 or tried == 0:
            say(f"{name}: {tried:,} inputs in {now - begun:.0f} s")
            told = now
        try:
            test()
        except Exception as error:  # whatever it is, it falsifies
            say(f"{name}: FALSIFIED")
            traceback.print_exception(error)
            return False
    say(f"{name}: {tried:,} inputs in {monotonic() - begun:.0f} s, none falsifies it")
    return True


def main(words: Sequence[str], seconds: float) -> int:
    settings.register_profile(
        "fuzz", max_examples=ROUND, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    settings.load_profile("fuzz")  # before the tests are imported
    chosen = [(name, test) for name, test in targets() if not words or any(word in name for word in words)]
    return 0 if chosen and all(run(name, test, seconds) for name, test in chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], float(os.environ.get("FUZZ_SECONDS") or 60)))
