"""Settings: what overrides what, what each may be, and how mistakes are told."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given
from hypothesis import strategies as st

from gateway.policies.circuit_breaker import CircuitBreakerConfig
from gateway.policies.services import ServiceTable, Timeouts
from gateway.policies.token_bucket import Limits
from gateway.settings import (
    BUILT_IN,
    OPTIONS,
    SERVICE_OPTIONS,
    Option,
    ServiceSettings,
    Settings,
    SettingsError,
    _is_within,
    settings_table,
)

ROOT = Path(__file__).parent.parent

CA_FILE = Path(__file__).parent / "tls" / "cert.pem"


def load(toml: str = "", tmp: Path | None = None, /, **environ: str) -> Settings:
    config = None
    if toml:
        assert tmp is not None
        config = tmp / "gateway.toml"
        config.write_text(toml)
    return Settings.load(environ, config=config)


def mistakes(toml: str = "", tmp: Path | None = None, /, **environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(toml, tmp, **environ)
    return caught.value.mistakes


def service(settings: Settings, name: str) -> ServiceSettings:
    return next(each for each in settings.services if each.service.name == name)


# Defaults and precedence ----------------------------------------------------------------------------------------------


def test_an_empty_environment_gives_the_seven_services_and_their_defaults() -> None:
    settings = load()
    assert [(each.service.name, each.service.prefix, each.service.replicas) for each in settings.services] == [
        ("recommendation-service", "/api/v1/recommendations", ("http://recommender:8001",)),
        ("search-service", "/api/v1/search", ("http://search:8002",)),
        ("pricing-service", "/api/v1/pricing", ("http://pricing:8003",)),
        ("chatbot-service", "/api/v1/chat", ("http://chatbot:8004",)),
        ("fraud-service", "/api/v1/fraud", ("http://fraud:8005",)),
        ("forecast-service", "/api/v1/forecast", ("http://forecasting:8006",)),
        ("vision-service", "/api/v1/vision", ("http://vision:8007",)),
    ]
    assert {each.breaker for each in settings.services} == {CircuitBreakerConfig()}
    assert {each.service.timeouts for each in settings.services} == {Timeouts()}
    assert not any(each.own_buckets for each in settings.services)
    assert (settings.rate_limit_per_minute, settings.rate_limit_per_hour) == (60, 1000)
    assert (settings.redis_url, settings.qdrant_url, settings.admin_token) == (None, None, None)
    assert (settings.host, settings.port, settings.workers, settings.workers_known) == ("0.0.0.0", 8080, 1, False)
    assert settings == Settings(services=settings.services)


def test_the_environment_is_above_the_file_and_the_file_above_the_defaults(tmp_path: Path) -> None:
    toml = 'log_level = "debug"\nretries = 3\nconnect_timeout = 4'
    settings = load(toml, tmp_path, RETRIES="2")
    assert settings.log_level == "DEBUG"
    assert service(settings, "search-service").service.retries == 2
    assert service(settings, "search-service").service.timeouts.connect == 4


def test_an_empty_variable_is_an_unset_one(tmp_path: Path) -> None:
    settings = load("log_json = false", tmp_path, LOG_JSON="", REDIS_URL=" ")
    assert settings.log_json is False
    assert settings.redis_url is None


def test_dotenv_is_below_the_environment_and_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    assert Settings.load({}, dotenv=path) == load()
    path.write_text("# a comment\nexport RETRIES=2\nLOG_LEVEL='error'\nADMIN_TOKEN=se#cret\nLOG_JSON=\n")
    settings = Settings.load({"LOG_LEVEL": "warning"}, dotenv=path)
    assert (settings.log_level, settings.admin_token, settings.log_json) == ("WARNING", "se#cret", True)
    assert {each.service.retries for each in settings.services} == {2}


def test_overrides_are_above_and_defaults_below_all(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("RETRIES=2\nDRAIN_DELAY=2")
    settings = Settings.load(
        {"RETRIES": "3"},
        dotenv=path,
        defaults={"DRAIN_DELAY": "1", "DRAIN_TIMEOUT": "1"},
        overrides={"RETRIES": "4", "PORT": "9000"},
    )
    assert settings.services[0].service.retries == 4
    assert (settings.edge.drain_delay, settings.edge.drain_timeout, settings.port) == (2, 1, 9000)


def test_host_port_and_workers_are_not_read_from_the_environment(tmp_path: Path) -> None:
    environ = {"HOST": "myhost", "PORT": "3000", "WORKERS": "9", "HOME": "/root", "PORTS": "1"}
    toml = tmp_path / "gateway.toml"
    toml.write_text('host = "::1"\nport = 81\nworkers = 3')
    settings = Settings.load(environ, config=toml, supervised=True)
    assert (settings.host, settings.port, settings.workers, settings.workers_known) == ("::1", 81, 3, True)


def test_under_a_foreign_process_manager_web_concurrency_says_how_many_workers_there_are(tmp_path: Path) -> None:
    toml = "workers = 3"
    assert load(toml, tmp_path).workers == 1
    assert not load(toml, tmp_path).workers_known
    settings = load(toml, tmp_path, WEB_CONCURRENCY="4")
    assert (settings.workers, settings.workers_known) == (4, True)
    supervised = Settings.load({"WEB_CONCURRENCY": "nonsense"}, supervised=True)
    assert (supervised.workers, supervised.workers_known) == (1, True)


def test_gateway_config_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text("max_in_flight = 7")
    assert Settings.load({"GATEWAY_CONFIG": str(path)}).max_in_flight == 7


# For one service ------------------------------------------------------------------------------------------------------


def test_whatever_is_set_for_all_services_can_be_set_for_one(tmp_path: Path) -> None:
    toml = "[services.chatbot]\ncircuit_breaker_timeout = 30\nstream_timeout = 1800\nmax_in_flight = 10"
    settings = load(toml, tmp_path, CIRCUIT_BREAKER_TIMEOUT="10", CHATBOT_STREAM_TIMEOUT="600.5")
    chat, search = service(settings, "chatbot-service"), service(settings, "search-service")
    assert (chat.breaker.timeout, search.breaker.timeout, settings.circuit_breaker.timeout) == (30, 10, 10)
    assert (chat.service.timeouts.stream, search.service.timeouts.stream) == (600.5, 900)
    assert (chat.service.max_in_flight, search.service.max_in_flight, settings.max_in_flight) == (10, None, 1000)


@pytest.mark.parametrize("option", SERVICE_OPTIONS, ids=lambda option: option.name)
def test_every_service_option_takes_effect_for_all_and_for_one(option: Option, tmp_path: Path) -> None:
    values = {"UPSTREAM_CA_FILE": str(CA_FILE), "RATE_LIMIT_ON_REDIS_FAILURE": "closed", "UPSTREAM_PROXY": "http://p:1"}
    booleans = dict.fromkeys(("RETRY_ALL_METHODS", "PRESERVE_HOST", "UPSTREAM_HTTP2"), "yes")
    value = {**values, **booleans, "CIRCUIT_BREAKER_MIN_FAILURE_RATIO": "0.5"}.get(option.name, "7")
    before = load()
    common = load(**{option.name: value})
    if option.name == "MAX_IN_FLIGHT":
        assert common == replace(before, max_in_flight=7)
    else:
        assert all(new != old for new, old in zip(common.services, before.services, strict=True))
    own = load(**{f"VISION_{option.name}": value})
    assert own.services[:-1] == before.services[:-1]
    assert own.services[-1] != before.services[-1]
    assert replace(own, services=()) == replace(before, services=())


def test_a_service_with_a_limit_of_its_own_has_buckets_of_its_own() -> None:
    settings = load(CHATBOT_RATE_LIMIT_PER_MINUTE="10", SEARCH_RATE_LIMIT_PER_HOUR="off", RATE_LIMIT_PER_HOUR="500")
    chat, search, fraud = (service(settings, f"{name}-service") for name in ("chatbot", "search", "fraud"))
    assert (chat.own_buckets, chat.rate_limit_per_minute, chat.rate_limit_per_hour) == (True, 10, 500)
    assert (search.own_buckets, search.rate_limit_per_minute, search.rate_limit_per_hour) == (True, 60, None)
    assert (fraud.own_buckets, fraud.rate_limit_per_minute, fraud.rate_limit_per_hour) == (False, 60, 500)


def test_the_file_adds_services_and_removes_them(tmp_path: Path) -> None:
    toml = """
        [services.text-embeddings]
        prefix = "/api/v1/embeddings/"
        url = ["http://embeddings:8010", "https://[::1]:8011/v2/"]
        [services.vision]
        enabled = false
    """
    settings = load(toml, tmp_path, TEXT_EMBEDDINGS_RETRIES="0")
    added = service(settings, "text-embeddings-service").service
    assert (added.prefix, added.retries) == ("/api/v1/embeddings", 0)
    assert added.replicas == ("http://embeddings:8010", "https://[::1]:8011/v2")
    assert "vision-service" not in [each.service.name for each in settings.services]
    assert ServiceTable(each.service for each in settings.services).match(b"/api/v1/embeddings/x") is added


def test_an_added_service_may_have_its_address_from_the_environment(tmp_path: Path) -> None:
    toml = '[services.embeddings]\nprefix = "/e"'
    settings = load(toml, tmp_path, EMBEDDINGS_SERVICE_URL="http://a:1, http://b:2")
    assert service(settings, "embeddings-service").service.replicas == ("http://a:1", "http://b:2")


def test_a_service_may_listen_on_unix_sockets() -> None:
    settings = load(CHATBOT_SERVICE_URL="unix:/run/chat.sock:/v1/, http://chatbot:8004")
    chatbot = service(settings, "chatbot-service").service
    assert chatbot.replicas == ("unix:/run/chat.sock:/v1", "http://chatbot:8004")


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once_by_name(tmp_path: Path) -> None:
    found = mistakes(
        'log_levle = "INFO"\nlog_level = "loud"\n[services.search]\nretries = true\nurl = "search:8002"\nfoo = 1',
        tmp_path,
        RATE_LIMIT_PER_MINUTE="many",
        CHATBOT_CONNECT_TIMEOUT="2s",
        REDIS_ULR="redis://localhost",
    )
    config = tmp_path / "gateway.toml"
    assert [line.partition(":")[0] for line in found] == [
        f"log_level in {config}",
        "RATE_LIMIT_PER_MINUTE",
        f"services.search.retries in {config}",
        f"services.search.url in {config}",
        "CHATBOT_CONNECT_TIMEOUT",
        "REDIS_ULR",
        f"log_levle in {config}",
        f"services.search.foo in {config}",
    ]
    assert "CHATBOT_CONNECT_TIMEOUT: expected a number of seconds from 0.001 to 604800, found '2s'" in found
    assert all(": expected " in line and ", found " in line for line in found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "localhost:6379"),
        ("REDIS_URL", "http://localhost"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://localhost:port"),
        ("REDIS_URL", "redis://localhost/db"),
        ("QDRANT_URL", "localhost:6333"),
        ("RATE_LIMIT_PER_MINUTE", "-1"),
        ("RATE_LIMIT_PER_MINUTE", "1_000"),
        ("RATE_LIMIT_PER_MINUTE", "٣"),
        ("RATE_LIMIT_PER_MINUTE", "150119987"),
        ("RATE_LIMIT_PER_HOUR", "2501999"),
        ("RATE_LIMIT_ON_REDIS_FAILURE", "maybe"),
        ("RATE_LIMIT_REDIS_DEADLINE_MS", "25ms"),
        ("CONNECT_TIMEOUT", "0"),
        ("CONNECT_TIMEOUT", "inf"),
        ("CONNECT_TIMEOUT", "1e3"),
        ("CONNECT_TIMEOUT", "1.2.3"),
        ("CIRCUIT_BREAKER_MIN_FAILURE_RATIO", "1.1"),
        ("CIRCUIT_BREAKER_FAILURE_THRESHOLD", "0"),
        ("MAX_BODY_BYTES", "10MiB"),
        ("LOG_JSON", "jein"),
        ("LOG_LEVEL", "loud"),
        ("TRUSTED_PROXIES", "10.0.0.0/33"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,"),
        ("SYSTEM_FROM", "localhost"),
        ("ADMIN_TOKEN", "two words"),
        ("UPSTREAM_CA_FILE", "/no/such/file"),
        ("UPSTREAM_CA_FILE", __file__),
        ("CHATBOT_UPSTREAM_PROXY", "proxy:3128"),
        ("CHATBOT_UPSTREAM_PROXY", "https://proxy:3128"),
        ("CHATBOT_UPSTREAM_PROXY", "http://proxy:3128/path"),
        ("CHATBOT_SERVICE_URL", "http://a..b:80"),
        ("REDIS_URL", "redis://h/0?foo=1"),
        ("WEB_CONCURRENCY", "0"),
        *(
            ("CHATBOT_SERVICE_URL", url)
            for url in (
                "chatbot:8004",
                "ftp://chatbot",
                "http://",
                "http://:80",
                "http://chatbot:",
                "http://chatbot:0",
                "http://chatbot:65536",
                "http://chatbot:8004?x=1",
                "http://chatbot:8004#x",
                "http://chatbot:8004/a/../b",
                "http://chatbot:8004//b",
                "http://chatbot:8004/a%2Fb",
                "http://user:pass@chatbot:8004",
                "http://chat bot",
                "http://chätbot",
                "http://a,",
                "http://a,http://a/",
                "unix:chatbot.sock",
                "unix:/run/chatbot.sock:v1",
                "unix:///run/chatbot.sock",
            )
        ),
    ],
)
def test_a_value_that_can_not_be_meant_is_a_mistake(name: str, value: str) -> None:
    (mistake,) = mistakes(**{name: value})
    assert mistake.startswith(f"{name}: expected ")


@pytest.mark.parametrize(
    "prefix",
    ["api", "/", "", "/a/../b", "/a/./b", "/a//b", "/a%20b", "/a b", "/a?b", "/é", "/health", "/health/x", "/metrics/",
     "/circuit-breakers/a", "/dashboard", "/a;b", "/a\\\\b"],
)  # fmt: skip
def test_a_prefix_is_plain_and_covers_none_of_the_gateways_own_paths(prefix: str, tmp_path: Path) -> None:
    (mistake,) = mistakes(f'[services.new]\nurl = "http://new"\nprefix = "{prefix}"', tmp_path)
    assert mistake.startswith(f"services.new.prefix in {tmp_path / 'gateway.toml'}: expected a path ")


def test_a_path_that_only_begins_like_the_gateways_own_is_fine(tmp_path: Path) -> None:
    toml = '[services.new]\nurl = "http://new"\nprefix = "/healthcare"'
    assert service(load(toml, tmp_path), "new-service").service.prefix == "/healthcare"


@pytest.mark.parametrize(
    ("toml", "about"),
    [
        ('[services.new]\nurl = "http://new"', "services.new.prefix"),
        ('[services.new]\nprefix = "/new"', "services.new.url"),
        ('[services.new]\nurl = "http://new"\nprefix = "/api/v1/chat/"', "services.new.prefix"),
        ('[services.New]\nurl = "http://new"\nprefix = "/new"', "services.New"),
        ('[services."a.b"]\nurl = "http://new"\nprefix = "/new"', "services.a.b"),
        ('[services.""]\nurl = "http://new"\nprefix = "/new"', "services."),
        ('[services.a-b]\nurl="http://a"\nprefix="/a"\n[services.a_b]\nurl="http://b"\nprefix="/b"', "services.a_b"),
        ("services = 3", "services"),
        ("[services]\nchatbot = 3", "services.chatbot"),
        ("retries = 1.5", "retries"),
        ("retries = true", "retries"),
        ("retries = [1, 2]", "retries"),
        ("retries = {a = 1}", "retries"),
        ("connect_timeout = inf", "connect_timeout"),
        ("gateway_config = 'x'", "gateway_config"),
        ("\n".join(f"[services.{key}]\nenabled = false" for key in BUILT_IN), "services"),
    ],
)
def test_what_the_file_has_wrong_is_told_by_its_place(toml: str, about: str, tmp_path: Path) -> None:
    (mistake,) = mistakes(toml, tmp_path)
    assert mistake.startswith((f"{about} in ", f"{about}: "))


def test_a_file_that_can_not_be_read_is_a_mistake(tmp_path: Path) -> None:
    assert mistakes(GATEWAY_CONFIG=str(tmp_path / "none.toml"))[0].endswith("found No such file or directory")
    assert "line 1" in mistakes("retries = = 1", tmp_path)[0]
    (tmp_path / "latin.toml").write_bytes(b"# \xe4")
    assert mistakes(GATEWAY_CONFIG=str(tmp_path / "latin.toml"))[0].startswith(f"{tmp_path / 'latin.toml'}: expected")


def test_a_dotenv_line_that_is_none_is_a_mistake_told_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("RETRIES=2\nhunter2\nADMIN_TOKEN='hunter2\n")
    with pytest.raises(SettingsError) as caught:
        Settings.load({}, dotenv=path)
    assert [line.partition(":")[0] for line in caught.value.mistakes] == [f"{path}, line 2", f"{path}, line 3"]
    assert "hunter2" not in str(caught.value)
    path.write_bytes(b"A=\xff")
    with pytest.raises(SettingsError, match="UTF-8"):
        Settings.load({}, dotenv=path)
    with pytest.raises(SettingsError, match="Is a directory"):
        Settings.load({}, dotenv=tmp_path)


def test_qdrant_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(QDRANT_URL="http://qdrant:6333").qdrant_url == "http://qdrant:6333"
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    (mistake,) = mistakes(QDRANT_URL="http://qdrant:6333")
    assert mistake.startswith("QDRANT_URL: expected the extra `qdrant`")
    assert load().qdrant_url is None


def test_http2_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert service(load(SEARCH_UPSTREAM_HTTP2="true"), "search-service").service.http2
    monkeypatch.setitem(sys.modules, "h2", None)
    (mistake,) = mistakes(SEARCH_UPSTREAM_HTTP2="true")
    assert mistake.startswith("UPSTREAM_HTTP2: expected the extra `http2`")


def test_no_forward_proxy_leads_to_a_unix_socket_and_its_password_is_not_shown() -> None:
    settings = load(UPSTREAM_PROXY="http://me:hunter2@proxy:3128")
    assert service(settings, "search-service").service.proxy == "http://me:hunter2@proxy:3128"
    assert "hunter2" not in repr(settings)
    (mistake,) = mistakes(UPSTREAM_PROXY="http://proxy", SEARCH_SERVICE_URL="http://search, unix:/run/search.sock")
    assert mistake.startswith("SEARCH_UPSTREAM_PROXY: expected no proxy before a unix socket")


# Names that are nearly ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("REDIS_ULR", "REDIS_URL"),
        ("RATE_LIMIT_PER_MINUT", "RATE_LIMIT_PER_MINUTE"),
        ("CHATBOT_SERVICE_URLS", "CHATBOT_SERVICE_URL"),
        ("CHAT_BOT_RETRIES", "CHATBOT_RETRIES"),
        ("LOGJSON", "LOG_JSON"),
        ("ADMIN-TOKEN", "ADMIN_TOKEN"),
    ],
)
def test_a_variable_that_nearly_spells_one_of_ours_is_a_mistake(name: str, ours: str) -> None:
    (mistake,) = mistakes(**{name: "a secret"})
    assert mistake == f"{name}: expected {ours}, or a name less like it, found an unknown variable"


def test_what_kubernetes_injects_is_no_mistake() -> None:
    names = ["SEARCH_SERVICE_HOST", "CHATBOT_SERVICE_PORT", "CHATBOT_SERVICE_PORT_HTTP", "REDIS_PORT", "FRAUD_PORT"]
    names += ["REDIS_PORT_6379_TCP", "REDIS_PORT_6379_TCP_ADDR", "VISION_PORT_8007_TCP_PROTO", "LOG_PORT"]
    assert load(**dict.fromkeys(names, "tcp://10.0.0.1:6379")) == load()


def test_the_usual_environment_is_no_mistake() -> None:
    names = ["HOME", "HOST", "PATH", "USER", "SHELL", "LANG", "TERM", "PWD", "PORT", "PORTS", "WORKERS", "HOSTNAME"]
    names += ["PYTHONPATH", "VIRTUAL_ENV", "DISPLAY", "XDG_RUNTIME_DIR", "NO_PROXY", "HTTP_PROXY", "DEBUG", "GPG_KEY"]
    names += ["KUBERNETES_SERVICE_HOST", "KUBERNETES_PORT_443_TCP_ADDR", "PROMETHEUS_MULTIPROC_DIR", "LOG_FILE"]
    assert load(**dict.fromkeys(names, "x")) == load()


@given(st.text("AB_", max_size=6), st.text("AB_", max_size=6), st.integers(0, 3))
def test_nearness_is_the_edit_distance(a: str, b: str, edits: int) -> None:
    distances = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, distances = distances, [i]
        for j, right in enumerate(b, 1):
            distances.append(min(above[j] + 1, distances[j - 1] + 1, above[j - 1] + (left != right)))
    assert _is_within(a, b, edits) == (distances[-1] <= edits)


def test_no_variable_can_mean_two_things() -> None:
    names = [row.name for row in settings_table()]
    assert len(set(names)) == len(names)
    assert not [
        (option.name, own.name) for option in OPTIONS for own in SERVICE_OPTIONS if option.name.endswith(f"_{own.name}")
    ]


# Secrets --------------------------------------------------------------------------------------------------------------


def test_no_secret_is_in_the_repr() -> None:
    settings = load(
        ADMIN_TOKEN="hunter2",
        REDIS_URL="rediss://user:hunter2@redis:6379/0?password=hunter2",
        QDRANT_URL="https://:hunter2@qdrant",
    )
    assert "hunter2" not in repr(settings)
    assert "rediss://***@redis:6379/0" in repr(settings)
    assert settings.redis_url == "rediss://user:hunter2@redis:6379/0?password=hunter2"
    assert repr(load(REDIS_URL="unix:///run/redis.sock").redis_url) == "'unix:///run/redis.sock'"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ADMIN_TOKEN", "hunter2 hunter2"),
        ("ADMIN_TOKEN", "hunter2://ü"),
        ("REDIS_URL", "http://:hunter2@redis"),
        ("REDIS_URL", "hunter2"),
        ("REDIS_URL", "redis://:hunter2@"),
        ("QDRANT_URL", "qdrant?api_key=hunter2"),
        ("CHATBOT_SERVICE_URL", "http://a:hunter2@chatbot"),
        ("CHATBOT_SERVICE_URL", "http://chatbot?key=hunter2"),
        ("LOG_LEVEL", "redis://:hunter2@redis"),
        ("UPSTREAM_PROXY", "http://me:hunter2@proxy/path"),
    ],
)
def test_no_secret_is_in_a_mistake(name: str, value: str) -> None:
    (mistake,) = mistakes(**{name: value})
    assert "hunter2" not in mistake


# What is documented, and what it costs --------------------------------------------------------------------------------


def test_the_example_lists_every_setting_with_its_default_and_meaning() -> None:
    path = ROOT / ".env.example"
    text = path.read_text()
    for row in settings_table():
        assert f"\n# {row.meaning}{' *' if row.per_service else ''}\n{row.name}={row.default}\n" in text
    assert list(dotenv_values(path)) == [row.name for row in settings_table()]


def test_the_example_changes_nothing() -> None:
    assert Settings.load({}, dotenv=ROOT / ".env.example") == load()


def test_limits_of_any_allowed_size_can_be_counted_exactly() -> None:
    settings = load(RATE_LIMIT_PER_MINUTE="150119986", RATE_LIMIT_PER_HOUR="2501998", CHATBOT_RATE_LIMIT_PER_HOUR="0")
    assert Limits.of(settings.rate_limit_per_minute, settings.rate_limit_per_hour)
    assert service(settings, "chatbot-service").rate_limit_per_hour == 0


def test_networks_may_be_none_at_all(tmp_path: Path) -> None:
    assert load(TRUSTED_PROXIES="none").trusted_proxies == ()
    assert load("system_from = []", tmp_path).system_from == ()
    assert load(SYSTEM_FROM="10.0.0.0/8, unix").system_from == ("10.0.0.0/8", "unix")


def test_reading_settings_loads_nothing_heavy() -> None:
    heavy = "'pydantic', 'redis', 'httpx', 'qdrant_client', 'dotenv', 'uvicorn'"
    code = (
        f"import sys; from gateway.settings import Settings; Settings.load({{}}); print({{{heavy}}} & {{*sys.modules}})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
