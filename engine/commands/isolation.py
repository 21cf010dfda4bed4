"""`loraplex doctor --isolation`: the proof, on this machine, that requests get their own adapter and nothing else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.commands.checkup import Finding
from engine.config import Settings
from engine.errors import InvalidAdapter
from engine.registry.file_checks import CONFIG
from engine.registry.fingerprint import check_base
from engine.runtime.engine import LoadedAdapter
from engine.runtime.isolation import TOLERANCES, IsolationCheck
from engine.runtime.strong import write_mixed_adapters
from engine.server.app import make_engine

_ADAPTERS = 8  # made up when none are given
_SLOTS = 4  # fewer than adapters, so that they take turns
_FIX = "Do not serve with this build: answers mix tenants. Check --lora-kernels and vLLM's version, and report it."


async def check_isolation(
    settings: Settings, folders: Sequence[Path], mixes: int, on_mix: Callable[[], None]
) -> Finding:
    """Start an engine, run the mixes, and say what was compared. Raises what the engine raises."""
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    small = settings.model_copy(update={"dtype": dtype, "max_resident": _SLOTS - 1, "max_running": 16})
    with tempfile.TemporaryDirectory(prefix="loraplex-isolation-") as scratch:
        _, tensors = check_base(settings.model)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        made = [(folder.absolute(), _rank(folder)) for folder in folders] or write_mixed_adapters(
            Path(scratch), shapes, _ADAPTERS, settings.max_rank
        )
        adapters = [LoadedAdapter(n, f"{folder.name}#{n}", folder, rank) for n, (folder, rank) in enumerate(made, 1)]
        engine = make_engine(small)
        try:
            await engine.start()
            check = IsolationCheck(engine, adapters, engine.info.slots, TOLERANCES[dtype])
            report = await check.run(mixes, on_mix)
        finally:
            await engine.stop()
    found = f"{engine.info.description}, {dtype}: {report}"
    return Finding("isolation", "ok", found) if report.ok else Finding("isolation", "fail", found, _FIX)


def _rank(folder: Path) -> int:
    try:
        return int(json.loads((folder / CONFIG).read_bytes())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{folder} holds no readable {CONFIG}"
        raise InvalidAdapter("config", CONFIG, problem, fix="Give the folder that PEFT saved.") from error
