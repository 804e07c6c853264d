"""The command line: ``ai-gateway serve | check | demo | reset``.

Mistakes in the settings are printed all at once on standard error, before anything listens; the exit status is 2.
"""

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import click

from gateway import __version__
from gateway.circuit_breaker import UnknownBreakerError, check_reason, this_process
from gateway.settings import ServiceSettings, Settings, SettingsError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

Result = TypeVar("Result")
DOTENV = ".env"  # in the working directory
LOCAL = "http://127.0.0.1:8080"
MISTAKEN = 2
CONTEXT = find_spec("gateway.context")  # among what is compiled where anything is
COMPILED = " (compiled)" if CONTEXT and not str(CONTEXT.origin).endswith(".py") else ""
a_port = click.IntRange(0, 65535)
with_config = click.option("--config", metavar="FILE", help="A TOML file of settings, in place of GATEWAY_CONFIG.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ai-gateway", message=f"%(prog)s %(version)s{COMPILED}")
def main() -> None:
    """An API gateway for AI services.

    Settings come from flags, over the environment, over .env in the working directory, over a file.
    """


@main.command()
@click.option("--host", help="The address to listen on, 0.0.0.0 unless the file says otherwise.")
@click.option("--port", type=a_port, help="The port to listen on, 8080 unless the file says otherwise.")
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes that share the work.")
@with_config
def serve(host: str | None, port: int | None, workers: int | None, config: str | None) -> None:
    """Run the gateway until SIGTERM; SIGHUP reads the settings again."""
    flags = {"HOST": host, "PORT": port, "WORKERS": workers}
    overrides = {name: str(value) for name, value in flags.items() if value is not None}

    def load() -> Settings:
        return Settings.from_environment(config=config, dotenv=DOTENV, overrides=overrides, supervised=True)

    settings = or_exit(load)
    # Whatever the file says later: the supervisor has bound the address, and counts its workers.
    overrides |= {"HOST": settings.host, "PORT": str(settings.port), "WORKERS": str(settings.workers)}
    from gateway.server.workers import serve as run

    status = run(
        app=create_app,
        load=load,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        on_worker_exit=keep_metrics,
    )
    raise SystemExit(status)


@main.command()
@with_config
def check(config: str | None) -> None:
    """Check the settings, and show the services that come of them."""
    settings = or_exit(lambda: Settings.from_environment(config=config, dotenv=DOTENV, supervised=True))
    rows = [("SERVICE", "PREFIX", "REPLICAS", "LIMITS", "BREAKER"), *map(row_of, settings.services)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    click.echo("ok")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=a_port, default=8080, show_default=True, help="The port to listen on.")
@click.option(
    "--restart-after",
    default=90.0,
    show_default=True,
    help="Seconds that a dead stand-in stays so.",
    type=click.FloatRange(0),
)
def demo(host: str, port: int, restart_after: float) -> None:
    """Run the gateway in front of seven stand-in AI services, and say what to try."""
    from gateway.demo import demo as run

    raise SystemExit(or_exit(lambda: run(host=host, port=port, restart_after=restart_after, dotenv=DOTENV)))


@main.command()
@click.argument("name")
@click.option("--url", help=f"Ask a gateway there over HTTP, with ADMIN_TOKEN. Without REDIS_URL: {LOCAL}.")
@click.option("--reason", default="", help="Why, for the log of every worker.")
def reset(name: str, url: str | None, reason: str) -> None:
    """Close the circuit breaker NAME, such as chatbot-service, in every worker that meets others at REDIS_URL."""
    settings = or_exit(lambda: Settings.from_environment(dotenv=DOTENV, supervised=True))
    try:
        check_reason(reason)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--reason") from None
    if url is None and settings.redis_url is not None:
        from gateway.backends.fleet import reset_through_redis

        by = this_process("ai-gateway reset")
        try:
            workers = reset_through_redis(settings.redis_url, settings.redis_key_prefix, name, by=by, reason=reason)
        except (UnknownBreakerError, ConnectionError) as error:
            raise click.ClickException(f"Not reset: {error}") from None
        click.echo(json.dumps({"service": name, "state": "closed", "workers": workers}))
        return
    url, token = url or LOCAL, settings.admin_token
    if token is None:
        raise click.ClickException("ADMIN_TOKEN is not set, and without one nobody may reset a breaker over HTTP")
    import httpx

    address = f"{url.rstrip('/')}/circuit-breakers/{quote(name, safe='')}/reset"
    body = {"reason": reason} if reason else None
    try:
        answer = httpx.post(address, headers={"authorization": f"Bearer {token}"}, json=body, trust_env=False)
    except httpx.HTTPError as error:
        raise click.ClickException(f"No answer from the gateway at {url}: {error}") from None
    if not answer.is_success:
        raise click.ClickException(f"The gateway answered {answer.status_code}: {answer.text}")
    click.echo(answer.text)


def or_exit(work: Callable[[], Result]) -> Result:
    """What ``work`` returns; mistakes in the settings end the process."""
    try:
        return work()
    except SettingsError as error:
        click.echo("\n".join(error.mistakes), err=True)
        raise SystemExit(MISTAKEN) from None


def create_app(settings: Settings) -> "ASGIApp":
    """The application, loaded only in the worker that runs it."""
    from gateway.app import create_app as create

    return create(settings)


def keep_metrics(pid: int) -> None:
    """What a worker that has ended had counted stays counted."""
    from gateway.backends import metric_files  # which the first worker that ends loads, and most supervisors never

    if directory := metric_files.directory():
        metric_files.fold_in(directory, pid)


def row_of(each: ServiceSettings) -> tuple[str, str, str, str, str]:
    """A service as ``check`` shows it."""
    service, breaker = each.service, each.breaker
    limits = [("min", each.rate_limit_per_minute), ("h", each.rate_limit_per_hour)]
    shown = " ".join(f"{limit}/{period}" for period, limit in limits if limit is not None) or "off"
    opens = f"{breaker.failure_threshold} failures, {breaker.timeout:g} s"
    own = ", its own" if each.own_buckets else ""
    return service.name, service.prefix, ", ".join(service.replicas), f"{shown}{own}", opens
