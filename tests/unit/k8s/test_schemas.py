"""Every overlay is built, and every resource in it has the fields that a cluster knows, and only those."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.k8s.manifests import K8S, OVERLAYS, of_kind, rendered, schema_problems


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_fits_its_schema(overlay: str) -> None:
    """Kubernetes' own and the custom ones, strictly: an unknown field is an error."""
    for document in rendered(overlay):
        assert schema_problems(document) == [], document["metadata"]["name"]


@pytest.mark.parametrize(
    "file", sorted((K8S / "components").glob("*/*.yaml")), ids=lambda file: "/".join(file.parts[-2:])
)
def test_every_component_fits_its_schema(file: Path) -> None:
    """Also what no overlay takes."""
    for document in yaml.safe_load_all(file.read_text()):
        if file.name != "kustomization.yaml":
            assert schema_problems(document) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_resource_is_in_the_namespace(overlay: str) -> None:
    """And no two have one name."""
    documents = rendered(overlay)
    assert {one["metadata"].get("namespace", "loraplex") for one in documents} == {"loraplex"}
    names = [(one["kind"], one["metadata"]["name"]) for one in documents]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("overlay", "kind", "path"),
    [
        ("single-gpu", "StatefulSet", "spec.template.spec.containers.0"),
        ("fleet", "GRPCRoute", "spec.rules.0"),
        ("fleet", "ScaledObject", "spec"),
        ("ray", "RayService", "spec.rayClusterConfig"),
        ("ray", "RayService", "spec.rayClusterConfig.headGroupSpec.template.spec"),
    ],
)
def test_a_misspelt_field_is_found(overlay: str, kind: str, path: str) -> None:
    """The schemas are strict wherever we write: this is what the other tests stand on."""
    broken: Any = deepcopy(of_kind(rendered(overlay), kind)[0])
    place = broken
    for step in path.split("."):
        place = place[int(step) if step.isdecimal() else step]
    place["mispelt"] = 1
    assert any("mispelt" in problem for problem in schema_problems(broken))
