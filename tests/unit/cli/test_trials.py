"""Canaries that are judged, shadows, and their reports, from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import Client
from engine.client.testing import FakeServer, fake_server
from tests.unit.cli.calls import call


@pytest.fixture
def name(server: FakeServer, request: pytest.FixtureRequest) -> str:
    """An adapter with two versions, that no other test has."""
    made = f"t{abs(hash(request.node.nodeid)) % 10**9}"
    for _ in range(2):
        server.publish(made)
    return made


def told(server: FakeServer, *words: str) -> Any:
    """What a command of `adapters` prints as JSON."""
    done = call("adapters", *words, "--server", server.target, "--json")
    assert (done.code, done.err) == (0, "")
    return done.json


def settled(server: FakeServer, name: str, drawn: int) -> Any:
    """The shadow's report, once so many copies have been compared, dropped or have failed."""
    for _ in range(100):
        report = told(server, "shadow", name, "--report")
        if report["compared"] + sum((report["dropped"] | report["failed"]).values()) == drawn:
            break
        time.sleep(0.05)
    return report


def test_a_canary_that_is_judged(server: FakeServer, name: str) -> None:
    """What was asked for is in the log with the bounds that were left out; the report says how it fares."""
    change = told(server, "canary", f"{name}@v2", "--weight", "0.5", "--for", "10m", "--max-ttft-ratio", "3")
    trial = {"seconds": 600, "max_error_rate": 0.02, "max_ttft_ratio": 3.0, "then": "end"}
    assert (change["canary_weight"], change["canary_trial"]) == (0.5, trial)
    with Client(server.target) as client:
        for _ in range(8):
            client.generate(adapter=name, prompt="hi")
    report = told(server, "canary", name, "--report")
    assert report["canary"]["trial"] == trial
    assert sum(side["requests"] for side in report["sides"].values()) == 8
    at = ("--server", server.target)
    assert "left, then end" in call("adapters", "canary", name, "--report", *at).out
    assert "then end" in call("adapters", "show", name, *at).out
    said = call("adapters", "canary", f"{name}@v2", "--weight", "0.1", "--for", "90s", "--then", "promote", *at).out
    assert said == f"{name}@v2 now answers 0.1 of the requests for {name}, judged for 90 s, then promote\n"


@pytest.fixture
def server_of_its_own() -> Iterator[FakeServer]:
    """A server with room: in a full one a shadow's version makes way for other tests' adapters, and nothing is compared."""
    with fake_server(refresh_s=0.1) as running:
        yield running


def test_a_shadow(server_of_its_own: FakeServer) -> None:
    """Start, look, end: the report counts what was compared."""
    server, name = server_of_its_own, "support"
    for _ in range(2):
        server.publish(name)
    change = told(server, "shadow", f"{name}@v2", "--sample", "1", "--reason", "try")
    assert (change["alias"], change["shadow_sample"], change["reason"]) == ("shadow", 1.0, "try")
    assert told(server, "show", name)["shadow"] == {"version": "v2", "sample": 1.0}
    with Client(server.target) as client:
        for number in range(1, 4):
            client.generate(adapter=name, prompt="hi", temperature=0)
            report = settled(server, name, number)
    assert (report["drawn"], report["equal"]) == (3, 0)
    assert report["compared"] >= 1
    shown = call("adapters", "shadow", name, "--report", "--server", server.target).out
    assert f"{name}@v2 beside {name}@v1" in shown
    assert "0 of " in shown
    assert told(server, "shadow", name, "--end")["shadow_sample"] is None


@pytest.mark.parametrize(
    "words",
    [
        ("canary", "x", "--weight", "0.1", "--report"),
        ("canary", "x@v2", "--report"),
        ("canary", "x", "--weight", "0.1", "--then", "promote"),
        ("canary", "x", "--weight", "0.1", "--for", "soon"),
        ("canary", "x", "--for", "10m", "--end"),
        ("shadow", "x"),
        ("shadow", "x@v2", "--end"),
        ("shadow", "x", "--sample", "0.1", "--end"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_a_usage_error(words: tuple[str, ...]) -> None:
    """Exit code 2, before anything is asked."""
    assert call("adapters", *words).code == 2


def test_on_a_registry(tmp_path: Path, model: Path, adapter: Callable[[int], Path]) -> None:
    """Both are entries of the log, which a registry takes without a server; how they fare only servers know."""
    where = ("--registry", str(tmp_path / "registry"))
    for seed in (1, 2):
        assert call("adapters", "publish", adapter(seed), "support", "--model", model, *where).code == 0
    started = call(
        "adapters", "canary", "support@v2", "--weight", "0.1", "--for", "1h", "--then", "promote", *where, "--json"
    )
    assert started.json["canary_trial"]["then"] == "promote"
    copied = call("adapters", "shadow", "support@v2", "--sample", "0.1", *where, "--json")
    assert copied.json["shadow_sample"] == 0.1
    assert call("adapters", "shadow", "support", "--end", *where).code == 0
    for kind in ("canary", "shadow"):
        refused = call("adapters", kind, "support", "--report", *where, "--json")
        assert (refused.code, json.loads(refused.err)["error"]["reason"]) == (1, "BAD_CONFIGURATION")


def test_on_a_registry_versions_of_two_bases_are_not_compared(
    tmp_path: Path, model: Path, adapter: Callable[[int], Path]
) -> None:
    """Without a server that could refuse to load it, the manifests say that the bases differ."""
    where = ("--registry", str(tmp_path / "registry"))
    for seed in (1, 2):
        call("adapters", "publish", adapter(seed), "support", "--model", model, *where)
    path = tmp_path / "registry/adapters/support/v2/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["base"]["fingerprint"] = "sha256:" + "0" * 64
    path.write_text(json.dumps(manifest))
    for words in (("canary", "--weight", "0.1"), ("shadow", "--sample", "0.1")):
        refused = call("adapters", words[0], "support@v2", *words[1:], *where, "--json")
        assert (refused.code, json.loads(refused.err)["error"]["reason"]) == (1, "WRONG_BASE")
