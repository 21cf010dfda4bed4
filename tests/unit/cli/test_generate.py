"""Generating: streamed, whole, as JSON, and from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.client.testing import FakeServer
from tests.unit.cli.calls import call


@pytest.fixture
def at(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the fake server the default one, with an adapter "parrot"."""
    monkeypatch.setenv("LORAPLEX_SERVER", server.target)
    if "parrot" not in {view["name"] for view in call("adapters", "list", "--json").json["adapters"]}:
        server.publish("parrot")
    return server.target


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_one_prompt(at: str, how: str) -> None:
    """The answer is alone on stdout; who answered and how fast is on stderr."""
    said = call("generate", "hello", "--adapter", "parrot", "--temperature", "0", how)
    assert (said.code, said.out) == (0, "parrot@v1 heard: hello\n")
    assert said.err.startswith("parrot@v1 · 5 + ")
    assert "first after" in said.err


def test_json(at: str) -> None:
    """One JSON object with everything; stdin is read for `-`."""
    said = call("generate", "-", "-a", "parrot@v1", "-t", "0", "-n", "6", "--json", stdin="hello").json
    assert (said["text"], said["adapter"], said["finish_reason"]) == ("parrot", "parrot@v1", "length")
    assert said["usage"] == {"prompt_tokens": 5, "cached_tokens": 0, "completion_tokens": 6}
    assert said["completions"][0]["token_ids"] == list(b"parrot")
    assert "logprobs" not in said["completions"][0]


def test_chat_and_constraints(at: str, tmp_path: Path) -> None:
    """Conversations, choices, schemas and stop strings reach the server."""
    chat = call("generate", "hello", "--system", "be kind", "-t", "0", "--json").json["text"]
    assert chat == "base heard: system: be kind\nuser: hello\nassistant:"
    assert call("generate", "x", "--choice", "yes", "--choice", "no", "--json").json["text"] in ("yes", "no")
    (tmp_path / "schema.json").write_text('{"type": "boolean"}')
    assert call("generate", "x", "--json-schema", tmp_path / "schema.json", "--json").json["text"] in ("true", "false")
    assert call("generate", "x", "-t", "0", "--stop", "ear", "--json").json["text"] == "base h"


def test_cut_at_the_token_limit(at: str) -> None:
    """An answer that is cut says so."""
    assert "cut at the token limit" in call("generate", "hello", "-n", "3").err


def test_a_refused_request(at: str) -> None:
    """The server's refusal is told with the field, and as JSON if asked for."""
    refused = call("generate", "hello", "--temperature", "-1", "--json")
    assert (refused.code, refused.out) == (1, "")
    error = json.loads(refused.err)["error"]
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert error["violations"][0]["field"] == "sampling.temperature"
    assert "fix: " in call("generate", "hello", "--adapter", "parot").err


def lines(path: Path, *requests: object) -> Path:
    """A file with these requests; a str is a line as it is."""
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in requests))
    return path


def test_a_file_with_one_bad_request(at: str, tmp_path: Path) -> None:
    """Every other request is answered, in order; the exit code is 1."""
    file = lines(
        tmp_path / "requests.jsonl",
        *({"prompt": f"number {n}", "adapter": "parrot"} for n in range(20)),
        "",
        {"prompt": "who?", "adapter": "nobody"},
        {"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"7": 1.0}, "max_tokens": 4, "stop": "x"},
    )
    done = call("generate", "--file", file, "--temperature", "0", "--concurrency", "5")
    assert done.code == 1
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["line"] for answer in answers] == [*range(1, 21), 22, 23]
    assert [answer["text"] for answer in answers[:20]] == [f"parrot@v1 heard: number {n}" for n in range(20)]
    assert answers[20]["error"]["reason"] == "ADAPTER_NOT_FOUND"
    assert answers[21]["text"] == "base"
    assert done.err.startswith("21 answered, 1 failed, ")


def test_a_file_into_a_file(at: str, tmp_path: Path) -> None:
    """--out takes the answers; options hold where a line says nothing; `-` is stdin."""
    file = lines(tmp_path / "requests.jsonl", {"prompt": "a"}, {"prompt": "b", "temperature": 0})
    done = call("generate", "-f", file, "-o", tmp_path / "answers.jsonl", "--chat", "-a", "parrot", "-t", "1")
    assert (done.code, done.out) == (0, "")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answers[1]["text"] == "parrot@v1 heard: user: b\nassistant:"
    assert call("generate", "-f", "-", "--json", stdin='{"prompt": "c"}').json["line"] == 1


def test_malformed_lines_are_refused_before_anything_is_sent(at: str, tmp_path: Path) -> None:
    """All wrong lines are named by number."""
    file = lines(tmp_path / "r.jsonl", {"prompt": "fine"}, "{", [], {"prompt": "x", "tempo": 1}, {"adapter": "a"})
    refused = call("generate", "--file", file)
    assert (refused.code, refused.out) == (2, "")
    for expected in (
        "line 2: it is not JSON",
        "line 3: it is no JSON object",
        "line 4: unknown keyword tempo",
        "line 5: ",
    ):
        assert expected in " ".join(refused.err.replace("│", " ").split())
    assert "no requests" in call("generate", "-f", "-", stdin="\n").err
