"""SECURITY.md: every threat has what stops it, and a test that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "SECURITY.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| threat")
]


def test_every_kind_of_attacker_is_there() -> None:
    """Adapters, prompts, tenants, the network and the registry, several threats each."""
    text = (ROOT / "SECURITY.md").read_text()
    for kind in ("adapter", "prompt or caller", "tenant", "network", "registry"):
        assert f"### A hostile {kind}\n" in text
    assert len(ROWS) >= 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_every_threat_has_a_test(row: list[str]) -> None:
    """The tests that a row names exist, by file and by name."""
    _, measure, tests = row
    assert measure
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", tests)
    assert named
    assert len(named) == tests.count("`") / 2
    for path, test in named:
        source = (ROOT / path).read_text()
        assert not test or re.search(rf"def {test}\(", source), test
