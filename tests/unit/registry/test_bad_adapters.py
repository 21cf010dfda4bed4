"""The corpus of bad adapters: all are refused for the right reason, and nothing of them is ever seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import InvalidAdapter
from engine.registry.checks import check_adapter
from engine.registry.fingerprint import Base
from engine.registry.registry import Registry
from engine.registry.store import Store
from tests.unit.registry.bad_adapters import CORPUS, Bad
from tests.unit.registry.conftest import LIMITS, base_tensors, valid_adapter, write_base


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The base that all of them claim to be for."""
    from engine.registry.fingerprint import read_base

    return read_base(write_base(tmp_path_factory.mktemp("base") / "tiny", base_tensors()))


def test_the_corpus_is_large() -> None:
    """At least sixty ways to be bad, each with a name of its own."""
    assert len({bad.id for bad in CORPUS}) == len(CORPUS) >= 60


async def test_what_they_begin_with_is_good(served: Base, tmp_path: Path) -> None:
    """The adapter that all of them break would be published."""
    folder = valid_adapter(tmp_path / "adapter").write()
    registry = Registry(Store.open("memory://"))
    await registry.publish(folder, check_adapter(folder, served, LIMITS), name="good")
    assert await registry.list_names() == ["good"]


@pytest.mark.parametrize("bad", CORPUS, ids=lambda bad: bad.id)
async def test_refused(served: Base, tmp_path: Path, bad: Bad) -> None:
    """Refused by its own check, naming the place and what to do, without a path of ours; the registry stays empty."""
    folder = bad.write(valid_adapter(tmp_path / "adapter"))
    registry = Registry(Store.open("memory://"))
    with pytest.raises(bad.error) as caught:
        await registry.publish(folder, check_adapter(folder, served, LIMITS), name="bad")
    error = caught.value
    if isinstance(error, InvalidAdapter):
        assert error.check == bad.check
        assert bad.where in error.where
    assert error.fix
    assert str(tmp_path) not in error.message
    assert len(error.message) < 2000
    error.message.encode()
    assert await registry.list_names() == []
    assert await registry._store.list("") == []
