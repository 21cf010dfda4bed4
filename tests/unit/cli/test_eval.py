"""`loraplex eval`, `compare` and `promote --require`, against a fake server on a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.client import AsyncClient
from engine.client.testing import FakeServer, fake_server
from engine.commands.backends import connect
from engine.errors import AdapterNotFound
from tests.unit.cli.calls import call


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """The fake engine says who heard what: "support@v2 heard: hello"."""
    file = tmp_path / "suite.jsonl"
    rows = [{"prompt": f"hello {n}", "contains": "v2 heard: hello"} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_version_is_scored_beside_the_current_one_and_the_base(server: FakeServer, suite: Path) -> None:
    """All in one go; the result is kept beside the version, for programs and people."""
    for _ in range(2):
        server.publish("scored")
    found = call("eval", "scored@v2", suite, "--server", server.target, "--json").json
    assert {who: result["accuracy"]["value"] for who, result in found["results"].items()} == {
        "scored@v2": 1.0, "scored@v1": 0.0, "base": 0.0,
    }  # fmt: skip
    assert found["results"]["scored@v2"]["accuracy"]["interval"][0] < 0.7
    shown = call("eval", "scored@v2", suite, "--server", server.target)
    assert "1.000 (0.57 to 1.00)" in shown.out


def test_likelihoods_go_through_the_server(server: FakeServer, tmp_path: Path) -> None:
    """The right answer's tokens only."""
    server.publish("likely")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    found = call("eval", "likely", file, "--loglik", "--alone", "--server", server.target, "--json").json
    assert found["results"]["likely@v1"]["loglik"]["value"] <= 0


def test_a_promotion_that_requires_a_score_is_refused_without_it(server: FakeServer, suite: Path) -> None:
    """First there is no evaluation, then a bad one, then a good one; each refusal says the numbers."""
    for _ in range(3):
        server.publish("gated")
    where = ("--server", server.target)
    promote = ("adapters", "promote", "--require", "accuracy>=0.5 and not worse than current", *where)
    assert "has no evaluation" in call(*promote, "gated@v2").err
    call("eval", "gated@v3", suite, *where)
    refused = call(*promote, "gated@v3")
    assert refused.code == 1
    assert "gated@v3 is not promoted: accuracy 0 (95 %: 0 to 0.434, 5 rows), required accuracy >= 0.5" in refused.err
    call("eval", "gated@v2", suite, *where)
    assert call(*promote, "gated@v2").code == 0
    assert (
        "worse than gated@v2"
        in call("adapters", "promote", "gated@v3", "--require", "not worse than current", *where).err
    )


def test_a_score_counts_on_servers_of_its_precision(server: FakeServer, suite: Path) -> None:
    """What computes in 16 bits answers otherwise than what computes in 32, though it serves the same weights."""
    for _ in range(2):
        server.publish("rounded")
    assert call("eval", "rounded@v2", suite, "--server", server.target, "--json").json["dtype"] == "float32"
    with fake_server(dtype="float16", registry=server.app.settings.registry) as other:
        promote = ("adapters", "promote", "rounded@v2", "--require", "accuracy>=0.5", "--server", other.target)
        refused = call(*promote)
        assert (refused.code, "evaluated in float32 only, and this server computes in float16" in refused.err) == (
            1,
            True,
        )
        call("eval", "rounded@v2", suite, "--server", other.target)
        assert call(*promote).code == 0


def test_a_requirement_that_does_not_parse_is_refused(server: FakeServer) -> None:
    """Before anything is asked."""
    shown = call("adapters", "promote", "x@v1", "--require", "accuracy!!", "--server", server.target)
    assert (shown.code, "cannot be read" in shown.err) == (1, True)


def test_evaluations_are_kept_in_a_registry_too(tmp_path: Path, adapter: Callable[[int], Path], model: Path) -> None:
    """What was kept is read back in order, once if it was sent twice; of a version that does not exist nothing is kept."""
    registry = str(tmp_path / "registry")
    call("adapters", "publish", adapter(1), "kept", "--registry", registry, "--model", model)

    async def keep() -> list[int]:
        async with connect("", registry, None) as backend:
            for number in (1, 2, 2):
                assert await backend.record_evaluation("kept", "v1", {"number": number}) == number
            with pytest.raises(AdapterNotFound):
                await backend.record_evaluation("kept", "v9", {})
            return [record["number"] for record in await backend.evaluations("kept", "v1")]

    assert asyncio.run(keep()) == [1, 2]


@pytest.mark.slow
def test_answers_side_by_side(server: FakeServer, suite: Path) -> None:
    """Those that differ are counted, or alone shown."""
    for _ in range(2):
        server.publish("sided")
    words = ("compare", "sided@v1", "sided@v2", suite, "--server", server.target)
    shown = call(*words, "--rows", "3")
    assert "3 of 3 answers differ" in shown.out
    assert "sided@v2 heard: hello 1" in shown.out
    same = call("compare", "sided@v1", "sided@v1", suite, "--different", "--server", server.target)
    assert "0 of 5 answers differ" in same.out


def test_a_bare_name_is_compared_as_its_current_version(server: FakeServer, suite: Path) -> None:
    """A canary has no part in it."""
    for _ in range(2):
        server.publish("tried")
    call("adapters", "canary", "tried@v2", "--weight", "0.9", "--server", server.target)
    found = call("compare", "tried", "tried@canary", suite, "--server", server.target, "--json").json
    assert all("tried@v1 heard" in row["tried@v1"] and "tried@v2 heard" in row["tried@v2"] for row in found)


def test_questions_are_compared_however_a_row_says_them(server: FakeServer, tmp_path: Path) -> None:
    """A conversation, a list as the prompt, and rows that no suite would take as they say no answer."""
    server.publish("asked")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": turns}, {"prompt": turns[:1], "completion": turns[1:]}, {"prompt": "hi", "title": "a"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = call("compare", "base", "asked@v1", file, "--server", server.target, "--json").json
    assert [(row["asked"], row["expected"]) for row in found] == [("hi", "ho"), ("hi", "ho"), ("hi", "")]
    assert all(row["asked@v1"] for row in found)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3},
        {"prompt": ["x"]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"content": "x"}]},
        {"messages": "x"},
    ],
)
def test_a_row_that_cannot_be_compared_is_named(server: FakeServer, tmp_path: Path, row: dict[str, object]) -> None:
    """And a file that is no text, too."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps(row))
    shown = call("compare", "base", "base", file, "--server", server.target)
    assert (shown.code, "row 2:" in shown.err) == (1, True)
    file.write_bytes(b"\xff")
    assert "not UTF-8" in call("compare", "base", "base", file, "--server", server.target).err


def test_answers_that_differ_late_are_shown_whole(server: FakeServer, tmp_path: Path) -> None:
    """A table that shows the same for both, and calls them different, helps nobody; of a long question the end is shown."""
    for _ in range(2):
        server.publish("late")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "x" * 80 + "end"}))
    words = ("compare", "late@v1", "late@v2", file, "--max-tokens", "120", "--server", server.target)
    shown = call(*words).out.replace("\n", "")
    assert "…" + "x" * 56 + "end" in shown
    assert shown.count("end") == 3


def test_a_row_that_the_server_refuses_is_named(server: FakeServer, tmp_path: Path) -> None:
    """A prompt that is too long, in both commands."""
    server.publish("long")
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": prompt, "contains": "y"} for prompt in ("x", "x" * 3000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in (("eval", "long", file), ("compare", "base", "long", file)):
        shown = call(*words, "--server", server.target)
        assert (shown.code, "row 2 of long.jsonl" in shown.err) == (1, True)


def test_requests_have_hours_unless_the_caller_says_otherwise(
    server: FakeServer, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the others; the client's own deadline, a minute, would end an evaluation on a slow machine."""
    server.publish("slow")
    seen: set[float] = set()
    generate = AsyncClient.generate

    async def noted(client: AsyncClient, **options: Any) -> Any:
        seen.add(options["timeout_s"])
        return await generate(client, **options)

    monkeypatch.setattr(AsyncClient, "generate", noted)
    for words in (("eval", "slow", suite), ("compare", "base", "slow", suite)):
        assert call(*words, "--server", server.target).code == 0
        assert call(*words, "--timeout", "50", "--server", server.target).code == 0
    assert seen == {3600.0, 50.0}
