"""Who asks for what, and when: all of it from a seed, so that every strategy gets the same requests at the same times."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.cluster.simulation.engine import EngineModel
from engine.cluster.simulation.replica import Job

_RANKS = (8, 16, 16, 32, 64)  # of adapters, in turn


@dataclass(frozen=True)
class Traffic:
    """`load` is the share of the fleet's capacity that is asked for; adapter popularity follows Zipf's law with `zipf`.

    `burst`, from 1 to below 10, makes the rate swing: so many times the mean in one second of every ten, less in the others.
    `prompt` and `answer` are mean tokens (lognormal prompts, geometric answers).
    """

    requests: int = 40_000
    adapters: int = 2000
    load: float = 0.6
    zipf: float = 1.0
    burst: float = 1.0
    prompt: int = 300
    answer: int = 250
    base_share: float = 0.05
    seed: int = 1

    def rate(self, model: EngineModel, replicas: int) -> float:
        """Requests a second: `load` of what full batches would finish."""
        steps = self.answer + model.prefill(self.prompt)
        return self.load * replicas * model.places / (steps * model.step(model.places))


def jobs(traffic: Traffic, model: EngineModel, replicas: int, routers: int) -> Iterator[Job]:
    """The requests in order of arrival."""
    random = np.random.default_rng(traffic.seed)
    count = traffic.requests
    shares = np.arange(1, traffic.adapters + 1, dtype=float) ** -traffic.zipf
    picked = random.choice(traffic.adapters, size=count, p=shares / shares.sum())
    names = random.permutation(traffic.adapters)  # so that popularity does not go by name
    prompts = np.maximum(1, random.lognormal(math.log(traffic.prompt) - 0.32, 0.8, count)).astype(int)
    answers = random.geometric(1 / traffic.answer, count)
    base = random.random(count) < traffic.base_share
    times = _times(traffic, traffic.rate(model, replicas), random)
    for number in range(count):
        adapter = int(names[picked[number]])
        yield Job(
            arrived=float(times[number]),
            adapter="" if base[number] else f"a{adapter}",
            rank=0 if base[number] else _RANKS[adapter % len(_RANKS)],
            prompt_tokens=int(prompts[number]),
            tokens=int(answers[number]),
            router=number % routers,
        )


def _times(traffic: Traffic, rate: float, random: np.random.Generator) -> np.ndarray:
    """Poisson arrivals; with bursts, of a rate that is `burst` times the mean in the first second of every ten.

    Arrivals at the mean rate are drawn first; then what falls into ten seconds is spread over them unevenly.
    """
    tens, within = np.divmod(np.cumsum(random.exponential(1 / rate, traffic.requests)), 10)
    quiet = 1 + (within - traffic.burst) * 9 / (10 - traffic.burst)
    times: np.ndarray = 10 * tens + np.where(within < traffic.burst, within / traffic.burst, quiet)
    return times
