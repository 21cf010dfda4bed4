"""The policy file: tenants, their credentials, what each may do and how much of it.

Every key is checked; one that is unknown or out of bounds makes the whole file invalid, so that a slip of the pen never
takes a limit away.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.config import MAX_WEIGHT, MIN_WEIGHT, TENANT
from engine.errors import BadConfiguration
from engine.server.identity.principal import Principal, Role

_MOST_BYTES = 4 * 1024 * 1024
_PATTERN = re.compile(r"[a-z0-9*][a-z0-9._*-]{0,62}")
_FIX = (
    "Correct the file; `loraplex policy check FILE` says what is wrong, `loraplex policy init FILE` writes an example."
)

# Signatures by a key of which the verifier knows the public half only. HS256 and none are not among them: with a
# symmetric algorithm somebody could sign with our public key, which everybody knows.
Algorithm = Literal[
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"
]  # fmt: skip


def _tenant_name(name: str) -> str:
    if not TENANT.fullmatch(name):
        raise ValueError("a tenant's name has at most 64 letters, digits, '.', '_' and '-', a letter or digit first")
    return name


def _adapter_pattern(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("an adapter pattern is a name without @, in which * stands for any characters")
    return pattern


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


TenantName = Annotated[str, AfterValidator(_tenant_name)]
AdapterPattern = Annotated[str, AfterValidator(_adapter_pattern)]
Moment = Annotated[datetime, AfterValidator(_in_utc)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ApiKey(_Part):
    """An API key, by its public id and the SHA-256 of its secret half."""

    id: str = Field(
        pattern=r"^[a-z0-9]{8,32}$", description="The key's public half, as `loraplex keys create` says it."
    )
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False, description="Digest of the secret half.")
    expires: Moment | None = Field(None, description="From when on it is refused.")
    revoked: bool = Field(False, description="Refuse it from now on.")
    note: str = Field("", max_length=200, description="For people: who has it, and what for.")


class TenantLimits(_Part):
    """How much a tenant may have, of each server. What is left out is not limited."""

    requests_per_s: float | None = Field(None, gt=0, le=1_000_000, description="Requests a second, on average.")
    burst: int | None = Field(
        None, ge=1, le=1_000_000, description="Requests at once before that counts; default: those of a second."
    )
    tokens_per_min: int | None = Field(
        None, ge=1, le=10_000_000_000, description="Tokens of prompts and answers a minute."
    )
    concurrent: int | None = Field(None, ge=1, le=100_000, description="Requests at once, waiting ones included.")
    max_waiting: int | None = Field(None, ge=0, le=100_000, description="Requests that may wait for a place.")
    max_tokens: int | None = Field(None, ge=1, le=10_000_000, description="Most tokens of one answer.")
    weight: float = Field(1.0, ge=MIN_WEIGHT, le=MAX_WEIGHT, description="Its share of the engine, against others'.")
    max_priority: int = Field(0, ge=-100, le=100, description="Highest priority that its requests may ask for.")


class Tenant(_Part):
    """Who may do what."""

    roles: frozenset[Role] = Field(frozenset({Role.INVOKE}), description="invoke, publish, promote, observe, admin.")
    adapters: tuple[AdapterPattern, ...] = Field((), max_length=1000, description="Names, such as support or legal-*.")
    base: bool = Field(False, description="Whether it may use the base model itself.")
    keys: tuple[ApiKey, ...] = Field((), max_length=1000, description="Its API keys.")
    certificates: tuple[str, ...] = Field(
        (), max_length=1000, description="Its client certificates: a subject alternative name, or CN=a common name."
    )
    limits: TenantLimits = Field(TenantLimits(), description="How much it may have.")
    cache_group: TenantName | None = Field(
        None, description="Tenants of one group share the cache of prompt prefixes; default: nobody shares."
    )


class Issuer(_Part):
    """Whose tokens (JWT, OIDC) are believed, and which tenant they stand for."""

    issuer: str = Field(min_length=1, max_length=500, description="The claim `iss`.")
    audience: str = Field(min_length=1, max_length=500, description="What the claim `aud` must hold.")
    jwks: str = Field(min_length=1, max_length=2000, description="Its public keys: an https:// URL, or a file.")
    algorithms: frozenset[Algorithm] = Field(frozenset({"RS256", "ES256"}), min_length=1, description="Allowed ones.")
    tenant_claim: str = Field("sub", max_length=200, description="The claim that names the tenant.")
    tenants: dict[str, TenantName] = Field(
        default_factory=dict, max_length=10_000, description="The claim's values and their tenants; default: the same."
    )
    leeway_s: float = Field(30.0, ge=0, le=300, description="How far clocks may differ.")
    revoked: frozenset[str] = Field(
        frozenset(), max_length=10_000, description="Tokens that count no more, by their claim `jti`."
    )

    @field_validator("jwks")
    @classmethod
    def _safe(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme in ("", "file") or url.scheme == "https":
            return value
        if url.scheme == "http" and url.hostname in ("localhost", "127.0.0.1", "::1"):
            return value
        raise ValueError("must be a file or an https:// URL: whoever can change it on its way can sign for anybody")


class Open(_Part):
    """What needs no credentials, beside health, which never does."""

    reflection: bool = Field(False, description="Let anybody discover the API.")
    metrics: bool = Field(False, description="Let anybody read /metrics, which holds names of tenants and adapters.")


class Policy(_Part):
    """All of it."""

    version: Literal[1] = Field(description="Of this format.")
    tenants: dict[TenantName, Tenant] = Field(max_length=10_000, description="By name.")
    issuers: tuple[Issuer, ...] = Field((), max_length=20, description="Whose tokens are believed.")
    open: Open = Field(Open(), description="What needs no credentials.")
    share_prefix_cache: bool = Field(False, description="Let all tenants share the cache of prompt prefixes.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _unique("key id", [key.id for tenant in self.tenants.values() for key in tenant.keys])
        _unique("certificate", [name for tenant in self.tenants.values() for name in tenant.certificates])
        _unique("issuer", [issuer.issuer for issuer in self.issuers])
        for issuer in self.issuers:
            if unknown := sorted(set(issuer.tenants.values()) - set(self.tenants)):
                raise ValueError(f"issuer {issuer.issuer}: there is no tenant {', '.join(unknown)}")
        return self

    @cached_property
    def keys(self) -> dict[str, tuple[str, ApiKey]]:
        """Every API key with its tenant, by id."""
        return {key.id: (name, key) for name, tenant in self.tenants.items() for key in tenant.keys}

    @cached_property
    def certificates(self) -> dict[str, str]:
        """Tenants by the names in their certificates."""
        return {cert: name for name, tenant in self.tenants.items() for cert in tenant.certificates}

    def principal(self, tenant: str, credential: str) -> Principal:
        """The tenant as a caller that was known by `credential`."""
        found = self.tenants[tenant]
        return Principal(tenant, credential, found.roles, found.adapters, found.base)


def _unique(what: str, names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{what} {', '.join(twice)} is there twice, so it would be unclear whose it is")


def read_policy(path: Path) -> Policy:
    """The policy that is in the file. Raises BadConfiguration, which says where it is wrong but never repeats a value."""
    try:
        with path.open("rb") as file:
            return parse_policy(file.read(_MOST_BYTES + 1))
    except OSError as error:
        raise BadConfiguration(f"the policy {path.name} cannot be read: {error.strerror}", fix=_FIX) from error


def parse_policy(data: bytes) -> Policy:
    """The same of a file's contents."""
    if len(data) > _MOST_BYTES:
        raise BadConfiguration(f"the policy is larger than {_MOST_BYTES} bytes", fix=_FIX)
    try:
        content = yaml.load(data, _Loader)  # noqa: S506 - a SafeLoader that refuses more
    except Exception as error:  # noqa: BLE001 - PyYAML raises whatever a value's type does: `!!bool maybe` is a KeyError
        raise BadConfiguration(f"the policy is not YAML: {_where(error)}", fix=_FIX) from None
    try:
        return Policy.model_validate(content)
    except (ValidationError, RecursionError) as error:
        found = _problems(error) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise BadConfiguration(f"the policy is wrong: {found}", fix=_FIX) from None


class _Loader(yaml.SafeLoader):
    """Plain YAML without anchors, which could make a small file huge, and without keys that are there twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases (& and *) are not allowed; quote a pattern that begins with *")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {', '.join(sorted(twice))} is there twice")
        return super().construct_mapping(node, deep)


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors()[:20])


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', '')}"
    return str(error) if type(error) is yaml.YAMLError else type(error).__name__
