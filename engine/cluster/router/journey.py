"""One request's way through the fleet: which replica is next, and what a failure there means for it."""

from __future__ import annotations

import time
from enum import Enum, auto

from google.rpc import error_details_pb2
from grpc import StatusCode, aio

from engine.cluster.fleet import Fleet, Link
from engine.cluster.routing import Ask
from engine.errors import EngineDied, NoReplica
from engine.server.status import details_of

_MOST_BLAMED = 2  # failures for which replicas are blamed: who fails everywhere may be the reason for it
_MOST_DEATHS = 2  # replicas that may die under a request at once: it may be what they die of
_MOST_LATE_DEATHS = 4  # those that had it for a while, too
_LATE_S = 2.0  # after which it is less likely the request that a replica dies of, as it would in its first steps
_INNOCENT = 4  # messages from a replica, after which it is not the request that it dies of
_MOST_LOST = 4  # replicas that give it more time by having had it: what cuts every call off would do so for ever
_MOST_BASES = 2  # changes of the base: replicas that disagree about a version would send a request to and fro
_MOST_WITHOUT = 2  # replicas that may say that they cannot have the adapter now: all others may have to fetch it, too
_PAUSE_S = 0.25  # before the same replicas are tried again, unless one of them recovers sooner


class Refusal(Exception):
    """A replica's answer that the caller gets as it is."""

    def __init__(self, error: aio.AioRpcError) -> None:
        super().__init__(error.details())
        self.error = error


class Failure(Enum):
    """What a failed call says about the replica."""

    GONE = auto()  # it cannot be reached
    BROKEN = auto()  # it is there, and cannot do its work just now
    WITHOUT = auto()  # it is well, but cannot have the adapter's files just now
    LEAVING = auto()  # it takes no new work
    FULL = auto()  # it has more work than it can do
    OTHER_BASE = auto()  # the version needs another base
    STALE = auto()  # it may not know yet what another one has published
    FINAL = auto()  # any replica would say this


_REASONS = {
    "ENGINE_DIED": Failure.BROKEN,
    "ADAPTER_LOST": Failure.WITHOUT,
    "REGISTRY_UNAVAILABLE": Failure.WITHOUT,
    "DRAINING": Failure.LEAVING,
    "NOT_READY": Failure.LEAVING,
    "OVERLOADED": Failure.FULL,
    "WAITED_TOO_LONG": Failure.FULL,
    "DEADLINE_UNREACHABLE": Failure.FULL,
    "WRONG_BASE": Failure.OTHER_BASE,
    "ADAPTER_NOT_FOUND": Failure.STALE,
}
# What gRPC itself makes of a broken connection, or of a server that went away in the middle.
_BROKEN_CONNECTION = (StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.UNKNOWN, StatusCode.INTERNAL)


def error_info(error: aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    """Reason and metadata of a replica's own error; empty when gRPC made it."""
    info = error_details_pb2.ErrorInfo()
    for detail in details_of(error.trailing_metadata()):
        if detail.Unpack(info):
            break
    return info


def judge(error: aio.AioRpcError, reason: str) -> Failure:
    """What a failed call says about the replica."""
    if reason:
        return _REASONS.get(reason, Failure.FINAL)
    return Failure.GONE if error.code() in _BROKEN_CONNECTION else Failure.FINAL


class Journey:
    """Asks the routing for a replica, and for another one when that fails, until `give_up_s` after the first failure.

    What a replica had and lost begins anew: `give_up_s` counts from then, for the first few of them.
    """

    def __init__(
        self, fleet: Fleet, ask: Ask, adapter: str, deadline: float, give_up_s: float, begun_by: str = ""
    ) -> None:
        self._fleet = fleet
        self._ask = ask
        self._adapter = adapter  # as the request names it
        self._deadline = deadline  # of the call, by time.monotonic
        self._give_up_s = give_up_s
        if begun_by not in fleet.replicas.bases() and not fleet.had_lately(begun_by, give_up_s):
            begun_by = ""  # whoever is asked says that it was another one
        self._begun_by = begun_by  # the base that began the answer of which the caller has a part
        self._first_failure = 0.0
        self._last: aio.AioRpcError | None = None
        self._tried: set[str] = set()
        self._full = 0
        self._without = 0
        self._lost = 0  # replicas that had it, and failed
        self._reached = False  # whether the replica that is asked was there when it was
        self._asked_at = 0.0
        self._deaths = 0  # of replicas that were, soon after they were asked
        self._late_deaths = 0
        self._base_changes = 0
        self._began = time.monotonic()
        self._refreshed: set[str] = set()  # replicas that have looked into the registry for it
        self._resuming = False
        self._mistaken = False
        self.base = begun_by or fleet.base_of(adapter)
        self.failovers = 0  # replicas that failed on the way
        self.first_token_s = 0.0  # from the call's arrival

    @property
    def remaining_s(self) -> float:
        """Seconds until the call's deadline."""
        return self._deadline - time.monotonic()

    def resuming(self, base: str) -> None:
        """From now on it is about the rest of an answer that this base began: worth waiting for, and nobody else's."""
        self._resuming = True
        self.base = base

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call arrived."""
        return time.monotonic() - self._began

    @property
    def asked_s(self) -> float:
        """Seconds since the replica was asked that `next` named last."""
        return time.monotonic() - self._asked_at

    @property
    def lost_s(self) -> float:
        """How long after the call's arrival the replica that is now asked was."""
        return self._asked_at - self._began

    def progressed(self) -> None:
        """Tokens came: whatever failed before may be tried again, and for as long as ever."""
        self.first_token_s = self.first_token_s or self.elapsed_s
        self._first_failure = 0.0
        self._tried.clear()

    async def next(self) -> Link:
        """The replica to ask. Raises NoReplica, or Refusal with what the last one said, when there is none to hope for."""
        while True:
            base = self.base or next(iter(self._fleet.replicas.bases()), "")
            ask = Ask(self._ask.adapter, self._ask.version, self._ask.prefix, self.remaining_s)
            replica = self._fleet.chooser.choose(ask, base, self._tried)
            if replica:
                link = self._fleet.links[replica.id]
                self._reached, self._asked_at = link.connected, time.monotonic()
                return link
            if not self._forgot_base():
                await self._wait_for_any(base)

    def _forgot_base(self) -> bool:
        """The base that the adapter once needed has no replicas: ask the others, once, whether it still needs that one."""
        begun = self._resuming or self._begun_by  # by a base: the others cannot go on with its answer
        if self._mistaken or begun or self._last or self._fleet.replicas.group(self.base).members:
            return False
        self._mistaken, self.base = True, ""
        self._fleet.learn_base(self._adapter, "")
        return True

    async def _wait_for_any(self, base: str) -> None:
        """All have failed, or are away: wait until one has recovered, or it is time to try them again."""
        if self._last is None and not self._fleet.had_lately(base, self._give_up_s):
            raise NoReplica(self.base)
        self._first_failure = self._first_failure or time.monotonic()
        full = self._full and not self._patient
        if full or time.monotonic() - self._first_failure > self._give_up_s or self.remaining_s <= 0:
            raise Refusal(self._last) if self._last and error_info(self._last).reason else NoReplica(base)
        await self._fleet.change(_PAUSE_S)
        self._tried.clear()

    async def failed(self, link: Link, error: aio.AioRpcError, messages: int = 0) -> None:
        """Learn from a failure after so many messages; another replica may be asked next.

        Raises Refusal if none would answer otherwise, EngineDied if too many have died under the request.
        """
        info = error_info(error)
        failure = judge(error, info.reason)
        if self._resuming and info.reason == "QUOTA_EXCEEDED":  # all answers that broke there go on here at once
            failure = Failure.FULL
        if failure is Failure.FINAL or self.remaining_s <= 0:
            raise Refusal(error)
        if failure is Failure.STALE:
            await self._refresh(link, error)
        elif failure is Failure.OTHER_BASE:
            self._tried.add(link.replica.id)
            self._change_base(info.metadata["trained_on"], error)
        else:
            had = self._reached and failure in (Failure.GONE, Failure.BROKEN)
            self._missed(link, failure, error, had=had)
            # Who is still connected and well was only cut off from this call.
            gone = self._reached and (not link.connected or bool(link.problem))
            if gone if failure is Failure.GONE else info.reason == EngineDied.reason:
                self._count_death(messages, error)

    def _count_death(self, messages: int, error: aio.AioRpcError) -> None:
        """A replica died under the request. Raises EngineDied if it may well be what they die of."""
        if messages >= _INNOCENT:
            self._deaths = self._late_deaths = 0
        elif self.asked_s < _LATE_S:
            self._deaths += 1
        else:
            self._late_deaths += 1
        deaths = self._deaths + self._late_deaths
        if self._deaths >= _MOST_DEATHS or deaths >= _MOST_LATE_DEATHS:
            raise EngineDied(replicas=deaths) from error

    @property
    def _patient(self) -> bool:
        """Whether a replica has worked on it: then it is worth waiting for room, as much as for a replica."""
        return self._resuming or self._lost > 0

    def _missed(self, link: Link, failure: Failure, error: aio.AioRpcError, *, had: bool) -> None:
        """It has no answer from the replica, which `had` it. Raises Refusal if others would fail alike."""
        self._last = error
        self._lost += had
        if not self._first_failure or (had and self._lost <= _MOST_LOST):
            self._first_failure = time.monotonic()
        self._turn_away(link, failure, error)

    def _turn_away(self, link: Link, failure: Failure, error: aio.AioRpcError) -> None:
        self._tried.add(link.replica.id)
        if failure is Failure.FULL:
            self._full += 1
            if self._full > 1 and not self._patient:  # two of two are full: asking them all would only add to it
                raise Refusal(error)
            return
        self.failovers += 1
        if failure is Failure.WITHOUT:
            self._without += 1
            if self._without >= _MOST_WITHOUT and not self._resuming:
                raise Refusal(error)
        elif failure is not Failure.LEAVING and self.failovers <= _MOST_BLAMED:
            self._fleet.failed(link, self._asked_at)

    def _change_base(self, base: str, error: aio.AioRpcError) -> None:
        """The version was trained on another base than this replica's; remember it for the next request."""
        self._base_changes += 1
        if not base or base == self.base or self._resuming or self._base_changes > _MOST_BASES:
            raise Refusal(error)
        self.base = base
        self._fleet.learn_base(self._adapter, base)

    async def _refresh(self, link: Link, error: aio.AioRpcError) -> None:
        """Have the replica look into the registry, once: another one may have published or promoted just now."""
        if link.replica.id in self._refreshed:
            raise Refusal(error)
        try:
            known = await self._fleet.refresh(link, self._ask.adapter)
        except aio.AioRpcError as failed:  # nobody knows: another one may say
            gone = judge(failed, error_info(failed).reason) is Failure.GONE
            self._missed(link, *((Failure.GONE, failed) if gone else (Failure.WITHOUT, error)), had=False)
            return
        if not known:
            raise Refusal(error)
        self._refreshed.add(link.replica.id)
