"""What a training run leaves behind, and how it is found again.

.loraplex/runs/20261124T101500-support-1a2b3c4d/
    recipe.yaml        resolved, with every default
    environment.json   packages, Python, processor, GPUs
    origin.json        digests of the base and the rows, as they were when the run began
    metrics.jsonl      one line a step, and one a look at the held-out rows
    tensorboard/       the same for TensorBoard
    checkpoints/       the latest and the best
    train.log          what libraries printed
    lock               locked as long as a process trains the run
    adapter/           the PEFT folder with run.json: what `loraplex adapters publish` takes
"""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from engine.errors import InvalidRecipe, NoSpace, TrainingFailed
from engine.tuning.recipe import Recipe, parse_recipe

_PACKAGES = ("accelerate", "bitsandbytes", "loraplex", "peft", "safetensors", "tokenizers", "torch", "transformers")
_KEPT_CHECKPOINTS = 3  # two are kept, and a third is there while it is written


@dataclass(frozen=True)
class Spent:
    """What training took."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @classmethod
    def create(cls, runs: Path, recipe: Recipe, as_written: dict[str, Any]) -> RunFolder:
        """Make the folder of a new run, with its recipe in it: resolved, and as it was written."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        folder = cls(_fresh(runs, f"{stamp}-{recipe.name}-{recipe.digest}"))
        folder.recipe_file.write_text(yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False))
        (folder.path / "as-written.json").write_text(json.dumps(as_written, indent=2))
        (folder.path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run; raises InvalidRecipe when it is none."""
        folder = cls(path)
        if not folder.recipe_file.is_file():
            raise InvalidRecipe(
                "", f"{path} is no run folder: it has no recipe.yaml", fix="Name a folder under --runs."
            )
        return folder

    def check_origin(self, found: dict[str, str]) -> None:
        """Digests of what the run is made of, by what: kept when it begins, and the same ever after.

        Raises TrainingFailed when one has changed: the adapter would be said to be made of something that it is not.
        """
        file = self.path / "origin.json"
        if not file.exists():
            file.write_text(json.dumps(found, indent=2) + "\n")
        began = json.loads(file.read_text())
        if changed := [what for what, digest in found.items() if began.get(what) != digest]:
            problem = f"{' and '.join(changed)} changed since the run began"
            raise TrainingFailed(problem, fix="Start a new run, or put back what was there.")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the run; raises TrainingFailed when one trains it already."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                problem = "another process is training this run"
                raise TrainingFailed(problem, fix="Wait for it, or stop it, before you resume the run.") from error
            yield

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.path.resolve().name

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """What libraries printed."""
        return self.path / "train.log"

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return parse_recipe(yaml.safe_load(self.recipe_file.read_text()))

    def as_written(self) -> dict[str, Any]:
        """The recipe with its paths as its author wrote them."""
        content: dict[str, Any] = json.loads((self.path / "as-written.json").read_text())
        return content

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint: one that a kill cut short lacks its last file."""
        found = self.checkpoints.glob("checkpoint-*/trainer_state.json")
        whole = sorted((step_of(path.parent), path.parent) for path in found if _is_json(path))
        return whole[-1][1] if whole else None

    def note(self, event: dict[str, Any]) -> None:
        """Add a line to the metrics."""
        with self._metrics.open("a") as log:
            log.write(json.dumps(event) + "\n")

    def go_back_to(self, step: int) -> Spent:
        """Forget what the metrics say of later steps, which are done again; returns what those up to this one took."""
        if not self._metrics.exists():
            return Spent()
        lines = self._metrics.read_text().splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one
        kept = [event for event in events if event["step"] <= step]
        self._metrics.write_text("".join(json.dumps(event) + "\n" for event in kept))
        last: dict[str, Any] = next((event for event in reversed(kept) if event["event"] == "step"), {})
        return Spent(last.get("seconds", 0.0), last.get("tokens", 0))  # runs of earlier versions did not note it

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def check_space(self, checkpoint_bytes: int) -> None:
        """Raise NoSpace unless the run's checkpoints fit."""
        from_here = self.path if self.path.exists() else self.path.parent
        free = shutil.disk_usage(from_here).free
        needed = checkpoint_bytes * _KEPT_CHECKPOINTS
        if free < needed:
            raise NoSpace("checkpoints", f"{needed / 1e6:,.0f} MB", f"{free / 1e6:,.0f} MB")


def _fresh(runs: Path, name: str) -> Path:
    """A new folder of this name, or with a number after it."""
    for number in range(1, 1000):
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise InvalidRecipe("", f"{runs} has a thousand runs of this second", fix="Choose another folder with --runs.")


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def environment() -> dict[str, Any]:
    """What the run was made with."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
