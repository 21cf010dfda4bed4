"""Versions, aliases and changes of the registry: as data for programs, and as tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.commands import output

NONE = "-"


def version_data(version: pb.AdapterVersion) -> dict[str, Any]:
    """A version for programs."""
    return {
        "ref": ref_of(version),
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "created_at": _iso(version.created_at),
        "publisher": version.publisher,
        "run_id": version.run_id,
        "base": {"name": version.base_name, "fingerprint": version.base_fingerprint},
        "rank": version.rank,
        "alpha": version.alpha,
        "targets": list(version.targets),
        "size_bytes": version.size_bytes,
        "files": [{"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in version.files],
        "notes": version.notes,
        "evaluation": evaluation_of(version),
        "warnings": list(version.warnings),
    }


def change_data(name: str, change: pb.AliasChange) -> dict[str, Any]:
    """An alias move for programs; `version` is null when the alias was removed."""
    return {
        "name": name,
        "alias": change.alias,
        "version": change.version or None,
        "sequence": change.sequence,
        "created_at": _iso(change.created_at),
        "actor": change.actor,
        "reason": change.reason,
        "canary_weight": change.canary_weight if change.HasField("canary_weight") else None,
        "canary_trial": _trial_data(change.canary_trial) if change.HasField("canary_trial") else None,
        "shadow_sample": change.shadow_sample if change.HasField("shadow_sample") else None,
    }


def canary_data(canary: pb.Canary) -> dict[str, Any]:
    """A canary that stands, for programs."""
    data: dict[str, Any] = {"version": canary.version, "weight": canary.weight}
    if canary.HasField("trial"):
        data |= {"trial": _trial_data(canary.trial), "ends_at": _iso(canary.ends_at)}
    return data


def _trial_data(trial: pb.CanaryTrial) -> dict[str, Any]:
    return {
        "seconds": seconds_of(trial.duration),
        "max_error_rate": trial.max_error_rate,
        "max_ttft_ratio": trial.max_ttft_ratio,
        "then": _then(trial),
    }


def _then(trial: pb.CanaryTrial) -> str:
    return "promote" if trial.then == pb.AFTER_TRIAL_PROMOTE else "end"


def summary_data(summary: pb.AdapterSummary) -> dict[str, Any]:
    """An adapter of a list, for programs."""
    data = {"name": summary.name, "aliases": dict(sorted(summary.aliases.items())), "versions": list(summary.versions)}
    if summary.HasField("canary"):
        data["canary"] = canary_data(summary.canary)
    if summary.HasField("shadow"):
        data["shadow"] = {"version": summary.shadow.version, "sample": summary.shadow.sample}
    return data


def adapter_data(found: pb.GetAdapterResponse) -> dict[str, Any]:
    """A whole adapter for programs."""
    return summary_data(found.adapter) | {
        "versions": [version_data(version) for version in found.versions],
        "history": [change_data(found.adapter.name, change) for change in found.history],
    }


def list_view(adapters: Sequence[pb.AdapterSummary]) -> Iterator[RenderableType]:
    """A list of adapters."""
    if not adapters:
        yield Text("no adapters yet; publish one: loraplex adapters publish FOLDER NAME", "dim")
        return
    made = output.table("adapter", "current", "other aliases", "versions")
    for adapter in adapters:
        others = [f"{alias}={v}" for alias, v in sorted(adapter.aliases.items()) if alias != "current"]
        current = adapter.aliases.get("current", NONE)
        made.add_row(adapter.name, current, ", ".join(others) or NONE, _range(adapter.versions))
    yield made


def _range(versions: Sequence[str]) -> str:
    most = 6
    shown = list(versions[-most:])
    return f"{len(versions)}: {'... ' if len(versions) > most else ''}{' '.join(shown)}"


def adapter_view(found: pb.GetAdapterResponse) -> Iterator[RenderableType]:
    """A whole adapter: its versions, newest first, and its latest alias moves."""
    named: dict[str, list[str]] = {}
    for alias, label in sorted(found.adapter.aliases.items()):
        named.setdefault(label, []).append(alias)
    yield _versions(found.adapter.name, list(reversed(found.versions)), named)
    if found.adapter.HasField("canary"):
        canary = found.adapter.canary
        until = f" until {_when(canary.ends_at)}, then {_then(canary.trial)}" if canary.HasField("trial") else ""
        text = f"{canary.version} answers {canary.weight:.4g} of the requests for {found.adapter.name}{until}"
        yield Text(text, "bold")
    if found.adapter.HasField("shadow"):
        shadow = found.adapter.shadow
        yield Text(f"{shadow.version} is asked copies of {shadow.sample:.4g} of the requests for {found.adapter.name}")
    yield Text()
    yield _history(list(reversed(found.history))[:10])
    for version in found.versions:
        yield from output.warnings(f"{ref_of(version)}: {text}" for text in version.warnings)


def _versions(name: str, versions: Sequence[pb.AdapterVersion], named: dict[str, list[str]]) -> Table:
    made = output.table("version", "aliases", "rank", "size", "score", "published", "by", "notes", title=name)
    for version in versions:
        aliases = named.get(version.version, [])
        made.add_row(
            version.version,
            ", ".join(aliases) or NONE,
            str(version.rank),
            output.size(version.size_bytes),
            score(version),
            _when(version.created_at),
            version.publisher or NONE,
            version.notes,
            style="bold" if "current" in aliases else "",
        )
    return made


def _history(changes: Sequence[pb.AliasChange]) -> Table:
    made = output.table("when", "alias", "version", "by", "why", title="latest alias moves")
    for change in changes:
        by, version = change.actor or NONE, change.version or "(removed)"
        if change.HasField("canary_weight"):
            version += f" for {change.canary_weight:.4g} of requests"
        if change.HasField("shadow_sample"):
            version += f" for copies of {change.shadow_sample:.4g} of requests"
        made.add_row(_when(change.created_at), change.alias, version, by, change.reason)
    return made


def version_view(found: pb.AdapterVersion) -> Iterator[RenderableType]:
    """One version with all that is known about it."""
    files = ", ".join(f"{file.path} ({output.size(file.size_bytes)})" for file in found.files)
    yield output.facts(
        [
            ("version", Text(ref_of(found), "bold")),
            ("digest", found.digest),
            ("published", " by ".join(filter(None, [_when(found.created_at), found.publisher]))),
            ("run", found.run_id),
            ("base", f"{found.base_name} {found.base_fingerprint}"),
            ("rank, alpha", f"{found.rank}, {found.alpha:g}"),
            ("layers", " ".join(found.targets)),
            ("size", output.size(found.size_bytes)),
            ("files", files),
            ("score", "" if evaluation_of(found) is None else score(found)),
            ("notes", found.notes),
        ]
    )
    yield from output.warnings(found.warnings)


def change_line(name: str, change: pb.AliasChange) -> Text:
    """An alias move in a line."""
    if not change.version:
        return Text(f"{name}@{change.alias} is removed")
    if change.HasField("canary_weight"):
        text = f"{name}@{change.version} now answers {change.canary_weight:.4g} of the requests for {name}"
        if change.HasField("canary_trial"):
            trial = change.canary_trial
            seconds = seconds_of(trial.duration)
            text += f", judged for {seconds:g} s, then {_then(trial)}"
        return Text(text)
    if change.HasField("shadow_sample"):
        return Text(
            f"{name}@{change.version} is now asked copies of {change.shadow_sample:.4g} of the requests for {name}"
        )
    return Text(f"{name}@{change.alias} now names {name}@{change.version}")


def event_data(event: pb.WatchAdaptersResponse) -> dict[str, Any]:
    """A change that a watch saw, for programs."""
    match event.WhichOneof("change"):
        case "published":
            return {"event": "published", "name": event.name, "version": version_data(event.published)}
        case "alias_changed":
            return {"event": "alias", "name": event.name, "change": change_data(event.name, event.alias_changed)}
        case "deleted_version":
            return {"event": "deleted", "name": event.name, "version": event.deleted_version}
        case "loaded" | "evicted" | "quarantined" as kind:
            fact = getattr(event, kind)
            data = {"event": kind, "name": event.name, "version": fact.version, "digest": fact.digest}
            return data | ({"seconds": seconds_of(fact.took)} if kind == "loaded" else {})
    return {"event": "watching"}


def event_line(event: pb.WatchAdaptersResponse) -> Text:
    """A change that a watch saw, in a line."""
    match event.WhichOneof("change"):
        case "published":
            return Text(f"published {ref_of(event.published)}")
        case "alias_changed":
            return change_line(event.name, event.alias_changed)
        case "deleted_version":
            return Text(f"deleted {event.name}@{event.deleted_version}")
        case "loaded":
            took = output.seconds(seconds_of(event.loaded.took))
            return Text(f"loaded {event.name}@{event.loaded.version} into the engine in {took}")
        case "evicted":
            return Text(f"evicted {event.name}@{event.evicted.version} from the engine")
        case "quarantined":
            return Text(f"quarantined {event.name}@{event.quarantined.version}: an answer of it was NaN", "bold red")
    return Text("watching", "dim")


def ref_of(version: pb.AdapterVersion) -> str:
    """How callers write the version."""
    return f"{version.name}@{version.version}"


def evaluation_of(version: pb.AdapterVersion) -> dict[str, Any] | None:
    """The version's evaluation, if it has one."""
    return json.loads(version.evaluation_json) if version.evaluation_json else None


def score(version: pb.AdapterVersion) -> str:
    """The evaluation in a few words: "0.97 exact match (base 0.02)"."""
    evaluation = evaluation_of(version) or {}
    value = evaluation.get("adapter", evaluation.get("score"))
    if value is None:
        return ", ".join(f"{key} {number:g}" for key, number in _numbers(evaluation)[:3]) or NONE
    base = f" (base {evaluation['base']})" if "base" in evaluation else ""
    return f"{value} {evaluation.get('metric', '')}".rstrip() + base


def _numbers(evaluation: dict[str, Any]) -> list[tuple[str, float]]:
    return [(k, v) for k, v in evaluation.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def _iso(moment: Timestamp) -> str:
    return moment.ToJsonString()


def _when(moment: Timestamp) -> str:
    return f"{moment.ToDatetime():%Y-%m-%d %H:%M}"


def seconds_of(duration: Duration) -> float:
    """A Duration in seconds."""
    return duration.ToTimedelta().total_seconds()
