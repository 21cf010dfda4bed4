"""A vLLM logits processor that has a request say again what it said before, token by token, and then lets it go on.

An answer that began elsewhere is then in the same state in every part of vLLM as if it had begun here: the grammar, the counts
of the penalties, the seed's random numbers. A request asks for it by `SamplingParams.extra_args[REPEAT]`, the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams

REPEAT = "loraplex_repeat"


class Repeat(LogitsProcessor):  # type: ignore[misc]
    """Leaves one token possible in the rows that still repeat."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        # By row: what to say, and what is said so far (vLLM's own list).
        self._rows: dict[int, tuple[list[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """No: it decides."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the rows, and forget those that have repeated all."""
        process_dict_updates(self._rows, batch_update, _row)
        for row in [row for row, (wanted, said) in self._rows.items() if len(said) >= len(wanted)]:
            del self._rows[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """`logits` has one row per request, one column per token."""
        for row, (wanted, said) in self._rows.items():
            logits[row] = -float("inf")
            logits[row, wanted[len(said)]] = 0.0
        return logits


def _row(params: SamplingParams, prompt: list[int] | None, said: list[int]) -> tuple[list[int], list[int]] | None:
    del prompt
    wanted = (params.extra_args or {}).get(REPEAT)
    return (wanted, said) if wanted and len(said) < len(wanted) else None
