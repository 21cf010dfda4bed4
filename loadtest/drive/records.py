"""What is written down about one request. All times are from one clock, `time.monotonic`, shared by all processes."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """How a request ended. Every one that was due has a record, so none can drop out of a percentile."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    """By us, on purpose."""
    UNFINISHED = "unfinished"
    """Still under way when the drain time was over, or the run was interrupted."""
    DROPPED = "dropped"
    """Never sent: too many were in flight already."""


@dataclass(slots=True)
class Record:
    """One request. `scheduled` is when the tape wanted it sent, and where every latency starts."""

    row: int
    adapter: str
    scheduled: float
    canary: int = -1
    max_tokens: int = 0
    sent: float = 0.0
    ended: float = 0.0
    status: Status = Status.UNFINISHED
    reason: str = ""
    times: array[float] = field(default_factory=lambda: array("d"))
    """When each message with tokens arrived."""
    counts: array[int] = field(default_factory=lambda: array("i"))
    """How many tokens each of these had."""
    answered_by: str = ""
    """"support@v2", or "" for the base: what the server says."""
    digest: str = ""
    token_ids: tuple[int, ...] = ()
    """Kept for canaries only."""
    complete: bool = False
    """The last message, with the server's own counts, has come."""
    prompt_tokens: int = 0
    claimed_tokens: int = 0
    """Generated tokens by the server's count."""
    lost: int = 0
    """Messages that the numbering says are missing."""
    duplicated: int = 0
    reordered: int = 0
    switched: str = ""
    """Another adapter that a later message of the same stream named."""
    queue_s: float = 0.0
    adapter_wait_s: float = 0.0
    server_ttft_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens received."""
        return sum(self.counts)


@dataclass(slots=True)
class Beat:
    """A sign of life of one client process."""

    worker: int
    at: float
    sent: int
    in_flight: int
    cpu: float
    """Share of one core that this process used since the last beat."""
    loop_lags: list[float]
    """Seconds by which timers of its event loop came too late."""
