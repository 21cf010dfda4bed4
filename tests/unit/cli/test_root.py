"""What every command says of a failure."""

from __future__ import annotations

import pytest

from engine.commands.root import explain


@pytest.mark.parametrize(
    ("missing", "fix"),
    [
        ("peft", "loraplex[train]"),
        ("bitsandbytes.nn", "loraplex[train]"),
        ("ray.serve", "loraplex[ray]"),
        ("jinja2", "loraplex[loadtest]"),
        ("vllm", "loraplex[cpu]"),
        ("model_signing", "loraplex[cpu]"),
        ("no_package_of_ours", "loraplex[cpu]"),
    ],
)
def test_what_to_install(missing: str, fix: str) -> None:
    """A module that is missing is named, with the extra that brings it."""
    facts = explain(ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    assert facts is not None
    assert facts["message"] == f"{missing} is not installed"
    assert fix in facts["fix"]


def test_our_own_modules() -> None:
    """A module of ours that is missing is a bug: it keeps its traceback."""
    assert explain(ModuleNotFoundError("No module named 'engine.nothing'", name="engine.nothing")) is None
