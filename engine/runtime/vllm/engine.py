"""The real engine: vLLM's AsyncLLM behind our Engine interface.

What this file promises beyond vLLM: an adapter is only ever named by an id that `add_lora` has confirmed; vLLM's own eviction
and slot reuse never happen (it is given one slot more than residency ever fills); every error is one of ours.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from engine.config import Settings
from engine.errors import EngineDied, InvalidAdapter, InvalidRequest, LoraplexError, NotFinite
from engine.registry.file_checks import CONFIG, WEIGHTS
from engine.runtime.engine import (
    ChatTurn,
    Delta,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    LoadedAdapter,
    Sampling,
)
from engine.runtime.structured import to_grammar
from engine.runtime.tokens import check_token_ids
from engine.runtime.vllm.messages import deltas, lora_request, sampling_params
from engine.runtime.vllm.resume import asked, tell
from engine.runtime.vllm.start import engine_args, own_metrics, prepare_environment

T = TypeVar("T")

_LOOK_S = 0.2  # between looks at whether vLLM is alive while it is asked something
_STOP_S = 5.0  # how long vLLM's processes may take to end by themselves
_LONG_TEXT = 20_000  # characters; longer texts are tokenised in a thread, so that streams do not stutter


class VllmEngine:
    """One vLLM engine for one base model."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._llm: Any = None
        self._load = EngineLoad(running=0, kv_cache_usage=0.0)
        self._info = EngineInfo("vllm", 0, 0, 0, "")
        self._tokenizer: Any = None
        self._not_finite: set[str] = set()  # running requests
        self.steps = 0
        self._copies = False  # whether adapters are copied into slots from prepared files, not read by vLLM
        self._dtype: Any = None  # of the slots, the same in every life: adapters are prepared between two of them too
        # One more for the adapter that is loaded ahead. And one that stays empty: a full cache would make vLLM evict (and later
        # reload from disk, inside its step) on its own, and its own CPU kernels read the last slot for rows without an adapter.
        self._slots = settings.max_resident + 2

    @property
    def info(self) -> EngineInfo:
        """Version, platform and sizes; valid after `start`."""
        return self._info

    @property
    def llm(self) -> Any:
        """The AsyncLLM underneath, for whoever measures what we add to it; None before `start`."""
        return self._llm

    @property
    def alive(self) -> bool:
        """False once vLLM's engine process is gone."""
        return self._llm is not None and not self._llm.errored

    async def start(self) -> None:
        """Start vLLM; about half a minute, nearly all of it vLLM's own imports and profiling."""
        await asyncio.to_thread(self._build)
        import vllm

        self._copies = all(await self._llm.collective_rpc("loraplex_can_copy"))
        await self._llm.collective_rpc("loraplex_freeze")
        self._dtype = self._llm.vllm_config.lora_config.lora_dtype
        config = self._llm.model_config
        self._tokenizer = self._llm.get_tokenizer()
        self._info = EngineInfo(
            description=f"vllm {vllm.__version__} ({self._llm.vllm_config.device_config.device_type})",
            context_length=config.max_model_len,
            vocabulary_size=config.get_vocab_size(),
            slots=self._slots,
            dtype=str(config.dtype).removeprefix("torch."),
        )

    def _build(self) -> None:
        prepare_environment(self._settings)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.metrics.loggers import StatLoggerBase

        engine = self

        class LoadRecorder(StatLoggerBase):  # type: ignore[misc]
            """Keeps the scheduler's latest figures for `load_now`; vLLM sends them after each step."""

            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                del vllm_config, engine_index

            def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
                if scheduler_stats is not None:
                    engine.steps += 1
                    engine._load = EngineLoad(scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage)

            def log_engine_initialized(self) -> None:
                """Nothing to announce: the server does."""

        loggers: list[Any] = [LoadRecorder, own_metrics()] if self._settings.engine_metrics else [LoadRecorder]
        arguments = engine_args(self._settings, self._folder, self._slots)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=loggers)
        self._watch_numbers(self._llm.output_processor)
        self._tell_resumed(self._llm.output_processor)

    def _tell_resumed(self, processor: Any) -> None:
        """Have every request that goes on with an answer told what it has said (see resume.py)."""
        add = processor.add_request

        def told(request: Any, *rest: Any, **more: Any) -> None:
            add(request, *rest, **more)
            tell(processor, request)

        processor.add_request = told

    def _watch_numbers(self, processor: Any) -> None:
        """Note requests whose logits hold NaN: vLLM counts them (VLLM_COMPUTE_NANS_IN_LOGITS) and tells nobody whose."""
        process = processor.process_outputs

        def watched(outputs: Sequence[Any], *rest: Any, **more: Any) -> Any:
            for output in outputs:
                state = processor.request_states.get(output.request_id) if output.num_nans_in_logits else None
                if state is not None:
                    self._not_finite.add((state.parent_req or state).external_req_id)
            return process(outputs, *rest, **more)

        processor.process_outputs = watched

    async def stop(self) -> None:
        """Stop vLLM's processes and wait for them."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        from vllm.v1.engine.exceptions import EngineDeadError

        if llm.output_handler is not None:
            llm.output_handler.cancel()  # it would log the end of the engine as an error
        llm.output_processor.propagate_error(EngineDeadError())  # nobody else tells the requests that still wait
        self._load = EngineLoad(running=0, kv_cache_usage=0.0)
        await asyncio.to_thread(llm.shutdown, _STOP_S)
        del llm
        gc.collect()  # AsyncLLM's finaliser fails if it runs as late as the interpreter's exit

    def load_now(self) -> EngineLoad:
        """What vLLM's scheduler last reported."""
        return self._load

    async def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with the special tokens that the base's tokenizer adds."""
        if len(text) > _LONG_TEXT:
            return await asyncio.to_thread(self._encode, text)
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text))
        except UnicodeEncodeError as error:
            raise InvalidRequest("text", "is not valid Unicode") from error

    async def encode_chat(self, turns: Sequence[ChatTurn]) -> list[int]:
        """Render the conversation by the base's own chat template and tokenise it."""
        messages = [{"role": role, "content": content} for role, content in turns]
        return await asyncio.to_thread(self._encode_chat, messages)

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        import jinja2

        try:
            ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            problem = str(error).splitlines()[0][:200] if str(error) else "unknown"
            raise InvalidRequest("chat", f"the base's chat template refuses it: {problem}") from error
        return list(ids)

    def check(self, sampling: Sampling) -> None:
        """Refuse what vLLM would refuse, or worse, accept."""
        check_token_ids(sampling, self._info.vocabulary_size)
        if sampling.structured:
            to_grammar(sampling.structured)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Pass the request to vLLM and its outputs back, delta by delta."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self.alive:
            raise EngineDied
        ids, params, rest = asked(request, sampling_params(request.sampling))
        outputs = self._llm.generate(
            tokens_input(ids, cache_salt=request.cache_salt or None),
            params,
            request.id,
            lora_request=lora_request(request.adapter) if request.adapter else None,
            trace_headers={"traceparent": request.trace} if request.trace else None,
        )
        first = True
        try:
            async for output in outputs:
                if request.id in self._not_finite:
                    raise NotFinite(request.adapter.ref if request.adapter else "the base model")
                for delta in rest.of(deltas(output, first)):
                    first = False
                    yield delta
        except EngineDeadError as error:
            raise EngineDied from error
        except VLLMClientError as error:
            raise InvalidRequest("sampling", str(error).splitlines()[0][:200]) from error
        except LoraplexError:
            raise
        except Exception as error:
            if self.alive:
                raise
            raise EngineDied from error  # whatever its broken connections look like
        finally:
            self._not_finite.discard(request.id)
            await outputs.aclose()  # aborts the request if it has not finished, which frees its keys and values

    def prepare(self, files: Mapping[str, bytes], target: Path) -> None:
        """Convert the weights to the slots' precision; where vLLM reads adapters itself, there is nothing to prepare."""
        if not self._copies:
            target.touch()
            return
        from vllm.lora.peft_helper import PEFTHelper

        from engine.vllm_plugin import prepared

        try:
            helper = PEFTHelper.from_dict(json.loads(files[CONFIG]))
            prepared.write(files[WEIGHTS], lambda module: helper.get_rank_and_scaling(module)[1], self._dtype, target)
        except OSError:
            raise  # of the disk, not of the adapter
        except Exception as error:  # whatever vLLM, torch and safetensors raise
            problem = "cannot be converted to the engine's precision"
            raise InvalidAdapter("load", WEIGHTS, problem, fix="Publish the adapter as PEFT saves it.") from error

    async def load_adapter(self, adapter: LoadedAdapter, replaced: LoadedAdapter | None = None) -> None:
        """Copy the adapter into a slot, within one pause of the engine; where that is not possible, have vLLM read it."""
        try:
            if self._copies:
                await self._copy(adapter, [replaced.id] if replaced else [])
                return
            if replaced:
                await self.unload_adapter(replaced)
            loaded = await self._unless_dead(lambda: self._llm.add_lora(lora_request(adapter)))
        except EngineDied:
            raise
        except Exception as error:  # vLLM raises bare Exception with text for whatever it does not like
            raise _refused(adapter) from error
        if not loaded:
            raise _refused(adapter)

    async def _copy(self, adapter: LoadedAdapter, replaced: list[int]) -> None:
        if adapter.prepared is not None and adapter.prepared.exists():
            await self._copy_from(adapter.prepared, adapter.id, replaced)
            return
        with tempfile.TemporaryDirectory(prefix="loraplex-") as scratch:  # memory has had to make room for others
            target = Path(scratch) / "prepared"
            await asyncio.to_thread(self._prepare_again, adapter, target)
            await self._copy_from(target, adapter.id, replaced)

    def _prepare_again(self, adapter: LoadedAdapter, target: Path) -> None:
        self.prepare({name: (adapter.folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}, target)

    async def _copy_from(self, prepared: Path, adapter_id: int, replaced: list[int]) -> None:
        arguments = (adapter_id, str(prepared), replaced)
        await self._unless_dead(lambda: self._llm.collective_rpc("loraplex_copy", args=arguments))

    async def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Remove the adapter from vLLM."""
        with suppress(EngineDied):  # it is gone, and the adapter with it
            await self._unless_dead(lambda: self._llm.remove_lora(adapter.id))

    async def _unless_dead(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call vLLM and wait for its reply, or raise EngineDied: a dead engine's reply never comes, and vLLM would wait."""
        if not self.alive:
            raise EngineDied
        llm, task = self._llm, asyncio.ensure_future(call())
        try:
            while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
                if llm.errored:
                    raise EngineDied
            return await task
        except Exception as error:
            if llm.errored:
                raise EngineDied from error
            raise
        finally:
            task.cancel()


def _refused(adapter: LoadedAdapter) -> InvalidAdapter:
    return InvalidAdapter("load", adapter.ref, "vLLM refuses to load it", fix="See the server's log.")
