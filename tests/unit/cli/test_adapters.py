"""Publishing, looking, promoting, rolling back and deleting: the same through a server and on a registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.client.testing import FakeServer
from tests.unit.cli.calls import Outcome, call

Where = tuple[str, ...]
MakeAdapter = Callable[[int], Path]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """An adapter name that no other test has."""
    return f"a{abs(hash(request.node.nodeid)) % 10**9}"


@pytest.fixture
def publish(name: str, where: Where, model: Path, adapter: MakeAdapter) -> Callable[..., Outcome]:
    """Publishes adapter number `seed` as a version of `name`."""

    def run(seed: int, *options: str) -> Outcome:
        return call("adapters", "publish", adapter(seed), name, "--model", model, *where, *options)

    return run


def test_a_whole_life(name: str, where: Where, publish: Callable[..., Outcome]) -> None:
    """Publish, list, show, promote, roll back, compare, delete: each step's JSON says what happened."""

    def adapters(*words: str) -> Any:
        done = call("adapters", *words, *where, "--json")
        assert (done.code, done.err) == (0, "")
        return done.json

    assert publish(1, "--notes", "the first").code == 0
    assert json.loads(publish(2, "--json").out)["version"]["run_id"] == "run-2"
    assert {"name": name, "aliases": {"current": "v1"}, "versions": ["v1", "v2"]} in adapters("list")["adapters"]

    assert adapters("promote", f"{name}@v2", "--alias", "canary")["version"] == "v2"
    move = adapters("promote", f"{name}@canary", "--expected", "v1", "--reason", "looks good")
    assert (move["alias"], move["version"], move["reason"]) == ("current", "v2", "looks good")
    assert adapters("show", name)["aliases"] == {"canary": "v2", "current": "v2"}
    assert adapters("rollback", name)["version"] == "v1"
    assert adapters("show", f"{name}@current")["evaluation"]["adapter"] == 0.1
    assert adapters("unalias", f"{name}@canary")["version"] is None
    assert [c["version"] for c in adapters("show", name)["history"]] == ["v1", "v2", "v2", "v1", None]

    found = adapters("diff", f"{name}@v1", f"{name}@v2")
    assert found["different"]["evaluation adapter"] == [0.1, 0.2]
    assert found["different"]["notes"] == ["the first", None]
    assert found["same"]["rank"] == 2
    assert ("config lora_alpha" in found["same"]) == (where[0] == "--registry")

    assert adapters("delete", f"{name}@v2", "--yes") == {"deleted": f"{name}@v2"}
    assert [v["version"] for v in adapters("show", name)["versions"]] == ["v1"]


def test_what_people_see(name: str, where: Where, publish: Callable[..., Outcome]) -> None:
    """Tables and lines hold scores, warnings and the next step; notes are shown as they were written."""
    published = publish(3)
    assert f"published {name}@v1" in published.out
    assert "score 0.3 exact match (base 0.0)" in published.out
    assert "warning: nothing records which base" in published.out
    assert f"loraplex adapters promote {name}@v2" in publish(4, "--notes", "[red]careful[/red]").out

    shown = call("adapters", "show", name, *where)
    assert "[red]careful[/red]" in shown.out
    assert "0.4 exact match" in shown.out
    promoted = call("adapters", "promote", f"{name}@v2", *where)
    assert f"{name}@current now names {name}@v2" in promoted.out
    assert ("refresh time" in promoted.err) == (where[0] == "--registry")
    assert "exact match" in call("adapters", "show", f"{name}@v2", *where).out
    compared = call("adapters", "diff", f"{name}@v1", f"{name}@v2", *where).out
    assert "the same: " in compared
    assert "careful" in compared
    assert f"{name} " in call("adapters", "list", *where).out
    same = call("adapters", "diff", f"{name}@v1", f"{name}@v1", *where).out
    assert "are the same" in same


def test_publish_and_promote_at_once(name: str, where: Where, publish: Callable[..., Outcome], tmp_path: Path) -> None:
    """--promote switches; version, evaluation and publisher are the given ones."""
    publish(5)
    evaluation = tmp_path / "evaluation.json"
    evaluation.write_text('{"accuracy": 0.75}')
    done = publish(
        6, "--promote", "--version", "v7", "--evaluation", str(evaluation), "--publisher", "eve", "--json"
    ).json
    assert (done["version"]["version"], done["promoted"]["version"], done["promoted"]["actor"]) == ("v7", "v7", "eve")
    assert "accuracy 0.75" in call("adapters", "show", name, *where).out
    evaluation.write_text("[]")
    assert publish(6, "--evaluation", str(evaluation)).code == 2


def test_verify_a_version(name: str, where: Where, model: Path, publish: Callable[..., Outcome]) -> None:
    """A published version is proven good, by the engine or by the checks here."""
    publish(7)
    verified = call("adapters", "verify", name, "--model", model, *where, "--json")
    assert verified.code == 0
    assert (verified.json["ref"], verified.json["ok"]) == (f"{name}@v1", True)


def test_verify_notices_damage(tmp_path: Path, model: Path, adapter: MakeAdapter) -> None:
    """One changed byte in the registry fails the verification."""
    registry = tmp_path / "registry"
    call("adapters", "publish", adapter(1), "support", "--registry", registry, "--model", model)
    weights = registry / "adapters/support/v1/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    damaged = call("adapters", "verify", "support", "--registry", registry, "--model", model)
    assert damaged.code == 1
    assert "adapter_model.safetensors is not what was published" in damaged.err


def test_verify_a_folder(model: Path, adapter: MakeAdapter) -> None:
    """A folder is checked as by a publication; without a base model it cannot be."""
    folder = adapter(1)
    good = call("adapters", "verify", folder, "--model", model)
    assert good.code == 0
    assert "it may be published" in good.out
    (folder / "adapter_model.safetensors").unlink()
    bad = call("adapters", "verify", folder, "--model", model, "--json")
    error = json.loads(bad.err)["error"]
    assert (bad.code, bad.out, error["reason"]) == (1, "", "INVALID_ADAPTER")
    assert error["fix"]
    assert call("adapters", "verify", folder).code == 2  # no --model
    assert call("adapters", "verify", "/no/where", "--model", model).code == 2


def test_errors_say_what_to_do(name: str, where: Where, publish: Callable[..., Outcome]) -> None:
    """Unknown names, moved aliases and refused deletions exit 1 with a fix."""
    publish(8)
    publish(9)
    unknown = call("adapters", "show", f"{name}x", *where)
    assert unknown.code == 1
    assert f"did you mean {name}" in unknown.err
    assert "fix: " in unknown.err
    moved = call("adapters", "promote", f"{name}@v2", "--expected", "v2", *where, "--json")
    assert (moved.code, moved.out) == (1, "")
    assert json.loads(moved.err)["error"]["reason"] == "ALIAS_MOVED"
    named = call("adapters", "delete", f"{name}@v1", "--yes", *where)
    assert (named.code, "fix: Point the alias" in named.err) == (1, True)
    assert call("adapters", "show", "Not A Name", *where).code == 1


def test_delete_asks_first(name: str, where: Where, publish: Callable[..., Outcome]) -> None:
    """Nothing is deleted unless the user says yes."""
    publish(1)
    publish(2)
    assert call("adapters", "delete", f"{name}@v2", *where, stdin="n\n").code == 1
    assert call("adapters", "delete", f"{name}@v2", *where, stdin="y\n").code == 0


def test_no_registry_is_made_by_looking(tmp_path: Path) -> None:
    """A mistyped folder is an error, and is not created."""
    missing = tmp_path / "typo"
    refused = call("adapters", "list", "--registry", missing)
    assert (refused.code, "there is no registry" in refused.err, missing.exists()) == (1, True, False)


def test_publishing_into_a_registry_needs_the_base(tmp_path: Path, adapter: MakeAdapter) -> None:
    """Without a server, --model is needed."""
    refused = call("adapters", "publish", adapter(1), "support", "--registry", tmp_path / "registry")
    assert (refused.code, "--model FOLDER" in refused.err) == (2, True)


def test_no_server() -> None:
    """An unreachable server is explained."""
    refused = call("adapters", "list", "--server", "127.0.0.1:1")
    assert refused.code == 1
    assert "loraplex serve" in refused.err


def test_memory_of_the_engine(server: FakeServer) -> None:
    """Preload, pin, unpin and unload tell what they did."""
    ref = f"memory@{server.publish('memory')}"
    at = ("--server", server.target, "--json")
    assert call("adapters", "preload", "memory", *at).json == {"loaded": ref}
    assert call("adapters", "pin", ref, *at).json == {"version": ref, "pinned": True}
    assert call("adapters", "unpin", ref, *at).json == {"version": ref, "pinned": False}
    assert call("adapters", "unload", ref, *at).json == {"ref": ref, "was_resident": True}
    assert call("adapters", "unload", ref, "--server", server.target).out == f"{ref} was not loaded\n"


def test_watch(server: FakeServer) -> None:
    """A watch prints what happens, in order, and ends when told."""
    later = threading.Timer(0.5, lambda: server.publish("watched"))
    later.start()
    seen = call("adapters", "watch", "watched", "--for", "4", "--server", server.target, "--json")
    later.join()
    assert seen.code == 0
    first, *events = [json.loads(line) for line in seen.out.splitlines()]
    assert first == {"event": "watching"}
    assert [event["event"] for event in events] == ["published", "alias"]
    assert call("adapters", "watch", "--for", "0.2", "--server", server.target).out == "watching\n"


def test_a_canary(name: str, where: Where, publish: Callable[..., Outcome]) -> None:
    """Start, change, show and end a canary; what makes no sense is a usage error."""
    publish(1)
    publish(2)

    def canary(*words: str) -> Any:
        done = call("adapters", "canary", *words, *where, "--json")
        assert (done.code, done.err) == (0, "")
        return done.json

    assert canary(f"{name}@v2", "--weight", "0.05", "--reason", "try")["canary_weight"] == 0.05
    assert canary(name, "--weight", "0.25")["version"] == "v2"
    shown = call("adapters", "show", name, *where)
    assert f"v2 answers 0.25 of the requests for {name}" in shown.out
    assert "v2 for 0.05 of requests" in shown.out
    assert call("adapters", "show", name, *where, "--json").json["canary"] == {"version": "v2", "weight": 0.25}
    ended = canary(name, "--end")
    assert (ended["version"], ended["canary_weight"], ended["reason"]) == ("v2", None, "canary ended")
    assert "canary" not in call("adapters", "show", name, *where, "--json").json

    for words in ((name,), (name, "--weight", "0.1", "--end"), (f"{name}@v2", "--end")):
        assert call("adapters", "canary", *words, *where).code == 2
    assert call("adapters", "canary", f"{name}@v2", "--weight", "2", *where).code == 1
