"""JSON schemas of scenario and requirements files, for editors; they are made from the models, and committed.

python -m loadtest.plan.schemas          write them to loadtest/schemas
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtest.plan.requirements import Requirements
from loadtest.plan.scenario import Scenario, Workload

FOLDER = Path(__file__).parents[1] / "schemas"
_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def scenario() -> dict[str, Any]:
    """Of a scenario file. `quick` and each case may have any key of a workload, and one or two of their own."""
    made = Scenario.model_json_schema()
    keys = {name: made["properties"][name] for name in Workload.model_fields}
    names = {"type": "array", "items": {"type": ["string", "number"]}, "description": "The cases to keep."}
    variant = {"name": {"type": ["string", "number"]}}
    made["properties"]["quick"] |= {"additionalProperties": False, "properties": keys | {"cases": names}}
    made["properties"]["cases"]["items"] = {
        "type": "object", "additionalProperties": False, "properties": keys | variant,
    }  # fmt: skip
    return _schema("A scenario of loraplex loadtest", made)


def requirements() -> dict[str, Any]:
    """Of a requirements file."""
    return _schema("Requirements of loraplex loadtest", Requirements.model_json_schema())


def _schema(title: str, made: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"$schema": _DRAFT, "title": title} | _without_defaults(made)
    return found


def files() -> dict[Path, str]:
    """What the committed files must hold."""
    made = {"scenario.json": scenario(), "requirements.json": requirements()}
    return {FOLDER / name: json.dumps(schema, indent=1) + "\n" for name, schema in made.items()}


def _without_defaults(schema: Any) -> Any:
    """Null defaults and generated titles say nothing to a reader."""
    if isinstance(schema, dict):
        kept = {key: value for key, value in schema.items() if not (key == "default" and value is None)}
        if isinstance(kept.get("title"), str):
            del kept["title"]
        return {key: _without_defaults(value) for key, value in kept.items()}
    return [_without_defaults(one) for one in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
