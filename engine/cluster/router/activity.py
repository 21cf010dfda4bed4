"""Who is being served by a whole fleet: the replicas' own accounts, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.api.loraplex.v1 import engine_pb2 as pb

_COUNTS = ("waiting", "running", "requests", "failed")
_EVENTS = 50


def together(parts: Sequence[pb.GetActivityResponse]) -> pb.GetActivityResponse:
    """Sums of counts; of medians, that of the replica with most requests, and of high percentiles the highest."""
    return pb.GetActivityResponse(
        uptime=max((part.uptime for part in parts), key=lambda one: one.ToNanoseconds()),
        ready=any(part.ready for part in parts),
        generated_tokens=sum(part.generated_tokens for part in parts),
        adapters=_adapters(one for part in parts for one in part.adapters),
        tenants=_tenants(one for part in parts for one in part.tenants),
        events=_events(one for part in parts for one in part.events),
    )


def _adapters(found: Iterable[pb.AdapterActivity]) -> list[pb.AdapterActivity]:
    merged: dict[tuple[str, str], pb.AdapterActivity] = {}
    for one in sorted(found, key=lambda one: -one.requests):
        known = merged.get((one.name, one.version))
        if known is None:
            merged[one.name, one.version] = pb.AdapterActivity.FromString(one.SerializeToString())
            continue
        _add(known, one, (*_COUNTS, "generated_tokens"))
        if one.ttft_p95.ToNanoseconds() > known.ttft_p95.ToNanoseconds():
            known.ttft_p95.CopyFrom(one.ttft_p95)
    return sorted(merged.values(), key=lambda one: -(one.running + one.waiting))


def _tenants(found: Iterable[pb.TenantActivity]) -> list[pb.TenantActivity]:
    merged: dict[str, pb.TenantActivity] = {}
    for one in found:
        if one.name in merged:
            _add(merged[one.name], one, (*_COUNTS, "service"))
        else:
            merged[one.name] = pb.TenantActivity.FromString(one.SerializeToString())
    return sorted(merged.values(), key=lambda one: -(one.running + one.waiting))


def _events(found: Iterable[pb.ActivityEvent]) -> list[pb.ActivityEvent]:
    """Oldest first; what every replica tells of the registry is told once."""
    ordered = sorted(found, key=lambda one: -one.ago.ToNanoseconds())
    shared = ("published", "alias", "deleted")
    once = {(one.kind, one.text) if one.kind in shared else id(one): one for one in ordered}
    return sorted(once.values(), key=lambda one: -one.ago.ToNanoseconds())[-_EVENTS:]


def _add(
    known: pb.AdapterActivity | pb.TenantActivity, one: pb.AdapterActivity | pb.TenantActivity, fields: Iterable[str]
) -> None:
    for field in fields:
        setattr(known, field, getattr(known, field) + getattr(one, field))
