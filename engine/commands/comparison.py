"""Two versions side by side."""

from __future__ import annotations

from collections.abc import Iterator
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
        **{f"config {name}": value for name, value in (await backend.config(version) or {}).items()},
    }
    return {name: value for name, value in fields.items() if value not in (None, "", [], {})}


def comparison(data: dict[str, Any]) -> Iterator[RenderableType]:
    """The differences as a table, and what is the same in a line."""
    if not data["different"]:
        yield Text(f"{data['a']} and {data['b']} are the same")
        return
    made = output.table("", data["a"], data["b"])
    for name, (a, b) in data["different"].items():
        made.add_row(Text(name, "dim"), _cell(name, a), _cell(name, b))
    yield made
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
