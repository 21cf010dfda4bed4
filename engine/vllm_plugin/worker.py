"""What our server asks of vLLM's workers beyond vLLM's own calls: to copy a prepared adapter into a slot, and no more.

vLLM's `add_lora` reads the files, converts them, clears the whole slot and copies layer by layer, while every running
request waits. Here all but the copy was done before (prepared.py), and a slot is cleared only where the adapter before it had
more ranks or layers. What was measured: docs/residency.md.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from engine.vllm_plugin import prepared


class LoraplexWorker:
    """Mixed into vLLM's worker class by `worker_extension_cls`; the server calls it through `collective_rpc`."""

    model_runner: Any

    def loraplex_freeze(self) -> None:
        """Let Python's garbage collector pass over all that the start has made.

        A full collection looks at every object there is, 0.6 s in which nobody gets a token, and loading adapters brings it
        about again and again. vLLM does the same in its engine's process and its GPU workers, not in its CPU worker.
        """
        gc.collect()
        gc.freeze()

    def loraplex_can_copy(self) -> bool:
        """Whether every layer with slots is of the plain kind: whole on this device, one slot tensor for each part."""
        return _writer(self).plain

    def loraplex_copy(self, adapter_id: int, path: str, replaced: Sequence[int]) -> None:
        """Take the `replaced` adapters out, and copy a prepared one into a slot. Raises when it does not fit."""
        writer = _writer(self)
        for other in replaced:
            writer.manager.remove_adapter(other)
        writer.copy(adapter_id, path)


def _writer(worker: LoraplexWorker) -> SlotWriter:
    known: SlotWriter | None = vars(worker).get("_loraplex_writer")
    if known is None:
        known = vars(worker)["_loraplex_writer"] = SlotWriter(worker.model_runner.lora_manager._adapter_manager)
    return known


class SlotWriter:
    """Writes adapters into the slots of vLLM's LoRA manager, in place of its `activate_adapter`."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self._parts: dict[str, tuple[Any, Any]] = {}  # module: its A [slots, 1, rank, in] and B [slots, 1, out, rank]
        self._firsts: list[Any] = []
        self.plain = True
        for name, layer in manager.modules.items():
            self._add(layer, manager.packed_modules.get(name, [name]))
        self._names: dict[str, str] = {}
        self._held: list[dict[str, int]] = [{} for _ in range(manager.lora_slots)]  # ranks in use, by slot and module

    def _add(self, layer: Any, parts: Sequence[str]) -> None:
        a: Any = getattr(layer, "lora_a_stacked", None)
        b: Any = getattr(layer, "lora_b_stacked", None)
        whole = isinstance(a, tuple) and isinstance(b, tuple) and getattr(layer, "tp_size", 1) == 1
        if not (whole and len(a) == len(b) == len(parts)):
            self.plain = False
        else:
            self._parts.update(zip(parts, zip(a, b, strict=True), strict=True))
            self._firsts.append(a[0])

    def copy(self, adapter_id: int, path: str) -> None:
        """Fill a free slot and tell vLLM's manager that the adapter is in it."""
        from vllm.lora.lora_model import LoRAModel

        manager = self.manager
        if adapter_id in manager.list_adapters():
            raise ValueError(f"adapter {adapter_id} is loaded already")
        slot = manager.lora_index_to_id.index(None)  # ValueError: no slot is free
        data, places = prepared.read(path)
        self._fill(slot, data, {self._name(module): place for module, place in places.items()})
        rank = max(place[0] for place in places.values())
        manager._registered_adapters[adapter_id] = LoRAModel(adapter_id, rank, {})  # its weights are in the slot only
        manager._active_adapters[adapter_id] = None
        manager.lora_index_to_id[slot] = adapter_id

    def _fill(self, slot: int, data: Any, places: dict[str, prepared.Place]) -> None:
        held = self._held[slot]
        for module, (rank, columns, rows, begin) in places.items():
            a, b = (part[slot, 0] for part in self._parts[module])
            if rank > a.shape[0] or columns != a.shape[1] or rows != b.shape[0]:
                raise ValueError(f"{module} is {rows} x {columns} of rank {rank}: the slot has no room for that")
            before, held[module] = held.get(module, 0), a.shape[0]
            middle = begin + rank * columns
            a[:rank].copy_(data[begin:middle].view(rank, columns))
            b[:, :rank].copy_(data[middle : middle + rows * rank].view(rows, rank))
            self._clear(a, b, rank, before)
            held[module] = rank
        for module in held.keys() - places.keys():
            a, b = (part[slot, 0] for part in self._parts[module])
            self._clear(a, b, 0, held.pop(module))
        for first in self._firsts:
            # Writes nothing, but is seen as a write: our kernels look at a layer's first A only.
            first[slot, 0, :0].zero_()

    @staticmethod
    def _clear(a: Any, b: Any, rank: int, before: int) -> None:
        """Take away the ranks that the adapter before had more. B too: nothing times NaN is NaN."""
        if before > rank:
            a[rank:before].zero_()
            b[:, rank:before].zero_()

    def _name(self, module: str) -> str:
        """PEFT's name of a module as vLLM spells it for this model."""
        known = self._names.get(module)
        if known is None:
            from vllm.lora.utils import parse_fine_tuned_lora_name

            mapper = getattr(self.manager.model, "hf_to_vllm_mapper", None)
            name = f"base_model.model.{module}.lora_A.weight"
            known, _ = parse_fine_tuned_lora_name(name, mapper.get_rename_mapper() if mapper else None)
            self._names[module] = known
        return known
