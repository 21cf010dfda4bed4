"""Structured output: what is a constraint, and what is a broken one."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.runtime.engine import Structured
from engine.runtime.structured import to_grammar


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("choice", ("a", "b")),
        ("choice", ("a.b*", "[", "(", "\\", '"', "ä", "\n")),
        ("regex", "[0-9]+"),
        ("json_schema", '{"type": "object"}'),
        ("json_schema", "true"),
        ("json_schema", "{}"),
        ("grammar", 'start: "yes" | "no"'),
        ("grammar", 'root ::= "yes" | "no"'),
    ],
)
def test_good(kind: Any, value: Any) -> None:
    """Whatever compiles becomes a grammar."""
    assert to_grammar(Structured(kind, value))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "["),
        ("regex", "a{2,1}"),
        ("regex", "(?=lookahead)"),
        ("json_schema", ""),
        ("json_schema", "no json"),
        ("json_schema", '"text"'),
        ("json_schema", "12"),
        ("json_schema", "null"),
        ("json_schema", '{"type": 7}'),
        ("json_schema", '{"$ref": "#/nowhere"}'),
        ("json_schema", '{"$ref": "file:///etc/passwd"}'),
        ("json_schema", '{"type": "string", "pattern": "["}'),
        ("grammar", ""),
        ("grammar", "no grammar at all"),
        ("grammar", 'begin: "there is no start"'),
        ("grammar", "\x00"),
    ],
)
def test_broken(kind: Any, value: Any) -> None:
    """Whatever does not compile is the caller's mistake, told in one short line that names the field."""
    with pytest.raises(InvalidRequest) as refusal:
        to_grammar(Structured(kind, value))
    ((field, problem),) = refusal.value.violations
    assert field == f"sampling.structured.{kind}"
    assert "\n" not in problem
    assert len(problem) < 300
    assert not re.search(r"Traceback|File \"|panicked", problem)


def test_schema_nested_too_deeply() -> None:
    """A schema that would exhaust the stack of a parser is refused."""
    deep = '{"items":' * 30_000 + "{}" + "}" * 30_000
    with pytest.raises(InvalidRequest):
        to_grammar(Structured("json_schema", deep))


@pytest.mark.parametrize(
    "regex", ["((a{1,1000}){1,1000}){1,1000}", "(" * 20 + "a" + "{1,100})" * 20, r"\p{L}{1,4000}" * 200]
)
def test_regex_that_would_explode(regex: str) -> None:
    """A regular expression that would need gigabytes if it were written out takes no time to check."""
    started = time.perf_counter()
    assert to_grammar(Structured("regex", regex))
    assert time.perf_counter() - started < 0.5
