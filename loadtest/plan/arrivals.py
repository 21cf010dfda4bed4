"""When requests arrive: from `poisson:20` to times in seconds.

poisson:20          20 requests/s, memoryless
gamma:20,cv=4       20 requests/s in bursts: gaps from a gamma distribution with this coefficient of variation
constant:20         every 50 ms
ramp:1..50          a rate that rises (or falls) linearly over the duration; ramp:1..50..1 there and back
steps:5,10,20       equal stretches, each Poisson at its rate
trace:FILE,scale=2  the times of a file, twice as fast
closed:32,think=1s  32 callers, each asking again when it has its answer (and has thought)

A rate may be written as a share of what the target can do: `poisson:0.6x` is 60 % of the capacity that is measured first.
Gaps are never rescaled: a Poisson tape stays Poisson, so its realised rate varies like one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.plan.values import Spelled, seconds

Times = npt.NDArray[np.float64]

MOST_REQUESTS = 5_000_000
MOST_PER_SECOND = 100_000.0
_RELATIVE = re.compile(r"(\d+(?:\.\d+)?|\.\d+)x\b")
KINDS = ("poisson", "gamma", "constant", "ramp", "steps", "trace", "closed")


@dataclass(frozen=True)
class Arrival:
    """How requests arrive: `callers` above 0 means a closed loop, `rates` are requests/s over equal stretches."""

    text: str
    kind: str
    rates: tuple[float, ...] = ()
    cv: float = 1.0
    callers: int = 0
    think_s: float = 0.0
    file: str = ""
    scale: float = 1.0

    @property
    def rate(self) -> float:
        """Requests/s on average; 0 where nobody knows beforehand (closed loops and traces)."""
        if self.kind == "ramp":
            return float(np.mean([(a + b) / 2 for a, b in zip(self.rates, self.rates[1:], strict=False)]))
        return float(np.mean(self.rates)) if self.rates else 0.0


def relative(text: str) -> bool:
    """Whether a rate is written as a share of the capacity."""
    return bool(_RELATIVE.search(text)) and not text.startswith(("trace", "closed"))


def absolute(text: str, capacity: float) -> str:
    """The same arrival with shares of `capacity` (requests/s) turned into rates."""
    return _RELATIVE.sub(lambda match: f"{float(match[1]) * capacity:.4g}", text) if relative(text) else text


def scaled(text: str, rate: float) -> str:
    """The same arrival at `rate` requests/s on average, or with that many callers; ValueError for a trace."""
    arrival = parse(text)
    if arrival.kind == "trace":
        raise ValueError(f"{text!r} has times of its own: a trace has no other rate (see scale=)")
    if arrival.callers:
        return f"closed:{max(1, round(rate))},think={arrival.think_s:g}s"
    rates = [f"{one / arrival.rate * rate:.6g}" for one in arrival.rates]
    match arrival.kind:
        case "gamma":
            return f"gamma:{rates[0]},cv={arrival.cv:g}"
        case "ramp":
            return f"ramp:{'..'.join(rates)}"
    return f"{arrival.kind}:{','.join(rates)}"


def parse(text: Any) -> Arrival:
    """Take an arrival apart; ValueError says what is wrong with it. Shares of the capacity count as rates here."""
    spelled = Spelled.parse(_RELATIVE.sub(r"\1", str(text)) if relative(str(text)) else str(text))
    reader = _READERS.get(spelled.kind)
    if reader is None:
        raise ValueError(f"{text!r} is no arrival: it begins with one of {', '.join(KINDS)}")
    arrival = reader(spelled)
    if arrival.rates and max(arrival.rates) > MOST_PER_SECOND:
        raise ValueError(f"{text!r}: no client here sends more than {MOST_PER_SECOND:,.0f} requests/s")
    return arrival


def valid(text: Any) -> str:
    """For pydantic: the text itself, once it is known to be an arrival."""
    parse(text)
    return str(text)


def times(arrival: Arrival, duration_s: float, rng: np.random.Generator) -> Times:
    """Arrival times in [0, duration_s), ascending. ValueError when there would be more than MOST_REQUESTS."""
    if arrival.rate * duration_s > MOST_REQUESTS:
        raise ValueError(f"{arrival.text!r} for {duration_s:g} s is more than {MOST_REQUESTS:,} requests")
    match arrival.kind:
        case "constant":
            return np.asarray(np.arange(0.0, duration_s, 1 / arrival.rates[0]), np.float64)
        case "poisson" | "gamma":
            return _renewal(arrival.rates[0], arrival.cv, duration_s, rng)
        case "ramp":
            return _ramp(arrival.rates, duration_s, rng)
        case "steps":
            length = duration_s / len(arrival.rates)
            parts = [_renewal(rate, 1.0, length, rng) + at * length for at, rate in enumerate(arrival.rates)]
            return np.concatenate(parts)
    raise ValueError(f"{arrival.text!r} has no times of its own")


def _renewal(rate: float, cv: float, duration_s: float, rng: np.random.Generator) -> Times:
    """Gaps from a gamma distribution with mean 1/rate; its shape is 1/cv^2, so cv = 1 is Poisson."""
    shape = 1 / cv**2
    found: list[Times] = []
    at = 0.0
    while at < duration_s:
        steps = at + np.cumsum(rng.gamma(shape, 1 / (rate * shape), max(16, int(rate * duration_s) + 1)))
        found.append(steps)
        at = float(steps[-1])
    everything = np.concatenate(found)
    return everything[everything < duration_s]


def _ramp(rates: tuple[float, ...], duration_s: float, rng: np.random.Generator) -> Times:
    """A Poisson process whose rate moves linearly from corner to corner, by thinning one at the highest rate."""
    most = max(rates)
    candidates = _renewal(most, 1.0, duration_s, rng)
    corners = np.linspace(0.0, duration_s, len(rates))
    keep = rng.random(len(candidates)) * most < np.interp(candidates, corners, rates)
    return candidates[keep]


def _poisson(spelled: Spelled) -> Arrival:
    spelled.known()
    return Arrival(spelled.text, spelled.kind, (spelled.single("rate"),))


def _gamma(spelled: Spelled) -> Arrival:
    spelled.known("cv")
    cv = spelled.number(spelled.options.get("cv", "1"), "cv")
    return Arrival(spelled.text, "gamma", (spelled.single("rate"),), cv=cv)


def _corners(spelled: Spelled) -> Arrival:
    spelled.known()
    parts = (spelled.arguments[0] if len(spelled.arguments) == 1 else "").split("..")
    if len(parts) < 2:
        raise ValueError(f"{spelled.text!r}: give rates as ramp:1..50, or ramp:1..50..1 for there and back")
    return Arrival(spelled.text, "ramp", tuple(spelled.number(part, "rate") for part in parts))


def _steps(spelled: Spelled) -> Arrival:
    spelled.known()
    if not spelled.arguments:
        raise ValueError(f"{spelled.text!r}: give rates as steps:5,10,20")
    return Arrival(spelled.text, "steps", tuple(spelled.number(part, "rate") for part in spelled.arguments))


def _trace(spelled: Spelled) -> Arrival:
    spelled.known("scale")
    if len(spelled.arguments) != 1:
        raise ValueError(f"{spelled.text!r}: give a file, as in trace:day.csv")
    scale = spelled.number(spelled.options.get("scale", "1"), "scale")
    return Arrival(spelled.text, "trace", file=spelled.arguments[0], scale=scale)


def _closed(spelled: Spelled) -> Arrival:
    spelled.known("think")
    callers = spelled.single("number of callers")
    if callers != int(callers):
        raise ValueError(f"{spelled.text!r}: the number of callers must be whole")
    return Arrival(spelled.text, "closed", callers=int(callers), think_s=seconds(spelled.options.get("think", 0)))


_READERS: dict[str, Callable[[Spelled], Arrival]] = {
    "poisson": _poisson,
    "constant": _poisson,
    "gamma": _gamma,
    "ramp": _corners,
    "steps": _steps,
    "trace": _trace,
    "closed": _closed,
}
