"""The overlays as a cluster would get them, and what is common to their workloads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
KUBERNETES = "1.37.0"
_SCHEMAS = resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"

Document = Mapping[str, Any]


@cache
def rendered(overlay: str) -> tuple[Document, ...]:
    """Every resource of an overlay, as `kubectl kustomize` makes it."""
    return built(K8S / "overlays" / overlay)


def built(folder: Path) -> tuple[Document, ...]:
    """Every resource of a kustomization."""
    kubectl = Path(sys.executable).with_name("kubectl")
    made = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.safe_load_all(made.stdout))


@dataclass(frozen=True)
class Workload:
    """Something that makes pods; `long_running` unless it is a Job."""

    name: str
    kind: str
    labels: Mapping[str, str]
    pod: Mapping[str, Any]

    @property
    def long_running(self) -> bool:
        """Whether its pods are to run for ever."""
        return self.kind != "Job"

    def containers(self) -> list[Mapping[str, Any]]:
        """All containers, those that run first included."""
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]


def workloads(documents: tuple[Document, ...]) -> Iterator[Workload]:
    """Every workload of an overlay; a Ray cluster's groups are workloads too."""
    for document in documents:
        name, kind, spec = document["metadata"]["name"], document["kind"], document.get("spec", {})
        if kind in ("StatefulSet", "Deployment", "Job"):
            yield _workload(name, kind, spec["template"])
        elif kind == "RayService":
            cluster = spec["rayClusterConfig"]
            yield _workload("head", "head", cluster["headGroupSpec"]["template"])
            for group in cluster["workerGroupSpecs"]:
                yield _workload(group["groupName"], "workers", group["template"])


def _workload(name: str, kind: str, template: Mapping[str, Any]) -> Workload:
    return Workload(name, kind, template["metadata"].get("labels", {}), template["spec"])


def of_kind(documents: tuple[Document, ...], *kinds: str) -> list[Document]:
    """The documents of these kinds."""
    return [document for document in documents if document["kind"] in kinds]


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a selector, with or without `matchLabels`, picks these labels."""
    wanted = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    return all(labels.get(key) == value for key, value in wanted.items())


@cache
def _registry() -> Registry[Any]:
    definitions = Resource.from_contents(json.loads((_SCHEMAS / "_definitions.json").read_text()))
    return definitions @ Registry()


@cache
def _validator(api_version: str, kind: str) -> Any:
    group, _, version = api_version.rpartition("/")
    ours = K8S / "schemas" / f"{kind.lower()}.json"
    if ours.exists():
        schema = json.loads(ours.read_text())
    else:
        prefix = f"{group.partition('.')[0]}-" if group else ""
        schema = json.loads((_SCHEMAS / f"{kind.lower()}-{prefix}{version}.json").read_text())
    return jsonschema.Draft202012Validator(schema, registry=_registry())


def schema_problems(document: Document) -> list[str]:
    """What a cluster's API would refuse, field by field."""
    found = _validator(document["apiVersion"], document["kind"]).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
