"""What adapters, versions and aliases may be called, and what a caller may have meant by a name that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from rapidfuzz import process

from engine.errors import InvalidRequest

CURRENT = "current"  # the alias that a bare adapter name means
CANARY = "canary"  # the alias that may answer a share of what the bare name is asked
SHADOW = "shadow"  # the alias that may be asked a copy of what the bare name is asked

NAME = r"[a-z0-9][a-z0-9._-]{0,62}"  # what an adapter may be called, as a regular expression

_NAME = re.compile(NAME)
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
_VERSION_SHAPED = re.compile(r"v[0-9]+")
_RESERVED_ALIASES = frozenset({"base"})  # the API's word for the base model
_LEAST_LIKENESS = 55  # of 100; below this a suggestion confuses more than it helps
_NAME_SYNTAX = "use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"


@dataclass(frozen=True)
class AdapterRef:
    """What a caller writes to name a version: an adapter and a selector, which is a version or an alias."""

    name: str
    selector: str = CURRENT
    bare: bool = field(default=False, compare=False)  # the caller named no selector, so a canary may answer

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Read "support@v2", "support@canary" or "support" (which means "support@current").

        Raises InvalidRequest about the field "adapter".
        """
        name, separator, selector = text.partition("@")
        _require(_NAME, name, f"{name!r} is no adapter name: {_NAME_SYNTAX}")
        if separator:
            _require(_NAME, selector, f"{selector!r} is no version or alias: write {name}@v2 or {name}@{CURRENT}")
        return cls(name, selector if separator else CURRENT, bare=not separator)

    @property
    def names_version(self) -> bool:
        """Whether the selector is a version number rather than an alias."""
        return is_version(self.selector)

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"


def is_version(text: str) -> bool:
    """Whether `text` is spelled like a version: v1 to v999999999."""
    return _VERSION.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raise InvalidRequest unless `name` may be an adapter's name."""
    _require(_NAME, name, f"{name!r} is no adapter name: {_NAME_SYNTAX}")


def check_version(version: str) -> None:
    """Raise InvalidRequest unless `version` is spelled like one."""
    _require(_VERSION, version, f"{version!r} is no version: versions are v1, v2, ... up to v999999999", "version")


def check_alias(alias: str) -> None:
    """Raise InvalidRequest unless `alias` may be an alias: no version number, no reserved word."""
    if _VERSION_SHAPED.fullmatch(alias):
        raise InvalidRequest("alias", f"{alias!r} looks like a version: choose a word such as 'canary'")
    if alias in _RESERVED_ALIASES:
        raise InvalidRequest("alias", f"{alias!r} is reserved: choose another word")
    _require(_ALIAS, alias, f"{alias!r} is no alias: {_NAME_SYNTAX.replace('letter or digit', 'letter')}", "alias")


def nearest(name: str, candidates: Iterable[str], limit: int = 3) -> list[str]:
    """Return those of `candidates` that look like `name`, the most alike first."""
    found = process.extract(name, sorted(candidates), limit=limit, score_cutoff=_LEAST_LIKENESS)
    return [candidate for candidate, _, _ in found]


def nearest_versions(version: str, versions: Iterable[str], limit: int = 3) -> list[str]:
    """Return those of `versions` whose numbers are closest to that of `version`."""
    return sorted(versions, key=lambda other: (abs(int(other[1:]) - int(version[1:])), other))[:limit]


def _require(pattern: re.Pattern[str], value: str, problem: str, field: str = "adapter") -> None:
    if not pattern.fullmatch(value):
        raise InvalidRequest(field, problem)
