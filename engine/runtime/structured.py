"""Structured output: the one place that turns a constraint into a grammar, and refuses a broken one before the engine sees it.

vLLM is told to use the same library (llguidance), so what passes here compiles there.
"""

from __future__ import annotations

import json
import re

import llguidance

from engine.errors import InvalidRequest
from engine.runtime.engine import Structured

FIELD = "sampling.structured"


def to_grammar(structured: Structured) -> str:
    """The llguidance grammar of a constraint. Raises InvalidRequest naming the field and what is wrong with it."""
    field = f"{FIELD}.{structured.kind}"
    if structured.kind == "json_schema":
        _check_schema(field, str(structured.value))
    try:
        grammar = _grammar(structured)
    except ValueError as error:  # the library reads grammars in two notations and found neither
        raise InvalidRequest(field, f"cannot be read: {_first_sentence(str(error))}") from error
    if problem := llguidance.LLMatcher.validate_grammar(grammar, None):
        raise InvalidRequest(field, f"cannot be compiled: {_first_sentence(problem)}")
    return grammar


def _grammar(structured: Structured) -> str:
    if structured.kind == "choice":
        return str(llguidance.grammar_from("regex", "|".join(map(re.escape, structured.value))))
    return str(llguidance.grammar_from(structured.kind, str(structured.value)))


def _check_schema(field: str, text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(field, f"is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(field, "must be a JSON object (a JSON Schema)")


def _first_sentence(problem: str) -> str:
    """The library's message on one line: no source excerpt, no more than 200 characters."""
    lines = [
        line.strip() for line in problem.splitlines() if line.strip() and not re.match(r"^\s*(\d+ \||\||\^)", line)
    ]
    return " ".join(lines)[:200]
