"""What leaves the house: manifests, image, locks and the commands that make them."""

import ipaddress
import json
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gateway
from gateway.policies.edge import EdgeLimits
from gateway.settings import Settings

ROOT = Path(__file__).parent.parent
K8S = ROOT / "deploy" / "k8s"
TREES = {"default": K8S, "development": K8S / "overlays/development", "production": K8S / "overlays/production"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
Manifest = dict[str, Any]


# Reading the manifests: as kubectl renders them, where there is one, and by hand, without the overlays' patches.


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomization(directory: Path) -> Manifest:
    return documents((directory / "kustomization.yaml").read_text())[0]


def literals(directory: Path, generator: Manifest) -> Iterator[tuple[str, str]]:
    lines = [line for name in generator.get("envs", ()) for line in (directory / name).read_text().splitlines()]
    for line in [*lines, *generator.get("literals", ())]:
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            yield name, value


def assembled(directory: Path, config_maps: dict[str, Manifest]) -> list[Manifest]:
    found: list[Manifest] = []
    top = kustomization(directory)
    for entry in [*top.get("resources", ()), *top.get("components", ())]:
        path = directory / entry
        found += assembled(path, config_maps) if path.is_dir() else documents(path.read_text())
    for generator in top.get("configMapGenerator", ()):
        name, merges = generator["name"], generator.get("behavior") == "merge"
        assert (name in config_maps) == merges
        if not merges:
            config_maps[name] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {}}
            found.append(config_maps[name])
        config_maps[name]["data"] |= dict(literals(directory, generator))
    return found


def by_hand(directory: Path) -> list[Manifest]:
    return assembled(directory, {})


def by_kubectl(directory: Path) -> list[Manifest]:
    run = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return documents(run.stdout)


READERS: list[Callable[[Path], list[Manifest]]] = [by_hand]
if shutil.which("kubectl"):
    READERS.append(by_kubectl)


@pytest.fixture(scope="module", params=[(tree, read) for tree in TREES for read in READERS], ids=lambda p: str(p[0]))
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    tree, read = request.param
    found: list[Manifest] = read(TREES[tree])
    return found


def of_kind(manifests: list[Manifest], kind: str, name: str = "ai-gateway") -> Manifest:
    return next(one for one in manifests if one["kind"] == kind and one["metadata"]["name"].startswith(name))


def settings_in(manifests: list[Manifest]) -> dict[str, str]:
    data: dict[str, str] = of_kind(manifests, "ConfigMap")["data"]
    return data


def pods(manifests: list[Manifest]) -> list[Manifest]:
    return [manifest["spec"]["template"] for manifest in manifests if manifest["kind"] == "Deployment"]


def gateway_container(manifests: list[Manifest]) -> Manifest:
    container: Manifest = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    return container


# Kubernetes.


@pytest.mark.parametrize("version", ["1.27", kubernetes_validate.latest_version()])
def test_every_manifest_keeps_to_the_schema_of_kubernetes(manifests: list[Manifest], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_manifest_is_in_a_kustomization_except_the_example_of_a_secret() -> None:
    used = {
        (path.parent / entry).resolve()
        for path in K8S.rglob("kustomization.yaml")
        for key in ("resources", "components")
        for entry in kustomization(path.parent).get(key, ())
    }
    left = {path.name for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml" and path not in used}
    assert left == {"secret.example.yaml"}


def test_no_pod_may_be_root_or_write_to_its_root_or_gain_a_privilege(manifests: list[Manifest]) -> None:
    for pod in pods(manifests):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["runAsGroup"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert all("emptyDir" in volume and "sizeLimit" in volume["emptyDir"] for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()


def test_kubernetes_asks_the_gateway_whether_it_lives_and_whether_it_is_ready(manifests: list[Manifest]) -> None:
    container = gateway_container(manifests)
    asked = {probe: container[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {
        "startupProbe": {"path": "/health/live", "port": "http"},
        "livenessProbe": {"path": "/health/live", "port": "http"},
        "readinessProbe": {"path": "/health/ready", "port": "http"},
    }
    assert container["ports"] == [{"name": "http", "containerPort": 8080}]


def test_a_pod_has_time_to_drain_and_none_is_missing_while_it_is_replaced(manifests: list[Manifest]) -> None:
    spec = of_kind(manifests, "Deployment")["spec"]
    edge = Settings.load(settings_in(manifests)).edge
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > edge.drain_delay + edge.drain_timeout
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_default_drain_fits_the_grace_period_of_the_base() -> None:
    spec = of_kind(by_hand(K8S / "base"), "Deployment")["spec"]
    edge = EdgeLimits()
    assert spec["replicas"] == 2
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= edge.drain_delay + edge.drain_timeout + 5


def test_all_that_points_at_the_gateway_finds_it(manifests: list[Manifest]) -> None:
    deployment = of_kind(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    service = of_kind(manifests, "Service")["spec"]
    assert service["selector"] == labels
    assert service["ports"][0]["targetPort"] == "http"
    assert of_kind(manifests, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    for constraint in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"] == labels
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    assert of_kind(manifests, "ServiceAccount")["metadata"]["name"] == account
    for budget in (one for one in manifests if one["kind"] == "PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] == labels
    for scaler in (one for one in manifests if one["kind"] == "HorizontalPodAutoscaler"):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert scaler["spec"]["scaleTargetRef"]["kind"] == "Deployment"
        assert scaler["spec"]["minReplicas"] >= 2
        assert [metric["resource"]["name"] for metric in scaler["spec"]["metrics"]] == ["cpu"]


def test_prometheus_is_told_where_the_metrics_are(manifests: list[Manifest]) -> None:
    annotations = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": "8080",
        "prometheus.io/path": "/metrics",
    }


def test_settings_come_from_the_config_map_and_then_from_a_secret_that_is_not_ours(manifests: list[Manifest]) -> None:
    first, second = gateway_container(manifests)["envFrom"]
    assert first["configMapRef"]["name"] == of_kind(manifests, "ConfigMap")["metadata"]["name"]
    assert second["secretRef"]["name"] == "ai-gateway-secrets"
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]


def test_every_setting_in_the_manifests_is_one_the_gateway_takes(manifests: list[Manifest]) -> None:
    settings = Settings.load(settings_in(manifests))
    addresses = {one.service.name: one.service.replicas for one in settings.services}
    assert addresses == {one.service.name: one.service.replicas for one in Settings.load({}).services}


def test_only_private_networks_see_its_own_paths_or_speak_for_others(manifests: list[Manifest]) -> None:
    for setting in ("SYSTEM_FROM", "TRUSTED_PROXIES"):
        networks = [ipaddress.ip_network(entry) for entry in settings_in(manifests)[setting].split(",")]
        assert not [network for network in networks if network.is_global or network.prefixlen < 7]
        assert any(ipaddress.ip_address("10.1.2.3") in network for network in networks)


def test_the_example_of_a_secret_is_one_and_the_gateway_takes_what_it_sets() -> None:
    (secret,) = documents((K8S / "secret.example.yaml").read_text())
    kubernetes_validate.validate(secret, kubernetes_validate.latest_version(), strict=True)
    assert secret["metadata"]["name"] == "ai-gateway-secrets"
    settings = Settings.load(secret["stringData"])
    assert (settings.redis_url, settings.qdrant_url, settings.admin_token) == (
        secret["stringData"]["REDIS_URL"],
        secret["stringData"]["QDRANT_URL"],
        secret["stringData"]["ADMIN_TOKEN"],
    )


def test_the_redis_of_the_default_is_reached_by_the_gateway_alone() -> None:
    manifests = by_hand(K8S)
    service = of_kind(manifests, "Service", "ai-gateway-redis")
    assert settings_in(manifests)["REDIS_URL"] == f"redis://{service['metadata']['name']}:6379/0"
    policy = of_kind(manifests, "NetworkPolicy", "ai-gateway-redis")["spec"]
    assert policy["podSelector"]["matchLabels"] == service["spec"]["selector"]
    labels = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert [rule["from"] for rule in policy["ingress"]] == [[{"podSelector": {"matchLabels": labels}}]]


def test_production_pins_its_image_wants_its_secret_and_leaves_the_number_of_pods_alone() -> None:
    top = kustomization(TREES["production"])
    assert [(image["name"], image["newTag"]) for image in top["images"]] == [("ai-gateway", gateway.__version__)]
    assert not top.get("components")
    patches = [yaml.safe_load(patch["patch"]) for patch in top["patches"]]
    operations = {step["path"]: step for patch in patches if isinstance(patch, list) for step in patch}
    assert operations["/spec/replicas"]["op"] == "remove"
    assert operations["/spec/template/spec/containers/0/envFrom/1/secretRef/optional"]["value"] is False


# The image.


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def in_last_stage(word: str) -> list[str]:
    stages = [position for position, (found, _) in enumerate(instructions()) if found == "FROM"]
    return [rest for found, rest in instructions()[stages[-1] :] if found == word]


def test_the_image_runs_as_the_number_that_the_manifests_name_and_not_as_root() -> None:
    (user,) = in_last_stage("USER")
    security = of_kind(by_hand(K8S), "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert int(user.split(":")[0]) > 0


def test_the_image_starts_the_gateway_without_a_shell_and_stops_it_with_sigterm() -> None:
    (entrypoint,), (command,) = in_last_stage("ENTRYPOINT"), in_last_stage("CMD")
    assert json.loads(entrypoint) == ["ai-gateway"]
    assert json.loads(command) == ["serve"] == gateway_container(by_hand(K8S))["args"]
    assert PROJECT["project"]["scripts"] == {"ai-gateway": "gateway.cli:main"}
    assert in_last_stage("STOPSIGNAL") == ["SIGTERM"]
    assert in_last_stage("EXPOSE") == ["8080"]
    assert not in_last_stage("RUN")


def test_all_that_the_image_downloads_is_checked_by_its_hash() -> None:
    steps = [step for word, rest in instructions() if word == "RUN" for step in rest.split("&&")]
    downloads = [step for step in steps if re.search(r"pip .*(install|wheel|download)", step)]
    assert len(downloads) == 4
    for step in downloads:
        assert "--require-hashes" in step or "--no-index" in step or "--no-build-isolation" in step, step


def test_an_image_whose_gateway_is_interpreted_or_lacks_a_module_is_not_built() -> None:
    built = [rest for word, rest in instructions() if word == "RUN"][-1].split(" && ")
    version, load = built[-2:]
    assert version == "/opt/gateway/bin/ai-gateway --version | grep -F '(compiled)'"
    assert load == "/opt/gateway/bin/python3 -c 'import gateway.main, gateway.server.worker'"


def test_the_image_is_made_of_files_that_its_context_lets_through() -> None:
    shown = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == shown
    assert not [name for name in copied if not (ROOT / name).exists()]


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (None, False)])
def test_the_health_check_of_the_image_asks_health(status: int | None, healthy: bool) -> None:
    asked: list[str] = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status or 0)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the name it is called by
            pass

    (check,) = in_last_stage("HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert command[0] == "python3"
    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        code = command[2].replace("8080", str(server.server_address[1]))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        if status is None:
            server.server_close()
        else:
            thread.start()
        run = subprocess.run([sys.executable, command[1], code], check=False, capture_output=True)
        if status is not None:
            server.shutdown()
            thread.join()
    assert (run.returncode == 0) == healthy
    assert asked == ([] if status is None else ["/health"])


# The locks.


def pins(name: str) -> dict[str, set[str]]:
    """Versions by distribution; more than one where it depends on the Python."""
    found: dict[str, set[str]] = {}
    text = (ROOT / "requirements" / name).read_text()
    for block in re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]:
        package, version = block.split()[0].split("==")
        assert "--hash=sha256:" in block, package
        found.setdefault(package, set()).add(version)
    return found


def required(requirements: list[Any]) -> list[Requirement]:
    return [Requirement(line) for line in requirements if isinstance(line, str)]


def test_the_locks_hold_what_the_project_asks_for() -> None:
    project = PROJECT["project"]
    extras = [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    groups = {name: required(lines) for name, lines in PROJECT["dependency-groups"].items()}
    core = required(project["dependencies"])
    qdrant = required(project["optional-dependencies"]["qdrant"])
    wanted = {
        "base.txt": [*core, *qdrant],
        "build.txt": groups["build"],
        "dev.txt": [*core, *extras, *groups["build"], *groups["dev"]],
    }
    for name, requirements in wanted.items():
        locked = pins(name)
        for requirement in requirements:
            versions = locked[canonicalize_name(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in versions), f"{name}: {requirement}"


def test_tests_run_with_the_versions_that_the_image_has() -> None:
    everything = pins("dev.txt")
    for name in ("base.txt", "build.txt"):
        assert {package: everything.get(package) for package in pins(name)} == pins(name)


def test_no_lock_names_where_it_was_compiled() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        assert not re.search(r"://|^--", path.read_text(), flags=re.MULTILINE)


def test_the_build_system_is_locked() -> None:
    assert {Requirement(line).name for line in PROJECT["build-system"]["requires"]} <= pins("build.txt").keys()


# What CI runs.


def test_ci_runs_the_checks_and_then_the_tests_once_interpreted_and_once_compiled() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 == 0o111
    lines = script.read_text().splitlines()
    commands = [
        line.partition("#")[0].strip() for line in lines if "make " in line and not line.startswith((" ", "#", "if"))
    ]
    assert commands == ["make lint", "COVERAGE=1 make test", "make native test"]
    assert lines[-1].startswith(commands[-1])
    assert "set -euo pipefail" in lines
