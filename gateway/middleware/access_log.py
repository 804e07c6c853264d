"""The access log: one line a request, written when it has ended, the aborted and the refused included."""

from collections.abc import Callable, Collection
from functools import partial
from time import monotonic, time
from typing import Any

import orjson
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import Cause
from gateway.policies.timestamps import timestamp
from gateway.watch import Watch

PROBES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
COMPLETED = Cause.COMPLETED
LEVELS = {"TRACE": 5, "DEBUG": 10, "INFO": 20, "SUCCESS": 25, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
LONGEST_PATH = 1024  # a line must stay below the 4,096 bytes that a pipe takes whole
LONGEST_METHOD = 32
OPTIONAL = ("service", "caller", "client", "attempts", "replica", "bytes_in", "bytes_out")  # not written where empty
COLOURS = {"DEBUG": 36, "INFO": 32, "WARNING": 33, "ERROR": 31}
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


class LoggingASGI:
    """Write one line for each request and WebSocket when it has ended (SPEC.md, 7); never a body, key, token or query.

    The level is ERROR where the answer was a 5xx, WARNING where the client got less than a whole one, else INFO.

    Args:
        app: the ASGI application to wrap.
        sink: takes each line, its newline included; must neither wait nor raise. None: standard output, buffered.
        json: lines of JSON; else for people.
        colour: colour the lines for people.
        level: the least to write, by name.
        quiet_paths: paths of which only failures are written, and the rest at level DEBUG.
        clock: seconds, monotonic.
        now: seconds since 1970.

    Raises:
        ValueError: no such level.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        sink: Callable[[bytes], None] | None = None,
        json: bool = True,
        colour: bool = False,
        level: str = "INFO",
        quiet_paths: Collection[str] = PROBES,
        clock: Callable[[], float] = monotonic,
        now: Callable[[], float] = time,
    ) -> None:
        if level.upper() not in LEVELS:
            raise ValueError(f"No such log level: {level}")
        if sink is None:
            from gateway.backends.log_sink import standard_output

            sink = standard_output().write
        self.app = app
        self.sink = sink
        self.line: Callable[[dict[str, Any]], bytes] = _json if json else partial(_text, colour=colour)
        self.left_out = frozenset(name for name, number in LEVELS.items() if number < LEVELS[level.upper()])
        self.quiet_paths = frozenset(quiet_paths)
        self.clock = clock
        self.now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        watch, inner, receive, send = Watch.over(scope, receive, send, self.clock)
        try:
            await self.app(inner, receive, send)
        except BaseException as error:
            watch.ended(error)
            raise
        else:
            watch.ended()
        finally:
            self._log(scope, watch)

    def _log(self, scope: Scope, watch: Watch) -> None:
        status = watch.status
        if status >= 500:
            level = "ERROR"
        elif watch.cut_short:
            level = "WARNING"
        elif status < 400 and scope["path"] in self.quiet_paths:
            level = "DEBUG"
        else:
            level = "INFO"
        if level in self.left_out:
            return

        context = watch.context
        service = context.service
        bytes_in = watch.bytes_in
        bytes_out = watch.bytes_out
        fields: dict[str, Any] = {  # all at once: a field put in by itself costs three times as much
            "timestamp": timestamp(int(self.now())),
            "level": level,
            "message": "Request completed",
            "correlation_id": context.correlation_id,
            "method": scope.get("method", "GET")[:LONGEST_METHOD],  # a WebSocket's handshake is a GET
            "path": _path(scope),
            "status_code": status,
            "duration_ms": int(watch.seconds * 100_000 + 0.5) / 100,  # half the time of round()
            "service": None if service is None else service.name,
            "caller": context.caller,
            "client": context.client_address,
            "attempts": context.attempts,
            "replica": context.replica,
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
        }
        if not (service and context.caller and context.client_address and context.replica and bytes_in and bytes_out):
            _leave_out_empty(fields, scope)
        first_byte_at = context.first_byte_at or watch.answered_at
        if first_byte_at is not None:
            fields["ttfb_ms"] = int((first_byte_at - context.started) * 100_000 + 0.5) / 100
        if context.cause is not COMPLETED:
            fields["message"] = _message(watch)
            fields["cause"] = context.cause
        if context.reason:
            fields["reason"] = context.reason
        self.sink(self.line(fields))


def _leave_out_empty(fields: dict[str, Any], scope: Scope) -> None:
    if not fields["client"] and scope.get("client"):
        fields["client"] = scope["client"][0]
    for name in OPTIONAL:
        if not fields[name]:
            del fields[name]


def _message(watch: Watch) -> str:
    if watch.context.cause is Cause.REFUSED:
        return "Request refused"
    return "Request aborted" if watch.cut_short else "Request failed"


def _path(scope: Scope) -> str:
    """The path as it was sent, without its query, whatever a server puts into ``raw_path``."""
    raw: bytes | None = scope.get("raw_path")
    path: str = scope["path"]
    if raw is not None and len(raw) != len(path):  # something in it was decoded, or stands behind it
        path = raw.decode("ascii", "backslashreplace")
    if "?" in path:
        path = path.partition("?")[0]
    return path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}..."


def _json(fields: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(fields, None, orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # a lone surrogate in what a server or an inner layer gave
        fields = {
            name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
            for name, value in fields.items()
        }
        return orjson.dumps(fields, None, orjson.OPT_APPEND_NEWLINE)


def _text(fields: dict[str, Any], colour: bool) -> bytes:
    level = f"{fields['level']:<8}"
    if colour:
        level = f"\x1b[{COLOURS[fields['level']]}m{level}\x1b[0m"
    rest = (
        f"{fields['method']} {fields['path']} {fields['status_code']} {fields['duration_ms']:.2f} ms "
        f"{fields['correlation_id'] or '-'}"
    )
    for name in ("service", "caller", "attempts", "cause", "reason"):
        if name in fields:
            rest += f" {name}={fields[name]}"
    line = f"{fields['timestamp']} {level} {fields['message']}: {rest.translate(CONTROLS)}\n"
    return line.encode("utf-8", "backslashreplace")
