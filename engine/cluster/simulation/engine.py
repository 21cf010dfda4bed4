"""An engine's times, in seconds, and what fits into it. Each model says where its numbers come from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineModel:
    """A step takes `step_s` and `step_row_s` for each row in the batch; a prompt takes a step for each `chunk` tokens.

    `chunk` is what a step's time buys of a prompt. `places` rows fit into a batch, `slots` adapters into memory. Loading an
    adapter from local disk takes `load_s` and `load_rank_s` a rank; rows that run meanwhile do not notice. `source` says in a
    few words where the numbers come from.
    """

    name: str
    step_s: float
    step_row_s: float
    chunk: int
    places: int
    slots: int
    load_s: float
    load_rank_s: float
    source: str

    def step(self, rows: int) -> float:
        """Seconds that a step with so many rows takes."""
        return self.step_s + self.step_row_s * rows

    def load(self, rank: int) -> float:
        """Seconds that loading an adapter takes."""
        return self.load_s + self.load_rank_s * rank

    def prefill(self, tokens: int) -> int:
        """Steps until a prompt of so many tokens is read."""
        return math.ceil(tokens / self.chunk)


# Measured here, SmolLM2-135M in bfloat16 on two cores (README, Figures, and docs/residency.md):
# - a step of 16 rows takes 50 ms, of which 1.7 ms for each row;
# - a prompt's token costs 1.5 ms, so a step's time buys 32 of them;
# - an adapter of rank 16 on all linear layers takes 25 ms to prepare and 13 ms to copy, one of rank 64 about 30 ms more.
_CPU = EngineModel(
    "cpu", step_s=0.023, step_row_s=0.0017, chunk=32, places=32, slots=8, load_s=0.03, load_rank_s=0.0006,
    source="measured here, SmolLM2-135M on two cores: a step of 16 rows takes 50 ms, a prompt's token 1.5 ms, "
    "a load of rank 16 40 ms",
)  # fmt: skip

# An 8B model in bfloat16 on an H100 SXM, by NVIDIA's data sheet (3.35 TB/s, 989 TFLOP/s in dense bfloat16):
# - a step reads 16 GB of weights: 4.8 ms, and half again as much in practice;
# - a row adds 0.02 ms for its keys and values (430 tokens of 131 kB: Llama 3.1 has 32 layers and 8 heads of 128 for them) and
#   0.06 ms for its adapter (Punica, MLSys 2024: 2 ms a token in batches of 32);
# - a prompt's token is 16 GFLOP: 32 us at half of the peak, so a step's time (8 to 13 ms) buys 256 of them;
# - an adapter of rank 16 on all linear layers has 42 million numbers, 84 MB, and comes from local disk at 1 GB/s (assumed, as
#   a server reads, proves and converts it); the constant is the wait for the step under way, and the call.
_H100 = EngineModel(
    "h100", step_s=0.007, step_row_s=0.00009, chunk=256, places=64, slots=32, load_s=0.03, load_rank_s=0.005,
    source="an 8B model in bfloat16 by NVIDIA's H100 SXM data sheet (3.35 TB/s, 989 TFLOP/s), Punica's 2 ms a step for "
    "adapters; adapters of 5 MB a rank from local disk at 1 GB/s",
)  # fmt: skip

MODELS = {one.name: one for one in (_CPU, _H100)}
