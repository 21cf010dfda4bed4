"""An evaluation suite: prompts, and what a right answer is. A file of training rows is one, too, other keys in them and all.

    {"prompt": "...", "completion": " billing"}                       the answer is this text (case and outer space aside)
    {"messages": [...], "contains": ["refund"]}                       each of these texts is in the answer
    {"prompt": "...", "regex": "^[A-Z]{3}$"}                          the expression is found in the answer
    {"prompt": "...", "json_schema": {"type": "object", ...}}         the answer is JSON that fits the schema

A row may have several; it is right when all hold. `metrics` says which of the keys are to count, if not all. As in training, an
answer may also be the last of the messages, and prompt and completion may both be lists of messages.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import InvalidRows
from engine.tuning.data import ROLES
from engine.tuning.jsonl import BadRow, object_of, parsed

MAX_TOKENS = 64  # of an answer, unless its row or whoever asks says otherwise
METRICS = ("exact", "contains", "regex", "json_schema")
_KEYS = {"completion": "exact", "contains": "contains", "regex": "regex", "json_schema": "json_schema"}
_OTHER = {"prompt", "messages", "metrics", "max_tokens", "id"}
_KNOWN = sorted({*_KEYS, *_OTHER})
_ALIKE = 0.85  # from 0 to 1, by difflib: "contain" and "contains" are, "idx" and "id" are not
_MOST_TOKENS = 2**31 - 1  # what the API's field holds


@dataclass(frozen=True)
class Case:
    """One row: what is asked, and each metric with what it wants."""

    number: int
    prompt: str
    messages: tuple[dict[str, str], ...]
    wanted: dict[str, Any]
    max_tokens: int | None = None

    @property
    def asked(self) -> str:
        """What is asked, for people: the prompt, or the last message."""
        return self.messages[-1]["content"] if self.messages else self.prompt

    def check(self, answer: str) -> dict[str, bool]:
        """Which of the row's metrics hold for an answer."""
        return {metric: _CHECKS[metric](answer, wanted) for metric, wanted in self.wanted.items()}

    def right(self, answer: str) -> bool:
        """Whether all of the row's metrics hold for an answer."""
        return all(self.check(answer).values())

    @property
    def label(self) -> str:
        """The right answer, normalised; empty when the row does not say it."""
        return normal(self.wanted.get("exact", ""))


@dataclass(frozen=True)
class Suite:
    """A suite's name, the SHA-256 of its bytes, and its rows."""

    name: str
    digest: str
    cases: tuple[Case, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, when it is a classification: every row says its answer, and there are few of them."""
        found = [case.label for case in self.cases]
        different = sorted(set(found))
        few = 2 <= len(different) <= 20 and 3 * len(different) <= len(found)
        return tuple(different) if all(found) and few else ()


def read_suite(file: Path, *, judged: bool = True) -> Suite:
    """Read and check a suite; if its answers are not `judged`, rows need not say what a right one is.

    Raises InvalidRows naming every bad row.
    """
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidRows(str(file), [(1, f"it cannot be read: {error.strerror}")], fix="Name a file.") from error
    except UnicodeDecodeError as error:
        raise InvalidRows(file.name, [(1, "it is not UTF-8 text")]) from error
    cases = parsed(text, file.name, partial(_case, judged=judged))
    return Suite(file.name, f"sha256:{hashlib.sha256(data).hexdigest()}", tuple(cases))


def _case(line: str, number: int, *, judged: bool) -> Case:
    row = _plain(_object(line))
    if bool(row["prompt"]) == bool(row["messages"]):
        raise BadRow("it needs either a prompt or messages")
    limit = row.get("max_tokens")
    if limit is not None and not (isinstance(limit, int) and 1 <= limit <= _MOST_TOKENS):
        raise BadRow(f"max_tokens is no whole number from 1 to {_MOST_TOKENS}")
    wanted = _judged_by(row) if judged else {"exact": row["completion"]} if _is_text(row.get("completion")) else {}
    return Case(number, row["prompt"], tuple(row["messages"]), wanted, limit)


def _object(line: str) -> dict[str, Any]:
    row = object_of(line)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRow("it holds half of a character (a surrogate), which cannot be sent") from None
    return row


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `prompt` a text or `messages` what is asked, and `completion`, if it says its answer, that text."""
    prompt, turns, completion = row.get("prompt", ""), row.get("messages", []), row.get("completion")
    if isinstance(prompt, list) != isinstance(completion, list) and completion is not None and not turns:
        raise BadRow("prompt and completion must both be text, or both be lists of messages")
    if isinstance(prompt, list) and not turns:
        prompt, turns, completion = "", [*prompt, *(completion or [])], None
    _check_turns(turns)
    if turns and turns[-1]["role"] == "assistant":
        *turns, answer = turns
        prompt, completion = "", answer["content"] if completion is None else completion
        if not turns:
            raise BadRow("its only message is an answer: there is nothing to ask")
    if not isinstance(prompt, str):
        raise BadRow("prompt is no text")
    plain = {**row, "prompt": prompt, "messages": turns, "completion": completion}
    if completion is None:
        del plain["completion"]
    return plain


def _check_turns(turns: Any) -> None:
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise BadRow("messages is no list of objects with the texts role and content, and nothing else")
    if unknown := [turn["role"] for turn in turns if turn["role"] not in ROLES]:
        raise BadRow(f"a message has the role {unknown[0]!r}; use {', '.join(ROLES)}")


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict) and set(turn) == {"role", "content"} and all(isinstance(turn[key], str) for key in turn)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _judged_by(row: dict[str, Any]) -> dict[str, Any]:
    """Each metric with what it wants; a row that says its answer, as training rows do, may hold more than is known here."""
    for key in sorted(set(row) - set(_KNOWN)):
        alike = get_close_matches(key, _KNOWN, 1, _ALIKE)
        if "completion" not in row or alike:
            raise BadRow(f"it has an unknown key {key!r}; known: {', '.join(_KNOWN)}")
    chosen = row.get("metrics", "exact")
    if not isinstance(chosen, str) and not (isinstance(chosen, list) and all(isinstance(one, str) for one in chosen)):
        raise BadRow("metrics is neither a text nor a list of texts")
    if not (wanted := _wanted(row)):
        raise BadRow(f"nothing says what a right answer is: give one of {', '.join(_KEYS)}")
    return wanted


def _wanted(row: dict[str, Any]) -> dict[str, Any]:
    chosen = row.get("metrics") or METRICS
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if unknown := [metric for metric in chosen if metric not in METRICS]:
        raise BadRow(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    found = {metric: _readable(metric, row[key]) for key, metric in _KEYS.items() if key in row and metric in chosen}
    if missing := [metric for metric in chosen if "metrics" in row and metric not in found]:
        raise BadRow(f"the metric {missing[0]!r} has nothing to compare with")
    return found


def _readable(metric: str, value: Any) -> Any:
    if metric == "exact" and not _is_text(value):
        raise BadRow("completion is no text")
    if metric == "contains":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadRow("contains is neither a text nor a list of texts")
        return texts
    if metric == "regex":
        try:
            re.compile(value)
        except (re.error, TypeError, RecursionError, OverflowError) as error:
            raise BadRow(f"regex cannot be read: {error}") from None
    if metric == "json_schema":
        _check_schema(value)
    return value


def _check_schema(schema: Any) -> None:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    try:
        validator = validator_for(schema)
        validator.check_schema(schema, format_checker=validator.FORMAT_CHECKER)  # its patterns, too
    except (SchemaError, TypeError, AttributeError, RecursionError) as error:
        raise BadRow(f"json_schema is no JSON Schema: {str(error)[:100]}") from None
    if isinstance(schema, dict):
        _check_references(schema)


def _check_references(schema: dict[str, Any]) -> None:
    """Follow each reference now: one that leads nowhere would raise only when answers are there to check."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    top = Resource.from_contents(schema, default_specification=DRAFT202012)
    open_ones = [(top, REGISTRY.with_resource(top.id() or "", top).resolver(top.id() or ""))]
    while open_ones:
        part, resolver = open_ones.pop()
        if reference := _reference(part.contents):
            _follow(reference, resolver)
        open_ones += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


def _follow(reference: str, resolver: Any) -> None:
    """Go where a reference leads, and on from there if that is a reference, too."""
    from referencing.exceptions import Unresolvable

    seen: list[str] = []
    following = reference
    while following:
        if following in seen:
            raise BadRow(f"json_schema: {reference!r} leads back to itself")
        seen.append(following)
        try:
            target = resolver.lookup(following)
        except Unresolvable:
            raise BadRow(f"json_schema refers to {following!r}, which is not in it") from None
        following, resolver = _reference(target.contents), target.resolver


def _reference(schema: Any) -> str:
    """What a schema refers to; empty if it does not."""
    reference = schema.get("$ref") if isinstance(schema, dict) else None
    return reference if isinstance(reference, str) else ""


def normal(text: str) -> str:
    """A text for comparing: outer space and case do not count."""
    return text.strip().casefold()


def _fits(answer: str, schema: Any) -> bool:
    from jsonschema.validators import validator_for

    try:
        content = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    try:
        return bool(validator_for(schema)(schema).is_valid(content))
    except RecursionError:  # an answer, or a schema, that is nested without end
        return False


_CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "exact": lambda answer, wanted: normal(answer) == normal(wanted),
    "contains": lambda answer, wanted: all(text.casefold() in answer.casefold() for text in wanted),
    "regex": lambda answer, wanted: re.search(wanted, answer) is not None,
    "json_schema": _fits,
}
