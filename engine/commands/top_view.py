"""A frame of `loraplex top`: as data for programs, and drawn for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.commands.describe import NONE, seconds_of
from engine.commands.top_frame import AdapterRow, Frame, TenantRow

_BAR = 16
_HEIGHT = 40  # lines of a frame that no terminal bounds
_COLUMNS = 80
_STATES = {"ready": "bold green", "draining": "bold yellow", "no engine": "bold red"}
_KINDS = {"quarantined": "bold red", "restarted": "bold red", "evicted": "yellow", "loaded": "green", "alias": "cyan"}


def data(frame: Frame) -> dict[str, Any]:
    """A frame for programs; times in seconds, null while unknown."""
    load, limits = frame.engine.load, frame.engine.limits
    return {
        "server": frame.server,
        "base": frame.engine.base.name,
        "engine": frame.engine.engine,
        "state": frame.state,
        "uptime_s": seconds_of(frame.activity.uptime),
        "running": load.running,
        "max_running": limits.max_running,
        "waiting": load.waiting,
        "max_waiting": limits.max_waiting,
        "tokens_per_s": frame.tokens_per_s,
        "kv_cache_usage": load.kv_cache_usage,
        "slots": limits.max_resident,
        "resident": [_resident_data(one) for one in frame.engine.resident],
        "adapters": [asdict(row) for row in frame.adapters],
        "tenants": [asdict(row) for row in frame.tenants],
        "events": [{"ago_s": seconds_of(one.ago), "kind": one.kind, "text": one.text} for one in frame.activity.events],
    }


def _resident_data(one: pb.ResidentAdapter) -> dict[str, Any]:
    ref = f"{one.name}@{one.version}"
    return {"ref": ref, "in_use": one.in_use, "pinned": one.pinned, "idle_s": seconds_of(one.idle)}


def view(frame: Frame, height: int = _HEIGHT) -> Iterator[RenderableType]:
    """A frame for people, in about `height` lines."""
    room = max(6, height - 9)  # for rows of the four parts, without their headings
    yield _title(frame)
    yield _load(frame)
    yield _slots(frame.engine, most=max(2, room // 5))
    yield Text()
    yield _adapters(frame.adapters, most=max(2, room // 2 - 1))
    yield Text()
    yield _tenants(frame.tenants, most=max(1, room // 6))
    yield Text()
    for event in list(reversed(frame.activity.events))[: max(1, room // 6)]:
        yield _event(event)


def _title(frame: Frame) -> Text:
    line = Text(frame.state, _STATES[frame.state])
    line.append(f"  {frame.server}", "bold").append(f"  {frame.engine.base.name}  {frame.engine.engine}", "not bold")
    line.append(f"  up {_age(seconds_of(frame.activity.uptime))}", "dim not bold")
    return _cut(line)


def _load(frame: Frame) -> Text:
    load, limits = frame.engine.load, frame.engine.limits
    line = Text("running ").append(_bar(load.running / limits.max_running), "green")
    line.append(f" {load.running}/{limits.max_running}", "bold")
    line.append("  waiting ").append(f"{load.waiting}/{limits.max_waiting}", "bold yellow" if load.waiting else "bold")
    line.append("  tokens/s ").append(f"{frame.tokens_per_s:.0f}", "bold")
    line.append("  KV ").append(f"{load.kv_cache_usage:.0%}", "bold red" if load.kv_cache_usage > 0.9 else "bold")
    return line


def _bar(share: float) -> str:
    full = round(min(1.0, share) * _BAR)
    return "█" * full + "░" * (_BAR - full)


def _slots(engine: pb.GetEngineResponse, most: int) -> Text:
    """Which adapter is in which slot: in use (how often), pinned, or idle; as many lines as are needed, `most` of them."""
    residents = sorted(engine.resident, key=lambda one: (-one.in_use, not one.pinned, one.idle.seconds))
    line = Text("slots ").append(f"{len(residents)}/{engine.limits.max_resident}", "bold")
    width, lines, left = line.cell_len, 1, len(residents)
    for one in residents:
        text = _slot(one)
        if width + 2 + text.cell_len > _COLUMNS - 8:
            if lines == most:
                return line.append(f"  +{left} more", "dim")
            line.append("\n     ")
            width, lines = 5, lines + 1
        line.append("  ").append_text(text)
        width, left = width + 2 + text.cell_len, left - 1
    return line


def _slot(one: pb.ResidentAdapter) -> Text:
    ref = f"{one.name}@{one.version}"
    text = Text(f"●{one.in_use} {ref}", "green") if one.in_use else Text(f"○ {ref}", "dim")
    return text.append(" pinned", "magenta") if one.pinned else text


def _adapters(rows: Sequence[AdapterRow], most: int) -> Table:
    made = _table(("adapter", 22), "run", "wait", "req/s", "tok/s", "queue", "TTFT", "p95", "failed")
    for row in rows[:most]:
        made.add_row(
            row.ref,
            _count(row.running, "green"),
            _count(row.waiting, "yellow"),
            f"{row.requests_per_s:.1f}",
            f"{row.tokens_per_s:.0f}",
            _time(row.queue_p50),
            _time(row.ttft_p50),
            _time(row.ttft_p95),
            _count(row.failed, "red"),
        )
    return _rest(made, len(rows) - most)


def _tenants(rows: Sequence[TenantRow], most: int) -> Table:
    made = _table(("tenant", 22), "run", "wait", "req/s", "weight", "share", "failed")
    for row in rows[:most]:
        made.add_row(
            row.name,
            _count(row.running, "green"),
            _count(row.waiting, "yellow"),
            f"{row.requests_per_s:.1f}",
            f"{row.weight:g}",
            f"{row.share:.0%}",
            _count(row.failed, "red"),
        )
    return _rest(made, len(rows) - most)


def _table(first: tuple[str, int], *columns: str) -> Table:
    name, width = first
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column(name, width=width, no_wrap=True, overflow="ellipsis")
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True, min_width=4)
    return made


def _rest(made: Table, more: int) -> Table:
    if more > 0:
        made.add_row(Text(f"{more} more", "dim"))
    return made


def _event(event: pb.ActivityEvent) -> Text:
    ago = f"{_age(seconds_of(event.ago)):>6} ago "
    return _cut(Text(ago, "dim").append(f"{event.kind:<11} ", _KINDS.get(event.kind, "")).append(event.text, "default"))


def _cut(line: Text) -> Text:
    line.truncate(_COLUMNS, overflow="ellipsis")
    return line


def _count(count: int, style: str) -> Text:
    return Text(str(count), style) if count else Text(NONE, "dim")


def _time(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value * 1000:.0f}ms" if value < 1 else f"{value:.1f}s"


def _age(value: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if value >= length:
            return f"{value / length:.0f} {unit}"
    return f"{value:.0f} s"
