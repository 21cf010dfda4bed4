"""Who calls, and until when they wait: what a call's metadata and deadline say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from grpc import aio

from engine.config import TENANT
from engine.errors import InvalidRequest
from engine.runtime.admission import ANONYMOUS

TENANT_KEY = "x-loraplex-tenant"


@dataclass(frozen=True)
class Caller:
    """The tenant that a call is counted for, and its deadline on time.monotonic's clock (inf: none)."""

    tenant: str
    deadline: float


def caller(context: aio.ServicerContext[Any, Any]) -> Caller:
    """Who calls. Raises InvalidRequest when the tenant's name is malformed; nothing proves yet that it is the caller's own."""
    remaining_s = context.time_remaining()
    deadline = math.inf if remaining_s is None else time.monotonic() + remaining_s
    for key, value in context.invocation_metadata() or ():
        if key == TENANT_KEY:
            name = value if isinstance(value, str) else ""
            if not TENANT.fullmatch(name):
                raise InvalidRequest(
                    TENANT_KEY,
                    "is no name of at most 64 letters, digits, '.', '_' and '-' that begins with a letter or digit",
                )
            return Caller(name, deadline)
    return Caller(ANONYMOUS, deadline)
