"""Settings: the environment over a file over defaults, checked as a whole before anything listens.

Nothing else reads the environment. What comes out is frozen and plain: floats are seconds, None means absent or off.
Two tables, ``GATEWAY_OPTIONS`` and ``SERVICE_OPTIONS``, are the settings themselves; what follows them reads and lists.
"""

import os
import ssl
import string
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

from gateway.policies.callers import LOCAL_PEERS, Networks
from gateway.policies.circuit_breaker import CircuitBreakerConfig
from gateway.policies.edge import EdgeLimits
from gateway.policies.services import ADDRESS_FORM, Address, Service, Timeouts, has_odd_segments

OnRedisFailure = Literal["local", "open", "closed"]
OWN_PATHS = ("/health", "/metrics", "/circuit-breakers", "/dashboard")  # the gateway's; no service may cover them
BUILT_IN = {  # key in the file, and stem of the variables: prefix and default address
    "recommendation": ("/api/v1/recommendations", "http://recommender:8001"),
    "search": ("/api/v1/search", "http://search:8002"),
    "pricing": ("/api/v1/pricing", "http://pricing:8003"),
    "chatbot": ("/api/v1/chat", "http://chatbot:8004"),
    "fraud": ("/api/v1/fraud", "http://fraud:8005"),
    "forecast": ("/api/v1/forecast", "http://forecasting:8006"),
    "vision": ("/api/v1/vision", "http://vision:8007"),
}


class SettingsError(ValueError):
    """The settings have mistakes: all of them, each ``NAME: expected ..., found ...``, and no secret in any."""

    def __init__(self, mistakes: Iterable[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self.mistakes))


class PrivateURL(str):
    """A URL that may have a password in it, which its ``repr`` leaves out."""

    __slots__ = ()

    def __repr__(self) -> str:
        scheme, _, rest = self.partition("://")
        _, hidden, place = rest.partition("?")[0].rpartition("@")
        return repr(f"{scheme}://{'***@' if hidden else ''}{place}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSettings:
    """One service; what is set for it alone is in place of what is set for all.

    Attributes:
        own_buckets: it has a rate limit of its own, and so buckets apart from the common ones.
        rate_limit_per_minute: the limit that applies, its own or the common one; None: no such limit; 0 denies all.
    """

    service: Service
    breaker: CircuitBreakerConfig
    own_buckets: bool
    rate_limit_per_minute: int | None
    rate_limit_per_hour: int | None
    rate_limit_on_redis_failure: OnRedisFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, checked. ``Settings.load`` makes one; ``settings_table`` explains each.

    Attributes:
        redis_deadline: seconds a request may wait for Redis.
        rate_limit_per_minute: of the common buckets; None: no such limit; 0 denies all.
        workers: how many processes share this gateway's work.
        workers_known: false where a foreign process manager started us without saying how many there are.
    """

    services: tuple[ServiceSettings, ...]
    redis_url: str | None = None
    redis_key_prefix: str = "gateway:1:"
    redis_deadline: float = 0.025
    qdrant_url: str | None = None
    rate_limit_per_minute: int | None = 60
    rate_limit_per_hour: int | None = 1000
    rate_limit_on_redis_failure: OnRedisFailure = "local"
    circuit_breaker: CircuitBreakerConfig = field(default_factory=CircuitBreakerConfig)
    trusted_proxies: tuple[str, ...] = LOCAL_PEERS
    system_from: tuple[str, ...] = ("0.0.0.0/0", "::/0", "unix")
    admin_token: str | None = field(default=None, repr=False)
    log_level: str = "INFO"
    log_json: bool = True
    log_buffer_bytes: int = 1024 * 1024
    max_in_flight: int = 1000
    edge: EdgeLimits = field(default_factory=EdgeLimits)
    host: str = "0.0.0.0"
    port: int = 8080
    workers: int = 1
    workers_known: bool = False

    @classmethod
    def load(
        cls,
        environ: Mapping[str, str],
        *,
        config: str | Path | None = None,
        dotenv: str | Path | None = None,
        defaults: Mapping[str, str] | None = None,
        overrides: Mapping[str, str] | None = None,
        supervised: bool = False,
    ) -> Self:
        """Read and check all settings.

        Args:
            environ: the environment; an empty value is an unset one.
            config: the TOML file; else the one that ``GATEWAY_CONFIG`` names, if any.
            dotenv: a file of ``NAME=value`` lines, below the environment; it need not exist.
            defaults: variables below those of ``dotenv``.
            overrides: variables above all else. ``HOST``, ``PORT`` and ``WORKERS`` come only from here and from the
                file: in an environment, these names are those of shells and platforms.
            supervised: the gateway's own supervisor starts the workers, so ``WEB_CONCURRENCY`` is not asked.

        Raises:
            SettingsError: with every mistake there is.
        """
        mistakes = _Mistakes()
        lines = _read_dotenv(Path(dotenv), mistakes) if dotenv else {}
        found = {**(defaults or {}), **lines, **environ}
        variables = {name: value for name, value in found.items() if name not in NOT_IN_ENVIRONMENT}
        variables |= overrides or {}
        sources = _Sources(variables, str(config or variables.get(CONFIG, "")), mistakes)
        common = sources.common(supervised=supervised)
        services = sources.services(common)
        sources.check_names()
        if common["QDRANT_URL"] and find_spec("qdrant_client") is None:
            mistakes.add("QDRANT_URL", "the extra `qdrant` (pip install 'ai-gateway[qdrant]')", "no qdrant_client")
        if any(each.service.http2 for each in services) and find_spec("h2") is None:
            mistakes.add("UPSTREAM_HTTP2", "the extra `http2` (pip install 'ai-gateway[http2]')", "no h2")
        if mistakes:
            raise SettingsError(mistakes)
        return cls(
            services=services,
            circuit_breaker=CircuitBreakerConfig(**_fields_of(CircuitBreakerConfig, common)),
            edge=EdgeLimits(**_fields_of(EdgeLimits, common), client_timeout=common["CLIENT_TIMEOUT"]),
            workers_known=supervised or common[CONCURRENCY] is not None,
            **_fields_of(Settings, common),
        )

    @classmethod
    def from_environment(cls, **options: Any) -> Self:
        """``load``, with this process's environment and the same options."""
        return cls.load(os.environ, **options)


# What a value must be -------------------------------------------------------------------------------------------------


def _write(value: Any) -> str:
    """A value as one would write it in the environment."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _show(text: str) -> str:
    """What was found, for an error message; anything that may be a URL with a secret in it as far as its scheme."""
    if "@" in text or "?" in text:
        return _show_scheme(text)
    return repr(text if len(text) <= 80 else f"{text[:79]}…")


def _show_scheme(text: str) -> str:
    scheme, found, _ = text.partition("://")
    return repr(f"{scheme}://...") if found and scheme.isalpha() and len(scheme) < 8 else "something else"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a value must be: in words, and as a function from its text that raises ValueError where it is not."""

    expected: str
    parse: Callable[[str], Any]
    write: Callable[[Any], str] = _write
    show: Callable[[str], str] = _show


def _whole(low: int, high: int, of: str = "") -> _Kind:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise ValueError
        return int(text)

    return _Kind(f"a whole number {of}from {low} to {high}", parse)


def _decimal(low: float, high: float, of: str = "", *, unit: float = 1) -> _Kind:
    """A plain number, divided by ``unit``: a sign, an exponent or an ``inf`` is likelier a slip than meant."""

    def parse(text: str) -> float:
        if not (set(text) <= set("0123456789.") and low <= float(text) <= high):
            raise ValueError
        return float(text) / unit

    return _Kind(f"a number {of}from {low:g} to {high:g}", parse, write=lambda value: f"{value * unit:g}")


def _limit(period: str, period_us: int) -> _Kind:
    """A rate limit; beyond the maximum, buckets could no longer count exactly (RESILIENCE.md, 2)."""
    number = _whole(0, (2**53 - 1) // period_us - 1, f"of requests {period} ")
    return _Kind(
        f"{number.expected}, or off",
        lambda text: None if text.lower() == "off" else number.parse(text),
        write=lambda value: "off" if value is None else str(value),
    )


def _word(expected: str, words: Mapping[str, Any]) -> _Kind:
    def parse(text: str) -> Any:
        if text.lower() not in words:
            raise ValueError
        return words[text.lower()]

    return _Kind(expected, parse)


def _words(*words: str) -> _Kind:
    return _word(f"one of {', '.join(words)}", {word.lower(): word for word in words})


def _visible(text: str) -> str:
    if not all("!" <= character <= "~" for character in text):
        raise ValueError
    return text


def _networks(text: str) -> tuple[str, ...]:
    entries = () if text.lower() == "none" else tuple(entry.strip() for entry in text.split(","))
    Networks(entries)  # raises for the first that is none
    return entries


def _url(text: str, *schemes: str) -> str:
    parts = urlsplit(_visible(text))
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in schemes or not place or parts.port == 0:  # a port that is none raises as it is read
        raise ValueError
    return PrivateURL(text)


def _redis_url(text: str) -> str:
    url = _url(text, "redis", "rediss", "unix")
    parts = urlsplit(url)
    database = parts.path.strip("/")
    if database and not database.isdigit() and not url.startswith("unix"):
        raise ValueError
    if any(name not in REDIS_OPTIONS for name, _ in parse_qsl(parts.query, strict_parsing=bool(parts.query))):
        raise ValueError
    return url


def _replicas(text: str) -> tuple[str, ...]:
    addresses = tuple(address.strip().rstrip("/") for address in text.split(","))
    if len(set(map(Address.parse, addresses))) < len(addresses):  # parsing raises for the first that is none
        raise ValueError
    return addresses


def _proxy(text: str) -> str:
    url = _url(text, "http")
    parts = urlsplit(url)
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError
    return url


def _prefix(text: str) -> str:
    path = text.rstrip("/")
    if not path or not set(path) <= PATH_CHARACTERS or has_odd_segments(path):
        raise ValueError
    if any(f"{path}/".startswith(f"{own}/") for own in OWN_PATHS):
        raise ValueError
    return path


def _ca_file(text: str) -> str:
    try:
        ssl.create_default_context(cafile=text)
    except (OSError, ssl.SSLError):
        raise ValueError from None
    return text


PATH_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-._~!$&'()*+,=:@/")
KEY_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + "-_")
_UNSET, _REQUIRED = object(), object()  # in place of a default

_NAME = _Kind("visible ASCII characters", _visible)
_TOKEN = _Kind("visible ASCII characters", _visible, show=lambda text: f"others among its {len(text)}")
_LEVEL = _words("TRACE", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_ON_FAILURE = _words("local", "open", "closed")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
_BOOLEAN = _word("true or false", dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False))
_COUNT = _whole(1, 1_000_000)
_RETRIES = _whole(0, 10)
_PORT = _whole(0, 65535)
_PROCESSES = _whole(1, 1024)
_BODY_BYTES = _whole(0, 2**40, "of bytes ")
_HEAD_BYTES = _whole(256, 16 * 2**20, "of bytes ")
_LOG_BYTES = _whole(4096, 2**30, "of bytes ")
_RATIO = _decimal(0, 1)
_SECONDS = _decimal(0.001, 604_800, "of seconds ")
_SECONDS_OR_NONE = _decimal(0, 604_800, "of seconds ")
_MILLISECONDS = _decimal(1, 10_000, "of milliseconds ", unit=1000)
_PER_MINUTE = _limit("a minute", 60_000_000)
_PER_HOUR = _limit("an hour", 3_600_000_000)
_NETWORKS = _Kind("addresses, networks such as 10.0.0.0/8 and `unix`, comma-separated, or `none`", _networks)
REDIS_OPTIONS = frozenset(
    {"client_name", "db", "password", "socket_keepalive", "ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs"}
    | {"ssl_certfile", "ssl_check_hostname", "ssl_keyfile", "username"}
)
_REDIS = _Kind("redis://host, rediss://host or unix:///path", _redis_url, show=_show_scheme)
_QDRANT = _Kind("http://host or https://host", lambda text: _url(text, "http", "https"), show=_show_scheme)
_REPLICAS = _Kind(f"{ADDRESS_FORM} and no more, or several such, comma-separated, no two the same", _replicas)
_PROXY = _Kind("http://[user:password@]host[:port]", _proxy, show=_show_scheme)
_PREFIX = _Kind(f"a path such as /api/v1/name, without escapes, outside of {' '.join(OWN_PATHS)}", _prefix)
_CA_FILE = _Kind("a file of certificates in PEM form", _ca_file)


# The settings themselves ----------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One setting: its variable (in lower case its key in the file), what it must be, and the field it becomes."""

    name: str
    kind: _Kind
    home: Any  # the dataclass that has the field, and the default
    field: str
    meaning: str

    @property
    def default(self) -> Any:
        """The value where nothing is set."""
        return next(each.default for each in fields(self.home) if each.name == self.field)


GATEWAY_OPTIONS = (
    Option("HOST", _NAME, Settings, "host", "The address to listen on"),
    Option("PORT", _PORT, Settings, "port", "The port to listen on"),
    Option("WORKERS", _PROCESSES, Settings, "workers", "Processes that share the work"),
    Option("REDIS_URL", _REDIS, Settings, "redis_url", "Redis, where workers and pods meet; without it each is alone"),
    Option("REDIS_KEY_PREFIX", _NAME, Settings, "redis_key_prefix", "What the gateway's keys in Redis begin with"),
    Option("RATE_LIMIT_REDIS_DEADLINE_MS", _MILLISECONDS, Settings, "redis_deadline", "The longest wait for Redis, ms"),
    Option("QDRANT_URL", _QDRANT, Settings, "qdrant_url", "Qdrant, for /health to watch; needs the extra qdrant"),
    Option("TRUSTED_PROXIES", _NETWORKS, Settings, "trusted_proxies", "Peers whose X-User-ID and X-Forwarded-* count"),
    Option("SYSTEM_FROM", _NETWORKS, Settings, "system_from", "Peers that /health, /metrics and the like answer"),
    Option("ADMIN_TOKEN", _TOKEN, Settings, "admin_token", "Bearer token that resets breakers; without it nobody can"),
    Option("LOG_LEVEL", _LEVEL, Settings, "log_level", "TRACE, DEBUG, INFO, WARNING, ERROR or CRITICAL"),
    Option("LOG_JSON", _BOOLEAN, Settings, "log_json", "A JSON object a line; false: lines for people"),
    Option("LOG_BUFFER_BYTES", _LOG_BYTES, Settings, "log_buffer_bytes", "Log lines held while their reader is slow"),
    Option("HEAD_TIMEOUT", _SECONDS, EdgeLimits, "head_timeout", "Seconds for a client to send a whole head: 408"),
    Option("BODY_TIMEOUT", _SECONDS, EdgeLimits, "body_timeout", "Seconds for a client to send more of a body: 408"),
    Option("KEEP_ALIVE_TIMEOUT", _SECONDS, EdgeLimits, "keep_alive_timeout", "Seconds idle between two requests"),
    Option("DISCARD_TIMEOUT", _SECONDS_OR_NONE, EdgeLimits, "discard_timeout", "Seconds of reading on after a refusal"),
    Option("MAX_REQUEST_LINE_BYTES", _HEAD_BYTES, EdgeLimits, "max_request_line_bytes", "Of a request line: 414"),
    Option("MAX_FIELD_BYTES", _HEAD_BYTES, EdgeLimits, "max_field_bytes", "Of a header field: 431"),
    Option("MAX_HEAD_BYTES", _HEAD_BYTES, EdgeLimits, "max_head_bytes", "Of a request's head: 431"),
    Option("MAX_FIELDS", _COUNT, EdgeLimits, "max_fields", "Header fields of a request: 431"),
    Option("MAX_CONNECTIONS", _COUNT, EdgeLimits, "max_connections", "Clients connected to a worker: 503"),
    Option("DRAIN_DELAY", _SECONDS_OR_NONE, EdgeLimits, "drain_delay", "Seconds from SIGTERM to closing the listener"),
    Option("DRAIN_TIMEOUT", _SECONDS_OR_NONE, EdgeLimits, "drain_timeout", "Seconds for answers in flight after that"),
)
_Breaker = CircuitBreakerConfig
SERVICE_OPTIONS = (  # for all services, or for one: CHATBOT_RETRIES
    Option(
        "RATE_LIMIT_PER_MINUTE", _PER_MINUTE, Settings, "rate_limit_per_minute", "Of one caller; off, or 0 for none"
    ),
    Option("RATE_LIMIT_PER_HOUR", _PER_HOUR, Settings, "rate_limit_per_hour", "Of one caller; off, or 0 for none"),
    Option(
        "RATE_LIMIT_ON_REDIS_FAILURE",
        _ON_FAILURE,
        Settings,
        "rate_limit_on_redis_failure",
        "Limits while Redis is gone: local, open (none) or closed (503)",
    ),
    Option("CIRCUIT_BREAKER_FAILURE_THRESHOLD", _COUNT, _Breaker, "failure_threshold", "Failures that open a breaker"),
    Option("CIRCUIT_BREAKER_SUCCESS_THRESHOLD", _COUNT, _Breaker, "success_threshold", "Successes that close it"),
    Option("CIRCUIT_BREAKER_TIMEOUT", _SECONDS, _Breaker, "timeout", "Seconds that it stays open"),
    Option("CIRCUIT_BREAKER_WINDOW_SIZE", _COUNT, _Breaker, "window_size", "Calls that it remembers"),
    Option("CIRCUIT_BREAKER_MIN_FAILURE_RATIO", _RATIO, _Breaker, "min_failure_ratio", "Part of them that must fail"),
    Option("CONNECT_TIMEOUT", _SECONDS, Timeouts, "connect", "Seconds to connect to a service"),
    Option("POOL_TIMEOUT", _SECONDS, Timeouts, "pool", "Seconds to wait for a free connection to it"),
    Option("WRITE_TIMEOUT", _SECONDS, Timeouts, "write", "Seconds for it to take more of a request's body"),
    Option("FIRST_BYTE_TIMEOUT", _SECONDS, Timeouts, "first_byte", "Seconds to the first byte of its answer"),
    Option("BETWEEN_BYTES_TIMEOUT", _SECONDS, Timeouts, "between_bytes", "Seconds between two bytes of its answer"),
    Option("ANSWER_TIMEOUT", _SECONDS, Timeouts, "answer", "Seconds for a whole answer with Content-Length"),
    Option("STREAM_TIMEOUT", _SECONDS, Timeouts, "stream", "Seconds for a whole answer without"),
    Option("CLIENT_TIMEOUT", _SECONDS, Timeouts, "client", "Seconds for a client to read more of an answer"),
    Option("WEBSOCKET_PING_INTERVAL", _SECONDS, Timeouts, "websocket_ping", "Seconds between pings of a WebSocket"),
    Option("WEBSOCKET_IDLE_TIMEOUT", _SECONDS, Timeouts, "websocket_idle", "Seconds that a WebSocket may be silent"),
    Option("RETRIES", _RETRIES, Service, "retries", "How often what is safe to send again is sent again"),
    Option("RETRY_ALL_METHODS", _BOOLEAN, Service, "retry_all_methods", "A POST is safe to send again, too"),
    Option("PRESERVE_HOST", _BOOLEAN, Service, "preserve_host", "Services get the client's Host rather than their own"),
    Option("MAX_BODY_BYTES", _BODY_BYTES, Service, "max_body_bytes", "Of a request's body: 413"),
    Option("MAX_IN_FLIGHT", _COUNT, Settings, "max_in_flight", "Requests that a worker works on at a time: 503"),
    Option("UPSTREAM_CA_FILE", _CA_FILE, Service, "ca_file", "Certificates to verify services by, not the system's"),
    Option("UPSTREAM_HTTP2", _BOOLEAN, Service, "http2", "HTTP/2 to services; needs the extra http2"),
    Option("UPSTREAM_PROXY", _PROXY, Service, "proxy", "A forward proxy to reach services through"),
)
OPTIONS = (*GATEWAY_OPTIONS, *SERVICE_OPTIONS)
NOT_IN_ENVIRONMENT = ("HOST", "PORT", "WORKERS")
CONFIG = "GATEWAY_CONFIG"
CONCURRENCY = "WEB_CONCURRENCY"


class Row(NamedTuple):
    """A variable as documentation lists it; one that is ``per_service`` exists for each service, ``CHATBOT_...``."""

    name: str
    default: str
    meaning: str
    per_service: bool = False


def settings_table() -> list[Row]:
    """Every variable there is, with its default as one would write it."""
    rows = [
        Row(CONFIG, "", "A TOML file of settings, below the environment; its keys are these names in lower case"),
        Row(CONCURRENCY, "", "Workers that a foreign process manager runs; serve has --workers instead"),
    ]
    for key, (prefix, address) in BUILT_IN.items():
        rows.append(Row(_variable(key, "SERVICE_URL"), address, f"Where {prefix} leads; replicas separated by commas"))
    for option in OPTIONS:
        if option.name not in NOT_IN_ENVIRONMENT:
            default = option.kind.write(option.default)
            rows.append(Row(option.name, default, option.meaning, option in SERVICE_OPTIONS))
    return rows


# Reading them ---------------------------------------------------------------------------------------------------------


class _Mistakes(list[str]):
    def add(self, where: str, expected: str, found: str) -> None:
        self.append(f"{where}: expected {expected}, found {found}")


class _Sources:
    """Variables over a file over defaults, and what is wrong with them."""

    def __init__(self, variables: Mapping[str, str], config: str, mistakes: _Mistakes) -> None:
        self.variables = variables
        self.config = config
        self.mistakes = mistakes
        self.file = _read_toml(Path(config), mistakes) if config else {}
        declared = self._table(self.file, "services")
        self.tables = {key: self._table(declared, f"services.{key}") for key in dict.fromkeys((*BUILT_IN, *declared))}

    def common(self, *, supervised: bool) -> dict[str, Any]:
        """By variable, what is set for the gateway and for all services."""
        values = {}
        for option in OPTIONS:
            default = option.default
            values[option.name] = self._value(option.kind, option.name, self.file, option.name.lower(), default)
        values[CONCURRENCY] = None if supervised else self._value(_PROCESSES, CONCURRENCY, {}, "", None)
        if not supervised:  # what the file says is for the gateway's own supervisor
            values["WORKERS"] = values[CONCURRENCY] or 1
        return values

    def services(self, common: Mapping[str, Any]) -> tuple[ServiceSettings, ...]:
        """The services that are enabled."""
        services = []
        owners: dict[str, str] = {}  # of variables and of prefixes
        for key, table in self.tables.items():
            path = f"services.{key}"
            is_named = KEY_CHARACTERS.issuperset(key) and key[:1].isalpha()
            if not is_named or owners.setdefault(_variable(key), key) != key:
                self.mistakes.add(path, "a name of a-z, 0-9, - and _, with variables of its own", repr(key))
            elif self._value(_BOOLEAN, "", table, f"{path}.enabled", True):
                service = self._service(key, table, common)
                services.append(service)
                replicas = service.service.replicas
                if service.service.proxy and replicas is not _REQUIRED and any(url[:5] == "unix:" for url in replicas):
                    self.mistakes.add(_variable(key, "UPSTREAM_PROXY"), "no proxy before a unix socket", "one")
                prefix = service.service.prefix
                if prefix is not _REQUIRED and owners.setdefault(prefix, key) != key:
                    self.mistakes.add(f"{path}.prefix", "one of its own", f"{prefix!r}, that of {owners[prefix]}")
        if not services:
            self.mistakes.add("services", "at least one", "none that is enabled")
        return tuple(services)

    def _service(self, key: str, table: Mapping[str, Any], common: Mapping[str, Any]) -> ServiceSettings:
        path = f"services.{key}"
        prefix, address = BUILT_IN.get(key, (_REQUIRED, None))
        replicas = (address,) if address else _REQUIRED
        found = {
            option.name: self._value(
                option.kind, _variable(key, option.name), table, f"{path}.{option.name.lower()}", _UNSET
            )
            for option in SERVICE_OPTIONS
        }
        own = {name: value for name, value in found.items() if value is not _UNSET}
        values = {**common, **own}
        return ServiceSettings(
            service=Service(
                name=f"{key.replace('_', '-')}-service",
                prefix=self._value(_PREFIX, "", table, f"{path}.prefix", prefix),
                replicas=self._value(_REPLICAS, _variable(key, "SERVICE_URL"), table, f"{path}.url", replicas),
                max_in_flight=own.get("MAX_IN_FLIGHT"),
                timeouts=Timeouts(**_fields_of(Timeouts, values)),
                **_fields_of(Service, values),
            ),
            breaker=CircuitBreakerConfig(**_fields_of(CircuitBreakerConfig, values)),
            own_buckets="RATE_LIMIT_PER_MINUTE" in own or "RATE_LIMIT_PER_HOUR" in own,
            rate_limit_per_minute=values["RATE_LIMIT_PER_MINUTE"],
            rate_limit_per_hour=values["RATE_LIMIT_PER_HOUR"],
            rate_limit_on_redis_failure=values["RATE_LIMIT_ON_REDIS_FAILURE"],
        )

    def check_names(self) -> None:
        """Report variables that are nearly ours, and keys that are not."""
        ours = {option.name for option in OPTIONS if option.name not in NOT_IN_ENVIRONMENT} | {CONFIG, CONCURRENCY}
        for key in self.tables:
            ours |= {_variable(key, "SERVICE_URL"), *(_variable(key, option.name) for option in SERVICE_OPTIONS)}
        for name in sorted(self.variables.keys() - ours - set(NOT_IN_ENVIRONMENT)):
            near = None if _is_of_kubernetes(name) else _nearest(name, ours)
            if near:
                self.mistakes.add(name, f"{near}, or a name less like it", "an unknown variable")
        common = {option.name.lower() for option in OPTIONS} | {"services"}
        own = {option.name.lower() for option in SERVICE_OPTIONS} | {"prefix", "url", "enabled"}
        for path, table, known in (
            ("", self.file, common),
            *((f"services.{key}.", table, own) for key, table in self.tables.items()),
        ):
            for key in sorted(table.keys() - known):
                near = _nearest(key, known)
                wanted = f"a known key, such as {near}" if near else "a known key"
                self.mistakes.add(f"{path}{key} in {self.config}", wanted, "an unknown one")

    def _value(self, kind: _Kind, variable: str, table: Mapping[str, Any], path: str, default: Any) -> Any:
        """A checked value: that of the variable, else that of the last part of ``path`` in ``table``, else the default.

        A mistake gives the default too, for what is read next to go on.
        """
        text, where = self.variables.get(variable, "").strip(), variable
        if not text:
            text, where = _text(table.get(path.rpartition(".")[2], "")), f"{path} in {self.config}"
        if not text and default is not _REQUIRED:
            return default
        try:
            return kind.parse(text)
        except ValueError:
            self.mistakes.add(where, kind.expected, kind.show(text) if text else "nothing")
            return default

    def _table(self, parent: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        table = parent.get(path.rpartition(".")[2], {})
        if isinstance(table, dict):
            return table
        self.mistakes.add(f"{path} in {self.config}", "a table", repr(type(table).__name__))
        return {}


def _fields_of(home: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {option.field: values[option.name] for option in OPTIONS if option.home is home}


def _variable(key: str, name: str = "") -> str:
    """What variable sets ``name`` for one service: ``chatbot``, ``RETRIES`` give ``CHATBOT_RETRIES``."""
    return f"{key.upper().replace('-', '_')}_{name}"


def _text(value: Any) -> str:
    """A value of the file, as it would stand in the environment."""
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "none"
    try:
        return str(value).lower() if isinstance(value, bool) else str(value).strip()
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number too long to write"  # which no setting takes


def _read_toml(path: Path, mistakes: _Mistakes) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        mistakes.add(str(path), "a TOML file", "arrays or tables within one another without end")
        return {}
    except (OSError, ValueError) as error:  # a missing file, bytes that are not UTF-8, a slip in the syntax
        mistakes.add(str(path), "a TOML file", str(getattr(error, "strerror", None) or error))
        return {}


def _read_dotenv(path: Path, mistakes: _Mistakes) -> dict[str, str]:
    if not path.exists():
        return {}
    from dotenv.parser import parse_stream  # only here: most processes have no such file

    variables = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for binding in parse_stream(lines):
                if binding.error or (binding.key and binding.value is None):
                    mistakes.add(f"{path}, line {binding.original.line}", "NAME=value", "something else")
                elif binding.key:
                    variables[binding.key] = binding.value or ""
    except (OSError, ValueError) as error:
        mistakes.add(str(path), "lines of NAME=value", getattr(error, "strerror", None) or "other bytes than UTF-8")
    return variables


def _is_of_kubernetes(name: str) -> bool:
    """It has the form of what Kubernetes tells a pod about the services around it."""
    number = name.rpartition("_PORT_")[2][:1] if "_PORT_" in name else ""
    return name.endswith(("_SERVICE_HOST", "_PORT")) or "_SERVICE_PORT" in name or number.isdigit()


def _nearest(name: str, names: Collection[str]) -> str | None:
    return next((each for each in sorted(names) if _is_within(name, each, 2)), None)


def _is_within(a: str, b: str, edits: int) -> bool:
    """So many insertions, deletions and replacements of a character, or fewer, make ``a`` into ``b``."""
    if abs(len(a) - len(b)) > edits:
        return False
    start = next((index for index, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), None)
    if start is None or edits == 0:
        return start is None
    a, b = a[start:], b[start:]
    return any(_is_within(*pair, edits - 1) for pair in ((a[1:], b[1:]), (a[1:], b), (a, b[1:])))
