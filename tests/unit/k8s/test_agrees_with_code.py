"""Every setting, argument, port, path, service, metric and version in the manifests is one that the code has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import typer.main
import yaml

from engine.cli import make_app
from engine.client import AsyncClient
from engine.client.testing import FakeServer
from engine.cluster.router.workers import source_of
from engine.config import ClusterSettings, RouterSettings, Settings, load
from engine.server.grpc_server import SERVICES
from tests.unit.k8s.exported import exported, selectors
from tests.unit.k8s.manifests import OVERLAYS, ROOT, Document, Workload, of_kind, rendered, workloads

KINDS: dict[str, type[Settings] | type[RouterSettings]] = {"serve": Settings, "router": RouterSettings}
COMMAND: Any = typer.main.get_command(make_app())
IN_IMAGE = "/usr/local/share/loraplex/examples"  # where the demo image has the examples
LONGEST_STREAM_S = 600  # what docs/kubernetes.md promises: a stream of ten minutes outlives its pod's end
_CLOSING_S = 20  # to close everything once the streams have ended


def environment(documents: tuple[Document, ...], container: Mapping[str, Any]) -> dict[str, str]:
    """What a container's process finds in its environment."""
    maps = {one["metadata"]["name"]: one.get("data", {}) for one in of_kind(documents, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]
    return found | {one["name"]: one.get("value", "") for one in container.get("env", [])}


def ours(overlay: str) -> Iterator[tuple[Workload, Mapping[str, Any], dict[str, str]]]:
    """The containers that run `loraplex`, with their environment; Ray starts its own by itself."""
    documents = rendered(overlay)
    for workload in workloads(documents):
        for container in workload.containers():
            if "args" in container:
                yield workload, container, environment(documents, container)


def settings_of(overlay: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Workload, Mapping[str, Any], Any]]:
    """Settings as the servers and routers of an overlay read them."""
    for workload, container, variables in ours(overlay):
        if kind := KINDS.get(container["args"][0]):
            with monkeypatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                yield workload, container, load(kind)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting(overlay: str) -> None:
    """A misspelt one would be ignored, and the default served."""
    for _, container, variables in ours(overlay):
        kind = KINDS.get(container["args"][0])
        prefix = kind.model_config["env_prefix"] if kind else "LORAPLEX_"
        known = {f"{prefix}{name}".upper() for name in kind.model_fields} if kind else set()
        assert {name for name in variables if name.startswith("LORAPLEX_")} <= known


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_arguments_are_understood(overlay: str) -> None:
    """Each container's command line is one that the program accepts."""
    for _, container, _ in ours(overlay):
        command, words = COMMAND, [word.replace(IN_IMAGE, str(ROOT / "examples")) for word in container["args"]]
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context("loraplex", words).close()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_and_probes_are_where_the_servers_listen(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are valid, too, and other pods reach the server."""
    for workload, container, settings in settings_of(overlay, monkeypatch):
        assert settings.host == "0.0.0.0"
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"grpc": settings.port, "http": settings.http_port}
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
        assert {container[name]["httpGet"]["port"] for name in ("readinessProbe", "livenessProbe", "startupProbe")} == {
            "http"
        }
        if isinstance(settings, RouterSettings):
            source_of(settings)
            service, port = settings.replicas.removeprefix("dns:").rsplit(":", 1)
            named = {one["metadata"]["name"]: one["spec"] for one in of_kind(rendered(overlay), "Service")}
            assert int(port) in {one["port"] for one in named[service]["ports"]}, workload.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_speak_tls_where_the_server_does(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every file of a setting lies in a Secret that is mounted as a folder, which its user may read."""
    for workload, container, settings in settings_of(overlay, monkeypatch):
        schemes = {
            container[probe]["httpGet"].get("scheme", "HTTP")
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        }
        assert schemes == {"HTTPS" if settings.tls_certificate else "HTTP"}
        assert settings.allow_remote is (settings.tls_certificate is None)
        secrets = {v["name"]: v["secret"] for v in workload.pod["volumes"] if "secret" in v}
        mounts = {m["mountPath"]: m for m in container["volumeMounts"] if m["name"] in secrets}
        assert not any("subPath" in mount for mount in mounts.values())
        names = [
            name for name in type(settings).model_fields if "tls" in name or name in ("policy", "replica_key_file")
        ]
        files = [Path(value) for name in names if isinstance(value := getattr(settings, name), Path)]
        assert {str(file.parent) for file in files} == set(mounts)
        for mount in mounts.values():
            assert secrets[mount["name"]]["defaultMode"] == 0o440
            assert workload.pod["securityContext"]["fsGroup"] == workload.pod["securityContext"]["runAsGroup"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_outlives_its_longest_stream(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause before SIGTERM, the drain and the closing fit into the time that Kubernetes gives."""
    for workload, container, settings in settings_of(overlay, monkeypatch):
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert settings.drain_s >= LONGEST_STREAM_S
        assert workload.pod["terminationGracePeriodSeconds"] >= pause + settings.drain_s + _CLOSING_S
        # Kubernetes notices that a pod is not ready before SIGTERM comes, whatever else is late.
        assert pause > container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["failureThreshold"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_engine_has_time_to_start_and_room_for_its_adapters(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes for a large model; prepared adapters fit into the shared memory, copies onto the volume, all into the pod."""
    documents = rendered(overlay)
    for workload, container, settings in settings_of(overlay, monkeypatch):
        if not isinstance(settings, Settings):
            continue
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in workload.pod["volumes"]}
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert bytes_of(shared["sizeLimit"]) > settings.host_memory_mib * 2**20
        assert bytes_of(container["resources"]["limits"]["memory"]) > bytes_of(shared["sizeLimit"]) * 2
        assert str(settings.cache).startswith("/var/lib/loraplex/")
        for claim in (c for s in of_kind(documents, "StatefulSet") for c in s["spec"].get("volumeClaimTemplates", [])):
            assert bytes_of(claim["spec"]["resources"]["requests"]["storage"]) > settings.disk_cache_mib * 2**20
        writable = set(mounts) | {"/models"}
        assert settings.registry.startswith("s3://") or settings.registry in writable


def bytes_of(quantity: str) -> float:
    """A Kubernetes quantity of memory."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
    return float(quantity[:-2]) * units[quantity[-2:]]


def test_the_route_leads_to_services_that_exist() -> None:
    """By the names in the protos, and none that changes anything."""
    routes = of_kind(rendered("fleet"), "GRPCRoute")
    named = {m["method"]["service"] for r in routes for rule in r["spec"]["rules"] for m in rule["matches"]}
    assert named == {"loraplex.v1.GenerationService", "grpc.health.v1.Health"}
    assert "loraplex.v1.GenerationService" in {service.full_name for service in SERVICES}


@pytest.mark.filterwarnings("ignore")  # Ray's own, of pydantic
def test_the_ray_application_is_ours() -> None:
    """Serve accepts the configuration, the import path is right, and every argument is a setting, the nested ones too."""
    from ray.serve.schema import ServeDeploySchema

    from engine.cluster.ray import actors, application

    (service,) = of_kind(rendered("ray"), "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert app.import_path == f"{application.__name__}:{application.build.__name__}"
    spec = load(ClusterSettings, **app.args)
    engine, router = (
        actors.engine_settings(spec, "10.0.0.1", 1),
        actors.router_settings(spec, ROOT / "fleet.yaml"),
    )
    cluster = service["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in worker["ports"]}
    assert (ports["grpc"], ports["http"]) == (router["port"], router["http_port"])
    assert min(engine["drain_s"], router["drain_s"]) >= LONGEST_STREAM_S
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= engine["drain_s"] + 2 * actors.SLOW_S
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) == spec.gpus
    assert float(worker["resources"]["requests"]["cpu"]) >= spec.cpus
    assert (group["minReplicas"], group["maxReplicas"]) == (spec.replicas, spec.max_replicas)
    assert f"\nray=={cluster['rayVersion']} " in (ROOT / "gpu.lock").read_text()
    assert cluster["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("component", ["autoscaling", "keda"])
def test_scaling_follows_metrics_that_exist(component: str) -> None:
    """By the names that the server exports."""
    file = ROOT / "k8s" / "components" / component / "scaler.yaml"
    scaler = yaml.safe_load(file.read_text())
    if component == "keda":
        found = {name for one in scaler["spec"]["triggers"] for name in names_in(one["metadata"]["query"])}
    else:
        found = {one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"]}
    assert found
    assert found <= exported().keys()


def names_in(query: str) -> set[str]:
    """The metrics that a PromQL query asks for."""
    return {name for name, _ in selectors(promql_parser.parse(query))}


async def test_the_docs_clients_reach_a_server_by_its_name(loraplex_server: FakeServer) -> None:
    """`dns:///` with round robin, as docs/kubernetes.md says, is a target that our client takes."""
    async with AsyncClient(f"dns:///{loraplex_server.target}") as client:
        assert (await client.generate(prompt="hi")).text
