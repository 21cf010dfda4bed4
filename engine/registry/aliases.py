"""What an alias log means: which version each alias names now, and which one it named before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from engine.errors import AdapterNotFound, NotAllowedNow, Overtaken
from engine.registry.manifest import AliasChange
from engine.registry.names import CANARY, CURRENT, SHADOW, AdapterRef, nearest, nearest_versions


def aliases_now(history: Iterable[AliasChange]) -> dict[str, str]:
    """Replay the log: which version each alias names."""
    latest = {change.alias: change.version for change in history}
    return {alias: version for alias, version in sorted(latest.items()) if version is not None}


def standing(alias: str, history: Sequence[AliasChange]) -> AliasChange | None:
    """Replay the log: the move that gave the alias the share that it has now, if any.

    Whatever moves the alias or "current" ends it, so that a promotion or rollback never leaves traffic on a version that was
    compared with something else.
    """
    for change in reversed(history):
        if change.alias == alias and change.version and change.split:
            return change
        if change.alias in (alias, CURRENT):
            return None
    return None


def refuse_if_overtaken(name: str, alias: str, history: Sequence[AliasChange], since: int) -> None:
    """Raise Overtaken if a move after number `since` changed what a decision about the alias was based on."""
    concerned = {alias, CURRENT} | ({CANARY} if alias != SHADOW else set())
    for change in reversed(history):
        if change.sequence > since and change.alias in concerned:
            raise Overtaken(f"{name}@{change.alias}", change.version or "no version")


def select_version(ref: AdapterRef, versions: Collection[str], aliases: dict[str, str]) -> str:
    """Return the version that `ref` means; raises AdapterNotFound with the nearest of what does exist."""
    version = ref.selector if ref.names_version else aliases.get(ref.selector)
    if version in versions and version is not None:
        return version
    if ref.names_version:
        found, kind = nearest_versions(ref.selector, versions), "version"
    else:
        found, kind = nearest(ref.selector, aliases), "alias"
    raise AdapterNotFound(str(ref), [f"{ref.name}@{selector}" for selector in found], kind)


class Moved(Protocol):
    """A move of an alias; `version` is empty or None when it was removed."""

    @property
    def alias(self) -> str:
        """Which one."""
        ...

    @property
    def version(self) -> str | None:
        """What it named from then on."""
        ...


def version_before(name: str, alias: str, history: Iterable[Moved], versions: Collection[str]) -> str:
    """Return the version that `alias` named before its present one, of those that still exist.

    Raises AdapterNotFound when there is no such alias, NotAllowedNow when it never named another version.
    """
    named = [change.version for change in history if change.alias == alias]
    if not named or not named[-1]:
        raise AdapterNotFound(f"{name}@{alias}", [], "alias")
    present = named[-1]
    for version in reversed(named):
        if version and version != present and version in versions:
            return version
    raise NotAllowedNow(
        f"{name}@{alias} names {present} and never named another version that still exists",
        fix="Set the alias to a version of your choice.",
    )
