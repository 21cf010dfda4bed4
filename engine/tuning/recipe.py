"""A training recipe: one YAML file, every key checked before anything is loaded.

Defaults follow "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025): adapters on all linear layers, small
batches, and a learning rate about ten times that of full fine-tuning.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from rapidfuzz import process

from engine.config import load_settings, max_rank_for, read_yaml, without_nul
from engine.errors import BadConfiguration, InvalidRecipe
from engine.registry.checks import FULL

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        return without_nul(value)


class Data(_Section):
    """Which rows are trained on, and which are held out to score the adapter."""

    train: str
    held_out: str | float = 0.1
    max_length: int = Field(1024, ge=8, le=1_000_000)
    packing: bool = True

    @field_validator("held_out")
    @classmethod
    def _share(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and not 0 < value < 1:
            raise ValueError("as a number it is a share of the rows, between 0 and 1")
        return value


class Lora(_Section):
    """The adapter's shape; `alpha` is twice the rank unless said otherwise."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] | tuple[str, ...] = "all-linear"
    rslora: bool = False

    @property
    def scaled_by(self) -> float:
        """The alpha that holds."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank


class Quantization(_Section):
    """How `method: qlora` stores the frozen base (Dettmers et al., 2023)."""

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True


_FOUR_BITS = get_args(Quantization.model_fields["type"].annotation)
PRECISIONS = (FULL, *(f"{kind}{double}" for kind in _FOUR_BITS for double in ("", "-double")))
"""How training can hold a base's weights: what `Recipe.precision_name` may be."""


class Training(_Section):
    """Steps, batches, optimiser. A step learns from `batch_size` times `accumulation` rows."""

    steps: Positive | None = None
    epochs: float | None = Field(None, gt=0, le=1_000_000)
    batch_size: Positive = 8
    accumulation: Positive = 1
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    optimizer: Literal["auto", "adamw", "paged_adamw_8bit"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    evaluate_every: Positive | None = None
    patience: Positive = 3
    seed: int = Field(1, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps and self.epochs:
            raise ValueError("give steps or epochs, not both")
        return self

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the whole run over so many training rows; three epochs unless the recipe says otherwise."""
        if self.steps:
            return self.steps
        whole = round((self.epochs or 3.0) * self.steps_per_epoch(rows), 6)  # 0.7 times 10 is a little more than 7
        return math.ceil(whole) or 1

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps to go through so many rows once: as the Trainer does it, an epoch's last batch and step are short."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)


class Recipe(_Section):
    """Everything that makes an adapter. Paths are relative to the recipe's own folder."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    base: str
    method: Literal["lora", "qlora"] = "lora"
    data: Data
    lora: Lora = Lora()
    quantization: Quantization = Quantization()
    train: Training = Training()

    @property
    def digest(self) -> str:
        """Eight hex digits that change with any key."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:8]

    @property
    def precision_name(self) -> str:
        """How the base's weights are held while training: "full", or "nf4-double"; part of what the adapter was trained on."""
        if self.method == "lora":
            return FULL
        return self.quantization.type + ("-double" if self.quantization.double else "")


def load_recipe(file: Path, changes: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe, with `changes` by dotted key, such as {"lora.rank": 8}; raises InvalidRecipe naming the key."""
    recipe = parse_recipe(written_recipe(file, changes))
    places = {"base": anchored(recipe.base, file.parent), "data": _anchor(recipe.data, file.parent)}
    return recipe.model_copy(update=places)


def written_recipe(file: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe as it was written, with `changes`: paths still relative, defaults left out, values not yet checked."""
    try:
        content = read_yaml(file)
    except BadConfiguration as error:
        raise InvalidRecipe("", error.message) from error
    for key, value in (changes or {}).items():
        _set(content, key, value)
    return content


def parse_recipe(content: dict[str, Any]) -> Recipe:
    """Check a recipe's keys and values; raises InvalidRecipe for the first that is wrong, unknown keys before wrong values."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explained(error) from error
    limit = load_settings().max_rank
    if recipe.lora.rank > limit:
        enough = max_rank_for(recipe.lora.rank)
        fix = f"Use {limit} or less, or set LORAPLEX_MAX_RANK={enough} here and where the adapter is served."
        raise InvalidRecipe("lora.rank", f"{recipe.lora.rank} is above the engine's limit of {limit}", fix=fix)
    return recipe


def _explained(error: ValidationError) -> InvalidRecipe:
    first, *_ = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        near = process.extractOne(where[-1], _keys_of(where[:-1]), score_cutoff=50)
        known = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(_keys_of(where[:-1]))}"
        return InvalidRecipe(".".join(where), f"unknown key; {known}")
    of_unions = ("literal[", "tuple[", "str", "float", "bool")  # how pydantic names the one that it tried
    return InvalidRecipe(
        ".".join(part for part in where if not part.startswith(of_unions)), first["msg"].removeprefix("Value error, ")
    )


def _keys_of(path: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        inner = section.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        section = inner
    return list(section.model_fields)


# What people write in --set and --sweep without its section.
_SHORT = {
    **{key: f"lora.{key}" for key in Lora.model_fields},
    **{key: f"train.{key}" for key in Training.model_fields},
    "max_length": "data.max_length",
    "packing": "data.packing",
}


def full_key(key: str) -> str:
    """The dotted path of a key that may be written short: "rank" is "lora.rank"."""
    return _SHORT.get(key, key)


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = full_key(key).split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InvalidRecipe(key, f"{section} is no section")
    content[last] = value


def anchored(path: str, folder: Path) -> str:
    """A recipe's path, seen from the folder that the recipe is in; URLs and data sets stay as they are."""
    if "://" in path or path.startswith("datasets:"):
        return path
    return str((folder / path).resolve())


def _anchor(data: Data, folder: Path) -> Data:
    held_out = anchored(data.held_out, folder) if isinstance(data.held_out, str) else data.held_out
    return data.model_copy(update={"train": anchored(data.train, folder), "held_out": held_out})


TEMPLATE = """\
# A training recipe. Paths are relative to this file. Check it all with: loraplex train THIS_FILE --dry-run
name: support                 # what the adapter is for; the run folder and --publish use it
base: .models/smollm2-135m-instruct   # a folder with config.json, tokenizer and .safetensors
method: lora                  # qlora: the same, with the base in 4 bits (a third of the memory)

data:
  train: train.jsonl          # one row a line: {"messages": [...]} or {"prompt": ..., "completion": ...}
                              # a file, an fsspec URL (s3://, https://, ...), datasets:NAME[:SPLIT],
                              # or datasets:OWNER/NAME/CONFIG[:SPLIT]
  held_out: 0.1               # a share of the rows, never trained on; better: a file of its own
  max_length: 1024            # tokens of a row; what is longer loses its end
  packing: true               # a batch's rows end to end without padding; no row sees another

lora:
  rank: 16                    # more can learn more, and costs memory in every server
  # alpha: 32                 # default: twice the rank. What counts is alpha / rank
  dropout: 0.0
  targets: all-linear         # attention, or names of layers: [q_proj, v_proj]
  rslora: false               # scale by alpha / sqrt(rank) instead, for high ranks

# quantization: {type: nf4, double: true}   # for method: qlora

train:
  steps: 200                  # or epochs: 3
  batch_size: 8               # rows at once
  accumulation: 1             # batches before a step: memory of one, gradient of all
  learning_rate: 2.0e-4       # short runs on small models bear up to 1e-3
  schedule: linear            # cosine, constant
  warmup_steps: 5
  optimizer: auto             # adamw; with qlora on a GPU paged_adamw_8bit
  precision: auto             # bf16 or fp16 on a GPU, fp32 on a CPU
  gradient_checkpointing: auto   # on for qlora on a GPU: less memory, a third more time
  # evaluate_every: 50        # steps between looks at the held-out rows; default: four looks
  patience: 3                 # looks without a better held-out loss before it stops early
  seed: 1
"""
