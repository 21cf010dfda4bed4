"""Whether every answer came from whom it was asked of, and whole. No percentile makes up for one that did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loadtest.drive.records import Record, Status
from loadtest.judge.aliases import Aliases
from loadtest.judge.canaries import References

MISROUTES = ("misroute", "wrong_adapter", "wrong_version", "wrong_digest", "switched")
_KEPT = 200  # findings with their details; all are counted


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one answer."""

    kind: str
    row: int
    asked: str
    detail: str


@dataclass
class Correctness:
    """What was found in all answers together."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    bad_rows: set[int] = field(default_factory=set)
    lost_tokens: int = 0
    duplicated_tokens: int = 0
    checked: int = 0
    canaries: Counter[str] = field(default_factory=Counter)
    confusion: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(asked adapter, answered adapter): all of it should lie on the diagonal."""

    @property
    def misroutes(self) -> int:
        """Answers by somebody else."""
        return sum(self.counts[kind] for kind in MISROUTES)

    @property
    def compared(self) -> int:
        """Canaries that there was a reference for."""
        return sum(count for kind, count in self.canaries.items() if kind != "no reference")

    @property
    def wrong(self) -> bool:
        """Whether anything was wrong for certain; drift is not."""
        return bool(self.misroutes or self.lost_tokens or self.duplicated_tokens)


def check(
    records: Iterable[Record], aliases: Aliases, references: References | None, *, names: bool = True
) -> Correctness:
    """Check every record. `names` is False for a target that does not say who answered."""
    result = Correctness()
    for record in records:
        found = list(_stream(record))
        if names and record.times:
            result.checked += 1
            found += _identity(record, aliases)
            asked, answered = _name(record.adapter), _name(record.answered_by)
            result.confusion[asked, answered] += 1
        if references and record.canary >= 0 and record.status is Status.OK:
            found += _canary(record, references, result, names=names)
        _note(result, record, found)
    return result


def _note(result: Correctness, record: Record, found: list[Finding]) -> None:
    for finding in found:
        result.counts[finding.kind] += 1
        if finding.kind not in ("drift", "unexplained"):
            result.bad_rows.add(record.row)
        if len(result.findings) < _KEPT:
            result.findings.append(finding)
    result.duplicated_tokens += record.duplicated + record.reordered
    if record.status is Status.OK:
        result.lost_tokens += _lost(record)


def _lost(record: Record) -> int:
    """Tokens that an answer which claims to be whole does not have."""
    missing = max(record.claimed_tokens, record.max_tokens) - record.tokens
    return max(missing, record.lost, 0 if record.complete else 1)


def _stream(record: Record) -> Iterator[Finding]:
    def finding(kind: str, detail: str) -> Finding:
        return Finding(kind, record.row, record.adapter or "base", detail)

    if record.lost:
        yield finding("lost", f"{record.lost} messages are missing in the numbering")
    if record.duplicated:
        yield finding("duplicated", f"{record.duplicated} tokens came twice")
    if record.reordered:
        yield finding("reordered", f"{record.reordered} messages came out of order")
    if record.status is not Status.OK:
        return
    if not record.complete:
        yield finding("truncated", f"ended as OK after {record.tokens} tokens, without its last message")
    elif record.claimed_tokens != record.tokens and not (record.lost or record.duplicated):
        yield finding("miscounted", f"the server counts {record.claimed_tokens} tokens, {record.tokens} came")
    elif record.tokens < record.max_tokens and not (record.lost or record.duplicated):
        yield finding("short", f"{record.tokens} tokens instead of {record.max_tokens}")


def _identity(record: Record, aliases: Aliases) -> Iterator[Finding]:
    def finding(kind: str, detail: str) -> Finding:
        return Finding(kind, record.row, record.adapter or "base", detail)

    answered = record.answered_by
    if record.switched:
        yield finding("switched", f"began as {answered or 'base'} and went on as {record.switched}")
    if _name(record.adapter) != _name(answered):
        yield finding("wrong_adapter", f"answered by {answered or 'base'}")
        return
    if not record.adapter:
        return
    allowed = aliases.versions(record.adapter, record.sent, record.times[0])
    if answered not in allowed:
        yield finding(
            "wrong_version", f"answered by {answered}, not {' or '.join(sorted(allowed)) or 'any known version'}"
        )
    elif aliases.digests.get(answered, record.digest) != record.digest:
        yield finding("wrong_digest", f"{answered} answered with digest {record.digest or 'none'}")


def _canary(record: Record, references: References, result: Correctness, *, names: bool) -> Iterator[Finding]:
    judged = references.judge(record.answered_by if names else record.adapter, record.canary, record.token_ids)
    if judged is None:
        result.canaries["no reference"] += 1
        return
    result.canaries[judged.kind] += 1
    if judged.kind != "match":
        who = f"looks like {judged.culprit}" if judged.culprit else f"differs from token {judged.place} on"
        yield Finding(
            judged.kind, record.row, record.adapter or "base", f"{who}; claims to be {record.answered_by or 'base'}"
        )


def _name(ref: str) -> str:
    return ref.partition("@")[0]
