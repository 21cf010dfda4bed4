"""How canaries and shadows fare: as data for programs, and as tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.commands import describe, output


def canary_data(name: str, found: pb.GetCanaryReportResponse) -> dict[str, Any]:
    """A canary's report for programs; times in seconds, null while unknown."""
    return {
        "name": name,
        "canary": describe.canary_data(found.canary),
        "sides": {"canary": _side_data(found.canary_side), "current": _side_data(found.current_side)},
        "verdict": found.verdict,
    }


def _side_data(side: pb.SideReport) -> dict[str, Any]:
    return {"requests": side.requests, "failed": side.failed} | _spread_data("ttft", side.time_to_first_token)


def canary_view(name: str, found: pb.GetCanaryReportResponse) -> Iterator[RenderableType]:
    """A canary's report."""
    canary = found.canary
    made = output.table("side", "requests", "failed", "TTFT p50", "p95", title=f"{name}@{canary.version} on trial")
    for label, side in (("canary", found.canary_side), ("current", found.current_side)):
        made.add_row(label, str(side.requests), str(side.failed), *_spread(side.time_to_first_token))
    yield made
    yield Text(found.verdict)


def shadow_data(name: str, found: pb.GetShadowReportResponse) -> dict[str, Any]:
    """A shadow's report for programs; times in seconds, null while unknown."""
    return {
        "name": name,
        "shadow": {"version": found.shadow.version, "sample": found.shadow.sample},
        "current": found.current_version,
        "drawn": found.drawn,
        "compared": found.compared,
        "equal": found.equal,
        "equal_share": found.equal / found.compared if found.compared else None,
        "asked_greedily": found.asked_greedily,
        "first_difference_p50": found.first_difference_p50 if found.HasField("first_difference_p50") else None,
        "first_difference_min": found.first_difference_min if found.HasField("first_difference_min") else None,
        "dropped": dict(found.dropped),
        "failed": dict(found.failed),
        "last_failure": found.last_failure,
        "times": {"current": _times_data(found.current_times), "shadow": _times_data(found.shadow_times)},
    }


def shadow_view(name: str, found: pb.GetShadowReportResponse) -> Iterator[RenderableType]:
    """A shadow's report."""
    equal = f"{found.equal} of {found.compared} ({found.equal / found.compared:.1%})" if found.compared else "none yet"
    places = ""
    if found.HasField("first_difference_p50"):
        places = f"at token {found.first_difference_p50} (median), {found.first_difference_min} (earliest)"
    greedily = f"{found.asked_greedily} compared at temperature 0, both asked again" if found.asked_greedily else ""
    yield Text(f"{name}@{found.shadow.version} beside {name}@{found.current_version}", "bold")
    yield output.facts(
        [
            ("equal answers", equal),
            ("first difference", places),
            ("sampled requests", greedily),
            ("drawn", f"{found.drawn}, {found.shadow.sample:.4g} of the requests"),
            ("dropped", _counts(found.dropped)),
            ("failed", _counts(found.failed)),
            ("last failure", found.last_failure),
        ]
    )
    made = output.table("", "TTFT p50", "p95", "total p50", "p95")
    for label, times in ((found.current_version, found.current_times), (found.shadow.version, found.shadow_times)):
        made.add_row(label, *_spread(times.time_to_first_token), *_spread(times.total))
    yield made


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(counts.items()))


def _times_data(times: pb.AnswerTimes) -> dict[str, Any]:
    return _spread_data("ttft", times.time_to_first_token) | _spread_data("total", times.total)


def _spread_data(name: str, spread: pb.Spread) -> dict[str, float | None]:
    known = spread.HasField("p50")
    return {
        f"{name}_p50_s": describe.seconds_of(spread.p50) if known else None,
        f"{name}_p95_s": describe.seconds_of(spread.p95) if known else None,
    }


def _spread(spread: pb.Spread) -> tuple[str, str]:
    if not spread.HasField("p50"):
        return describe.NONE, describe.NONE
    return output.seconds(describe.seconds_of(spread.p50)), output.seconds(describe.seconds_of(spread.p95))
