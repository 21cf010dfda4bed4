"""Values as people write them: `500ms`, `5%`, `gamma:20,cv=4`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_DURATION = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*")


def seconds(value: Any) -> float:
    """Seconds from `250ms`, `1.5s`, `2m`, `1h`, or a plain number of seconds; ValueError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    else:
        match = _DURATION.fullmatch(str(value))
        if not match or (match[2] or "s") not in _UNITS:
            raise ValueError(f"{value!r} is no duration: write 500ms, 10s, 2m or 1h")
        found = float(match[1]) * _UNITS[match[2] or "s"]
    if not math.isfinite(found) or found < 0:
        raise ValueError(f"{value!r} is no duration: it must be finite and not below 0")
    return found


def share(value: Any) -> float:
    """A share between 0 and 1, from `0.05` or `5%`."""
    text = str(value).strip()
    try:
        found = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"{value!r} is no share: write 0.05 or 5%") from None
    if not 0 <= found <= 1:
        raise ValueError(f"{value!r} is no share: it must lie between 0 and 1")
    return found


def _schema(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": "number", "minimum": 0}, {"type": "string", "pattern": pattern, "examples": [example]}]}
    )


Seconds = Annotated[float, BeforeValidator(seconds), _schema(r"^\s*[0-9.]+\s*(us|ms|s|m|min|h)?\s*$", "500ms")]
Share = Annotated[float, BeforeValidator(share), _schema(r"^[0-9.]+%?$", "5%")]


@dataclass(frozen=True)
class Spelled:
    """`kind:argument,key=value` taken apart; several plain arguments are kept in order."""

    text: str
    kind: str
    arguments: tuple[str, ...]
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Spelled:
        """Take it apart; nothing is checked but the form."""
        kind, _, rest = str(text).partition(":")
        parts = [part.strip() for part in rest.split(",") if part.strip()]
        options = dict(part.split("=", 1) for part in parts if "=" in part)
        return cls(str(text), kind.strip(), tuple(part for part in parts if "=" not in part), options)

    def number(self, value: str, what: str, least: float = 0.0) -> float:
        """A finite number above `least`."""
        try:
            found = float(value)
        except ValueError:
            raise ValueError(f"{self.text!r}: {what} {value!r} is no number") from None
        if not math.isfinite(found) or found <= least:
            raise ValueError(f"{self.text!r}: {what} must be above {least:g}")
        return found

    def single(self, what: str, least: float = 0.0) -> float:
        """The one plain argument, a number."""
        if len(self.arguments) != 1:
            raise ValueError(f"{self.text!r}: give one {what}, as in {self.kind}:20")
        return self.number(self.arguments[0], what, least)

    def span(self, what: str, least: float = 0.0) -> tuple[float, float]:
        """The one plain argument `low..high`."""
        low, separator, high = (self.arguments[0] if len(self.arguments) == 1 else "").partition("..")
        if not separator:
            raise ValueError(f"{self.text!r}: give a {what} as {self.kind}:1..50")
        return self.number(low, what, least), self.number(high, what, least)

    def known(self, *names: str) -> None:
        """Refuse options that are none of `names`."""
        if unknown := [name for name in self.options if name not in names]:
            allowed = f"it takes {', '.join(names)}" if names else "it takes none"
            raise ValueError(f"{self.text!r}: unknown option {unknown[0]!r}; {allowed}")
