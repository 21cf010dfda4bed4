"""Names, references and suggestions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.registry.names import AdapterRef, check_alias, check_version, nearest


@pytest.mark.parametrize(
    ("text", "name", "selector"),
    [
        ("support", "support", "current"),
        ("support@v2", "support", "v2"),
        ("a.b-c_1@canary", "a.b-c_1", "canary"),
        ("v2@v2", "v2", "v2"),
    ],
)
def test_references_parse(text: str, name: str, selector: str) -> None:
    """A reference is a name and a selector; without selector it means current."""
    assert AdapterRef.parse(text) == AdapterRef(name, selector)


@pytest.mark.parametrize(
    "text", ["", "@", "@v1", "support@", "Support", "a b", "../x", "a/b", "-a", "a" * 64, "a@b@c", "a@B", "a\n", "é"]
)
def test_bad_references_are_refused(text: str) -> None:
    """What is no reference is refused, naming the field."""
    with pytest.raises(InvalidRequest) as caught:
        AdapterRef.parse(text)
    assert caught.value.violations[0][0] == "adapter"


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}@[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True))
def test_references_survive_printing(text: str) -> None:
    """Parsing what was printed gives the same reference."""
    assert str(AdapterRef.parse(text)) == text


@pytest.mark.parametrize("alias", ["v1", "v0", "v0123456789", "base", "2nd", "", "Canary", "a/b", "a" * 64])
def test_bad_aliases_are_refused(alias: str) -> None:
    """An alias is a word that nobody takes for a version or for the base."""
    with pytest.raises(InvalidRequest):
        check_alias(alias)


@pytest.mark.parametrize("version", ["v0", "v01", "1", "v", "v1234567890", "V1", "v1 "])
def test_bad_versions_are_refused(version: str) -> None:
    """Versions are v1, v2, and so on."""
    with pytest.raises(InvalidRequest):
        check_version(version)


def test_nearest_names_come_first_and_strangers_not_at_all() -> None:
    """A suggestion looks like what was asked for."""
    assert nearest("suport", ["billing", "support", "support-de", "zz"])[0] == "support"
    assert nearest("suport", ["billing", "zz"]) == []
    assert len(nearest("a1", [f"a{n}" for n in range(20)])) == 3
