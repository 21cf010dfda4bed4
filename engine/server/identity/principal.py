"""Who calls, and what they may do: the answer to every question about rights."""

from __future__ import annotations

import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import translate
from functools import lru_cache

from engine.errors import AdapterNotFound, LoraplexError, PermissionDenied
from engine.runtime.admission import ANONYMOUS


class Role(StrEnum):
    """What a tenant may do. ADMIN includes all the others."""

    INVOKE = "invoke"  # generate and count tokens
    PUBLISH = "publish"  # publish versions and record their evaluations
    PROMOTE = "promote"  # decide which version answers: preloads, aliases, canaries, shadows
    OBSERVE = "observe"  # see metrics, and everybody's activity
    ADMIN = "admin"  # pin, unload and delete, and everything else


@dataclass(frozen=True)
class Principal:
    """A caller. `credential` says by what it was known ("key:ID", "token:SUBJECT", "certificate:NAME"), without any secret.

    `adapters` are patterns such as "support" and "legal-*"; None stands for a server that asks nobody who they are.
    """

    tenant: str
    credential: str = ""
    roles: frozenset[Role] = frozenset()
    adapters: tuple[str, ...] | None = None
    base: bool = True
    _matching: re.Pattern[str] | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_matching", None if self.adapters is None else _pattern(self.adapters))

    @property
    def trusted(self) -> bool:
        """Whether nobody is asked who they are, so that everything is allowed."""
        return self.adapters is None

    def may(self, role: str, adapter: str | None = None) -> bool:
        """Whether it has the role and, if an adapter is named, may use it: "" is the base model, None names none."""
        return self._has(role) and (adapter is None or self.uses(adapter))

    def require(self, role: str, adapter: str | None = None) -> None:
        """Raise PermissionDenied unless `may`; looks nothing up, so an adapter that is not there makes no difference."""
        if not self._has(role):
            raise PermissionDenied(self.tenant, f"do this: it needs the role {str(role)!r}")
        if adapter is not None and not self.uses(adapter):
            raise self.denied(adapter)

    def uses(self, adapter: str) -> bool:
        """Whether the adapter is on its list: "support", "support@v2", or "" for the base model."""
        return self.sees(adapter.partition("@")[0]) if adapter else self.base

    def denied(self, adapter: str) -> PermissionDenied:
        """The one refusal of an adapter that is not on its list."""
        return PermissionDenied(self.tenant, f"use the adapter {adapter!r}" if adapter else "use the base model")

    def sees(self, name: str) -> bool:
        """Whether it may know of the adapter."""
        return self._matching is None or self._matching.fullmatch(name) is not None

    def sees_tenant(self, name: str) -> bool:
        """Whether it may know how the tenant is served."""
        return name == self.tenant or self._has(Role.OBSERVE)

    def signed(self, actor: str) -> str:
        """Who is written into the registry's histories: the caller's own word only where nothing better is known."""
        if self.trusted:
            return actor
        known = f"{self.tenant} ({self.credential})"
        return f"{known} for {actor}"[:256] if actor else known

    def shown(self, error: LoraplexError) -> LoraplexError:
        """An error as this caller may see it: without names that it may not know."""
        return error.only(self.sees) if isinstance(error, AdapterNotFound) and not self.trusted else error

    def _has(self, role: str) -> bool:
        return self.trusted or role in self.roles or Role.ADMIN in self.roles


@lru_cache(maxsize=1024)
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """All patterns in one; `*` is any run of characters, and nothing matches if there is none."""
    return re.compile("|".join(translate(pattern) for pattern in patterns) or r"(?!)")


ANYBODY = Principal(ANONYMOUS)  # where nobody is asked who they are
_current: ContextVar[Principal] = ContextVar("principal", default=ANYBODY)


def principal() -> Principal:
    """Who makes the call that is being handled."""
    return _current.get()


def act_as(caller: Principal) -> None:
    """From here on, the call that is being handled is this caller's."""
    _current.set(caller)
