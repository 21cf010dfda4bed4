"""What a security review asks of the manifests: Kubernetes' Pod Security Standard "restricted", and a little more.

https://kubernetes.io/docs/concepts/security/pod-security-standards names the fields. Each rule is a function that tells what is
wrong, and is tried on a pod that breaks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest

from tests.unit.k8s.manifests import OVERLAYS, Document, Workload, of_kind, rendered, selects, workloads

_VOLUMES = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC", "hostUsers")


def restricted(workload: Workload) -> Iterator[str]:
    """The Pod Security Standard's fields."""
    pod = workload.pod
    context = pod.get("securityContext", {})
    yield from (field for field in _HOST if pod.get(field))
    yield from (f"volume {v['name']}" for v in pod.get("volumes", []) if not (v.keys() - {"name"}) <= _VOLUMES)
    if not context.get("runAsNonRoot") or not context.get("runAsUser"):
        yield "runs as root"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    for container in workload.containers():
        own = container.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            yield f"{container['name']} may gain rights"
        if own.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container['name']} keeps capabilities"
        if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
            yield f"{container['name']} runs as root"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{container['name']} takes a port of the node"


def careful(workload: Workload) -> Iterator[str]:
    """What the standard leaves open."""
    pod = workload.pod
    if pod.get("enableServiceLinks") is not False:
        yield "a Service's address could be taken for a setting (LORAPLEX_PORT)"
    if workload.kind != "head" and pod.get("automountServiceAccountToken") is not False:
        yield "has a token of the Kubernetes API"
    if not pod.get("serviceAccountName"):
        yield "has the default account"
    for container in workload.containers():
        name, resources = container["name"], container.get("resources", {})
        if not container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            yield f"{name} may write to its image"
        if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
            yield f"{name} says not what it needs"
        if container["image"].endswith(":latest"):
            yield f"{name} runs whatever is latest"
        if workload.long_running and not {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys():
            yield f"{name} has no probes"
        if any("/bin/sh" in word or "bash" in word for word in container.get("command", [])):
            yield f"{name} needs a shell"


def spread(workload: Workload) -> Iterator[str]:
    """Pods of which there are several are on several nodes and zones."""
    constraints = workload.pod.get("topologySpreadConstraints", [])
    if workload.kind not in ("Job", "head") and {one["topologyKey"] for one in constraints} != {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }:
        yield "may all be on one node"
    if not all(selects(one["labelSelector"], workload.labels) for one in constraints):
        yield "counts other pods"


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("rule", [restricted, careful, spread])
def test_every_pod_keeps_to_the_rules(overlay: str, rule: Callable[[Workload], Iterator[str]]) -> None:
    """In every overlay, Jobs and the containers that run first included."""
    found = list(workloads(rendered(overlay)))
    assert found
    assert {one.name: list(rule(one)) for one in found} == {one.name: [] for one in found}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        (restricted, lambda pod: pod.update(hostNetwork=True)),
        (restricted, lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})),
        (restricted, lambda pod: pod["securityContext"].update(runAsNonRoot=False)),
        (restricted, lambda pod: pod["securityContext"].pop("seccompProfile")),
        (restricted, lambda pod: pod["containers"][0]["securityContext"].update(capabilities={"add": ["NET_ADMIN"]})),
        (restricted, lambda pod: pod["containers"][0]["securityContext"].pop("allowPrivilegeEscalation")),
        (restricted, lambda pod: pod["containers"][0]["ports"][0].update(hostPort=80)),
        (careful, lambda pod: pod.pop("enableServiceLinks")),
        (careful, lambda pod: pod.update(automountServiceAccountToken=True)),
        (careful, lambda pod: pod["containers"][0]["securityContext"].pop("readOnlyRootFilesystem")),
        (careful, lambda pod: pod["containers"][0].pop("resources")),
        (careful, lambda pod: pod["containers"][0].pop("startupProbe")),
        (careful, lambda pod: pod["containers"][0].update(command=["/bin/sh", "-c", "loraplex serve"])),
        (careful, lambda pod: pod["containers"][0].update(image="loraplex:latest")),
        (spread, lambda pod: pod.pop("topologySpreadConstraints")),
    ],
)
def test_the_rules_find_what_breaks_them(
    rule: Callable[[Workload], Iterator[str]], change: Callable[[dict[str, Any]], object]
) -> None:
    """One at a time, in a pod that is good but for that."""
    good = next(workloads(rendered("single-gpu")))
    pod: Any = deepcopy(good.pod)
    change(pod)
    assert len(list(rule(Workload(good.name, good.kind, good.labels, pod)))) == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_workload_that_serves_has_a_disruption_budget(overlay: str) -> None:
    """So that a drained node takes one pod of a kind at a time."""
    documents = rendered(overlay)
    budgets = of_kind(documents, "PodDisruptionBudget")
    for workload in workloads(documents):
        chosen = [one for one in budgets if selects(one["spec"]["selector"], workload.labels)]
        assert len(chosen) == workload.long_running, workload.name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_find_pods_and_their_ports(overlay: str) -> None:
    """A Service, route, claim or account that nothing stands behind is a misspelling."""
    documents = rendered(overlay)
    pods = list(workloads(documents))
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(documents, "Service")}
    for name, service in services.items():
        behind = [one for one in pods if selects(service["selector"], one.labels)]
        assert behind, name
        ports = {port["name"] for one in behind for c in one.pod["containers"] for port in c.get("ports", [])}
        assert {port["targetPort"] for port in service["ports"]} <= ports
    for stateful in of_kind(documents, "StatefulSet"):
        assert services[stateful["spec"]["serviceName"]]["clusterIP"] == "None"
    for route in of_kind(documents, "GRPCRoute"):
        for backend in (one for rule in route["spec"]["rules"] for one in rule["backendRefs"]):
            assert backend["port"] in {port["port"] for port in services[backend["name"]]["ports"]}
    accounts = {one["metadata"]["name"] for one in of_kind(documents, "ServiceAccount")}
    claims = {one["metadata"]["name"] for one in of_kind(documents, "PersistentVolumeClaim")}
    for one in pods:
        assert one.pod["serviceAccountName"] in accounts
        named = {
            v["persistentVolumeClaim"]["claimName"] for v in one.pod.get("volumes", []) if "persistentVolumeClaim" in v
        }
        assert named <= claims


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_mount_has_its_volume(overlay: str) -> None:
    """And nothing is mounted over what the image brings."""
    documents = rendered(overlay)
    templates = {
        t["metadata"]["name"]
        for s in of_kind(documents, "StatefulSet")
        for t in s["spec"].get("volumeClaimTemplates", [])
    }
    for workload in workloads(documents):
        volumes = {volume["name"] for volume in workload.pod.get("volumes", [])} | templates
        for mount in (m for c in workload.containers() for m in c.get("volumeMounts", [])):
            assert mount["name"] in volumes
            assert not mount["mountPath"].startswith("/usr")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traffic_is_refused_unless_it_is_allowed(overlay: str) -> None:
    """Both ways for every pod, and what is allowed is never any port from anywhere."""
    documents = rendered(overlay)
    policies = of_kind(documents, "NetworkPolicy")
    for workload in workloads(documents):
        mine = [one["spec"] for one in policies if selects(one["spec"]["podSelector"], workload.labels)]
        assert {kind for one in mine for kind in one["policyTypes"]} == {"Ingress", "Egress"}, workload.name
        assert [rule for one in mine for rule in one.get("ingress", []) if not rule.get("from")] == []
        assert [rule for one in mine for rule in one.get("egress", []) if not rule.get("to")] == []
        if workload.long_running:
            assert _calling_ports(mine) <= _ports(workload)


def _calling_ports(policies: list[Document]) -> set[Any]:
    return {port["port"] for policy in policies for rule in policy.get("ingress", []) for port in rule.get("ports", [])}


def _ports(workload: Workload) -> set[Any]:
    return {port["name"] for container in workload.pod["containers"] for port in container.get("ports", [])}
