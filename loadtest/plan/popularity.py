"""Who is asked: from `zipf:1.0` to one adapter for each request.

uniform         every adapter alike
zipf:1.0        the k-th adapter in proportion to 1/k^s: s = 0 is uniform, 1 the usual skew, 1.5 a steep one
identical       only the first adapter
distinct        one after the other, round and round
weights:a=3,b=1 in these proportions; weights:FILE reads `adapter,weight` lines
trace           as the trace says
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.plan.strict import nearest
from loadtest.plan.values import Spelled

Indices = npt.NDArray[np.int32]
Shares = npt.NDArray[np.float64]
KINDS = ("uniform", "zipf", "identical", "distinct", "weights", "trace")


def valid(text: Any) -> str:
    """For pydantic: the text itself, once it is known to be a popularity."""
    spelled = Spelled.parse(str(text))
    if spelled.kind not in KINDS:
        raise ValueError(f"{text!r} is no popularity: it begins with one of {', '.join(KINDS)}")
    if spelled.kind == "zipf":
        _exponent(spelled)
    elif spelled.kind == "weights" and not (spelled.arguments or spelled.options):
        raise ValueError(f"{text!r}: give weights:a=3,b=1 or weights:FILE")
    return str(text)


def shares(text: str, adapters: tuple[str, ...]) -> Shares:
    """The expected share of each adapter's requests; they sum to 1."""
    spelled = Spelled.parse(text)
    count = len(adapters)
    match spelled.kind:
        case "zipf":
            weights = np.arange(1, count + 1, dtype=np.float64) ** -_exponent(spelled)
        case "identical":
            weights = np.zeros(count)
            weights[0] = 1
        case "weights":
            weights = _weights(spelled, adapters)
        case _:
            weights = np.ones(count)
    return np.asarray(weights / weights.sum())


def draw(text: str, adapters: tuple[str, ...], count: int, rng: np.random.Generator) -> Indices:
    """An adapter's index for each of `count` requests."""
    if Spelled.parse(text).kind == "distinct":
        return (np.arange(count) % len(adapters)).astype(np.int32)
    return rng.choice(len(adapters), size=count, p=shares(text, adapters)).astype(np.int32)


def best_hit_rate(expected: Shares, slots: int) -> float:
    """The share of requests that find their adapter loaded if the `slots` most popular ones always are."""
    return float(np.sort(expected)[::-1][:slots].sum())


def _exponent(spelled: Spelled) -> float:
    spelled.known()
    return spelled.single("exponent", least=-1e-9) if spelled.arguments else 1.0


def _weights(spelled: Spelled, adapters: tuple[str, ...]) -> Shares:
    given = dict(spelled.options)
    for file in spelled.arguments:
        given |= _read(Path(file), spelled)
    if unknown := [name for name in given if name not in adapters]:
        raise ValueError(f"{spelled.text!r}: no adapter {unknown[0]!r} here{nearest(unknown[0], adapters)}")
    found = np.array([spelled.number(given.get(name, "0") or "0", f"weight of {name}", -1e-9) for name in adapters])
    if found.sum() <= 0:
        raise ValueError(f"{spelled.text!r}: at least one weight must be above 0")
    return found


def _read(path: Path, spelled: Spelled) -> dict[str, str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise ValueError(f"{spelled.text!r}: cannot read {path}: {error.strerror}") from error
    found = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#") or line.replace(" ", "") == "adapter,weight":
            continue
        name, separator, weight = line.partition(",")
        if not separator:
            raise ValueError(f"{path}:{number}: {line!r} is no `adapter,weight`")
        found[name.strip()] = weight.strip()
    return found
