"""What a server must reach: `requirements.yaml`, or `--slo 'ttft.p99<500ms,attainment>=0.95'`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from loadtest.errors import BadInput
from loadtest.plan.strict import Strict, checked, read_yaml
from loadtest.plan.values import Seconds, Share

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999}
LATENCIES = ("ttft", "tpot", "itl", "e2e")
_CONDITION = re.compile(r"\s*([a-z_]+)(?:\.([a-z0-9_]+))?\s*(<=|>=|==|<|>)\s*(\S+)\s*")
_AT_LEAST = ("attainment", "worst_adapter", "goodput", "rate")


def _ratio(value: Any) -> float:
    try:
        found = float(str(value).strip().removesuffix("x"))
    except ValueError:
        raise ValueError(f"{value!r} is no ratio: write 5x") from None
    if not found > 0:
        raise ValueError(f"{value!r} is no ratio: it must be above 0")
    return found


Ratio = Annotated[
    float, BeforeValidator(_ratio), WithJsonSchema({"type": ["number", "string"], "examples": ["5x"]})
]  # fmt: skip


class Latencies(Strict):
    """Upper limits on percentiles, in seconds. Failed requests count as infinitely slow."""

    p50: Seconds | None = None
    p90: Seconds | None = None
    p95: Seconds | None = None
    p99: Seconds | None = None
    p999: Seconds | None = None

    def limits(self) -> Iterator[tuple[str, float]]:
        """The percentiles that have a limit."""
        return ((name, limit) for name in QUANTILES if (limit := getattr(self, name)) is not None)


class Slowdowns(Strict):
    """Upper limits on percentiles of TTFT under load over TTFT alone: for machines whose milliseconds mean nothing."""

    p50: Ratio | None = None
    p90: Ratio | None = None
    p95: Ratio | None = None
    p99: Ratio | None = None
    p999: Ratio | None = None

    def limits(self) -> Iterator[tuple[str, float]]:
        """The percentiles that have a limit."""
        return ((name, limit) for name in QUANTILES if (limit := getattr(self, name)) is not None)


class Good(Strict):
    """What makes one request a good one, beside being answered in full and rightly."""

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    itl: Seconds | None = Field(None, description="The longest gap between two tokens of the answer.")
    e2e: Seconds | None = None
    slowdown: Ratio | None = None


class Requirements(Strict):
    """Everything that a verdict can be about. What is left out is measured, and judged by nobody."""

    ttft: Latencies = Latencies()
    tpot: Latencies = Latencies()
    itl: Latencies = Latencies()
    e2e: Latencies = Latencies()
    slowdown: Slowdowns = Slowdowns()
    good: Good = Good()
    attainment: Share | None = Field(None, description="Least share of good requests.")
    worst_adapter: Share | None = Field(None, description="Least share of good requests of every single adapter.")
    goodput: float | None = Field(None, gt=0, description="Least good requests per second.")
    error_rate: Share | None = Field(None, description="Largest share of failed requests.")
    misroutes: int = Field(0, ge=0, description="Answers by another adapter or version than asked for.")
    lost_tokens: int = Field(0, ge=0)
    duplicated_tokens: int = Field(0, ge=0, description="Tokens that came twice or out of order.")
    rate: float | None = Field(None, gt=0, description="Requests/s that all replicas together must take.")
    gpu_hour: float | None = Field(None, gt=0, description="Price of one accelerator (or machine) for an hour.")
    gpus: int = Field(1, ge=1, description="Accelerators of the measured target.")

    @model_validator(mode="after")
    def _attainment_of_something(self) -> Requirements:
        if (self.attainment or self.worst_adapter or self.goodput) and self.good == Good() and not self._percentiles():
            raise ValueError("attainment and goodput need `good:` (such as good: {ttft: 500ms}) to say what is good")
        return self

    def _percentiles(self) -> bool:
        return any(True for name in LATENCIES for _ in getattr(self, name).limits())

    @property
    def goodness(self) -> Good:
        """`good`, or where it is left out the strictest limit that a percentile sets on each latency."""
        if self.good != Good():
            return self.good
        found = {name: [limit for _, limit in getattr(self, name).limits()] for name in LATENCIES}
        return Good(**{name: min(limits) for name, limits in found.items() if limits})


def read(path: Path) -> Requirements:
    """Requirements from a YAML file."""
    return checked(Requirements, read_yaml(path), str(path))


def from_conditions(text: str) -> dict[str, Any]:
    """`ttft.p99<500ms,attainment>=0.95` as the mapping that a file would hold."""
    data: dict[str, Any] = {}
    for condition in filter(None, text.split(",")):
        match = _CONDITION.fullmatch(condition)
        if not match:
            raise BadInput(f"{condition!r} is no condition: write ttft.p99<500ms, attainment>=0.95 or misroutes==0")
        name, part, operator, value = match.groups()
        name = "misroutes" if name == "misroute" else name
        if operator != "==" and (operator in (">", ">=")) != (name in _AT_LEAST):
            raise BadInput(f"{condition!r} goes the wrong way: {name} has {_side(name)} limit")
        if part:
            data.setdefault(name, {})[part] = value
        else:
            data[name] = value
    return data


def _side(name: str) -> str:
    return "a lower" if name in _AT_LEAST else "an upper"
