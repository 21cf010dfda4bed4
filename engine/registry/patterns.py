"""The module patterns of PEFT configurations, kept from running for ever.

`target_modules`, `exclude_modules`, `rank_pattern` and `alpha_pattern` hold regular expressions that a stranger wrote,
and vLLM evaluates some of them in the engine, so expressions that could backtrack without end are refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import InvalidAdapter

T = TypeVar("T")

_BUDGET_S = 2.0
# A repeated group or a back-reference can take exponential time; flags such as (?x) would hide one.
_DANGEROUS = re.compile(r"\)[*+{?]|\\[1-9]|\(\?(?!:)")
_REPEATS = re.compile(r"(?<![\\(])(?:[*+?]|\{[\d,]*\})[?+]?")


@dataclass(frozen=True)
class Complexity:
    """How much an expression may hold: matching takes time exponential in these."""

    length: int
    repeats: int
    groups: int

    def holds(self, pattern: str) -> bool:
        """Whether `pattern` stays within the bounds."""
        repeats, groups = len(_REPEATS.findall(pattern)), pattern.count("(")
        return len(pattern) <= self.length and repeats <= self.repeats and groups <= self.groups


SELECTION = Complexity(length=2000, repeats=5, groups=8)  # fits the expressions that Unsloth writes
KEY = Complexity(length=200, repeats=2, groups=4)  # vLLM tries these on every module when it loads the adapter


def compile_safely(pattern: str, where: str, bounds: Complexity = SELECTION) -> re.Pattern[str]:
    """Compile `pattern`; raises InvalidAdapter naming the field `where` when it is malformed or could run for ever."""
    fix = "Name the layers in a list, such as ['q_proj', 'v_proj']."
    if not bounds.holds(pattern) or _DANGEROUS.search(pattern):
        raise InvalidAdapter("pattern", where, "the regular expression is too complex to be run safely", fix=fix)
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidAdapter("pattern", where, "the regular expression is malformed", fix=fix) from error


def matching(names: Iterable[str], chosen: tuple[str, ...] | str, where: str) -> set[str]:
    """Select module names as PEFT does: a list holds dotted endings, a string is an expression for the whole name."""
    if isinstance(chosen, str):
        return set(_within_budget(compile_safely(chosen, where).fullmatch, names, where))
    return {name for name in names if any(ends_with(name, target) for target in chosen)}


def ends_with(name: str, ending: str) -> bool:
    """Whether `ending` is the whole of `name` or its last dotted components."""
    return name == ending or name.endswith(f".{ending}")


def look_up(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that ends `name`: the rule of PEFT's get_pattern_key and of vLLM."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _within_budget(matches: Callable[[str], object], names: Iterable[str], where: str) -> Iterable[str]:
    started = time.monotonic()
    for name in names:
        if matches(name):
            yield name
        if time.monotonic() - started > _BUDGET_S:
            problem = "the regular expression takes too long to match"
            raise InvalidAdapter("pattern", where, problem, fix="Name the layers in a list.")
