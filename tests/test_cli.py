"""The command line, as a person or a process manager meets it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from gateway import __version__, context
from gateway.cli import main
from tests.wire import eventually, is_healthy

MISTAKES = {"RETRIES": "x", "REDIS_ULR": "redis://:hunter2@redis", "CONNECT_TIMEOUT": "2s"}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a .env of anybody's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, arguments, env=environ)
    return result.exit_code, result.stdout, result.stderr


def wait_for_health(port: int, process: "subprocess.Popen[str]") -> None:
    eventually(lambda: is_healthy(port) or process.poll() is not None)
    assert process.poll() is None


@contextmanager
def started(*command: str, **environ: str) -> Iterator["subprocess.Popen[str]"]:
    # its own process group, so that what a failed test leaves can be ended
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_version_is_told() -> None:
    kind = " (compiled)" if str(context.__file__).endswith(".so") else ""
    assert run("--version") == (0, f"ai-gateway {__version__}{kind}\n", "")
    told = subprocess.run([sys.executable, "-m", "gateway", "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"ai-gateway {__version__}{kind}\n"


def test_check_shows_the_services_that_come_of_the_settings() -> None:
    status, out, err = run("check", CHATBOT_RATE_LIMIT_PER_MINUTE="10", SEARCH_SERVICE_URL="http://a:1,unix:/b.sock")
    assert (status, err) == (0, "")
    lines = [line.split("  ") for line in out.splitlines()]
    table = {cells[0]: [cell.strip() for cell in cells if cell] for cells in lines}
    assert table["SERVICE"] == ["SERVICE", "PREFIX", "REPLICAS", "LIMITS", "BREAKER"]
    assert table["search-service"][1:3] == ["/api/v1/search", "http://a:1, unix:/b.sock"]
    assert table["search-service"][3:] == ["60/min 1000/h", "5 failures, 60 s"]
    assert table["chatbot-service"][3] == "10/min 1000/h, its own"
    assert len(table) == 1 + 7 + 1
    assert out.endswith("\nok\n")


def test_a_file_can_be_named_and_dotenv_is_read_from_the_working_directory(empty_directory: Path) -> None:
    Path("my.toml").write_text("[services.vision]\nenabled = false")
    Path(".env").write_text("CHATBOT_SERVICE_URL=http://from-dotenv:1")
    _, out, _ = run("check", "--config", "my.toml")
    assert "http://from-dotenv:1" in out
    assert "vision" not in out


@pytest.mark.parametrize("command", ["check", "serve", "demo"])
def test_all_mistakes_are_printed_at_once_before_anything_starts(command: str) -> None:
    status, out, err = run(command, **MISTAKES)
    assert (status, out) == (2, "")
    assert [line.partition(":")[0] for line in err.splitlines()] == ["CONNECT_TIMEOUT", "RETRIES", "REDIS_ULR"]
    assert "hunter2" not in err


def test_a_misspelt_flag_is_refused() -> None:
    assert run("serve", "--port", "99999")[0] == 2
    assert run("serve", "--workers", "0")[0] == 2


def test_serve_answers_until_sigterm_and_then_exits_with_0(port: int) -> None:
    with started("gateway", "serve", "--host", "127.0.0.1", "--port", str(port), DRAIN_DELAY="0") as process:
        wait_for_health(port, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_serve_reads_the_settings_again_on_sighup(empty_directory: Path, port: int) -> None:
    Path("gateway.toml").write_text(f'host = "127.0.0.1"\nport = {port}\ndrain_delay = 0')
    address = f"http://127.0.0.1:{port}/circuit-breakers"
    with started("gateway", "serve", "--config", "gateway.toml") as process:
        wait_for_health(port, process)
        assert "vision-service" in httpx.get(address).json()
        with Path("gateway.toml").open("a") as file:
            file.write("\n[services.vision]\nenabled = false")
        process.send_signal(signal.SIGHUP)
        eventually(lambda: "vision-service" not in httpx.get(address).json())
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["uvicorn", "gateway.main:app", "--port", "0"], 2),
        (["gunicorn", "gateway.main:app", "-k", "uvicorn_worker.UvicornWorker", "-b", "127.0.0.1:0"], 4),
    ],
    ids=["uvicorn", "gunicorn"],
)
def test_under_another_server_mistakes_end_it_without_a_traceback(
    command: list[str], status: int, empty_directory: Path
) -> None:
    environ = {**os.environ, **MISTAKES, "HOME": str(empty_directory)}
    ended = subprocess.run(
        [sys.executable, "-m", *command], env=environ, capture_output=True, text=True, timeout=20, check=False
    )
    assert ended.returncode == status
    assert "RETRIES: expected" in ended.stderr
    assert "REDIS_ULR: expected REDIS_URL" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_under_another_server_the_application_works(port: int) -> None:
    with started("uvicorn", "gateway.main:app", "--port", str(port)) as process:
        wait_for_health(port, process)
        assert len(httpx.get(f"http://127.0.0.1:{port}/circuit-breakers").json()) == 7
        process.send_signal(signal.SIGINT)
        process.wait(10)


def test_reset_asks_the_gateway_with_the_token() -> None:
    asked = []

    class Gateway(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.headers["authorization"]))
            self.send_response(200 if "chatbot" in self.path else 404)
            self.end_headers()
            self.wfile.write(b"what it says")

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            done = run("reset", "chatbot-service", "--url", url, ADMIN_TOKEN="secret")
            unknown = run("reset", "a/b", "--url", url, ADMIN_TOKEN="secret")
        finally:
            server.shutdown()
    assert asked == [
        ("/circuit-breakers/chatbot-service/reset", "Bearer secret"),
        ("/circuit-breakers/a%2Fb/reset", "Bearer secret"),
    ]
    assert done == (0, "what it says\n", "")
    assert unknown == (1, "", "Error: The gateway answered 404: what it says\n")


def test_reset_says_what_it_lacks(port: int) -> None:
    assert "ADMIN_TOKEN is not set" in run("reset", "chatbot-service")[2]
    nobody = run("reset", "chatbot-service", "--url", f"http://127.0.0.1:{port}", ADMIN_TOKEN="secret")
    assert nobody[0] == 1
    assert nobody[2].startswith("Error: No answer from the gateway at ")
