"""Training: packing changes nothing but time, a killed run goes on as if it had not been, and what cannot learn is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.errors import NoSpace, TrainingFailed, WrongBase
from engine.intervals import wilson
from engine.registry.checks import Limits, check_adapter
from engine.registry.fingerprint import read_base
from engine.tuning.advice import Evidence, advise
from engine.tuning.base_model import attach, check_gradients, keep_gradients, load_base, losses
from engine.tuning.batches import packed, padded
from engine.tuning.data import Row
from engine.tuning.encoding import Example, encode
from engine.tuning.estimate import read_shape, target_names
from engine.tuning.heldout import score
from engine.tuning.learner import diverged, packing_is_sound
from engine.tuning.recipe import load_recipe, written_recipe
from engine.tuning.run_folder import RunFolder, Spent
from engine.tuning.session import Session
from tests.unit.tuning.tiny import write_base, write_recipe

pytestmark = pytest.mark.slow


def adapted(file: Path, base: Path, **changes: Any) -> Any:
    """The base with a fresh adapter."""
    recipe = load_recipe(file, changes)
    torch.manual_seed(0)
    return attach(load_base(base, torch.float32), recipe, target_names(recipe, read_shape(base)), checkpointing=False)


def started(file: Path, runs: Path, **changes: Any) -> Session:
    """A run in this process, its events in `session.events`."""
    folder = RunFolder.create(runs, load_recipe(file, changes), written_recipe(file, changes))
    return opened(folder)


def opened(folder: RunFolder) -> Session:
    """A run that was begun before, or just now."""
    events: list[dict[str, Any]] = []
    session = Session(folder, events.append)
    session.events = events  # type: ignore[attr-defined]
    return session


def finished(session: Session) -> dict[str, Any]:
    """Train to the end."""
    session.prepare()
    session.learn()
    return session.finish()


@pytest.fixture
def examples(tokenizer: Any) -> list[Example]:
    """Rows of different lengths."""
    rows = [Row(1, "short", " a"), Row(2, "somewhat longer", " bcd"), Row(3, "x" * 40, " ef")]
    return [encode(row, tokenizer) for row in rows]


def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(
    recipe_file: Path, base: Path, examples: list[Example]
) -> None:
    """No row sees another one, and the same labels count."""
    found = []
    for batch in (packed(examples), padded(examples, 256)):
        model = adapted(recipe_file, base)
        loss = losses(model, batch)[1]
        loss.backward()
        gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
        found.append((float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])))
    (a, ga), (b, gb) = found
    assert math.isclose(a, b, rel_tol=1e-5)
    assert torch.allclose(ga, gb, atol=1e-5)


def test_kept_positions_are_those_before_each_label(recipe_file: Path, base: Path, examples: list[Example]) -> None:
    """The loss equals that of the whole sequence with shifted labels, as transformers computes it."""
    model = adapted(recipe_file, base)
    for example in examples:
        whole = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.labels])).loss
        ours = losses(model, packed([example]))[1] / example.learnt
        assert math.isclose(float(whole.detach()), float(ours.detach()), rel_tol=1e-5)


def test_a_model_that_mixes_packed_rows_is_found_out(
    recipe_file: Path, base: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that ignores where positions begin anew."""
    model = adapted(recipe_file, base)
    assert packing_is_sound(model, examples, 256)
    forward = model.get_base_model().model.forward

    def deaf(*args: Any, position_ids: Any = None, **options: Any) -> Any:
        return forward(*args, position_ids=torch.arange(position_ids.shape[1])[None], **options)

    monkeypatch.setattr(model.get_base_model().model, "forward", deaf)
    assert not packing_is_sound(model, examples, 256)


def test_a_model_that_mixes_packed_rows_a_little_is_found_out_in_16_bits(
    recipe_file: Path, base: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rounding moves a loss by more than that."""
    model = adapted(recipe_file, base).to(torch.bfloat16)
    assert packing_is_sound(model, examples, 256)
    embed = model.get_base_model().model.embed_tokens
    own = embed.forward

    def leaking(ids: Any) -> Any:
        found = own(ids)
        return found + 0.03 * found[:, :1]  # of the first token of all

    monkeypatch.setattr(embed, "forward", leaking)
    assert not packing_is_sound(model, examples, 256)


def test_greedy_answers_are_scored_without_generating(base: Path, tokenizer: Any, examples: list[Example]) -> None:
    """Exact by one forward pass is exact by generating, and an answer that goes on only begins rightly."""
    model = load_base(base, torch.float32)
    prompt = tokenizer("hello", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=256)[0].tolist()
    answer = written[len("hello") :]
    right = Example(1, written, [-100] * 5 + answer)
    wrong = Example(2, [*written[:-1], answer[-1] ^ 1], [-100] * 5 + answer[:-1] + [answer[-1] ^ 1])
    ended = Example(3, [*written, 256], [-100] * 5 + answer + [256])
    cut = replace(right, row=4, cut=True)
    found = score(model, [right, wrong, ended, cut], pad=256, end=256)
    assert (found.rows, found.exact, found.begin) == (4, 1, 3)


def test_a_run_learns_and_leaves_what_is_needed_to_do_it_again(recipe_file: Path, base: Path, tmp_path: Path) -> None:
    """The adapter, its record, the resolved recipe, the environment, metrics and TensorBoard events; no checkpoints."""
    session = started(recipe_file, tmp_path / "runs", steps=60, learning_rate=0.02)
    run = finished(session)["run"]
    folder = session.folder.path
    assert run["evaluation"]["adapter"] == 1.0
    assert run["evaluation"]["base"] == 0.0
    assert run["data"]["train_rows"] == 32
    assert run["recipe"]["data"]["train"] == "train.jsonl"  # as it was written: no path of this machine
    assert json.loads((folder / "adapter" / "run.json").read_text()) == run
    left = {path.name for path in folder.iterdir()}
    assert left >= {"adapter", "recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard"}
    made_with = json.loads((session.folder.path / "environment.json").read_text())
    assert made_with["processor"]
    assert made_with["packages"]["torch"]
    assert "checkpoints" not in left
    assert load_recipe(folder / "recipe.yaml") == load_recipe(recipe_file, {"steps": 60, "learning_rate": 0.02})


def test_the_adapter_passes_the_checks_of_a_publication(recipe_file: Path, base: Path, tmp_path: Path) -> None:
    """Trained on this base, it fits it; trained on another one, or when the base has changed since, it does not."""
    folder = started(recipe_file, tmp_path / "runs")
    finished(folder)
    checked = check_adapter(folder.folder.adapter, read_base(base), Limits(16, 10_000_000))
    assert (checked.rank, checked.base.assumed, checked.warnings) == (4, False, ())
    changed = write_base(tmp_path / "changed", seed=1)
    with pytest.raises(WrongBase):
        check_adapter(folder.folder.adapter, read_base(changed), Limits(16, 10_000_000))


class Killed(Exception):
    """In the place of a kill."""


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses to the last digit that counts, dropout included; a checkpoint that was cut short is passed over."""
    options = {"steps": 12, "evaluate_every": 4, "dropout": 0.2}
    unbroken = started(recipe_file, tmp_path / "a", **options)
    finished(unbroken)

    broken = started(recipe_file, tmp_path / "b", **options)
    tell = broken.watch._tell

    def kill_at_ten(event: dict[str, Any]) -> None:
        tell(event)
        if event.get("step") == 10 and event["event"] == "step":
            raise Killed

    broken.watch._tell = kill_at_ten
    broken.prepare()
    with pytest.raises(Killed):
        broken.learn()
    half = broken.folder.checkpoints / "checkpoint-10"
    shutil.copytree(broken.folder.checkpoints / "checkpoint-8", half)
    (half / "trainer_state.json").write_text('{"cut')

    resumed = opened(broken.folder)
    run = finished(resumed)["run"]
    assert resumed.events[4]["text"] == "training from step 8"  # type: ignore[attr-defined]
    assert run["steps"] == 12
    assert resumed.watch.losses == pytest.approx(unbroken.watch.losses, rel=1e-5)
    noted = [json.loads(line) for line in (broken.folder.path / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in noted if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert run["seconds"] > steps[7]["seconds"]  # what the steps before the kill took counts too
    assert steps[-1]["tokens"] == unbroken.spent.tokens


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 12, "evaluate_every": 4, "schedule": "constant", "batch_size": 5},
        {"steps": 40, "evaluate_every": 2, "patience": 2, "learning_rate": 1e-12},
    ],
    ids=["all-steps", "no-patience"],
)
def test_a_run_that_is_killed_while_it_is_scored_learns_no_more(
    recipe_file: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its last step was done, though the Trainer would do another one."""
    unbroken = started(recipe_file, tmp_path / "a", **options)
    whole = finished(unbroken)["run"]
    broken = started(recipe_file, tmp_path / "b", **options)
    broken.prepare()
    broken.learn()  # and killed

    resumed = opened(broken.folder)
    run = finished(resumed)["run"]
    for value in ("steps", "final_loss", "evaluation"):
        assert run[value] == whole[value]
    assert run["tokens_per_second"] > 0
    assert resumed.watch.losses == pytest.approx(unbroken.watch.losses, rel=1e-5)
    one, other = (load_file(session.folder.adapter / "adapter_model.safetensors") for session in (unbroken, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_loses_no_patience(recipe_file: Path, tmp_path: Path) -> None:
    """It stops early where an unbroken one does: looks without an improvement before the kill count."""
    options = {"steps": 20, "evaluate_every": 2, "patience": 2, "learning_rate": 1e-12}
    unbroken = started(recipe_file, tmp_path / "a", **options)
    stopped_at = finished(unbroken)["run"]["steps"]
    assert stopped_at < 20

    broken = started(recipe_file, tmp_path / "b", **options)
    tell = broken.watch._tell

    def kill(event: dict[str, Any]) -> None:
        tell(event)
        if event.get("step") == stopped_at - 1 and event["event"] == "step":
            raise Killed

    broken.watch._tell = kill
    broken.prepare()
    with pytest.raises(Killed):
        broken.learn()
    assert finished(opened(broken.folder))["run"]["steps"] == stopped_at


@pytest.mark.parametrize("what", ["the base", "the training data"])
def test_what_changes_under_a_run_ends_it(tmp_path: Path, what: str) -> None:
    """Else its record would name a base or rows that the adapter was not made of; on the way as after a kill."""
    base = write_base(tmp_path / "base")
    session = started(write_recipe(tmp_path, base), tmp_path / "runs")
    session.prepare()
    session.learn()
    if what == "the base":
        write_base(base, seed=5)
        with pytest.raises(TrainingFailed, match=f"{what} changed"):
            session.finish()
    else:
        rows = tmp_path / "train.jsonl"
        rows.write_text(rows.read_text().replace("0", "1"))
    with pytest.raises(TrainingFailed, match=f"{what} changed"):
        opened(session.folder).prepare()
    assert not session.folder.adapter.exists()


def test_an_adapter_without_gradients_is_refused(recipe_file: Path, base: Path, examples: list[Example]) -> None:
    """As when a library's fast path drops them."""
    model = adapted(recipe_file, base)
    loss = losses(model, packed(examples))[1]
    check_gradients(model, loss)
    silent = adapted(recipe_file, base)
    for name, parameter in silent.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_(False)
    with pytest.raises(TrainingFailed, match="no gradient reaches"):
        check_gradients(silent, losses(silent, packed(examples))[1])


def test_the_inference_path_that_breaks_training_is_switched_off() -> None:
    """Bitsandbytes marks it on each 4-bit layer."""

    class Layer(torch.nn.Module):
        support_avx512bf16_for_cpu = True

    model = torch.nn.Sequential(Layer())
    keep_gradients(model)
    assert model[0].support_avx512bf16_for_cpu is False


def test_qlora_learns_after_the_base_was_scored(recipe_file: Path, base: Path, tmp_path: Path) -> None:
    """The held-out rows are scored before and during training, which must not stop the gradients; its record says 4 bits."""
    session = started(recipe_file, tmp_path / "runs", method="qlora", steps=60, learning_rate=0.02)
    run = finished(session)["run"]
    assert run["evaluation"]["adapter"] == 1.0
    assert run["base"]["precision"] == "nf4-double"
    checked = check_adapter(session.folder.adapter, read_base(base), Limits(16, 10_000_000))
    assert "evaluate it here first" in checked.warnings[0]


def test_a_run_that_diverges_fails_with_what_to_do(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a checkpoint to go back to there is no adapter."""
    monkeypatch.setattr("engine.tuning.learner.diverged", lambda values: len(values) >= 2)
    session = started(recipe_file, tmp_path / "runs", evaluate_every=8)
    session.prepare()
    with pytest.raises(TrainingFailed, match="diverged in step 2") as caught:
        session.learn()
    assert "learning_rate" in caught.value.fix


def test_a_run_that_diverges_late_goes_back_to_its_best_checkpoint(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is that checkpoint, and it is said."""
    monkeypatch.setattr("engine.tuning.learner.diverged", lambda values: len(values) >= 7)
    session = started(recipe_file, tmp_path / "runs", evaluate_every=3)
    result = finished(session)
    assert result["run"]["steps"] == 7
    assert "best checkpoint before, checkpoint-6" in result["notes"][0]
    assert "diverged" in result["advice"][0]
    assert result["run"]["evaluation"]["loss"] == pytest.approx(session.watch.held_out[1][1], rel=0.01)


def test_what_counts_as_divergence() -> None:
    """NaN at once, a loss far above its beginning only when it stays there."""
    assert diverged([1.0, math.nan])
    assert diverged([2.0] * 10 + [20.0] * 10)
    assert not diverged([2.0] * 10 + [20.0] * 9 + [2.0])
    assert not diverged([9.0, 8.0])


def test_no_space_for_checkpoints_is_found_before_training(recipe_file: Path, tmp_path: Path) -> None:
    """The error says how much it takes."""
    folder = RunFolder.create(tmp_path / "runs", load_recipe(recipe_file), {})
    folder.check_space(1000)
    with pytest.raises(NoSpace, match="checkpoints"):
        folder.check_space(10**18)


EVIDENCE = Evidence(
    rank=8, alpha=16, rslora=False, learning_rate=1e-3, losses=(5.0,) + (0.1,) * 99, held_out_losses=(1.0, 0.5, 0.2),
    held_out_exact=0.97, held_out_rows=100, rows=500, duplicates=0, cut=0, max_length=256, diverged=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"held_out_exact": 0.5}, "rank 8 may be too low; try 16"),
        ({"held_out_exact": 0.5, "rank": 16, "alpha": 32}, "set LORAPLEX_MAX_RANK=32"),
        (
            {"held_out_exact": 0.5, "rank": 12, "alpha": 24},
            "--sweep rank=12,24 (above the limit of 16: set LORAPLEX_MAX_RANK=32",
        ),
        ({"held_out_exact": 0.5, "rank": 320, "alpha": 640}, "try 512, or compare: --sweep rank=320,512"),
        ({"held_out_exact": 0.5, "losses": tuple(5 - n / 25 for n in range(100))}, "train longer"),
        ({"alpha": 64}, "scales the adapter by 8"),
        ({"rslora": True, "rank": 64, "alpha": 128}, "with rslora scales the adapter by 16, where alpha = 16 gives 2"),
        ({"held_out_exact": 0.0, "losses": (6.0,) + (8.0,) * 99}, "too high; try 0.0003"),
        ({"held_out_exact": 0.3, "losses": (5.7,) + (3.9,) * 99, "learning_rate": 0.9}, "0.9 is too high; try 0.001"),
        ({"held_out_exact": 0.5, "losses": (6.0,) + (6.1,) * 99}, "compare: --sweep learning_rate=0.0001,0.01"),
        ({"diverged": True}, "try 0.0003"),
        ({"held_out_losses": (0.5, 0.2, 0.9)}, "over-fitting: the held-out loss rose from 0.2 to 0.9"),
        ({"rows": 20}, "20 rows are few"),
        ({"duplicates": 400}, "400 of 500 rows repeat"),
        ({"cut": 3}, "3 of 500 rows are longer than max_length 256"),
        ({"held_out_rows": 10}, "one row is 10.0%"),
    ],
)
def test_advice_comes_with_its_evidence(change: dict[str, Any], said: str) -> None:
    """Each of the known mistakes is named by the numbers that show it, and only that one."""
    from dataclasses import replace

    (advice,) = advise(replace(EVIDENCE, **change))
    assert said in advice


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rslora": True, "rank": 64, "alpha": 16},
        {"held_out_exact": 0.5, "rank": 512, "alpha": 1024},
        {"held_out_exact": 0.0, "losses": (1.8,) + (1.1,) * 99},
        {"held_out_exact": 0.02, "losses": (5.7,) + (3.9,) * 99},
        {"losses": (0.1,) * 100},
    ],
)
def test_a_run_that_gives_no_reason_gets_no_advice(change: dict[str, Any]) -> None:
    """Silence means something: free text is hardly ever exact, which says nothing about the rank."""
    assert advise(replace(EVIDENCE, **change)) == []


def test_intervals_are_wilsons() -> None:
    """Newcombe's published example, and sense at the ends."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(10, 10)[0] < 0.75


def test_metrics_of_an_earlier_version_are_gone_back_in(tmp_path: Path) -> None:
    """They say nothing of seconds and tokens; a line that a kill cut is dropped."""
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "step", "step": 2}\n{"event"')
    folder = RunFolder(tmp_path)
    assert folder.go_back_to(1) == Spent()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"event": "step", "step": 1}\n'


def test_only_whole_recipes_open_a_run_folder(tmp_path: Path, base: Path) -> None:
    """Resuming something else is refused."""
    from engine.errors import InvalidRecipe

    write_recipe(tmp_path, base)
    with pytest.raises(InvalidRecipe, match="no run folder"):
        RunFolder.open(tmp_path / "nowhere")
