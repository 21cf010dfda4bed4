"""The documentation is complete where it promises to be, and names nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from engine import errors

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.LoraplexError) and "reason" in vars(kind)
][1:]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.reason)
def test_every_reason_has_a_page(kind: type[errors.LoraplexError]) -> None:
    """A page with the reason's status and what to do about it, listed in the index."""
    page = (DOCS / "errors" / f"{kind.reason}.md").read_text()
    assert page.startswith(f"# {kind.reason}\n\n`{kind.status}` · ")
    assert "**What to do.**" in page
    assert f"| [{kind.reason}]({kind.reason}.md) | `{kind.status}` |" in (DOCS / "errors" / "index.md").read_text()


def test_no_page_without_a_reason() -> None:
    """Reasons that are gone have no pages."""
    assert {page.stem for page in (DOCS / "errors").glob("*.md")} == {kind.reason for kind in KINDS} | {"index"}


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_what_pages_name_is_there(page: Path) -> None:
    """Links between pages, and files and tests of the repository in code."""
    text = page.read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), target
    for path, test in re.findall(r"`((?:tests|docs|engine|loadtest|protos|examples|k8s)/[\w./-]+)(?:::(\w+))?`", text):
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), test


def test_every_page_is_in_the_navigation() -> None:
    """Nothing is written that nobody finds."""
    listed = set(re.findall(r"[\w/-]+\.md", yaml.safe_dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.glob("*.md")} | {
        "errors/index.md",
        "runbooks/README.md",
    }
