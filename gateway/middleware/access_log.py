"""The access log: one line a request, written when it has ended, the aborted and the refused included."""

from collections.abc import Callable, Collection
from functools import lru_cache
from time import monotonic, time
from typing import Any

import orjson
from orjson import Fragment
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.context import KEY, Cause, RequestContext
from gateway.policies.timestamps import timestamp
from gateway.watch import Watch, end

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
        self.json = json
        self.colour = colour
        self.left_out = frozenset(name for name, number in LEVELS.items() if number < LEVELS[level.upper()])
        self.quiet_paths = frozenset(quiet_paths)
        self.clock = clock
        self.now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        context: RequestContext | None = scope.get(KEY)
        inner = scope
        if context is None or not context.watched:
            context, inner, receive, send = Watch.over(scope, receive, send, self.clock)
        try:
            await self.app(inner, receive, send)
        except BaseException as error:
            end(context, self.clock(), error)
            raise
        else:
            if not context.ended:
                end(context, self.clock())
        finally:
            self._log(scope, context)

    def _log(self, scope: Scope, context: RequestContext) -> None:
        cause, status = context.cause, context.final_status
        if status >= 500:
            level = "ERROR"
        elif context.cut_short:
            level = "WARNING"
        elif status < 400 and scope["path"] in self.quiet_paths:
            level = "DEBUG"
        else:
            level = "INFO"
        if level in self.left_out:
            return
        message = "Request completed" if cause is COMPLETED else _message(context)
        second = int(self.now())
        if not self.json:
            self.sink(_text(second, level, message, scope, context, self.colour))
            return

        method, path, raw = scope.get("method", "GET"), scope["path"], scope.get("raw_path")
        if raw is None or len(raw) != len(path) or len(path) > LONGEST_PATH or "?" in path or not raw.isascii():
            path = _path(path, raw)
        service, caller, client, replica = context.service, context.caller, context.client_address, context.replica
        bytes_in, bytes_out = context.bytes_in, context.bytes_out
        began = context.first_byte_at or context.answered_at
        fields: dict[str, Any] = {  # all at once: a field put in by itself costs three times as much
            "timestamp": _opening(second, level, message),
            "correlation_id": context.correlation_id,
            "method": method if len(method) <= LONGEST_METHOD else method[:LONGEST_METHOD],
            "path": path,
            "status_code": status,
            "duration_ms": (context.seconds * 100_000.0 + 0.5) // 1.0 / 100.0,  # a third of the time of round()
            "service": None if service is None else service.name,
            "caller": caller,
            "client": client,
            "attempts": context.attempts,
            "replica": replica,
            "bytes_in": bytes_in,
            "bytes_out": bytes_out,
            "ttfb_ms": None if began is None else ((began - context.started) * 100_000.0 + 0.5) // 1.0 / 100.0,
        }
        if not (service is not None and replica and caller and client and bytes_in and bytes_out):
            _leave_out_empty(fields, scope)
        if cause is not COMPLETED:
            fields["cause"] = cause
        if context.reason:
            fields["reason"] = context.reason
        try:
            line = orjson.dumps(fields, None, orjson.OPT_APPEND_NEWLINE)
        except TypeError:  # a lone surrogate in what a server or an inner layer gave
            line = orjson.dumps(_with_surrogates_told(fields), None, orjson.OPT_APPEND_NEWLINE)
        self.sink(line)


@lru_cache(maxsize=16)
def _opening(second: int, level: str, message: str) -> Fragment:
    """The fields that a second's lines begin with, from the timestamp to the message, less the name of the first."""
    fields = orjson.dumps({"timestamp": timestamp(second), "level": level, "message": message})
    return Fragment(fields[len('{"timestamp":') : -1])


def _leave_out_empty(fields: dict[str, Any], scope: Scope) -> None:
    if not fields["client"] and scope.get("client"):
        fields["client"] = scope["client"][0]
    for name in OPTIONAL:
        if not fields[name]:
            del fields[name]
    if fields["ttfb_ms"] is None:
        del fields["ttfb_ms"]


def _with_surrogates_told(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in fields.items()
    }


def _message(context: RequestContext) -> str:
    if context.cause is Cause.REFUSED:
        return "Request refused"
    return "Request aborted" if context.cut_short else "Request failed"


def _path(path: str, raw: bytes | None) -> str:
    """The path as it was sent, without its query, whatever a server puts into ``raw_path``."""
    if raw is not None:
        path = raw.decode("ascii", "backslashreplace")
    if "?" in path:
        path = path.partition("?")[0]
    return path if len(path) <= LONGEST_PATH else f"{path[:LONGEST_PATH]}..."


def _text(second: int, level: str, message: str, scope: Scope, context: RequestContext, colour: bool) -> bytes:
    shown = f"{level:<8}"
    if colour:
        shown = f"\x1b[{COLOURS[level]}m{shown}\x1b[0m"
    told = {
        "service": context.service and context.service.name,
        "caller": context.caller,
        "attempts": context.attempts,
        "cause": None if context.cause is COMPLETED else context.cause,
        "reason": context.reason,
    }
    method, path = scope.get("method", "GET")[:LONGEST_METHOD], _path(scope["path"], scope.get("raw_path"))
    milliseconds = int(context.seconds * 100_000 + 0.5) / 100
    rest = f"{method} {path} {context.final_status} {milliseconds:.2f} ms {context.correlation_id or '-'}"
    rest += "".join(f" {name}={value}" for name, value in told.items() if value)
    line = f"{timestamp(second)} {shown} {message}: {rest.translate(CONTROLS)}\n"
    return line.encode("utf-8", "backslashreplace")
