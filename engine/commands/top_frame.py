"""What `loraplex top` shows at one moment: two looks at a server, and the rates between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.commands.describe import seconds_of


@dataclass(frozen=True)
class Look:
    """What a server says of itself at one moment."""

    engine: pb.GetEngineResponse
    activity: pb.GetActivityResponse


@dataclass(frozen=True)
class AdapterRow:
    """How a version is served; times in seconds, None while unknown."""

    ref: str
    running: int
    waiting: int
    requests_per_s: float
    tokens_per_s: float
    queue_p50: float | None
    ttft_p50: float | None
    ttft_p95: float | None
    failed: int


@dataclass(frozen=True)
class TenantRow:
    """How a tenant is served; `share` is of the service that all had, 0 to 1."""

    name: str
    weight: float
    share: float
    running: int
    waiting: int
    requests_per_s: float
    failed: int


class Frame:
    """Two looks at a server, the earlier one first."""

    def __init__(self, server: str, before: Look, now: Look) -> None:
        self.server = server
        self.engine = now.engine
        self.activity = now.activity
        self._before = before.activity
        self._seconds = max(1e-3, seconds_of(now.activity.uptime) - seconds_of(before.activity.uptime))

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all answers together got."""
        return (self.activity.generated_tokens - self._before.generated_tokens) / self._seconds

    @property
    def state(self) -> str:
        """The engine's state in a word."""
        if self.engine.load.draining:
            return "draining"
        return "ready" if self.activity.ready else "no engine"

    @cached_property
    def adapters(self) -> list[AdapterRow]:
        """The versions that were asked, the busiest first."""
        before = {(one.name, one.version): one for one in self._before.adapters}
        rows = [
            self._adapter(one, before.get((one.name, one.version), pb.AdapterActivity()))
            for one in self.activity.adapters
        ]
        return sorted(rows, key=lambda row: (-(row.running + row.waiting), -row.requests_per_s, row.ref))

    def _adapter(self, now: pb.AdapterActivity, before: pb.AdapterActivity) -> AdapterRow:
        return AdapterRow(
            ref=f"{now.name}@{now.version}" if now.name else "base model",
            running=now.running,
            waiting=now.waiting,
            requests_per_s=(now.requests - before.requests) / self._seconds,
            tokens_per_s=(now.generated_tokens - before.generated_tokens) / self._seconds,
            queue_p50=_known(now, "queue_p50"),
            ttft_p50=_known(now, "ttft_p50"),
            ttft_p95=_known(now, "ttft_p95"),
            failed=now.failed,
        )

    @cached_property
    def tenants(self) -> list[TenantRow]:
        """The tenants that asked, the busiest first."""
        before = {one.name: one for one in self._before.tenants}
        gained = {
            one.name: one.service - before.get(one.name, pb.TenantActivity()).service for one in self.activity.tenants
        }
        rows = [self._tenant(one, before.get(one.name, pb.TenantActivity()), gained) for one in self.activity.tenants]
        return sorted(rows, key=lambda row: (-(row.running + row.waiting), -row.share, row.name))

    def _tenant(self, now: pb.TenantActivity, before: pb.TenantActivity, gained: Mapping[str, int]) -> TenantRow:
        return TenantRow(
            name=now.name,
            weight=now.weight,
            share=gained[now.name] / (sum(gained.values()) or 1),
            running=now.running,
            waiting=now.waiting,
            requests_per_s=(now.requests - before.requests) / self._seconds,
            failed=now.failed,
        )


def _known(message: pb.AdapterActivity, field: str) -> float | None:
    return seconds_of(getattr(message, field)) if message.HasField(field) else None
