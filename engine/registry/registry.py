"""The one source of truth about adapters: names, immutable versions, and the log of what each alias names."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import (
    AdapterNotFound,
    AliasMoved,
    CorruptVersion,
    InvalidRequest,
    NotAllowedNow,
    RegistryUnavailable,
    VersionExists,
    WrongBase,
)
from engine.registry import publication
from engine.registry.aliases import aliases_now, refuse_if_overtaken, standing
from engine.registry.checks import CheckedAdapter
from engine.registry.layout import alias_file, evaluation_file, evaluations_folder, tombstone_file
from engine.registry.manifest import AliasChange, Manifest, Split, Trial, version_digest
from engine.registry.names import CANARY, CURRENT, SHADOW, check_alias, check_name, check_version, nearest
from engine.registry.publication import Progress
from engine.registry.reader import Reader
from engine.registry.store import AlreadyThere

_LAST_NUMBER = 999_999_999


class Registry(Reader):
    """Adapters in a store. Holds no state: any number of processes may use one store at once."""

    # Publishing and deleting

    async def publish(
        self,
        folder: Path,
        checked: CheckedAdapter,
        *,
        name: str,
        version: str | None = None,
        publisher: str = "",
        run_id: str = "",
        notes: str = "",
        evaluation: dict[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Manifest:
        """Publish a checked folder as `version`, or else as the next free one, all or nothing.

        Nothing answers differently afterwards, except that an adapter without a "current" version gets this one.
        The same files under the same version are no error: the version that exists is returned.
        Raises VersionExists, RegistryUnavailable, InvalidAdapter when the folder changed since its check, and InvalidRequest
        when what is said about the version could not be read again.
        """
        check_name(name)
        digest = version_digest(checked.files)
        if version and (existing := await self._same_version(name, version, digest)):
            await self._ensure_current(name, existing.version, publisher)
            return existing
        draft = Manifest(
            name=name,
            version=version or "v1",  # until a number is claimed
            digest=digest,
            created_at=datetime.now(UTC),
            publisher=publisher,
            run_id=run_id or checked.run.get("run_id") or "",
            base=checked.base,
            rank=checked.rank,
            alpha=checked.alpha,
            targets=checked.targets,
            size_bytes=sum(file.size_bytes for file in checked.files),
            files=checked.files,
            notes=notes,
            evaluation=evaluation if evaluation is not None else checked.run.get("evaluation"),
            warnings=checked.warnings,
        )
        publication.check_readable(draft, "evaluation_json" if evaluation is not None else "")
        claimed = await self._claim(name, version, digest)
        if isinstance(claimed, Manifest):
            return claimed
        manifest = draft.model_copy(update={"version": claimed})
        await publication.upload(self._store, manifest, folder, progress)
        await self._ensure_current(name, manifest.version, publisher)
        return manifest

    async def delete_version(self, name: str, version: str) -> None:
        """Withdraw a version for good, a damaged one too; raises NotAllowedNow while an alias names it.

        It goes on if the caller leaves; if it fails, the version is as before. Files that it left behind go with the next one.
        """
        check_name(name)
        check_version(version)
        if not await self._half_deleted(name, version):
            with suppress(CorruptVersion):
                await self.manifest(name, version)
            await self._refuse_if_named(name, version)
            await asyncio.shield(asyncio.create_task(self._withdraw(name, version)))
            return
        await self._refuse_if_named(name, version)
        await publication.delete_files(self._store, name, version)

    async def record_evaluation(self, name: str, version: str, record: dict[str, Any]) -> int:
        """Keep what an evaluation of a version found, for good; returns its number.

        The newest record once more is not kept twice: a router asks a second replica if the first dies before it answers.
        """
        await self.manifest(name, version)
        data = json.dumps(record, indent=2).encode()
        sequence = max(len(await self._store.list(evaluations_folder(name, version))), 1)  # the newest may be this one
        while True:
            path = evaluation_file(name, version, sequence)
            try:
                await self._store.create(path, data)
            except AlreadyThere:
                if await self._store.get(path) == data:
                    return sequence
                sequence += 1
            else:
                return sequence

    # Aliases

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: str,
        *,
        actor: str = "",
        reason: str = "",
        expected: str | None = None,
        since: int | None = None,
    ) -> AliasChange:
        """Point an alias at a version. With `expected`, only if it names that one now ("": none), else AliasMoved.

        With `since`, the number of the last move that the caller knows of, only if none after it moved this alias,
        "current" or "canary", else Overtaken.
        """
        check_alias(alias)
        await self.manifest(name, version)
        return await self._point(name, alias, version, actor, reason, expected, since)

    async def set_canary(
        self,
        name: str,
        version: str,
        weight: float,
        *,
        trial: Trial | None = None,
        actor: str = "",
        reason: str = "",
        expected: str | None = None,
        since: int | None = None,
    ) -> AliasChange:
        """Point "canary" at a version and give it a share of the bare name's requests, in one move.

        Raises InvalidRequest when the weight is outside 0 to 1, or leaves a trial nothing to compare with; NotAllowedNow when
        the version is the current one. `expected` and `since` as in `set_alias`.
        """
        if trial and weight in (0, 1):
            raise InvalidRequest("weight", "a canary that is judged needs requests on both sides: above 0, below 1")
        split = Split(weight=await self._share("weight", weight, name, version), trial=trial)
        return await self._point(name, CANARY, version, actor, reason, expected, since, split)

    async def end_canary(
        self, name: str, *, actor: str = "", reason: str = "", since: int | None = None
    ) -> AliasChange:
        """Let "current" answer alone again; "canary" goes on naming its version. NotAllowedNow when none stands."""
        return await self._end(name, CANARY, actor, reason, since)

    async def set_shadow(
        self, name: str, version: str, sample: float, *, actor: str = "", reason: str = "", since: int | None = None
    ) -> AliasChange:
        """Point "shadow" at a version and have it asked a share of the bare name's requests again, in one move.

        Raises InvalidRequest when the share is outside 0 to 1, NotAllowedNow when the version is the current one.
        """
        split = Split(weight=await self._share("sample", sample, name, version))
        return await self._point(name, SHADOW, version, actor, reason, None, since, split)

    async def end_shadow(self, name: str, *, actor: str = "", reason: str = "") -> AliasChange:
        """Copy no more requests; "shadow" goes on naming its version. NotAllowedNow when none stands."""
        return await self._end(name, SHADOW, actor, reason, None)

    async def _share(self, field: str, share: float, name: str, version: str) -> float:
        """Return the share after checking that it is one, and that the version can be compared with the current one."""
        if not 0 <= share <= 1:  # also when it is no number
            raise InvalidRequest(field, f"{share:g} is no share: use 0 to 1, such as 0.05 for 5 %")
        theirs = (await self.manifest(name, version)).base.fingerprint
        current = (await self.aliases(name)).get(CURRENT, version)
        if current == version:
            raise NotAllowedNow(f"{name}@{version} is the current version", fix="Name the version to try beside it.")
        if theirs != (base := (await self.manifest(name, current)).base.fingerprint):
            raise WrongBase(f"{name}@{version}", theirs, base)
        return share

    async def _end(self, name: str, alias: str, actor: str, reason: str, since: int | None) -> AliasChange:
        move = standing(alias, await self.history(name))
        if move is None or move.version is None:
            raise NotAllowedNow(f"{name} has no {alias}", fix="There is nothing to end.")
        since = move.sequence if since is None else since  # not a later one that nobody has told to end
        reason = reason or f"{alias} ended"
        return await self._point(name, alias, move.version, actor, reason, move.version, since)

    async def _point(
        self,
        name: str,
        alias: str,
        version: str,
        actor: str,
        reason: str,
        expected: str | None,
        since: int | None = None,
        split: Split | None = None,
    ) -> AliasChange:
        change = await self._append(name, alias, version, actor, reason, expected, since, split)
        if await self._published(name, version) is None:
            # Deleted between check and write: take the move back, so that no alias names a version that is gone.
            history = await self.history(name)
            before = aliases_now(move for move in history if move.sequence < change.sequence).get(alias)
            with suppress(AliasMoved):  # somebody has moved it on already
                await self._append(name, alias, before, actor, f"{version} was deleted", version)
            raise AdapterNotFound(f"{name}@{version}", [], "version")
        return change

    async def remove_alias(self, name: str, alias: str, *, actor: str = "", reason: str = "") -> AliasChange:
        """Take an alias away; raises AdapterNotFound when there is none, NotAllowedNow for "current"."""
        if alias == CURRENT:
            raise NotAllowedNow(f"the alias {CURRENT!r} cannot be removed", fix="Point it at another version.")
        present = await self.aliases(name)
        if alias not in present:
            raise AdapterNotFound(f"{name}@{alias}", [f"{name}@{found}" for found in nearest(alias, present)], "alias")
        return await self._append(name, alias, None, actor, reason, None)

    # Steps

    async def _same_version(self, name: str, version: str, digest: str) -> Manifest | None:
        """Return the version if it is published with these very files; raises VersionExists if with others."""
        check_version(version)
        if await self._exists(tombstone_file(name, version)):
            raise NotAllowedNow(
                f"{name}@{version} was deleted, and numbers are never used again",
                fix="Publish without naming a version to get the next free one.",
            )
        existing = await self._published(name, version)
        if existing is not None and existing.digest != digest:
            raise VersionExists(existing.ref)
        return existing

    async def _claim(self, name: str, version: str | None, digest: str) -> str | Manifest:
        """Take a number nobody has; or return the version if a racing publisher has just published the same files."""
        if version:
            if await publication.claim(self._store, name, version):
                return version
            if existing := await self._same_version(name, version, digest):
                return existing
            raise VersionExists(f"{name}@{version}")
        number = (await self._inventory(name)).next_number
        while number <= _LAST_NUMBER:
            if await publication.claim(self._store, name, f"v{number}"):
                return f"v{number}"
            number += 1
        raise NotAllowedNow(f"{name} has no version numbers left", fix="Publish under another name.")

    async def _ensure_current(self, name: str, version: str, actor: str) -> None:
        """Make a bare name work from the first version on; racing publishers agree on whoever comes first."""
        if CURRENT in await self.aliases(name):
            return
        try:
            await self.set_alias(name, CURRENT, version, actor=actor, reason="first version", expected="")
        except AliasMoved:
            return

    async def _half_deleted(self, name: str, version: str) -> bool:
        """Whether a deletion was cut off: the version is gone for callers, but not its files."""
        gone = await self._exists(tombstone_file(name, version))
        return gone and bool(await publication.files_left(self._store, name, version))

    async def _withdraw(self, name: str, version: str) -> None:
        """Delete a version, unless an alias has moved here meanwhile."""
        try:
            await publication.bury(self._store, name, version)
            # set_alias looks for tombstones after its write, so one sees the other.
            await self._refuse_if_named(name, version)
        except BaseException:
            # Nobody knows whether an alias names it. If it stays buried as the store is away, deleting it again helps.
            with suppress(RegistryUnavailable):
                await self._store.delete([tombstone_file(name, version)])
            raise
        await publication.delete_files(self._store, name, version)

    async def _refuse_if_named(self, name: str, version: str) -> None:
        naming = [alias for alias, named in (await self.aliases(name)).items() if named == version]
        if naming:
            aliases = " and ".join(f"{name}@{alias}" for alias in naming)
            raise NotAllowedNow(f"{aliases} names {name}@{version}", fix="Point the alias at another version first.")

    async def _append(
        self,
        name: str,
        alias: str,
        version: str | None,
        actor: str,
        reason: str,
        expected: str | None,
        since: int | None = None,
        split: Split | None = None,
    ) -> AliasChange:
        """Add a move to the log; whoever loses the race for a number looks again and takes the next."""
        while True:
            history = await self.history(name)
            if since is not None:
                refuse_if_overtaken(name, alias, history, since)
            present = aliases_now(history).get(alias, "")
            if expected is not None and present != expected:
                raise AliasMoved(f"{name}@{alias}", expected or "no version", present)
            change = AliasChange(
                sequence=history[-1].sequence + 1 if history else 1,
                alias=alias,
                version=version,
                created_at=datetime.now(UTC),
                actor=actor,
                reason=reason,
                split=split,
            )
            try:
                await self._store.create(alias_file(name, change.sequence), change.encode())
            except AlreadyThere:
                # A store that retries a write whose answer was lost reports our own move as somebody else's.
                if await self._move(name, change.sequence) != change:
                    continue
            return change
