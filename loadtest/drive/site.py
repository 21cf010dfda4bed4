"""A target as it was found: its adapters, their versions, its limits, and its answers when idle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from engine.client import AsyncClient, RequestError
from loadtest.drive.openai import OpenAIServer
from loadtest.drive.own_server import OwnServer
from loadtest.drive.targets import TargetSpec
from loadtest.errors import BadInput, TargetGone
from loadtest.judge import canaries
from loadtest.judge.aliases import Aliases
from loadtest.plan.scenario import Workload
from loadtest.plan.strict import nearest

CANARY_PROMPTS = (
    "Classify the support ticket as account, billing, cancel, shipping or technical.\nTicket: My parcel is late.\nCategory:",
    "Write one shell or SQL command.\nTask: count the rows in users\nCommand:",
    "The three largest rivers of Europe are",
)
_MOST_REFERENCES = 24  # adapters with references; beyond these canaries are checked by name and digest alone
_STILL_S = 5.0  # within which a target must say that it serves when the load is over


@dataclass
class Site:
    """What is asked (`spec`), and through what it is looked at and acted on: `client`, or `peer` for an OpenAI server."""

    spec: TargetSpec
    client: AsyncClient | None
    own: OwnServer | None = None
    workers: int = 1
    peer: OpenAIServer | None = None
    aliases: Aliases = field(default_factory=Aliases)
    adapters: tuple[str, ...] = ()
    callers: int = 16
    slots: int = 0
    about: dict[str, str] = field(default_factory=dict)
    prompts: tuple[str, ...] = CANARY_PROMPTS
    references: canaries.References | None = None
    capacity: dict[str, float] = field(default_factory=dict)
    yardstick_s: float = 0.0
    """A TTFT to take slowdowns of, instead of this target's own when alone: two targets are measured by one."""

    @property
    def names(self) -> bool:
        """Whether its answers say which version gave them."""
        return self.client is not None

    @property
    def alone_ttft_s(self) -> float:
        """What a request alone takes; 0 where nobody has measured it."""
        return self.yardstick_s or (self.references.alone_ttft_s if self.references else 0.0)

    async def gone(self) -> str:
        """Empty, or why the target is no longer there."""
        try:
            if self.client:
                await self.client.wait_ready(timeout_s=_STILL_S)
            elif self.peer:
                await self.peer.adapters()
        except (RequestError, TargetGone):
            return f"{', '.join(self.spec.addresses)} no longer answers"
        return ""


async def look(site: Site) -> None:
    """Find out what the target has. Raises TargetGone when it does not answer."""
    if site.peer:
        site.adapters = await site.peer.adapters()
    if site.client is None:
        return
    try:
        await site.client.wait_ready(timeout_s=10)
        info = await site.client.engine()
        listed = await site.client.adapters.list()
        for one in listed:
            found = await site.client.adapters.get(one.name)
            site.aliases.digests |= {f"{one.name}@{version.version}": version.digest for version in found.versions}
            site.aliases.initial |= {f"{one.name}@{alias}": version for alias, version in one.aliases.items()}
    except RequestError as error:
        raise TargetGone(f"{site.client.target} does not answer: {error}", "Start it, or use --serve MODEL.") from error
    site.adapters = tuple(one.name for one in listed if "current" in one.aliases)
    site.callers = max(1, info.limits.max_running)
    site.slots = info.limits.max_resident
    site.about = {"engine": info.engine, "base": info.base.name, "fingerprint": info.base.fingerprint}


def asked_adapters(workload: Workload, site: Site) -> tuple[str, ...]:
    """The adapters that a workload asks. Raises BadInput where the target has not got them."""
    wanted = workload.adapters
    if workload.base_share >= 1:
        return ()
    if isinstance(wanted, tuple):
        for name in wanted if site.client or site.peer else ():
            if name.partition("@")[0] not in site.adapters:
                raise BadInput(f"the target has no adapter {name!r}{nearest(name, site.adapters)}")
        return wanted
    if not site.adapters:
        raise BadInput("the target has no adapters", "Publish some, use --serve MODEL, or ask the base: base_share: 1.")
    if wanted == "all":
        return site.adapters
    if wanted > len(site.adapters):
        raise BadInput(f"{wanted} adapters are asked for, the target has {len(site.adapters)}")
    return site.adapters[:wanted]


async def take_references(site: Site, names: tuple[str, ...], step: Callable[[], None] = lambda: None) -> None:
    """Take the references of all versions of these adapters and of the base, once for all cases."""
    known = sorted(site.aliases.digests) if site.names else sorted(names)
    who = ["", *[ref for ref in known if ref.partition("@")[0] in names][:_MOST_REFERENCES]]
    ask: canaries.Ask | None = site.peer.reference if site.peer else None
    if site.client:
        ask = partial(canaries.ask, site.client)
    if site.references is not None or ask is None:
        return
    try:
        site.references = await canaries.take(ask, who, site.prompts, step)
    except RequestError as error:
        raise TargetGone(f"the target did not answer the canaries: {error}") from error
