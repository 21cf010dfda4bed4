"""How long prompts and answers are: from `lognormal:64,cv=1` to tokens.

64                  always 64
uniform:8..512      between the two, every length alike
normal:64,sd=16     around 64
lognormal:64,cv=1   64 on average, with a long tail
exponential:64      64 on average
All take max= (and are at least one token).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.plan.values import Spelled

Tokens = npt.NDArray[np.int32]
KINDS = ("uniform", "normal", "lognormal", "exponential")
_MOST = 1_000_000


def valid(text: Any) -> str:
    """For pydantic: the text itself, once it is known to be a length."""
    draw(str(text), 1, np.random.default_rng(0))
    return str(text)


def draw(text: str, count: int, rng: np.random.Generator) -> Tokens:
    """`count` lengths in tokens, each at least 1."""
    spelled = Spelled.parse(text if ":" in text else f"fixed:{text}")
    drawn = _draw(spelled, count, rng)
    most = spelled.number(spelled.options.get("max", str(_MOST)), "max")
    return np.clip(np.rint(drawn), 1, min(most, _MOST)).astype(np.int32)


def mean(text: str) -> float:
    """The average length in tokens."""
    return float(draw(text, 20_000, np.random.default_rng(0)).mean())


def _draw(spelled: Spelled, count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    match spelled.kind:
        case "fixed":
            spelled.known("max")
            return np.full(count, spelled.single("number of tokens"))
        case "uniform":
            spelled.known("max")
            low, high = spelled.span("span of tokens")
            if low > high:
                raise ValueError(f"{spelled.text!r}: {low:g} is above {high:g}")
            return rng.integers(int(low), int(high), count, endpoint=True).astype(np.float64)
        case "normal":
            spelled.known("sd", "max")
            return rng.normal(spelled.single("mean"), spelled.number(spelled.options.get("sd", "1"), "sd"), count)
        case "lognormal":
            spelled.known("cv", "max")
            cv = spelled.number(spelled.options.get("cv", "1"), "cv")
            sigma = np.sqrt(np.log1p(cv**2))  # mean m and variation cv of a log-normal: mu = ln m - sigma^2/2
            return rng.lognormal(np.log(spelled.single("mean")) - sigma**2 / 2, sigma, count)
        case "exponential":
            spelled.known("max")
            return rng.exponential(spelled.single("mean"), count)
    raise ValueError(f"{spelled.text!r} is no length: write a number or {', '.join(f'{k}:...' for k in KINDS)}")
