"""`adapters promote --require`: a promotion that depends on what evaluations found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import RequirementNotMet
from engine.registry.names import CURRENT

if TYPE_CHECKING:
    from engine.api.loraplex.v1 import adapters_pb2 as pb
    from engine.commands.backends import Backend
    from engine.tuning.requirement import Condition


def parsed_requirement(text: str | None) -> list[Condition]:
    """The conditions of an expression, none without one; raises InvalidRequirement."""
    if text is None:
        return []
    from engine.tuning.requirement import parse

    return parse(text)


async def check_requirement(backend: Backend, version: pb.AdapterVersion, conditions: Sequence[Condition]) -> str:
    """Raise RequirementNotMet unless all hold; returns the current version that it was compared with."""
    from engine.tuning.requirement import failures

    current = (await backend.get(version.name)).adapter.aliases.get(CURRENT, "")
    ref = f"{version.name}@{version.version}"
    records = await backend.evaluations(version.name, version.version)
    others = await backend.evaluations(version.name, current) if current else []
    than = f"{version.name}@{current}" if current else ""
    dtype = await backend.compute_dtype()
    found = failures(conditions, ref, than, records, others, version.base_fingerprint, dtype)
    if found:
        raise RequirementNotMet(ref, found)
    return current
