"""`make bench ARGS=tuning`: what training, resuming, merging and evaluating come to, beside doing it by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from loadtest.bench import output
from loadtest.bench.machine import machine
from loadtest.bench.tuning.parts import Bench, evaluated, merged, resume, speed

_PARTS = ("speed", "resume", "merge", "eval")


def tuning(
    parts: Annotated[str, typer.Option(metavar="LIST", help=f"Which of {', '.join(_PARTS)}.")] = ",".join(_PARTS),
    steps: Annotated[int, typer.Option(min=6, help="Training steps of a run.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the part speed.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Rows for each of the four adapters of the part eval.")] = 125,
    prompts: Annotated[int, typer.Option(min=1, max=200, help="Prompts of the part merge.")] = 200,
    port: Annotated[int, typer.Option(help="Where the server of the part eval listens.")] = 50077,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """Training, resuming, merging and evaluating, each beside doing it by hand with transformers and PEFT.

    Examples:
      make bench ARGS="tuning"                  all four: about 12 minutes
      make bench ARGS="tuning --parts speed --rounds 5"

    speed: training tokens/s against a plain Trainer + PEFT script, in turn.
    resume: losses of a run that is killed at a random step and resumed.
    merge: greedy tokens of the merged model in float32, and what 4 bits cost.
    eval: four adapters in one mixed batch, against adapter by adapter.
    tuning.json goes into the report's folder.
    """
    chosen = output.chosen("--parts", parts, str, _PARTS)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder, output.progress(len(chosen)) as step:
        bench = Bench(model, Path(folder))
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "speed": lambda: speed(bench, steps, rounds),
            "resume": lambda: resume(bench, steps),
            "merge": lambda: merged(bench, prompts),
            "eval": lambda: evaluated(bench, rows, port),
        }
        found: dict[str, Any] = {}
        for part in chosen:
            with step(part):
                found[part] = work[part]()
    data = {"machine": machine(), "model": model.name, **found}
    path = output.save(data, report / "tuning.json")
    if as_json:
        output.write_json(data)
    else:
        output.show([Text("\n".join(_lines(found)))])
    output.note(f"written: {path}")


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if part := found.get("speed"):
        low, high = part["ratios"][0], part["ratios"][-1]
        yield (
            f"speed   {part['loraplex']:.0f} tokens/s, plain Trainer + PEFT {part['plain']:.0f}: "
            f"{part['ratio']:.2f} ({low:.2f}-{high:.2f})"
        )
    if part := found.get("resume"):
        yield (
            f"resume  killed at step {part['killed_at']}: final loss {part['resumed']:.4f}, unbroken {part['unbroken']:.4f}; "
            f"largest difference of a step's loss {part['largest_difference']:.2g}"
        )
    if part := found.get("merge"):
        models = part["four_bits"]["models"]
        yield f"merge   {part['equal']} of {part['prompts']} greedy answers equal, token by token, in float32"
        for name, facts in models.items():
            yield f"        {name}: {facts['accuracy']:.0%} right, KL {facts['kl']:.3g}"
    if part := found.get("eval"):
        yield (
            f"eval    {part['requests']} requests for four adapters in {part['loraplex_s']:.1f} s, adapter by adapter with "
            f"PEFT {part['peft_s']:.1f} s: {part['ratio']:.2f} times as fast"
        )
