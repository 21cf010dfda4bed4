"""What the registry keeps about a version, and about every move of an alias."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from engine.errors import CorruptVersion

SCHEMA_VERSION = 1

# A manifest read back from the store decides where files are written, so no path in it may leave its folder.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Record(BaseModel):
    """Frozen; fields of later schema versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def encode(self) -> bytes:
        """Render as the JSON that the store keeps."""
        return self.model_dump_json(indent=2).encode()


class FileEntry(_Record):
    """One file of a version."""

    path: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class BaseRef(_Record):
    """The base model of a version; `assumed` when nobody recorded it and the serving base was taken."""

    name: str
    fingerprint: Digest
    assumed: bool


class Manifest(_Record):
    """A published version."""

    schema_version: int = SCHEMA_VERSION
    name: str
    version: str
    digest: Digest
    created_at: AwareDatetime
    publisher: str = ""
    run_id: str = ""
    base: BaseRef
    rank: int = Field(ge=1)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    targets: tuple[str, ...]
    size_bytes: int = Field(ge=0)
    files: tuple[FileEntry, ...]
    notes: str = ""
    evaluation: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """The version as callers write it: "support@v2"."""
        return f"{self.name}@{self.version}"

    @property
    def number(self) -> int:
        """The version as a number, for ordering."""
        return int(self.version[1:])


class Trial(_Record):
    """How a canary is judged against the current version: for `seconds`, within two bounds, and what comes `then`."""

    seconds: float = Field(gt=0, allow_inf_nan=False)
    max_error_rate: float = Field(0.02, ge=0, le=1, allow_inf_nan=False)
    max_ttft_ratio: float = Field(1.5, gt=0, allow_inf_nan=False)
    then: Literal["end", "promote"] = "end"


class Split(_Record):
    """A share of the bare name's requests, 0 to 1, that goes to the alias: answered by it ("canary") or copied ("shadow")."""

    weight: float = Field(ge=0, le=1, allow_inf_nan=False)
    trial: Trial | None = None


class AliasChange(_Record):
    """One move of an alias; `version` is None when it was removed. One with a `split` starts a canary or a shadow."""

    sequence: int = Field(ge=1)
    alias: str
    version: str | None
    created_at: AwareDatetime
    actor: str = ""
    reason: str = ""
    split: Split | None = None


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """An evaluation as callers get it: no longer than the text that a publisher's header may hold."""
    return json.dumps(evaluation, ensure_ascii=False, separators=(",", ":"))


def version_digest(files: Iterable[FileEntry]) -> str:
    """Digest a version by its files' paths and digests, in no particular order."""
    pairs = sorted((file.path, file.sha256) for file in files)
    canonical = json.dumps(pairs, separators=(",", ":")).encode()
    return f"sha256:{hashlib.sha256(canonical).hexdigest()}"


def decode_manifest(data: bytes, name: str, version: str) -> Manifest:
    """Read the manifest of `name`@`version`; raises CorruptVersion when it is damaged or another version's."""
    ref = f"{name}@{version}"
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptVersion(ref, "its manifest.json is not readable") from error
    if manifest.ref != ref:
        raise CorruptVersion(ref, f"its manifest.json is that of {manifest.ref}")
    if manifest.digest != version_digest(manifest.files):
        raise CorruptVersion(ref, "its manifest.json contradicts itself: digest and files differ")
    return manifest


def decode_change(data: bytes, name: str, sequence: int) -> AliasChange:
    """Read move number `sequence` of `name`'s aliases; raises CorruptVersion when it is damaged."""
    try:
        change = AliasChange.model_validate_json(data)
    except ValidationError as error:
        raise CorruptVersion(name, f"alias move {sequence} is not readable") from error
    if change.sequence != sequence:
        raise CorruptVersion(name, f"alias move {sequence} is filed under another number")
    return change
