"""Running a training from the outside: check all that can be checked, start the process, follow its events."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import TrainingFailed
from engine.registry.fingerprint import Base, check_base, read_base
from engine.tuning.data import Split, duplicates, split_rows
from engine.tuning.encoding import Example, encode_rows, scored_together
from engine.tuning.estimate import (
    Estimate,
    Largest,
    estimate,
    has_gpu,
    memory_available,
    read_shape,
    target_names,
    weight_width,
)
from engine.tuning.recipe import Recipe
from engine.tuning.run_folder import RunFolder

OnEvent = Callable[[dict[str, Any]], None]
_STOP_S = 10.0


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, before anything is loaded."""

    recipe: Recipe
    split: Split
    examples: list[Example]
    held_out: list[Example]
    targets: list[str]
    estimate: Estimate
    steps: int
    warnings: list[str]

    @cached_property
    def base(self) -> Base:
        """The base by its contents; reads every weight, about a second per 300 MB and core."""
        return read_base(Path(self.recipe.base))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each training row, shortest first."""
        return sorted(len(example.ids) for example in self.examples)


def plan(recipe: Recipe, tokenizer: Any = None) -> Plan:
    """Check recipe, base, targets and every row. Raises the error of whatever is wrong first; loads the tokenizer only."""
    shape = read_shape(Path(recipe.base))
    targets = target_names(recipe, shape)
    split = split_rows(recipe.data.train, recipe.data.held_out, recipe.train.seed)
    tokenizer = tokenizer or tokenizer_of(recipe)
    examples = encode_rows(split.train, tokenizer, recipe.data.max_length, recipe.data.train.rpartition("/")[2])
    held_out = encode_rows(split.held_out, tokenizer, recipe.data.max_length, "held-out data")
    longest = sorted(examples, key=lambda example: len(example.ids))[-recipe.train.batch_size :]
    trained = Largest(sum(len(example.ids) for example in longest), sum(example.learnt for example in longest))
    scored = max(map(_padded, scored_together(held_out)), key=lambda one: (one.learnt, one.tokens))
    needs = estimate(recipe, shape, weight_width(recipe, gpu=has_gpu()), trained, scored)
    return Plan(recipe, split, examples, held_out, targets, needs, recipe.train.total_steps(len(examples)),
                list(_warnings(recipe, split, examples, needs, shape.context)))  # fmt: skip


def _padded(examples: list[Example]) -> Largest:
    """A batch whose rows are all as long as the longest."""
    tokens, learnt = max(len(example.ids) for example in examples), max(example.learnt for example in examples)
    return Largest(len(examples) * tokens, len(examples) * learnt)


def tokenizer_of(recipe: Recipe) -> Any:
    """The base's tokenizer; needs no torch."""
    from transformers import AutoTokenizer

    check_base(Path(recipe.base))
    return AutoTokenizer.from_pretrained(recipe.base)


def _warnings(recipe: Recipe, split: Split, examples: list[Example], needs: Estimate, context: int) -> list[str]:
    found = []
    if cut := sum(example.cut for example in examples):
        found.append(
            f"{cut} rows are longer than data.max_length {recipe.data.max_length} and lose the end of their answer"
        )
    if repeated := duplicates(split.train):
        found.append(f"{repeated} rows repeat another one")
    if context and recipe.data.max_length > context and max(len(example.ids) for example in examples) > context:
        found.append(f"rows are longer than the base's context of {context} tokens")
    available = memory_available()
    if not has_gpu() and available and needs.total > available:
        found.append(
            f"it may need {needs.total / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free: use a smaller batch_size"
        )
    return found


def run(folder: RunFolder, on_event: OnEvent) -> dict[str, Any]:
    """Train in a process of its own and return what it made; Ctrl-C stops it, and it can be resumed.

    Raises TrainingFailed with the process's own reason, or with what is known when it was killed.
    """
    # -P: files of the user's working folder, such as a queue.py, are not taken for Python's modules and the libraries'.
    command = [sys.executable, "-P", "-m", "engine.tuning.worker", str(folder.path)]
    with folder.log.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)  # noqa: S603
        try:
            return _follow(process, folder, on_event)
        finally:
            _stop(process)


def _follow(process: subprocess.Popen[str], folder: RunFolder, on_event: OnEvent) -> dict[str, Any]:
    for line in process.stdout or ():
        event = json.loads(line)
        if event["event"] == "error":
            raise TrainingFailed(event["message"], fix=event["fix"])
        if event["event"] == "done":
            return dict(event)
        on_event(event)
    code = process.wait()
    go_on = f"Then go on from the last checkpoint: loraplex train --resume {folder.path}"
    if code == -signal.SIGKILL:
        problem = "the training process was killed, most likely by the system for lack of memory"
        raise TrainingFailed(problem, fix=f"Use a smaller train.batch_size, or free memory. {go_on}")
    raise TrainingFailed(f"the training process ended with code {code}", fix=f"See {folder.log}. {go_on}")


def _stop(process: subprocess.Popen[str]) -> None:
    """The end of its stdin is what the process takes as a request to end."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
