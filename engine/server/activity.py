"""Who is being served, and how well of late: what `loraplex top` shows. Bounded: whoever was quiet longest is forgotten."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from google.protobuf.duration_pb2 import Duration

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.errors import Overloaded
from engine.registry.catalog import AliasChanged, Catalog, Deleted, Event, InEngine, Published
from engine.registry.manifest import AliasChange
from engine.runtime.admission.tenants import ANSWER_TOKEN_COST, PROMPT_TOKEN_COST
from engine.runtime.recent import Recent
from engine.runtime.requests import Answer, Ending
from engine.server.convert import duration
from engine.server.identity import ANYBODY, Principal

_MOST = 200  # versions and tenants that are remembered
_EVENTS = 50
_LATEST = 200  # requests that a percentile is taken of

K = TypeVar("K")
Version = tuple[str, str]  # name and version, both empty for the base model


@dataclass
class Served:
    """What a version or a tenant has had, without its unfinished requests; times in seconds."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0
    service: int = 0
    queue: Recent = field(default_factory=lambda: Recent(_LATEST))
    ttft: Recent = field(default_factory=lambda: Recent(_LATEST))

    def add(self, answer: Answer, ending: Ending) -> None:
        """One more request has ended."""
        self.requests += 1
        self.failed += ending.code not in ("OK", "CANCELLED")
        self.tokens += answer.completion_tokens
        self.service += _service(answer)
        if answer.admitted:
            self.queue.add(answer.queue_s)
        if answer.first_token_s:
            self.ttft.add(answer.first_token_s)


class Activity:
    """Hears of every request and every event; `weights` are the tenants' that have one of their own."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._started = time.monotonic()
        self._open: dict[int, Answer] = {}
        self._versions: OrderedDict[Version, Served] = OrderedDict()
        self._tenants: OrderedDict[str, Served] = OrderedDict()
        self._events: deque[tuple[float, str, str, str]] = deque(maxlen=_EVENTS)
        self._tokens = 0

    def began(self, answer: Answer) -> None:
        """A request waits."""
        self._open[id(answer)] = answer

    def ended(self, answer: Answer, ending: Ending) -> None:
        """It has ended."""
        self._open.pop(id(answer), None)
        self._tokens += answer.completion_tokens
        _entry(self._versions, _version(answer)).add(answer, ending)
        _entry(self._tenants, answer.tenant).add(answer, ending)

    def engine_restarted(self, seconds: float) -> None:
        """The engine was replaced."""
        self._note("", "restarted", f"the engine is back after {seconds:.1f} s")

    async def follow(self, catalog: Catalog) -> NoReturn:
        """Remember what happens in the registry and the engine from now on."""
        while True:
            try:
                with catalog.subscribe() as events:
                    async for event in events:
                        self._note(*_told(event))
            except Overloaded:
                continue  # so many at once that some went by

    def snapshot(self, *, ready: bool, viewer: Principal = ANYBODY) -> pb.GetActivityResponse:
        """Everything that the viewer may see, now."""
        now = time.monotonic()
        return pb.GetActivityResponse(
            uptime=duration(now - self._started),
            ready=ready,
            generated_tokens=self._tokens + sum(answer.completion_tokens for answer in self._open.values()),
            adapters=[one for one in self._adapters() if viewer.uses(one.name)],
            tenants=[one for one in self._tenants_now() if viewer.sees_tenant(one.name)],
            events=[
                pb.ActivityEvent(ago=duration(now - at), kind=kind, text=text)
                for at, name, kind, text in self._events
                if not name or viewer.sees(name)
            ],
        )

    def _adapters(self) -> list[pb.AdapterActivity]:
        waiting: Counter[Version] = Counter()
        running: Counter[Version] = Counter()
        tokens: Counter[Version] = Counter()
        for answer in self._open.values():
            (running if answer.admitted else waiting)[_version(answer)] += 1
            tokens[_version(answer)] += answer.completion_tokens
        known = self._versions | {key: Served() for key in running | waiting if key not in self._versions}
        return [
            pb.AdapterActivity(
                name=key[0],
                version=key[1],
                waiting=waiting[key],
                running=running[key],
                requests=served.requests,
                failed=served.failed,
                generated_tokens=served.tokens + tokens[key],
                queue_p50=_percentile(served.queue, 50),
                ttft_p50=_percentile(served.ttft, 50),
                ttft_p95=_percentile(served.ttft, 95),
            )
            for key, served in sorted(known.items(), key=lambda one: -(running + waiting)[one[0]])
        ]

    def _tenants_now(self) -> list[pb.TenantActivity]:
        waiting: Counter[str] = Counter()
        running: Counter[str] = Counter()
        service: Counter[str] = Counter()
        for answer in self._open.values():
            (running if answer.admitted else waiting)[answer.tenant] += 1
            if answer.admitted:
                service[answer.tenant] += _service(answer)
        known = self._tenants | {name: Served() for name in running | waiting if name not in self._tenants}
        return [
            pb.TenantActivity(
                name=name,
                weight=self._weights.get(name, 1.0),
                waiting=waiting[name],
                running=running[name],
                requests=served.requests,
                failed=served.failed,
                service=served.service + service[name],
            )
            for name, served in sorted(known.items(), key=lambda one: -(running + waiting)[one[0]])
        ]

    def _note(self, name: str, kind: str, text: str) -> None:
        self._events.append((time.monotonic(), name, kind, text))


def _entry(entries: OrderedDict[K, Served], key: K) -> Served:
    served = entries.setdefault(key, Served())
    entries.move_to_end(key)
    if len(entries) > _MOST:
        entries.popitem(last=False)
    return served


def _version(answer: Answer) -> Version:
    return (answer.manifest.name, answer.manifest.version) if answer.manifest else ("", "")


def _service(answer: Answer) -> int:
    if not answer.admitted:
        return 0
    return PROMPT_TOKEN_COST * answer.prompt_tokens + ANSWER_TOKEN_COST * answer.completion_tokens


def _percentile(values: Recent, percent: float) -> Duration | None:
    value = values.percentile(percent)
    return None if value is None else duration(value)


def _told(event: Event) -> tuple[str, str, str]:
    """The adapter that an event is about, its kind, and a sentence about it."""
    match event:
        case Published(manifest=manifest):
            return manifest.name, "published", manifest.ref
        case Deleted(name=name, version=version):
            return name, "deleted", f"{name}@{version}"
        case AliasChanged(name=name, change=change):
            return name, "alias", _move(name, change)
        case InEngine(change="loaded", manifest=manifest, seconds=seconds):
            return manifest.name, "loaded", f"{manifest.ref} in {seconds:.2f} s"
        case InEngine(change=kind, manifest=manifest):
            return manifest.name, kind, manifest.ref


def _move(name: str, change: AliasChange) -> str:
    share = f" for {change.split.weight:.4g} of requests" if change.split else ""
    why = f": {change.reason}" if change.reason else ""
    return f"{name}@{change.alias} is {change.version or 'removed'}{share}{why}"
