"""The protos' own constraints, checked on every message, as errors that name the field and its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import protovalidate
from google.protobuf.message import DecodeError, Message

from engine.errors import InvalidRequest

_NAME_RULE = "lower-case letters, digits, '.', '_' and '-', starting with a letter or digit, at most 63 characters"
_MOST_ITEMS = 1000  # of a message of which all violations are looked for
_MOST_NAMED = 20  # violations of one answer
_LONGEST_KEY = 40  # characters of a map's key in a path
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
    """Raise InvalidRequest naming every field of `request` that breaks a constraint of the protos.

    Of long lists only the first, as a million violations would take half a minute and gigabytes.
    """
    violations = protovalidate.collect_violations(request, fail_fast=True)
    if not violations:
        return
    if not _has_more_items(request, _MOST_ITEMS):
        violations = protovalidate.collect_violations(request)
    (field, problem), *more = [_violation(violation.proto) for violation in violations[:_MOST_NAMED]]
    if len(violations) > _MOST_NAMED:
        more.append(("", f"and {len(violations) - _MOST_NAMED} more"))
    raise InvalidRequest(field, problem, *more)


def _has_more_items(message: Message, most: int) -> bool:
    """Whether there are more than so many items in its lists and those below it."""
    below = [message]
    while below:
        for field, value in below.pop().ListFields():
            if field.is_repeated:
                most -= len(value)
                if most < 0:
                    return True
            if field.message_type and not field.message_type.GetOptions().map_entry:
                below += value if field.is_repeated else [value]
    return False


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
            key = str(getattr(subscript, "value", subscript))
            path += f"[{key}]" if len(key) <= _LONGEST_KEY else f"[{key[:_LONGEST_KEY]}…]"
    return path
