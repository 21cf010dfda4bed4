"""What `loraplex train` shows: the plan, the progress, the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from engine.commands import output

if TYPE_CHECKING:
    from engine.tuning.encoding import Example
    from engine.tuning.run_folder import RunFolder
    from engine.tuning.training import Plan

_SAMPLES = 2
_BUCKETS = 6


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan for programs."""
    needs = plan.estimate
    return {
        "name": plan.recipe.name,
        "base": {"name": plan.base.name, "fingerprint": plan.base.fingerprint},
        "rows": len(plan.examples),
        "held_out_rows": len(plan.held_out),
        "steps": plan.steps,
        "targets": plan.targets,
        "trainable_parameters": needs.trainable,
        "trainable_share": needs.trainable / (needs.parameters + needs.trainable),
        "memory_bytes": needs.total,
        "longest_row_tokens": plan.lengths[-1],
        "warnings": plan.warnings,
    }


def needs_line(plan: Plan) -> str:
    """What trains on which base, and what it takes, in a line."""
    needs = plan.estimate
    share = needs.trainable / (needs.parameters + needs.trainable)
    return (
        f"base {_base(plan)}; {len(plan.examples)} rows, {len(plan.held_out)} held out; "
        f"{needs.trainable:,} parameters train, {share:.2%} of all; "
        f"about {output.size(needs.total)} of memory (base {output.size(needs.weights)}, "
        f"adapter and optimiser {output.size(needs.adapter)}, activations {output.size(needs.activations)})"
    )


def _base(plan: Plan) -> str:
    return f"{plan.base.name} {plan.base.fingerprint[:19]}"


def plan_view(plan: Plan, tokenizer: Any) -> Iterator[RenderableType]:
    """A checked recipe: what it comes to, how long rows are, and what of them is learnt."""
    needs, recipe = plan.estimate, plan.recipe
    every, rows = recipe.train.batch_size * recipe.train.accumulation, len(plan.examples)
    times = plan.steps / recipe.train.steps_per_epoch(rows)
    yield output.facts(
        [
            ("recipe", Text(f"{recipe.name}, {recipe.method}", "bold")),
            ("base", _base(plan)),
            ("rows", f"{rows} trained on, {len(plan.held_out)} held out"),
            ("steps", f"{plan.steps} of {min(every, rows)} rows: {times:.1f} times through the data"),
            ("adapter", f"rank {recipe.lora.rank}, alpha {recipe.lora.scaled_by:g}, on {' '.join(plan.targets)}"),
            ("trains", f"{needs.trainable:,} parameters of {needs.parameters:,} "
                       f"({needs.trainable / (needs.parameters + needs.trainable):.2%})"),
            ("memory", f"about {output.size(needs.total)}: base {output.size(needs.weights)}, adapter and optimiser "
                       f"{output.size(needs.adapter)}, activations {output.size(needs.activations)}, "
                       f"libraries {output.size(needs.runtime)}"),
            ("row lengths", _histogram(plan.lengths)),
        ]
    )  # fmt: skip
    for number, example in enumerate(plan.examples[:_SAMPLES], 1):
        yield Text()
        yield Text(f"sample {number}: what is learnt is marked", "dim")
        yield _marked(example, tokenizer)
    yield from output.warnings(plan.warnings)
    yield Text("everything checks out; nothing was trained", "dim")


def _histogram(lengths: Sequence[int]) -> str:
    low, high = lengths[0], lengths[-1]
    width = max(1, -(-(high - low + 1) // _BUCKETS))
    counts: dict[int, int] = {}
    for length in lengths:
        start = low + (length - low) // width * width
        counts[start] = counts.get(start, 0) + 1
    return "  ".join(f"{start}-{start + width - 1}: {count}" for start, count in sorted(counts.items())) + " tokens"


def _marked(example: Example, tokenizer: Any) -> Text:
    """The row as text, what has a label in bold green (without colours: between [[ and ]])."""
    text = Text()
    for ids, learnt in _runs(example):
        piece = output.harmless(tokenizer.decode(ids))
        plain = learnt and not output.out.is_terminal
        text.append(f"[[{piece}]]" if plain else piece, "bold green" if learnt else "")
    return text


def _runs(example: Example) -> Iterator[tuple[list[int], bool]]:
    """Neighbouring tokens that are alike in being learnt."""
    start = 0
    learnt = [label >= 0 for label in example.labels]
    for at in range(1, len(learnt) + 1):
        if at == len(learnt) or learnt[at] != learnt[start]:
            yield example.ids[start:at], learnt[start]
            start = at


@contextmanager
def progress(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar with loss, held-out score, speed, memory and time left; lines where stderr is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    live = output.err.is_terminal
    with Progress(*columns, console=output.err, transient=True, disable=not live) as bar:
        task = bar.add_task(title, total=None, numbers="")
        numbers: dict[str, str] = {}

        def on_event(event: dict[str, Any]) -> None:
            numbers.update(_numbers(event))
            if event["event"] == "step":
                bar.update(task, total=event["steps"], completed=event["step"], numbers="  ".join(numbers.values()))
            elif event["event"] == "stage":
                bar.update(task, description=event["text"])
            if not live and (line := _line(event)):
                output.note(line)

        yield on_event


def _numbers(event: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if event["event"] == "step":
        yield "loss", f"loss {event['loss']:.4f}"
        yield "speed", f"{event['tokens_per_second']:.0f} tokens/s"
        yield "memory", output.size(event["bytes"])
    elif event["event"] == "held_out":
        yield "held out", f"held-out {event['exact']:.0%} (loss {event['loss']:.3f})"


def _line(event: dict[str, Any]) -> str:
    match event["event"]:
        case "stage":
            return str(event["text"])
        case "held_out":
            return f"step {event['step']}: held-out loss {event['loss']:.4f}, {event['exact']:.0%} right"
        case "step" if event["step"] % max(1, event["steps"] // 10) == 0:
            return "  ".join([f"step {event['step']}/{event['steps']}:", *(text for _, text in _numbers(event))])
    return ""


def result_view(folder: RunFolder, data: dict[str, Any]) -> Iterator[RenderableType]:
    """What a run made."""
    run = data["run"]
    evaluation = run["evaluation"]
    low, high = evaluation["interval"]
    yield Text(f"trained {run['recipe']['name']}", "bold").append(
        f"  {run['steps']} steps, {run['seconds']:.0f} s, loss {run['final_loss']:.4f}, {run['tokens_per_second']} tokens/s, "
        f"{output.size(run['peak_bytes'])}", "not bold")  # fmt: skip
    yield Text(
        f"held-out: {evaluation['adapter']:.0%} right of {evaluation['rows']} ({low:.0%} to {high:.0%}), base "
        f"{evaluation['base']:.0%} (begins rightly {evaluation['base_begins_right']:.0%})"
    )
    yield Text(f"adapter: {folder.adapter}")
    yield from output.warnings([*data["notes"], *data["advice"]])
    if data["published"]:
        yield Text(f"published {data['published']}", "bold")
    else:
        yield Text(f"to publish it: loraplex adapters publish {folder.adapter} {run['recipe']['name']}", "dim")


def sweep_view(key: str, results: Sequence[dict[str, Any]]) -> Iterator[RenderableType]:
    """A sweep's runs side by side, the best one marked, and what each run advises."""
    best = max(results, key=lambda run: (run["evaluation"]["adapter"], -run["evaluation"]["loss"]))
    made = output.table(key, "held-out", "95 %", "held-out loss", "loss", "time", "run", title="sweep")
    for run in results:
        evaluation = run["evaluation"]
        low, high = evaluation["interval"]
        made.add_row(
            str(run["value"]), f"{evaluation['adapter']:.1%}", f"{low:.0%} to {high:.0%}", f"{evaluation['loss']:.4f}",
            f"{run['final_loss']:.4f}", output.seconds(run["seconds"]), run["folder"], style="bold" if run is best else "",
        )  # fmt: skip
    yield made
    for run in results:
        yield from output.warnings(f"{key} = {run['value']}: {text}" for text in [*run["notes"], *run["advice"]])
