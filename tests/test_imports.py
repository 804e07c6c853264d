"""The arrows of the architecture, held: imports point down, never up, never sideways, and stay cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import gateway

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gateway"

# What a module may import when it is loaded, by the first part of its name below `gateway`; the longest match counts.
VOCABULARY = {"problems", "context", "policies", "circuit_breaker", "watch", "event_loop", "outbox", "tally"}
MAY_IMPORT = {
    "__init__": set[str](),
    "policies": {"policies"},
    "event_loop": {"tally"},
    "outbox": set(),
    "tally": set(),
    "context": {"policies"},
    "problems": {"context", "policies"},
    "circuit_breaker": {"policies"},
    "watch": {"context", "policies"},
    "middleware": VOCABULARY,
    "proxy": VOCABULARY | {"proxy"},
    "backends": VOCABULARY | {"backends"},
    "settings": {"policies"},
    "server": {"problems", "context", "policies", "outbox", "server"},
    "app": {*VOCABULARY, "settings", "middleware", "proxy", "backends"},
    "demo": {"policies", "settings", "app", "server"},
    "main": {"settings", "app"},
    "cli": {"settings", "app", "server", "demo", "circuit_breaker", "backends"},
    "__main__": {"cli"},
}
# What it may besides import in a function, as the default of an option, or for its types.
MAY_IMPORT_LATER = {
    "__init__": {*MAY_IMPORT} - {"__init__", "main", "cli", "__main__"},
    "middleware": {"proxy", "backends"},
    "proxy": {"backends"},
    "circuit_breaker": {"settings", "backends"},  # for a process that is none of the gateway's own
}
# Policies decide: what waits, looks at the clock or reaches outside is not for them.
NOT_FOR_POLICIES = {"asyncio", "io", "logging", "os", "pathlib", "selectors", "signal", "socket", "ssl", "subprocess"}
NOT_FOR_POLICIES |= {"tempfile", "threading"}
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep"}
CLOCKS |= {"now", "utcnow", "today"}

# Who besides settings.py touches the environment, and why.
MAY_TOUCH_ENVIRONMENT = {
    "gateway.settings",
    "gateway.server.workers",  # tells its workers who they are, and prometheus_client where they meet
}

# Costly to load (50 ms and more, some of them), or an extra that may not be there.
HEAVY = {
    "click",
    "grpc",
    "gunicorn",
    "httpx",
    "loguru",
    "numpy",
    "prometheus_client",
    "pydantic",
    "qdrant_client",
    "redis",
    "rich",
    "starlette_exporter",
    "uvicorn",
    "uvloop",
    "websockets",
}
# The modules whose job it is to use one. All others load none when they are imported.
MAY_LOAD = {
    "gateway.app": {"httpx", "loguru", "prometheus_client", "redis", "starlette_exporter", "websockets"},
    "gateway.backends.metric_files": {"prometheus_client"},
    "gateway.backends.prometheus": {"prometheus_client"},
    "gateway.backends.qdrant": {"httpx", "qdrant_client", "grpc", "numpy", "pydantic"},
    "gateway.backends.redis": {"redis"},
    "gateway.cli": {"click"},
    "gateway.demo": {"click", "uvicorn", "uvloop", "websockets"},
    "gateway.middleware.metrics": {"prometheus_client"},
    "gateway.proxy.app": {"websockets"},
    "gateway.proxy.httpx_upstream": {"httpx", "click", "rich"},  # the two come with httpx's command line
    "gateway.proxy.websocket": {"websockets"},
    "gateway.server": {"uvicorn", "uvloop", "websockets", "click"},
    "gateway.settings": set(),
}


class Import(NamedTuple):
    module: str
    line: int
    later: bool  # in a function, or for types only

    def __str__(self) -> str:
        return f"line {self.line} imports {self.module}"


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """What a module belongs to: `gateway.proxy.pool` to `proxy`, `gateway` itself to `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path: Path) -> Iterator[Import]:
    """Every import of a module, names of the package's own resolved to the module where they live."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]

    def visit(node: ast.AST, later: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (Import(home(source, alias.name), node.lineno, later) for alias in node.names)
        else:
            later = later or is_for_types(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, later)

    return visit(ast.parse(path.read_text()), later=False)


def home(source: str, name: str) -> str:
    if f"{source}.{name}" in MODULES:
        return f"{source}.{name}"
    return gateway._HOMES.get(name, source) if source == "gateway" else source


def loaded_by(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after some code."""
    report = f"\nimport sys; print('loaded', *sorted({HEAVY!r} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split()[1:])


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    assert part in MAY_IMPORT, f"{module} has no place in the architecture: give it one in MAY_IMPORT"
    allowed = {"__init__", *MAY_IMPORT[part]}
    for found in imports(MODULES[module]):
        if found.module.split(".")[0] != "gateway":
            continue
        also = MAY_IMPORT_LATER.get(part, set()) if found.later else set()
        assert found.module == module or part_of(found.module) in allowed | also, f"{module}, {found}"


@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) == "policies"])
def test_policies_neither_wait_nor_look_at_a_clock_nor_reach_outside(module: str) -> None:
    for found in imports(MODULES[module]):
        top = found.module.split(".")[0]
        assert top == "gateway" or top in sys.stdlib_module_names, f"{module}, {found}: not the standard library's"
        assert top not in NOT_FOR_POLICIES, f"{module}, {found}"
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), f"{module} waits in line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            assert not CLOCKS.intersection(alias.name for alias in node.names), f"{module}, line {node.lineno}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("time", "date", "datetime"):
            assert node.attr not in CLOCKS, f"{module} looks at a clock in line {node.lineno}"


@pytest.mark.parametrize("module", sorted(MODULES.keys() - MAY_TOUCH_ENVIRONMENT))
def test_only_the_settings_touch_the_environment(module: str) -> None:
    forbidden = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in forbidden, f"{module} touches os.{node.attr} in line {node.lineno}"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            touched = forbidden.intersection(alias.name for alias in node.names)
            assert not touched, f"{module} imports {touched} in line {node.lineno}"


# `main` and `__main__` are programs: to import one is to run it.
@pytest.mark.parametrize("module", [module for module in MODULES if part_of(module) not in ("main", "__main__")])
def test_importing_a_module_loads_nothing_heavy_that_is_not_its_job(module: str) -> None:
    jobs = [jobs for name, jobs in MAY_LOAD.items() if f"{module}.".startswith(f"{name}.")]
    assert loaded_by(f"import {module}") <= set().union(*jobs)


def test_layers_used_alone_load_nothing_heavy() -> None:
    layers = ["AdmissionASGI", "BreakerASGI", "CorrelationASGI", "ErrorsASGI", "LoggingASGI", "RateLimitASGI"]
    code = f"from gateway import {', '.join(layers)}\napp = lambda scope, receive, send: None\n"
    assert loaded_by(code + "\n".join(f"{layer}(app)" for layer in layers)) == set()


@pytest.mark.parametrize("name", gateway.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(gateway, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        gateway.no_such_name  # noqa: B018
