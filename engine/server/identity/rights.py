"""Which role each method needs, and which adapter a message is about. A method that is not here is refused to everybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.api.loraplex.v1.adapters_pb2 import PublishAdapterRequest
from engine.errors import PermissionDenied
from engine.server.identity.principal import Principal, Role

PACKAGE = "/loraplex.v1."
_DETAILS = ("version", "alias", "expected_version", "weight", "pinned", "reason")  # of a message, for the audit log


@dataclass(frozen=True)
class Need:
    """`role` None: any tenant may, and sees what is on its list. `field` is the path to the adapter's name, if there is one."""

    role: Role | None
    field: str = ""
    audited: bool = False

    def adapter(self, request: Any) -> str | None:
        """The adapter that a message names, "" for the base model; None if it names none."""
        *parents, last = self.field.split(".")
        for parent in parents:
            if not request.HasField(parent):
                return None
            request = getattr(request, parent)
        name = str(getattr(request, last)) if last else ""
        return name if name or (self.role is Role.INVOKE and last) else None

    def details(self, request: Any) -> dict[str, Any]:
        """What else a message says, for the audit log."""
        return {name: value for name in _DETAILS if (value := getattr(request, name, None))}


def _act(role: Role, field: str = "name") -> Need:
    return Need(role, field, audited=True)


NEEDS: dict[str, Need] = {
    "GenerationService/Generate": Need(Role.INVOKE, "adapter"),
    "GenerationService/GenerateStream": Need(Role.INVOKE, "request.adapter"),
    "GenerationService/CountTokens": Need(Role.INVOKE),
    "AdapterService/ListAdapters": Need(None),
    "AdapterService/GetAdapter": Need(None, "name"),
    "AdapterService/WatchAdapters": Need(None, "name"),
    "AdapterService/GetCanaryReport": Need(None, "name"),
    "AdapterService/GetShadowReport": Need(None, "name"),
    "AdapterService/ListEvaluations": Need(None, "name"),
    "AdapterService/PublishAdapter": _act(Role.PUBLISH, "header.name"),
    "AdapterService/RecordEvaluation": _act(Role.PUBLISH),
    "AdapterService/SetAlias": _act(Role.PROMOTE),
    "AdapterService/RollbackAlias": _act(Role.PROMOTE),
    "AdapterService/RemoveAlias": _act(Role.PROMOTE),
    "AdapterService/SetCanary": _act(Role.PROMOTE),
    "AdapterService/EndCanary": _act(Role.PROMOTE),
    "AdapterService/SetShadow": _act(Role.PROMOTE),
    "AdapterService/EndShadow": _act(Role.PROMOTE),
    "AdapterService/PreloadAdapter": _act(Role.PROMOTE, "adapter"),
    "AdapterService/PinAdapter": _act(Role.ADMIN, "adapter"),
    "AdapterService/UnloadAdapter": _act(Role.ADMIN, "adapter"),
    "AdapterService/DeleteVersion": _act(Role.ADMIN),
    "EngineService/GetEngine": Need(None),
    "EngineService/GetActivity": Need(None),
    "EngineService/GetCaller": Need(None),
}


def need_of(method: str) -> Need | None:
    """What a method of ours needs ("/loraplex.v1.Service/Method"); None for one that is not ours, which needs nothing of this.

    Raises PermissionDenied for one of ours that is not in the table.
    """
    if not method.startswith(PACKAGE):
        return None
    need = NEEDS.get(method.removeprefix(PACKAGE))
    if need is None:
        raise PermissionDenied("", "call this: no rule allows it to anybody")
    return need


def check_role(need: Need, caller: Principal) -> None:
    """Raise PermissionDenied if the caller lacks the role, before anything of the message is read."""
    if need.role is not None:
        caller.require(need.role)


def check_adapter(need: Need, caller: Principal, request: Any) -> None:
    """Raise PermissionDenied if the message names an adapter that the caller may not use."""
    adapter = need.adapter(request)
    if adapter is not None and not caller.uses(adapter):
        raise caller.denied(adapter)


def sign(request: Any, caller: Principal) -> None:
    """Put who really calls into what the registry's histories will say: the field `actor`, or a header's `publisher`."""
    if hasattr(request, "actor"):
        request.actor = caller.signed(request.actor)
    if isinstance(request, PublishAdapterRequest) and request.HasField("header"):
        request.header.publisher = caller.signed(request.header.publisher)
