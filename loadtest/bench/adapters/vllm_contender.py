"""One vLLM engine as a process: reads a workload per line, runs it on AsyncLLM, and writes what was measured.

    python -m loadtest.bench.adapters.vllm_contender '{"engine": {...}, "adapters": ["FOLDER", ...]}'

While a workload runs, exactly the adapters that it names are loaded, and each has answered once before the clock starts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import uvloop

from loadtest.bench.adapters.workloads import Ask, measure
from loadtest.bench.child import Handler, Stop, serve
from loadtest.bench.engines import EngineSpec, build, facts, stopping
from loadtest.bench.samples import Sample


class Progress:
    """How many tokens a workload's first request has; later requests arrive by it, so that speed does not change the mix."""

    def __init__(self) -> None:
        self._tokens: float = 0
        self._changed = asyncio.Event()

    def advance(self, tokens: float) -> None:
        """Note that more tokens have come."""
        self._tokens += tokens
        self._changed.set()
        self._changed = asyncio.Event()

    async def reach(self, tokens: int) -> None:
        """Wait until there are so many."""
        while self._tokens < tokens:
            await self._changed.wait()


class Contender:
    """An AsyncLLM, and the folders of the adapters that it may be asked for."""

    def __init__(self, llm: Any, folders: Sequence[str]) -> None:
        self._llm = llm
        self._folders = folders
        self._loaded: set[int] = set()
        self._sent = 0

    async def run(self, work: dict[str, Any]) -> dict[str, Any]:
        """Run one workload, `{"kind": ..., "asks": [...]}`; returns its measures.

        With `"profile": [after, steps]` torch.profiler watches so many engine steps after so many others.
        """
        asks = [Ask(**ask) for ask in work["asks"]]
        await self._load({ask.adapter for ask in asks if ask.adapter})
        progress = Progress()
        if watch := work.get("profile"):
            await self._llm.start_profile(delay_iterations=watch[0], max_iterations=watch[1])
        samples = await asyncio.gather(*(self._one(ask, progress, number == 0) for number, ask in enumerate(asks)))
        if watch:
            await self._llm.stop_profile()
        return measure(work["kind"], asks, samples)

    async def _load(self, wanted: set[int]) -> None:
        if wanted == self._loaded:
            return
        for number in self._loaded - wanted:
            await self._llm.remove_lora(number)
        for number in wanted - self._loaded:
            if not await self._llm.add_lora(self._lora(number)):
                raise RuntimeError(f"vLLM refuses to load {self._folders[number - 1]}")
        self._loaded = wanted
        await asyncio.gather(*(self._one(Ask([1], 1, number), Progress(), leads=True) for number in sorted(wanted)))

    def _lora(self, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{number}", number, self._folders[number - 1]) if number else None

    async def _one(self, ask: Ask, progress: Progress, leads: bool) -> Sample:
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = SamplingParams(
            max_tokens=ask.max_tokens, temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        await progress.reach(ask.after)
        self._sent += 1
        outputs = self._llm.generate(
            tokens_input(ask.prompt), sampling, str(self._sent), lora_request=self._lora(ask.adapter)
        )
        sample = Sample()
        try:
            async for output in outputs:
                count = len(output.outputs[0].token_ids)
                sample.tokens(count)
                if leads:
                    progress.advance(count)
        except Exception as error:  # noqa: BLE001 - whatever went wrong is this request's outcome
            sample.error = f"{type(error).__name__}: {error}"
        if leads:
            progress.advance(math.inf)  # nobody waits for a request that has failed
        return sample


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Start the engine; returns what it is, who answers, and how it stops."""
    llm = build(EngineSpec.from_json(arguments["engine"]))
    return facts(llm), Contender(llm, arguments["adapters"]).run, stopping(llm)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(prepare))
