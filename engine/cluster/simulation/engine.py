"""An engine's times, in seconds, and what fits into it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineModel:
    """A step takes `step_s` and `step_row_s` for each row in the batch; a prompt takes a step for each `chunk` tokens.

    `places` rows fit into a batch, `slots` adapters into memory. Loading an adapter takes `load_s` and `load_rank_s` a rank.
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


MODELS = {
    one.name: one
    for one in (
        EngineModel(
            "cpu", step_s=0.02, step_row_s=0.0018, chunk=512, places=32, slots=8, load_s=0.03, load_rank_s=0.001,
            source="measured: SmolLM2-135M on two cores; a step of 16 rows takes 48 ms, a load of rank 16 40 ms "
            "(README, Figures)",
        ),
        EngineModel(
            "h100", step_s=0.007, step_row_s=0.00009, chunk=2048, places=64, slots=32, load_s=0.03, load_rank_s=0.004,
            source="an 8B model in bfloat16 reads 16 GB of weights a step at 3.35 TB/s (NVIDIA's H100 SXM data sheet), "
            "half again as much in practice; a rank-16 adapter of all layers (84 MB) comes from local disk at 1 GB/s",
        ),
    )
}  # fmt: skip
