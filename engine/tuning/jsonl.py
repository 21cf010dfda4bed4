"""Files with one JSON object a line: every line is read, and every bad one named."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from engine.errors import InvalidRows

T = TypeVar("T")


class BadRow(Exception):
    """A row cannot be used; the text says why."""


def object_of(line: str) -> dict[str, Any]:
    """The JSON object that a line is; raises BadRow."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        raise BadRow("it is not JSON") from None
    if not isinstance(content, dict):
        raise BadRow("it is no JSON object")
    return content


def parsed(text: str, name: str, parse: Callable[[str, int], T], *, empty_fix: str | None = None) -> list[T]:
    """What `parse` makes of each line and its number, blank ones left out; it raises BadRow.

    Raises InvalidRows with all that is wrong with the file called `name`, or when it holds no rows.
    """
    rows: list[T] = []
    wrong: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also splits at U+2028, which JSON texts may hold
        if not line.strip():
            continue
        try:
            rows.append(parse(line, number))
        except BadRow as error:
            wrong.append((number, str(error)))
    if wrong:
        raise InvalidRows(name, wrong)
    if not rows:
        raise InvalidRows(name, [(1, "the file holds no rows")], fix=empty_fix)
    return rows
