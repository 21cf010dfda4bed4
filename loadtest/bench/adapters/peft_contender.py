"""transformers with PEFT as a process: reads a workload per line, runs it one of three ways, and writes what was measured.

    python -m loadtest.bench.adapters.peft_contender '{"model": "FOLDER", "dtype": "auto", "adapters": ["FOLDER", ...]}'

peft-one      one request at a time, set_adapter before each
peft-grouped  set_adapter, then all requests of that adapter as one batch; adapter by adapter
peft-mixed    one batch of all, a name per row (`adapter_names`)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from loadtest.bench.adapters.workloads import Ask, Step, measure_steps
from loadtest.bench.child import Handler, Stop, serve

_BASE = "__base__"  # PEFT's name for rows without an adapter


class Contender:
    """A PEFT model with every adapter loaded."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._ways: dict[str, Callable[[list[Ask]], list[Step]]] = {
            "peft-one": lambda asks: [self._alone([ask]) for ask in asks],
            "peft-grouped": lambda asks: [self._alone(group) for group in by_adapter(asks)],
            "peft-mixed": lambda asks: [self._generate(asks, adapter_names=[_name(ask.adapter) for ask in asks])],
        }

    async def run(self, work: dict[str, Any]) -> dict[str, Any]:
        """Run one workload, `{"way": ..., "kind": ..., "asks": [...]}`; returns its measures."""
        asks = [Ask(**ask) for ask in work["asks"]]
        steps = await asyncio.to_thread(self._ways[work["way"]], asks)
        return measure_steps(work["kind"], steps)

    def _alone(self, asks: Sequence[Ask]) -> Step:
        """A batch whose rows all belong to one adapter, or to the base."""
        if asks[0].adapter == 0:
            with self._model.disable_adapter():
                return self._generate(asks)
        self._model.set_adapter(_name(asks[0].adapter))
        return self._generate(asks)

    def _generate(self, asks: Sequence[Ask], **options: Any) -> Step:
        """One call of generate; all prompts are equally long, so nothing is padded."""
        import torch
        from transformers import StoppingCriteriaList

        moments: list[float] = []

        def note(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            if ids.is_cuda:
                torch.cuda.synchronize()  # a kernel that was only launched has made no token
            moments.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

        prompts = torch.tensor([ask.prompt for ask in asks], device=self._model.device)
        length = asks[0].max_tokens
        started = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=length,
                min_new_tokens=length, pad_token_id=0, stopping_criteria=StoppingCriteriaList([note]), **options,
            )  # fmt: skip
        return Step(len(asks), len(asks[0].prompt), started, moments)


def by_adapter(asks: Sequence[Ask]) -> list[list[Ask]]:
    """The requests of each adapter, in the order in which the adapters first appear."""
    groups: dict[int, list[Ask]] = {}
    for ask in asks:
        groups.setdefault(ask.adapter, []).append(ask)
    return list(groups.values())


def _name(adapter: int) -> str:
    return f"adapter-{adapter}" if adapter else _BASE


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Load the model and its adapters; returns what it is, and who answers."""
    import peft
    import torch
    import transformers
    from peft import PeftModel

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = transformers.AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=arguments["dtype"]).to(device)
    first, *others = arguments["adapters"]
    model = PeftModel.from_pretrained(base, first, adapter_name=_name(1), autocast_adapter_dtype=False)
    for number, folder in enumerate(others, 2):
        model.load_adapter(folder, adapter_name=_name(number), autocast_adapter_dtype=False)
    model.to(base.dtype).eval()  # the adapters were written in another precision
    facts = {"peft": peft.__version__, "transformers": transformers.__version__, "device": device}

    async def stop() -> None:
        """There is nothing beside this process."""

    return facts, Contender(model).run, stop


if __name__ == "__main__":
    asyncio.run(serve(prepare))
