"""Reading YAML into models that know their keys: a wrong key is named, with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from loadtest.errors import BadInput

M = TypeVar("M", bound="Strict")


class Strict(BaseModel):
    """A frozen model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadInput when there is none."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not text: {error.reason} at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # YAML's dates and numbers raise plain ValueErrors
        raise BadInput(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} must hold keys and values, one `name: value` a line")
    return {str(key): value for key, value in content.items()}


def checked(model: type[M], data: Mapping[str, Any], where: str) -> M:
    """`data` as a `model`. Raises BadInput that names every wrong key, its place and what would be right."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(model, details) for details in error.errors()]
        raise BadInput(f"{where}: " + "; ".join(dict.fromkeys(problems))) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """', did you mean X?', or nothing when no known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {found[0]!r}?" if found else ""


def _problem(model: type[BaseModel], details: Any) -> str:
    path = [str(part) for part in details["loc"]]
    if details["type"] != "extra_forbidden":
        text = details["msg"].removeprefix("Value error, ")
        return f"{'.'.join(path)}: {text}" if path else text
    known = _keys(model, path[:-1])
    hint = nearest(path[-1], known) or f"; known here: {', '.join(sorted(known))}"
    return f"unknown key {'.'.join(path)!r}{hint}"


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys of the model that `path` leads to, as far as it can be followed."""
    for part in path:
        field = model.model_fields.get(part)
        inner = _inner(field.annotation) if field else None
        if inner is None:
            continue  # the index of a list
        model = inner
    return list(model.model_fields)


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _inner(argument):
            return found
    return None
