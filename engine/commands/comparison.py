"""Two versions side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.commands import describe, output
from engine.commands.backends import Backend, find

_SIZES = frozenset({"size_bytes"})


async def compare(backend: Backend, first: str, second: str) -> dict[str, Any]:
    """The fields that differ, as {field: [a, b]}, and the names of those that do not."""
    a, b = await find(backend, first), await find(backend, second)
    left, right = await _fields(backend, a), await _fields(backend, b)
    names = list(dict.fromkeys([*left, *right]))
    pairs = {name: [left.get(name), right.get(name)] for name in names}
    return {
        "a": describe.ref_of(a),
        "b": describe.ref_of(b),
        "different": {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "same": {name: pair[0] for name, pair in pairs.items() if pair[0] == pair[1]},
    }


async def _fields(backend: Backend, version: pb.AdapterVersion) -> dict[str, Any]:
    """Everything about a version under flat names; absent values are left out."""
    data = describe.version_data(version)
    fields = {
        **{name: data[name] for name in ("created_at", "publisher", "run_id")},
        "base": f"{data['base']['name']} {data['base']['fingerprint']}",
        **{name: data[name] for name in ("rank", "alpha", "targets", "size_bytes", "notes", "digest")},
        **{f"file {file['path']}": file["sha256"] for file in data["files"]},
        **{f"evaluation {name}": value for name, value in (data["evaluation"] or {}).items()},
        **await _scores(backend, version),
        **{f"config {name}": value for name, value in (await backend.config(version) or {}).items()},
    }
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


async def _scores(backend: Backend, version: pb.AdapterVersion) -> dict[str, Any]:
    """What the version's latest evaluation found, and on which suite."""
    records = await backend.evaluations(version.name, version.version)
    if not records:
        return {}
    result = records[-1]["results"].get(describe.ref_of(version), {})
    scores = {f"scored {metric}": entry["value"] for metric, entry in result.items() if "value" in entry}
    return {"scored on": f"{records[-1]['suite']}, {records[-1]['rows']} rows"} | scores


def layer_norms(first: Path, second: Path) -> list[dict[str, Any]]:
    """What two adapters change, layer by layer: the norms of both changes and of their difference, and their cosine.

    Both are of one base. Norms are Frobenius norms over all of a layer's modules; a layer that one leaves alone counts as no
    change there.
    """
    import math

    from engine.tuning.deltas import Deltas

    a, b = Deltas.read(first), Deltas.read(second)
    layers: dict[str, list[float]] = {}
    for module in sorted(a.modules | b.modules, key=_by_number):
        left = a.of(module) if module in a.modules else None
        right = b.of(module) if module in b.modules else None
        dot = float((left * right).sum()) if left is not None and right is not None else 0.0
        squares = [float((change**2).sum()) if change is not None else 0.0 for change in (left, right)]
        sums = layers.setdefault(_layer(module), [0.0, 0.0, 0.0])
        layers[_layer(module)] = [sums[0] + squares[0], sums[1] + squares[1], sums[2] + dot]
    return [
        {
            "layer": name,
            "a": math.sqrt(one),
            "b": math.sqrt(other),
            "difference": math.sqrt(max(0.0, one + other - 2 * dot)),
            "cosine": dot / math.sqrt(one * other) if one and other else 0.0,
        }
        for name, (one, other, dot) in layers.items()
    ]


def _layer(module: str) -> str:
    """The name of a module's layer: "layer 3" for model.layers.3.self_attn.q_proj."""
    return next((f"layer {part}" for part in module.split(".") if part.isdigit()), module)


def _by_number(module: str) -> tuple[int, str]:
    return next((int(part) for part in module.split(".") if part.isdigit()), -1), module


def comparison(data: dict[str, Any]) -> Iterator[RenderableType]:
    """The differences as a table, and what is the same in a line."""
    if not data["different"]:
        yield Text(f"{data['a']} and {data['b']} are the same")
        return
    made = output.table("", data["a"], data["b"])
    for name, (a, b) in data["different"].items():
        made.add_row(Text(name, "dim"), _cell(name, a), _cell(name, b))
    yield made
    if data.get("layers"):
        yield Text()
        norms = output.table("weights changed by", data["a"], data["b"], "difference", "cosine")
        for row in data["layers"]:
            norms.add_row(row["layer"], *(f"{row[key]:.3f}" for key in ("a", "b", "difference", "cosine")))
        yield norms
    if data.get("layers_left_out"):
        yield Text(f"changes are not compared layer by layer: {data['layers_left_out']}", "dim")
    if data["same"]:
        yield Text(f"the same: {', '.join(data['same'])}", "dim")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return describe.NONE
    if name in _SIZES:
        return output.size(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    text = str(value)
    return text[:12] if name.startswith("file ") else text
