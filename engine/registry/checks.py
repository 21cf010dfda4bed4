"""Whether an adapter folder may be published: what vLLM would load wrongly is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

from engine.errors import InvalidAdapter, WrongBase
from engine.registry.config_checks import LoraConfig, read_config
from engine.registry.file_checks import RUN, check_files, read_json
from engine.registry.fingerprint import Base
from engine.registry.manifest import BaseRef, FileEntry, evaluation_text
from engine.registry.signatures import verify
from engine.registry.tensor_checks import check_tensors

_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
_MOST_RUN_ID = 256  # characters: what run.json says is told to everybody, and is held to the bounds of PublishHeader
_MOST_EVALUATION = 65536  # bytes
_USUAL_SCALES = (0.5, 4.0)
_SECTIONS = frozenset({"base", "recipe", "data", "evaluation"})
FULL = "full"  # how a training that does not quantise says it held the base


@dataclass(frozen=True)
class Limits:
    """What the server has room for, and whose signature it wants."""

    max_rank: int
    max_bytes: int
    signed_by: Path | None = None  # a public key


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter folder that passed every check; `rank` is the largest one if ranks differ by layer."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    warnings: tuple[str, ...]
    files: tuple[FileEntry, ...]
    base: BaseRef
    run: dict[str, Any] = field(default_factory=dict)


def check_adapter(folder: Path, base: Base, limits: Limits, declared_fingerprint: str | None = None) -> CheckedAdapter:
    """Check an adapter folder against the base that would serve it. Reads every byte: call it in a thread.

    The base that it was trained on is `declared_fingerprint`, or else what run.json says, or else assumed to be `base`.
    Raises InvalidAdapter naming check and place, WrongBase, or Unsigned.
    """
    files = check_files(folder, limits.max_bytes)
    if limits.signed_by:
        verify(folder, limits.signed_by, "the adapter")
    config = read_config(folder, limits.max_rank)
    run = _run_record(folder, {file.path for file in files})
    trained_on = _check_base(base, declared_fingerprint, run)
    modules = check_tensors(folder, config, base)
    return CheckedAdapter(
        rank=max(config.rank_of(module) for module in modules),
        alpha=config.alpha,
        targets=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        warnings=tuple(_warnings(config, modules, base, trained_on, run)),
        files=files,
        base=trained_on,
        run=run,
    )


def _run_record(folder: Path, names: set[str]) -> dict[str, Any]:
    if RUN not in names:
        return {}
    run = read_json(folder, RUN)
    for key, kind in (("run_id", str), ("base", dict), ("evaluation", dict)):
        if not isinstance(run.get(key), kind | None):
            _refuse_run(key, f"it is no {'text' if kind is str else 'JSON object'}")
    if len(run.get("run_id") or "") > _MOST_RUN_ID:
        _refuse_run("run_id", f"it is longer than {_MOST_RUN_ID} characters")
    if len(evaluation_text(run.get("evaluation") or {}).encode()) > _MOST_EVALUATION:
        _refuse_run("evaluation", f"it is longer than {_MOST_EVALUATION} bytes as JSON")
    fingerprint = (run.get("base") or {}).get("fingerprint")
    if fingerprint is not None and not (isinstance(fingerprint, str) and _FINGERPRINT.fullmatch(fingerprint)):
        _refuse_run("base.fingerprint", "it is no fingerprint: 'sha256:' and 64 hexadecimal digits")
    return run


def _refuse_run(field: str, problem: str) -> Never:
    raise InvalidAdapter("run record", f"{RUN}: {field}", problem, fix=f"Correct {RUN}, or leave it out.")


def _check_base(base: Base, declared: str | None, run: dict[str, Any]) -> BaseRef:
    recorded = (run.get("base") or {}).get("fingerprint")
    trained_on = declared or recorded
    if trained_on and trained_on != base.fingerprint:
        raise WrongBase("the adapter", str(trained_on)[:80], base.fingerprint)
    return BaseRef(name=base.name, fingerprint=base.fingerprint, assumed=not trained_on)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json records of a training, as far as it has the shape that training gives it.

    Other tools write a file of this name, too: what of it has another shape says nothing here, nor does a file that is damaged.
    """
    try:
        run = read_json(folder, RUN)
    except (OSError, InvalidAdapter):
        return {}
    run = {key: value for key, value in run.items() if key not in _SECTIONS or isinstance(value, dict)}
    if not _FINGERPRINT.fullmatch(str(run.get("base", {}).get("fingerprint"))):
        run.get("base", {}).pop("fingerprint", None)
    return run


def precision_of(run: dict[str, Any]) -> str:
    """How the base was held while an adapter was trained, by its run.json: FULL unless it says otherwise."""
    return str((run.get("base") or {}).get("precision") or FULL)


def _warnings(
    config: LoraConfig, modules: tuple[str, ...], base: Base, trained_on: BaseRef, run: dict[str, Any]
) -> list[str]:
    found = []
    if unusual := next((module for module in modules if not _scale_is_usual(config, module)), None):
        usual = (
            "between the square root of the rank and twice the rank"
            if config.rank_stabilized
            else "the rank or twice the rank"
        )
        found.append(f"{unusual} is scaled by {config.scale_of(unusual):.3g}: lora_alpha is usually {usual}")
    named = config.base_name.rstrip("/").rpartition("/")[2]
    if named.casefold() not in ("", base.name.casefold()):
        found.append(f"adapter_config.json names the base {named[:100]!r}, this server's is {base.name!r}")
    if (precision := precision_of(run)) != FULL:
        found.append(
            f"it was trained on the base in {precision[:20]}, which is another model than this server's: evaluate it here first"
        )
    if trained_on.assumed:
        found.append("nothing records which base it was trained on: this server's base was assumed")
    return found


def _scale_is_usual(config: LoraConfig, module: str) -> bool:
    """With rank stabilisation some keep to alpha / root of the rank, and some leave alpha what it was without."""
    low, high = _USUAL_SCALES
    return low <= config.scale_of(module) <= high * (math.sqrt(config.rank_of(module)) if config.rank_stabilized else 1)


__all__ = ["CheckedAdapter", "Limits", "check_adapter"]
