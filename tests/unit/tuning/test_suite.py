"""Evaluation suites and requirements: what is wrong with one is said before anything is asked; numbers mean what they say."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.client import AsyncClient, InvalidArgument
from engine.errors import InvalidRequirement, InvalidRows
from engine.tuning.data import read_rows
from engine.tuning.evaluation import Answer, Options, evaluate, summary
from engine.tuning.requirement import failures, parse
from engine.tuning.suite import Suite, read_suite

SCHEMA = {"type": "object", "required": ["city"]}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def suite(tmp_path: Path, *rows: Any) -> Suite:
    """A suite of these rows."""
    file = tmp_path / "suite.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_suite(file)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not JSON"),
        ({"prompt": "x"}, "nothing says what a right answer is"),
        ({"completion": "x"}, "either a prompt or messages"),
        ({"prompt": "x", "completion": "y", "metrics": ["rouge"]}, "unknown metric 'rouge'; known: exact, contains"),
        ({"prompt": "x", "completion": "y", "metrics": "regex"}, "'regex' has nothing to compare with"),
        ({"prompt": "x", "expected": "y"}, "unknown key 'expected'"),
        ({"prompt": "x", "regex": "("}, "regex cannot be read"),
        ({"prompt": "x", "contains": 3}, "neither a text nor a list"),
        ({"prompt": "x", "json_schema": {"type": "thing"}}, "no JSON Schema"),
        ({"prompt": "x", "json_schema": {"items": {"$ref": "#/$defs/gone"}}}, "refers to '#/$defs/gone'"),
        ({"prompt": "x", "json_schema": {"properties": {"a": {"pattern": "("}}}}, "no JSON Schema"),
        ({"prompt": "x", "json_schema": {"$ref": "#"}}, "'#' leads back to itself"),
        (
            {"prompt": "x", "json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
            "back to itself",
        ),
        ({"prompt": "x", "json_schema": {"$ref": "http://127.0.0.1:9/other.json"}}, "which is not in it"),
        ({"messages": [{"role": "human", "content": "x"}], "contains": "x"}, "the role 'human'; use system, user"),
        ({"messages": [{**TURNS[0], "weight": 1}], "contains": "x"}, "and nothing else"),
        ({"messages": TURNS[1:]}, "there is nothing to ask"),
        ({"prompt": "x", "completion": TURNS[1:]}, "must both be text, or both be lists"),
        ({"prompt": "x", "completion": "y", "contain": "z"}, "unknown key 'contain'"),
        ({"prompt": "x", "completion": "y", "max_tokens": 2**31}, "max_tokens is no whole number from 1 to 2147483647"),
        ({"prompt": "\ud800", "completion": "y"}, "half of a character"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path: Path, row: Any, said: str) -> None:
    """Before a single request is sent."""
    with pytest.raises(InvalidRows) as caught:
        suite(tmp_path, {"prompt": "a", "completion": "b"}, row)
    ((number, reason),) = caught.value.rows
    assert number == 2
    assert said in reason


@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        ({"completion": " Billing"}, "billing\n", "billing and more"),
        ({"contains": ["refund", "days"]}, "A REFUND takes ten days", "a refund"),
        ({"regex": "^[A-Z]{3}$"}, "ABC", "ABCD"),
        ({"json_schema": SCHEMA}, '{"city": "Graz"}', '{"town": "Graz"}'),
        ({"json_schema": SCHEMA}, '{"city": 1}', "city"),
        ({"json_schema": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}}, "1", "{}"),
        ({"contains": "a", "regex": "b"}, "ab", "a"),
    ],
)
def test_metrics(tmp_path: Path, wanted: dict[str, Any], right: str, wrong: str) -> None:
    """Each accepts a right answer and refuses a wrong one; a row with several is right when all hold."""
    (case,) = suite(tmp_path, {"prompt": "x", **wanted}).cases
    assert all(case.check(right).values())
    assert not all(case.check(wrong).values())


def test_a_schema_without_end_fits_nothing(tmp_path: Path) -> None:
    """It leads back to itself on a way that cannot be seen beforehand; that must not end an evaluation half way."""
    schema = {"allOf": [{"type": "integer"}, {"anyOf": [{"$ref": "#"}]}]}
    (case,) = suite(tmp_path, {"prompt": "x", "json_schema": schema}).cases
    assert not case.right("1")
    assert not case.right("[" * 100_000)


def test_a_conversation_that_ends_with_its_answer_is_a_row(tmp_path: Path) -> None:
    """As training rows do."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (case,) = suite(tmp_path, {"messages": turns}).cases
    assert (case.messages, case.wanted) == ((turns[0],), {"exact": "ho"})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "ho", "source": "mail", "idx": 3},
        {"messages": TURNS, "prompt": "hi", "prompt_id": "7"},
        {"prompt": TURNS[:1], "completion": TURNS[1:]},
        {"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]},
    ],
)
def test_what_can_be_trained_on_is_a_row(tmp_path: Path, row: dict[str, Any]) -> None:
    """Whatever else is in it; the last answer is the right one."""
    (case,) = suite(tmp_path, row).cases
    assert read_rows(str(tmp_path / "suite.jsonl")).rows
    assert (case.asked, case.wanted) == ("hi", {"exact": "ho"})


def test_an_answer_among_the_messages_counts_only_if_it_is_to(tmp_path: Path) -> None:
    """As every other key does."""
    (case,) = suite(tmp_path, {"messages": TURNS, "contains": "o", "metrics": "contains"}).cases
    assert case.wanted == {"contains": ["o"]}


def test_a_mark_at_the_beginning_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """Windows' editors write one."""
    (tmp_path / "marked.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}), encoding="utf-8-sig")
    assert len(read_suite(tmp_path / "marked.jsonl").cases) == 1


def test_classes_are_reported_by_precision_and_recall(tmp_path: Path) -> None:
    """By hand: of class a 2 of 3 are found and 2 of 3 said are right; an answer that is no class hurts recall only."""
    rows = [{"prompt": f"{n}", "completion": label} for n, label in enumerate("aaabbb")]
    found = suite(tmp_path, *rows)
    said = ["a", "a", "b", "a", "b", "nonsense"]
    answers = [Answer(text, case.check(text), None) for case, text in zip(found.cases, said, strict=True)]
    result = summary(found, answers)
    assert result["accuracy"]["value"] == 0.5
    assert result["classes"]["a"] == {"precision": 0.6667, "recall": 0.6667, "f1": 0.6667, "rows": 3}
    assert result["classes"]["b"] == {"precision": 0.5, "recall": 0.3333, "f1": 0.4, "rows": 3}
    assert result["f1"]["value"] == pytest.approx(0.5333, abs=1e-4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a condition is missing"),
        ("accuracy>=0.9 and", "a condition is missing"),
        ("accuracy 0.9", "is no condition"),
        ("rouge>=0.9", "unknown metric 'rouge'"),
        ("not worse than yesterday", "is no condition"),
        ("accuracy>=0.9 or f1>=1", "is no condition"),
    ],
)
def test_a_requirement_that_does_not_parse_is_refused(text: str, said: str) -> None:
    """With the part that cannot be read."""
    with pytest.raises(InvalidRequirement, match=said):
        parse(text)


def record(suite_digest: str = "sha256:a", **accuracies: float) -> dict[str, Any]:
    """An evaluation of versions by accuracy; v2 stands for support@v2."""
    entries = {
        name if name == "base" else f"support@{name}": {"accuracy": {"value": value, "interval": [0, 1], "rows": 9}}
        for name, value in accuracies.items()
    }
    base = {"name": "tiny", "fingerprint": "sha256:base", "precision": "bfloat16"}
    return {"suite": "s.jsonl", "suite_digest": suite_digest, "base": base, "results": entries}


@pytest.mark.parametrize(
    ("text", "records", "others", "said"),
    [
        ("accuracy>=0.9", [record(v2=0.95)], [], None),
        ("accuracy >= 90%", [record(v2=0.95)], [], None),
        ("accuracy>=0.9", [record(v2=0.8)], [], "accuracy 0.8 (95 %: 0 to 1, 9 rows), required accuracy >= 0.9"),
        ("accuracy>=0.9", [], [], "has no evaluation: loraplex eval support@v2"),
        ("accuracy>=0.9", [record(v2=0.95), record(v2=0.5)], [], "accuracy 0.5"),
        ("f1>=0.9", [record(v2=0.95)], [], "f1 was not measured"),
        ("not worse than current", [record(v2=0.9, v1=0.8)], [], None),
        ("not worse than current", [record(v2=0.8, v1=0.9)], [], "worse than support@v1 with accuracy 0.9"),
        ("not worse than current", [record(v2=0.8)], [record(v1=0.7)], None),
        ("not worse than current", [record(v2=0.8)], [record("sha256:b", v1=0.7)], "support@v1 was not evaluated"),
        (
            "not worse than current",
            [record(v2=0.8)],
            [record(v1=0.7) | {"max_tokens": 2, "stop": ["END"]}],
            "support@v1 was evaluated with --max-tokens 2 --stop=END only on the suite s.jsonl: "
            "loraplex eval support@v1 s.jsonl --max-tokens 64",
        ),
        ("not worse than base", [record(v2=0.8, base=0.9)], [], "worse than base"),
        ("accuracy>=0.5 and not worse than current", [record(v2=0.4, v1=0.9)], [], "required accuracy"),
    ],
)
def test_requirements_are_judged_by_the_latest_evaluation(
    text: str, records: list[dict[str, Any]], others: list[dict[str, Any]], said: str | None
) -> None:
    """What is not met is told with its numbers; what was never measured is not met."""
    found = failures(parse(text), "support@v2", "support@v1", records, others, "sha256:base")
    assert (found == []) == (said is None)
    assert said is None or said in found[0]


def test_likelihoods_have_an_interval(tmp_path: Path) -> None:
    """The mean of the rows' means."""
    found = suite(tmp_path, {"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "y"})
    answers = [Answer("y", {"exact": True}, value) for value in (-1.0, -3.0)]
    loglik = summary(found, answers)["loglik"]
    assert loglik["value"] == -2.0
    assert math.isclose(loglik["interval"][0], -2 - 1.96, abs_tol=0.01)


def test_a_servers_error_ends_an_evaluation_as_itself(tmp_path: Path) -> None:
    """Not as a group of errors, which the command line could not explain."""

    class Full(AsyncClient):
        def __init__(self) -> None:
            pass

        async def generate(self, *_: Any, **__: Any) -> Any:
            raise ConnectionError("full")

    found = suite(tmp_path, {"prompt": "x", "completion": "y"}, {"prompt": "z", "completion": "y"})
    with pytest.raises(ConnectionError, match="full"):
        asyncio.run(evaluate(Full(), found, ["base"], Options(), lambda: None))


def test_a_refusal_names_the_row_and_whom_it_was_asked_of(tmp_path: Path) -> None:
    """With the server's own words, and as the server's error; nobody can find a prompt that is too long otherwise."""
    deadlines = []

    class Strict(AsyncClient):
        def __init__(self) -> None:
            pass

        async def generate(self, **options: Any) -> Any:
            deadlines.append(options["timeout_s"])
            raise InvalidArgument("too long")

    found = suite(tmp_path, {"prompt": "x", "completion": "y"})
    with pytest.raises(InvalidArgument, match=r"row 1 of suite\.jsonl, asked of base: too long"):
        asyncio.run(evaluate(Strict(), found, ["base"], Options(timeout_s=600.0), lambda: None))
    assert deadlines == [600.0]


def test_a_score_taken_on_another_base_does_not_count() -> None:
    """However good: another base or precision is another model."""
    (found,) = failures(parse("accuracy>=0.5"), "support@v2", "", [record(v2=1.0)], [], "sha256:other")
    assert "evaluated on another base only (tiny, bfloat16)" in found


@pytest.mark.parametrize(
    ("measured", "serving", "said"),
    [
        (["float32"], "bfloat16", "was evaluated in float32 only, and this server computes in bfloat16: loraplex eval"),
        (["bfloat16", "float32"], "bfloat16", None),
        (["float32"], "", None),
        ([None], "bfloat16", None),
        ([""], "bfloat16", None),
    ],
    ids=["another", "an-earlier-one", "unknown-server", "old-record", "old-server"],
)
def test_a_score_counts_in_the_precision_that_it_was_computed_in(
    measured: list[str | None], serving: str, said: str | None
) -> None:
    """Weights are the same whatever the engine computes in, and answers are not; what does not say it counts as before."""
    records = [record(v2=0.9) | ({} if dtype is None else {"dtype": dtype}) for dtype in measured]
    found = failures(parse("accuracy>=0.5"), "support@v2", "", records, [], "sha256:base", serving)
    assert (found == []) == (said is None)
    assert said is None or said in found[0]


def test_a_rivals_score_in_another_precision_is_none() -> None:
    """It has to be measured here, too."""
    others = [record(v1=0.1) | {"dtype": "float32"}]
    records = [record(v2=0.9) | {"dtype": "bfloat16"}]
    wanted = parse("not worse than current")
    (found,) = failures(wanted, "support@v2", "support@v1", records, others, "sha256:base", "bfloat16")
    assert "support@v1 was not evaluated" in found
