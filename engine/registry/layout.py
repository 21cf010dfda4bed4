"""Which object lies where in the registry, and what a listing of it says."""

# adapters/<name>/v<N>/.claim            who took the number; never deleted, so that no number is used twice
# adapters/<name>/v<N>/<file>            the adapter's files, as they were uploaded
# adapters/<name>/v<N>/manifest.json     written last: without it the version does not exist
# adapters/<name>/aliases/<seq>.json     one move of an alias, numbered without gaps
# adapters/<name>/evaluations/v<N>/<seq>.json   what an evaluation of the version found
# adapters/<name>/deleted/v<N>.json      the version is withdrawn, whatever else of it is still there

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.registry.names import NAME

ROOT = "adapters"
MANIFEST = "manifest.json"
CLAIM = ".claim"

_VERSION_OBJECT = re.compile(rf"{ROOT}/({NAME})/v([1-9][0-9]{{0,8}})/([^/]+)")
_ALIAS_OBJECT = re.compile(rf"{ROOT}/({NAME})/aliases/([0-9]{{8}})\.json")
_TOMBSTONE = re.compile(rf"{ROOT}/({NAME})/deleted/v([1-9][0-9]{{0,8}})\.json")


@dataclass
class Inventory:
    """What a listing says about one adapter: numbers of versions and of alias moves."""

    taken: set[int] = field(default_factory=set)
    complete: set[int] = field(default_factory=set)
    deleted: set[int] = field(default_factory=set)
    moves: set[int] = field(default_factory=set)

    @property
    def published(self) -> list[int]:
        """The versions that exist for callers, oldest first."""
        return sorted(self.complete - self.deleted)

    @property
    def next_number(self) -> int:
        """A version number that nobody has ever taken."""
        return max(self.taken | self.deleted, default=0) + 1


def take_inventory(paths: Iterable[str]) -> dict[str, Inventory]:
    """Sort listed paths by adapter; objects that are none of ours are passed over."""
    found: dict[str, Inventory] = {}
    for path in paths:
        if match := _VERSION_OBJECT.fullmatch(path):
            inventory = found.setdefault(match[1], Inventory())
            inventory.taken.add(int(match[2]))
            if match[3] == MANIFEST:
                inventory.complete.add(int(match[2]))
        elif match := _ALIAS_OBJECT.fullmatch(path):
            found.setdefault(match[1], Inventory()).moves.add(int(match[2]))
        elif match := _TOMBSTONE.fullmatch(path):
            found.setdefault(match[1], Inventory()).deleted.add(int(match[2]))
    return found


def adapter_folder(name: str) -> str:
    """Where everything about one adapter lies."""
    return f"{ROOT}/{name}"


def version_file(name: str, version: str, file: str) -> str:
    """Where a file of a version lies."""
    return f"{ROOT}/{name}/{version}/{file}"


def alias_file(name: str, sequence: int) -> str:
    """Where a move of an alias lies."""
    return f"{ROOT}/{name}/aliases/{sequence:08d}.json"


def evaluations_folder(name: str, version: str) -> str:
    """Where a version's evaluations lie."""
    return f"{ROOT}/{name}/evaluations/{version}"


def evaluation_file(name: str, version: str, sequence: int) -> str:
    """Where one of them lies."""
    return f"{evaluations_folder(name, version)}/{sequence:08d}.json"


def tombstone_file(name: str, version: str) -> str:
    """What marks a version as deleted."""
    return f"{ROOT}/{name}/deleted/{version}.json"
