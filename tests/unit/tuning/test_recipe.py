"""Recipes: what is wrong with one is said before anything is loaded, with what to write instead."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.errors import InvalidRecipe
from engine.tuning.encoding import IGNORED, Example, scored_together
from engine.tuning.estimate import Largest, estimate, read_shape, target_names
from engine.tuning.recipe import TEMPLATE, Recipe, Training, load_recipe, parse_recipe
from tests.unit.tuning.tiny import write_tokenizer


def test_the_recipe_that_init_writes_is_valid() -> None:
    """Every key of the commented template exists, and its values are the defaults where it says so."""
    recipe = parse_recipe(yaml.safe_load(TEMPLATE))
    assert recipe.lora.scaled_by == 2 * recipe.lora.rank
    assert recipe.data.packing


def test_paths_are_relative_to_the_recipe(recipe_file: Path) -> None:
    """A recipe works from any folder."""
    recipe = load_recipe(recipe_file)
    assert Path(recipe.data.train) == recipe_file.parent / "train.jsonl"


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ({"lora": {"rnak": 4}}, "lora.rnak", "did you mean 'rank'"),
        ({"trian": {}}, "trian", "did you mean 'train'"),
        ({"strict": True}, "strict", "unknown key"),
        ({"floats": 1}, "floats", "unknown key"),
        ({"data": {"train": "x", "streaming": True}}, "data.streaming", "did you mean 'train'"),
        ({"train": {"boolean": True}}, "train.boolean", "unknown key"),
        ({"data": {"train": "x", "held_out": []}}, "data.held_out", "valid"),
        ({"lora": {"rank": 0}}, "lora.rank", "greater than or equal to 1"),
        ({"lora": {"rank": 64}}, "lora.rank", "above the engine's limit of 16"),
        ({"lora": {"rank": 24}}, "lora.rank", "set LORAPLEX_MAX_RANK=32 here"),
        ({"lora": {"alpha": -1}}, "lora.alpha", "greater than 0"),
        ({"train": {"steps": 1, "epochs": 1}}, "train", "not both"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate", "greater than 0"),
        ({"method": "full"}, "method", "'lora' or 'qlora'"),
        ({"data": {"train": "x", "held_out": 1.5}}, "data.held_out", "between 0 and 1"),
        ({"name": "No Spaces"}, "name", "match pattern"),
        ({"train": {"epochs": float("inf")}}, "train.epochs", "less than or equal to 1000000"),
        ({"train": {"epochs": 1e300}}, "train.epochs", "less than or equal to 1000000"),
        ({"train": {"steps": 10**400}}, "train.steps", "less than or equal to 1000000000"),
        ({"train": {"max_grad_norm": float("inf")}}, "train.max_grad_norm", "finite number"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe_file: Path, change: dict[str, Any], key: str, said: str) -> None:
    """Each mistake is refused by its dotted path."""
    content = yaml.safe_load(recipe_file.read_text()) | change
    with pytest.raises(InvalidRecipe) as caught:
        parse_recipe(content)
    assert caught.value.key == key
    assert said in caught.value.message + caught.value.fix


@pytest.mark.parametrize("text", ["[1, 2]", "name: [", ""])
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    """A file that is not YAML, or holds no keys."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRecipe):
        load_recipe(file)


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps"),
    [
        (20, 16, 1, 5, 10),
        (300, 8, 32, 3, 6),
        (100, 64, 1, 3, 6),
        (64, 8, 2, 3, 12),
        (80, 8, 1, 0.7, 7),
        (5, 8, 4, 1e-9, 1),
    ],
)
def test_an_epoch_ends_with_a_short_step(rows: int, batch: int, accumulation: int, epochs: float, steps: int) -> None:
    """Rows that do not fill a batch, and batches that do not fill a step, are a step of their own in every epoch."""
    train = Training(batch_size=batch, accumulation=accumulation, epochs=epochs)
    assert train.total_steps(rows) == steps


def test_changes_from_the_command_line_may_be_short(recipe_file: Path) -> None:
    """`rank` is lora.rank, `steps` is train.steps."""
    recipe = load_recipe(recipe_file, {"rank": 2, "train.steps": 3, "max_length": 32})
    assert (recipe.lora.rank, recipe.train.steps, recipe.data.max_length) == (2, 3, 32)


def test_unknown_targets_are_refused_with_those_that_exist(recipe_file: Path, base: Path) -> None:
    """A layer that the base does not have."""
    recipe = load_recipe(recipe_file, {"targets": ["q_prj"]})
    with pytest.raises(InvalidRecipe, match="q_prj") as caught:
        target_names(recipe, read_shape(base))
    assert "q_proj" in caught.value.fix


def test_targets_that_name_no_layer_are_refused(recipe_file: Path, base: Path) -> None:
    """An empty list, and a kind of layer that the base does not have: nothing would train."""
    shape = read_shape(base)
    without = replace(shape, linear={name: size for name, size in shape.linear.items() if "attn" not in name})
    for targets, layers in (([], shape), ("attention", without)):
        with pytest.raises(InvalidRecipe, match="names none of the base's layers") as caught:
            target_names(load_recipe(recipe_file, {"targets": targets}), layers)
        assert "down_proj" in caught.value.fix


def test_a_base_whose_layers_are_transposed_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    """GPT-2's: publishing would refuse the adapter, after it was trained."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    shape = read_shape(tmp_path / "gpt2")
    for targets in ("all-linear", "attention", ["c_proj"]):
        with pytest.raises(InvalidRecipe, match="stored transposed") as caught:
            target_names(load_recipe(recipe_file, {"targets": targets}), shape)
        assert caught.value.key == "base"


def test_targets_by_kind(recipe_file: Path, base: Path) -> None:
    """Attention's four layers, or all linear ones; never the embedding or the output layer."""
    shape = read_shape(base)
    attention = target_names(load_recipe(recipe_file, {"targets": "attention"}), shape)
    everything = target_names(load_recipe(recipe_file), shape)
    assert attention == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert set(everything) == {*attention, "down_proj", "gate_proj", "up_proj"}


def test_the_trainable_share_is_that_of_the_real_adapter(recipe_file: Path, base: Path) -> None:
    """The count from the weights' headers equals what PEFT makes; 4 bits need less than a sixth of 32."""
    import torch

    from engine.tuning.base_model import attach, load_base

    recipe, shape = load_recipe(recipe_file), read_shape(base)
    batches = Largest(100, 10), Largest(50, 5)
    needs = estimate(recipe, shape, 4, *batches)
    model = attach(load_base(base, torch.float32), recipe, target_names(recipe, shape), checkpointing=False)
    assert needs.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert needs.parameters == shape.parameters
    quantized = estimate(Recipe.model_validate({**recipe.model_dump(), "method": "qlora"}), shape, 4, *batches)
    assert quantized.weights < needs.weights


def test_long_answers_are_scored_within_bounds_and_what_that_takes_is_estimated(recipe_file: Path, base: Path) -> None:
    """A label takes a number for each word of the vocabulary: many short answers at once, few long ones."""
    rows = [Example(n, [1] * (200 + n), [IGNORED] * 100 + [1] * (100 + n)) for n in range(40)]
    groups = scored_together(rows + [Example(40 + n, [1] * 9, [IGNORED] * 7 + [1] * 2) for n in range(70)])
    assert sorted(row.row for group in groups for row in group) == list(range(110))
    assert max(map(len, groups)) == 32
    assert all(len(group) * max(row.learnt for row in group) <= 512 for group in groups)
    recipe, shape = load_recipe(recipe_file), read_shape(base)
    little, much = (estimate(recipe, shape, 4, Largest(9, 2), Largest(100, labels)) for labels in (2, 512))
    assert much.activations > little.activations + 500 * shape.vocabulary * 4
