"""Who calls, and until when they wait: what a call's metadata and deadline say."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from grpc import aio

from engine.server.identity import named_tenant, principal


@dataclass(frozen=True)
class Caller:
    """The tenant that a call is counted for, and its deadline on time.monotonic's clock (inf: none)."""

    tenant: str
    deadline: float


def caller(context: aio.ServicerContext[Any, Any]) -> Caller:
    """Who calls: the tenant that was authenticated or, where nobody is asked, the one that the metadata names.

    Raises InvalidRequest when that name is malformed.
    """
    remaining_s = context.time_remaining()
    deadline = math.inf if remaining_s is None else time.monotonic() + remaining_s
    known = principal()
    return Caller(named_tenant(context.invocation_metadata() or ()) if known.trusted else known.tenant, deadline)
