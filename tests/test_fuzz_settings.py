"""Settings that nearly make sense: taken whole, or refused with every mistake named and no secret told."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.settings import OPTIONS, PrivateURL, Settings, SettingsError, settings_table
from tests.fuzz import mutated

SECRET = "sw0rdfish"
MAY_BE_SECRET = ("ADMIN_TOKEN", "REDIS_URL", "QDRANT_URL", "UPSTREAM_PROXY", "CHATBOT_UPSTREAM_PROXY")
NAMES = [row.name for row in settings_table() if row.name != "GATEWAY_CONFIG"]
NAMES += ["CHATBOT_RETRIES", "CHATBOT_RATE_LIMIT_PER_MINUTE", "CHATBOT_UPSTREAM_PROXY", "RATE_LIMIT_PER_MINUT", "X"]
VALUES = [
    *{row.default for row in settings_table()},
    *(
        "0",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "nan",
        "inf",
        "٣",
        "²",
        "1_000",
        " 7 ",
        "0x10",
        "9" * 30,
        "9" * 5000,
        "1." + "0" * 400,
    ),
    *("off", "OFF", "none", "true", "yes", "maybe", "local", "closed", "DEBUG", "/etc", "/nowhere", "\udcff", "é"),
    *(
        "http://a:1",
        "http://a:0",
        "http://a:99999",
        "http://[::1",
        "http://[::1]:80/p",
        "https://a//b",
        "http://a/../b",
    ),
    *(
        "http://a,http://b",
        "http://a,http://a",
        "unix:/run/a.sock",
        "unix:/run/a.sock:/p",
        "unix:",
        "http://" + "a" * 300,
    ),
    *(
        f"redis://:{SECRET}@a:6379/0",
        f"redis://a/0?password={SECRET}",
        f"http://u:{SECRET}@a",
        f"redis://u:{SECRET}@[a",
    ),
    *("10.0.0.0/8", "10.0.0.1/8", "10.0.0.0/33", "::/0, unix", ",", "unix,,", "\t"),
]
TEXTS = mutated([value.encode("utf-8", "surrogateescape") for value in VALUES]).map(
    lambda value: value.replace(b"\0", b"").decode("utf-8", "surrogateescape")
)
FILES = [
    b"retries = 3\nlog_json = false\nredis_url = 'redis://a'\n",
    b"[services.chatbot]\nretries = 3\nurl = ['http://a:1', 'http://b:1']\nenabled = true\n",
    b"[services.own]\nprefix = '/own'\nurl = 'http://own:1'\nrate_limit_per_minute = 'off'\n",
    b"[services.own]\nprefix = '/health'\n[services.search]\nenabled = false\n[services.'a b']\nurl = 1\n",
    b"services = 5\nport = 1979-05-27\nhost = {a = 1}\nretries = [[1], 2.5, true]\nunknown = nan\n",
    b"[services]\nchatbot = []\n[servces.chatbot]\nretrys = 1\n",
    b"max_fields = 0xffff\nmax_in_flight = 0b1\nretries = 1_0\nhead_timeout = 1e400\nbody_timeout = -inf\n",
]


def load(environ: Mapping[str, str], file: bytes | None = None) -> Settings | SettingsError:
    try:
        if file is None:
            return Settings.load(environ)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "gateway.toml"
            path.write_bytes(file)
            return Settings.load(environ, config=path)
    except SettingsError as error:
        return error


def plain(value: Any) -> bool:
    """It is frozen all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return all(plain(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def check(environ: Mapping[str, str], file: bytes | None = None) -> None:
    loaded = load(environ, file)
    if isinstance(loaded, SettingsError):
        assert loaded.mistakes
        assert all(": expected " in mistake and ", found " in mistake for mistake in loaded.mistakes)
        assert str(loaded).encode("utf-8", "backslashreplace")
    else:
        assert plain(loaded)
        assert loaded.services
        for option in OPTIONS:
            option.kind.write(option.default)
    if not any(SECRET in value for name, value in environ.items() if name not in MAY_BE_SECRET):
        assert SECRET not in repr(loaded)
        assert SECRET not in str(loaded)


@given(st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=6))
def test_an_environment_is_taken_or_refused_by_name(environ: dict[str, str]) -> None:
    check(environ)


@given(mutated(FILES), st.dictionaries(st.sampled_from(NAMES), TEXTS, max_size=2))
def test_a_file_is_taken_or_refused_by_name(file: bytes, environ: dict[str, str]) -> None:
    check(environ, file)


def test_each_value_of_the_corpus_is_taken_or_refused_for_each_setting() -> None:
    for value in VALUES:
        check(dict.fromkeys(NAMES, value))
        check(dict.fromkeys(MAY_BE_SECRET, value))
    for file in FILES:
        check({}, file)


@pytest.mark.parametrize(
    "file",
    [
        b"retries = 0x" + b"f" * 5000,
        b"retries = {a = 0x" + b"f" * 5000 + b"}",
        b"retries = " + b"[" * 5000,
        b"retries = " + b"9" * 5000,
        b"\xff",
        b"a.b.c = 1",
    ],
    ids=["huge", "huge within", "deep", "long", "not UTF-8", "dotted"],
)
def test_a_file_that_is_hard_to_read_is_a_mistake_like_others(file: bytes) -> None:
    assert isinstance(load({}, file), SettingsError)


def test_a_password_in_what_is_kept_is_not_told() -> None:
    loaded = load({"REDIS_URL": f"redis://u:{SECRET}@a", "ADMIN_TOKEN": SECRET})
    assert isinstance(loaded, Settings)
    assert isinstance(loaded.redis_url, PrivateURL)
    assert (SECRET in loaded.redis_url, SECRET in repr(loaded)) == (True, False)
