"""The protos' own constraints, checked on every message, as errors that name the field and its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import protovalidate
from google.protobuf.message import DecodeError, Message

from engine.errors import InvalidRequest

_NAME_RULE = "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit, at most 63 characters"
_HINTS = {
    ("adapter", "string.pattern"): f"must be NAME, NAME@VERSION or NAME@ALIAS, each of {_NAME_RULE}",
    ("name", "string.pattern"): f"must be of {_NAME_RULE}",
    ("alias", "string.pattern"): f"must be of {_NAME_RULE}",
    ("version", "string.pattern"): "must be a version such as v3",
}


def parse(deserializer: Callable[[bytes], Any] | None, data: bytes) -> Any:
    """Read and check one message. Raises InvalidRequest when it is malformed or breaks a constraint."""
    if deserializer is None:
        return data
    try:
        request = deserializer(data)
    except (DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest("", "the message is not a valid protocol buffer of this method's request type") from error
    if isinstance(request, Message):
        check(request)
    return request


def check(request: Message) -> None:
    """Raise InvalidRequest naming every field of `request` that breaks a constraint of the protos."""
    found = [_violation(violation.proto) for violation in protovalidate.collect_violations(request)]
    if found:
        (field, problem), *more = found
        raise InvalidRequest(field, problem, *more)


def _violation(proto: Any) -> tuple[str, str]:
    path = _path(proto.field.elements if proto.field else [])
    name = path.rpartition(".")[2]
    if proto.rule_id.startswith("sampling."):  # a rule over several fields: name the one that its id names
        path = f"{path}.{proto.rule_id.removeprefix('sampling.')}"
    return path, _HINTS.get((name, proto.rule_id), proto.message)


def _path(elements: Any) -> str:
    path = ""
    for element in elements:
        path += ("." if path else "") + element.field_name
        subscript = element.subscript
        if subscript is not None:
            path += f"[{getattr(subscript, 'value', subscript)}]"
    return path
