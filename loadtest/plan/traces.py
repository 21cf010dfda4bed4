"""Traces: files of past traffic, with whichever columns they have.

ours                t,adapter,in,out            seconds, name, tokens; adapter may be empty (the base) or left out
BurstGPT            Timestamp,...,Request tokens,Response tokens,...        seconds
Azure LLM           TIMESTAMP,ContextTokens,GeneratedTokens                 date and time

No public trace that we know of has adapters: where the column is missing, the scenario's popularity fills it in.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from loadtest.errors import BadInput

_COLUMNS = {
    "t": ("t", "time", "timestamp"),
    "in": ("in", "request tokens", "contexttokens", "prompt_tokens"),
    "out": ("out", "response tokens", "generatedtokens", "output_tokens"),
    "adapter": ("adapter",),
}
_SHOWN = 3  # bad rows named in the message


@dataclass(frozen=True)
class Trace:
    """Rows in order of time: seconds from the first one, tokens in and out, and names where the file has them."""

    at: list[float]
    prompt_tokens: list[int]
    output_tokens: list[int]
    adapters: list[str] | None


def read(path: Path) -> Trace:
    """Read a trace. Raises BadInput naming the first bad rows; none is skipped silently."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = _columns(reader.fieldnames or [], path)
            rows, bad = _rows(reader, columns)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"cannot read the trace {path}: {error}") from error
    if bad:
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise BadInput(f"{path}: bad rows: {'; '.join(bad[:_SHOWN])}{more}", "Correct or remove these rows.")
    if not rows:
        raise BadInput(f"{path} has no rows")
    rows.sort(key=lambda row: row[0])
    at, prompt, output, adapters = zip(*rows, strict=True)
    named = list(adapters) if "adapter" in columns else None
    return Trace([time - at[0] for time in at], list(prompt), list(output), named)


def _columns(names: Sequence[str], path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for ours, theirs in _COLUMNS.items():
        for name in names:
            if name.strip().lower() in theirs:
                found.setdefault(ours, name)
    if missing := [ours for ours in ("t", "in", "out") if ours not in found]:
        raise BadInput(
            f"{path} has no column {' and no column '.join(missing)}; it has {', '.join(names) or 'nothing'}",
            "Use the columns t,adapter,in,out, or those of BurstGPT or of Azure's LLM traces.",
        )
    return found


Row = tuple[float, int, int, str]


def _rows(reader: csv.DictReader[str], columns: Mapping[str, str]) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    bad: list[str] = []
    for line in reader:
        try:
            adapter = (line[columns["adapter"]] or "").strip() if "adapter" in columns else ""
            tokens = _tokens(line[columns["in"]]), _tokens(line[columns["out"]])
            rows.append((_time(line[columns["t"]]), *tokens, adapter))
        except (ValueError, TypeError) as error:
            bad.append(f"line {reader.line_num}: {error}")
    return rows, bad


def _tokens(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 1_000_000:
        raise ValueError(f"{count} tokens")
    return count


def _time(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        # Azure writes seven digits of a second, one more than Python reads.
        moment = datetime.fromisoformat(text.strip()[:26])
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(found):
        raise ValueError(f"time {text}")
    return found
