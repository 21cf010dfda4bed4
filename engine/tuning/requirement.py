"""What a version must have scored to be promoted: 'accuracy>=0.9 and not worse than current'."""

from __future__ import annotations

import math
import operator
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequirement
from engine.tuning.evaluation import value_of
from engine.tuning.suite import MAX_TOKENS, METRICS

KNOWN = ("accuracy", *METRICS, "f1", "loglik")
_BOUND = re.compile(r"([a-z_0-9]+)\s*(>=|<=|>|<)\s*(-?[0-9]*\.?[0-9]+)\s*(%?)")
_NOT_WORSE = re.compile(r"not worse than (current|base)(?: by ([a-z_0-9]+))?")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """A metric and a number."""

    metric: str
    sign: str
    number: float


@dataclass(frozen=True)
class NotWorse:
    """A metric that must be at least another's, on the same suite."""

    metric: str
    than: str


Condition = Bound | NotWorse


def parse(text: str) -> list[Condition]:
    """Read an expression; raises InvalidRequirement with the part that cannot be read."""
    parts = [part.strip() for part in re.split(r"\band\b", text)]
    return [_condition(text, part) for part in parts]


def _condition(text: str, part: str) -> Condition:
    if match := _NOT_WORSE.fullmatch(part):
        return NotWorse(_metric(text, match[2] or "accuracy"), match[1])
    if match := _BOUND.fullmatch(part):
        return Bound(_metric(text, match[1]), match[2], float(match[3]) / (100 if match[4] else 1))
    raise InvalidRequirement(text, f"{part!r} is no condition" if part else "a condition is missing")


def _metric(text: str, name: str) -> str:
    if name not in KNOWN:
        raise InvalidRequirement(text, f"unknown metric {name!r}; known: {', '.join(KNOWN)}")
    return name


def _base(record: dict[str, Any]) -> dict[str, str]:
    """What an evaluation was run on; records may come from anywhere."""
    found = record.get("base")
    return found if isinstance(found, dict) else {}


def _computed_in(record: dict[str, Any], dtype: str) -> bool:
    """Whether an evaluation may have been computed in this precision: those of old servers do not say."""
    return not dtype or record.get("dtype", "") in ("", dtype)


def failures(
    conditions: Sequence[Condition],
    ref: str,
    current: str,
    records: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    base: str,
    dtype: str = "",
) -> list[str]:
    """What is not met by the latest of a version's `records`, each with the numbers; `others` are the current version's.

    Only what was measured on the base with the fingerprint `base` counts, and in the precision `dtype` where it is known.
    """
    if not records:
        return [f"{ref} has no evaluation: loraplex eval {ref} SUITE.jsonl"]
    counted, others = ([one for one in some if _base(one).get("fingerprint") == base] for some in (records, others))
    if not counted:
        other = _base(records[-1])
        named = f"{other.get('name', 'unknown')}, {other.get('precision', 'unknown')}"
        return [f"{ref} was evaluated on another base only ({named}): loraplex eval {ref} SUITE.jsonl, on its own"]
    elsewhere = [one["dtype"] for one in counted if not _computed_in(one, dtype)]
    counted, others = ([one for one in some if _computed_in(one, dtype)] for some in (counted, others))
    if not counted:
        fix = f"loraplex eval {ref} SUITE.jsonl, on this one"
        return [f"{ref} was evaluated in {elsewhere[-1]} only, and this server computes in {dtype}: {fix}"]
    latest = counted[-1]
    own = latest["results"][ref]
    found = []
    for condition in conditions:
        match condition:
            case Bound(metric, sign, number):
                if not _COMPARE[sign](value_of(own, metric), number):  # NaN meets nothing
                    found.append(f"{_told(own, metric)}, required {metric} {sign} {number:g} (suite {latest['suite']})")
            case NotWorse(metric, than):
                found += _worse(latest, own, metric, current if than == "current" else than, others)
    return found


def _worse(
    latest: dict[str, Any], own: dict[str, Any], metric: str, than: str, others: Sequence[dict[str, Any]]
) -> list[str]:
    if not than or latest["results"].get(than) is own:
        return []  # there is no current version, or it is this one
    told = [one for one in others if one["suite_digest"] == latest["suite_digest"] and than in one["results"]]
    same = [one for one in told if _asked(one) == _asked(latest)]
    other = latest["results"].get(than) or (same[-1]["results"][than] if same else None)
    if other is None:
        how = f"evaluated with {_asked(told[-1])} only" if told else "not evaluated"
        command = " ".join(["loraplex eval", than, latest["suite"], *([_asked(latest)] if told else [])])
        return [f"{than} was {how} on the suite {latest['suite']}: {command}"]
    mine, its = value_of(own, metric), value_of(other, metric)
    if math.isnan(mine) or math.isnan(its) or mine < its:
        return [f"{_told(own, metric)}, worse than {than} with {_told(other, metric)} (suite {latest['suite']})"]
    return []


def _asked(record: dict[str, Any]) -> str:
    """How answers were asked for, as options of `loraplex eval`; a score says nothing about another way."""
    limit, stop = record.get("max_tokens", MAX_TOKENS), record.get("stop", [])
    return shlex.join(["--max-tokens", str(limit), *(f"--stop={text}" for text in sorted(stop))])


def _told(result: dict[str, Any], metric: str) -> str:
    entry = result.get(metric)
    if not entry:
        return f"{metric} was not measured"
    if "interval" not in entry:
        return f"{metric} {entry['value']:.4g}"
    low, high = entry["interval"]
    return f"{metric} {entry['value']:.4g} (95 %: {low:.3g} to {high:.3g}, {entry['rows']} rows)"
