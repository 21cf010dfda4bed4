"""The command `adapters`: from options to a plan, the contest, and the report."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import VLLM_RANKS
from loadtest.bench import output
from loadtest.bench.adapters.contest import Conditions, Contest
from loadtest.bench.adapters.plan import CONTENDERS, FULL, HEADLINE, Grid, Stage, stages
from loadtest.bench.adapters.report import tables, to_json, write
from loadtest.bench.adapters.results import results
from loadtest.bench.adapters.workloads import KINDS, Kind, Mix
from loadtest.bench.child import run_until_signal
from loadtest.bench.engines import TARGETS
from loadtest.bench.machine import machine

_LIST = "LIST"


def adapters(
    full: Annotated[bool, typer.Option("--full", help="Everything: ranks 8, 16, 64, 1 to 64 requests. Hours.")] = False,
    contenders: Annotated[
        str | None, typer.Option(metavar=_LIST, help=f"Of {', '.join(CONTENDERS)}; the base always takes part.")
    ] = None,
    workloads: Annotated[str | None, typer.Option(metavar=_LIST, help=f"Of {', '.join(KINDS)}.")] = None,
    counts: Annotated[
        str | None, typer.Option("--adapters", metavar=_LIST, help="Adapters in a batch: 4, or base+4 with base rows.")
    ] = None,
    ranks: Annotated[str | None, typer.Option(metavar=_LIST, help="Ranks of the adapters.")] = None,
    targets: Annotated[str | None, typer.Option(metavar=_LIST, help=f"Of {', '.join(TARGETS)}.")] = None,
    batches: Annotated[str | None, typer.Option(metavar=_LIST, help="Requests at once.")] = None,
    slots: Annotated[
        str, typer.Option(metavar=_LIST, help="Engines to start, by how many adapters they have room for.")
    ] = "4,16",
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds; one more comes before them.")] = 3,
    tokens: Annotated[int, typer.Option(min=5, help="Tokens of an answer in decode and mixed work.")] = 16,
    dtype: Annotated[str, typer.Option(help="Precision to compute in, as vLLM says it; auto: as serve.")] = "auto",
    kv_cache_gib: Annotated[int, typer.Option(min=1, help="Memory for each engine's key-value cache on a CPU.")] = 1,
    gpu_share: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="Of a GPU's memory, for each engine; default: alike for all.")
    ] = None,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What a batch of many adapters costs: ours, vLLM's own, and PEFT, as a share of the base model's speed.

    Examples:
      make bench ARGS="adapters"            the headline: about ten minutes
      make bench ARGS="adapters --full"     ranks 8 to 64, 1 to 64 requests
      make bench ARGS="adapters --workloads decode --adapters 4,16 --rounds 7"
      make bench ARGS="adapters --contenders ours --ranks 8,64"

    Any list makes a grid of its own, in which whatever is not named is as
    usual: rank 16 on the attention layers, 4 adapters, 16 requests, all
    workloads, contenders base, ours and stock.

    decode   the rate of tokens at the median step of a full batch
    prefill  the rate at which prompts of 256 tokens are read
    mixed    one request in eight is such a prompt, and arrives while
             the others generate; the rate of all tokens

    Prompts and weights are random, and the same for all. adapters.json, .png
    and .svg go into the report's folder.
    """
    grids = _grids(full, contenders, workloads, counts, ranks, targets, batches)
    plan = stages(grids, output.chosen("--slots", slots, output.positive), tokens)
    same = Conditions(
        model=model.resolve(),
        vocabulary=json.loads((model / "config.json").read_bytes())["vocab_size"],
        dtype=dtype,
        rounds=rounds,
        max_running=max(32, *(entry.workload.batch for stage in plan for entry in stage.entries)),
        kv_cache_gib=kv_cache_gib,
        gpu_share=gpu_share or 0.85 / max(len(stage.processes) for stage in plan),
    )
    contest = _hold(plan, same)
    found, about = results(contest.measured), _about(contest)
    paths = write(found, about, report)
    if as_json:
        output.write_json(to_json(found, about))
    else:
        output.show([_conditions(about), *tables(found)])
    output.note("written: " + ", ".join(map(str, paths)))


def _grids(full: bool, *lists: str | None) -> Sequence[Grid]:
    if not any(lists):
        return FULL if full else HEADLINE
    if full:
        raise typer.BadParameter("is everything there is: leave it out, or the lists", param_hint="--full")
    contenders, workloads, counts, ranks, targets, batches = lists
    usual = Grid()
    return [
        Grid(
            contenders=output.chosen("--contenders", contenders, str, CONTENDERS) if contenders else usual.contenders,
            kinds=output.chosen("--workloads", workloads, _kind, KINDS) if workloads else usual.kinds,
            mixes=output.chosen("--adapters", counts, mix_of) if counts else usual.mixes,
            ranks=output.chosen("--ranks", ranks, _rank) if ranks else usual.ranks,
            targets=output.chosen("--targets", targets, str, tuple(TARGETS)) if targets else usual.targets,
            batches=output.chosen("--batches", batches, output.positive) if batches else usual.batches,
        )
    ]


def mix_of(word: str) -> Mix:
    """Parse "4" or "base+4"; raises ValueError."""
    return Mix(output.positive(word.removeprefix("base+")), base=word.startswith("base+"))


def _kind(word: str) -> Kind:
    kinds: dict[str, Kind] = {kind: kind for kind in KINDS}
    if word not in kinds:
        raise ValueError("is no workload")
    return kinds[word]


def _rank(word: str) -> int:
    rank = output.positive(word)
    if rank > VLLM_RANKS[-1]:
        raise ValueError(f"is more than vLLM's largest rank, {VLLM_RANKS[-1]}")
    return rank


def _hold(plan: Sequence[Stage], same: Conditions) -> Contest:
    """Run the plan; the adapters and the logs are in a folder that goes when it ends."""
    starts = len({name for stage in plan for name in stage.processes})
    steps = starts + (same.rounds + 1) * sum(stage.questions for stage in plan)
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder, output.progress(steps) as step:
        contest = Contest(same, Path(folder), step)
        run_until_signal(contest.run(plan))
    return contest


def _about(contest: Contest) -> dict[str, Any]:
    """Where the figures come from, for the report."""
    base = contest.facts["base"]
    wrappers = {name: facts["lora_wrapper"] for name, facts in contest.facts.items() if "lora_wrapper" in facts}
    libraries: dict[str, str] = {}
    for facts in contest.facts.values():
        libraries |= {name: facts[name] for name in ("peft", "transformers") if name in facts}
    return {
        "machine": machine(),
        "model": contest.conditions.model.name,
        "rounds": contest.conditions.rounds,
        **{name: base[name] for name in ("vllm", "torch", "device", "device_name", "dtype")},
        **libraries,
        "lora_wrappers": {name.partition(",")[0]: path for name, path in wrappers.items() if name != "base"},
    }


def _conditions(about: dict[str, Any]) -> str:
    machine = about["machine"]
    wrappers = ", ".join(f"{name} is {path.rpartition('.')[2]}" for name, path in about["lora_wrappers"].items())
    return (
        f"{about['model']}, {about['dtype']}, vLLM {about['vllm']} ({about['device']}), {machine['cpu']}, "
        f"{machine['cores']} cores; {about['rounds']} rounds: medians, and the ratio to the base of the same round"
        + (f"\nwrappers: {wrappers}" if wrappers else "")
    )
