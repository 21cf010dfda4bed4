"""Where a decode step's time goes: the operators of an engine with adapters beside the base's, from torch.profiler.

vLLM's own profiling is used (AsyncLLM.start_profile), so that the steps are those of the real engine: its worker writes a
trace of a few steps in which every request decodes. An operator's time is its own, without what it calls. What is left of a
step is Python, and native code that torch does not see. Watching makes small operators slower: the step's length without a
profiler is given beside it.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from loadtest.bench import output
from loadtest.bench.adapters.plan import BASE, OURS, STOCK
from loadtest.bench.adapters.weights import make_adapters
from loadtest.bench.adapters.workloads import Mix, Workload
from loadtest.bench.child import Running, run_until_signal, start_module
from loadtest.bench.engines import CONTENDER, TARGETS, EngineSpec, Lora, tensor_shapes
from loadtest.bench.machine import machine

OUTSIDE = "(outside of torch's operators)"
_STEP = "execute_context_0(0)_generation_"  # what vLLM calls a step in which nobody's prompt is read
_SKIP = 4  # steps before the profiler looks: prompts are read in the first


@dataclass(frozen=True)
class Operator:
    """One operator in an average step: calls, and milliseconds of its own."""

    calls: float
    self_ms: float


@dataclass(frozen=True)
class Profile:
    """An average decode step: milliseconds, watched and not, and its operators by name."""

    steps: int
    step_ms: float
    unwatched_ms: float
    operators: dict[str, Operator]


def summarize(events: Iterable[Mapping[str, Any]], unwatched_ms: float) -> Profile:
    """Sum up a trace's events over its decode steps: a GPU's kernels where there are any, or else the CPU's operators.

    Raises ValueError when there is no such step.
    """
    spans = [event for event in events if event.get("ph") == "X"]
    steps = [span for span in spans if span.get("cat") == "user_annotation" and span["name"].startswith(_STEP)]
    if not steps:
        raise ValueError("the trace has no decode step")
    kernels = [(span, float(span["dur"])) for span in spans if span.get("cat") == "kernel"]
    operators = [span for span in spans if span.get("cat") == "cpu_op" and any(_within(span, step) for step in steps)]
    own: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for span, self_us in kernels or _self_times(operators):
        own[span["name"]] += self_us
        calls[span["name"]] += 1
    total = sum(step["dur"] for step in steps)
    own[OUTSIDE] = max(0.0, total - sum(own.values()))
    found = {name: Operator(calls[name] / len(steps), us / len(steps) / 1000) for name, us in own.items()}
    return Profile(len(steps), total / len(steps) / 1000, unwatched_ms, found)


def _within(span: Mapping[str, Any], step: Mapping[str, Any]) -> bool:
    return bool(step["ts"] <= span["ts"] < step["ts"] + step["dur"] and span["tid"] == step["tid"])


def _self_times(spans: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Each span with its duration less that of the spans directly in it; all are of one thread, and nested or apart."""
    own = [float(span["dur"]) for span in spans]
    open_spans: list[int] = []
    for index in sorted(range(len(spans)), key=lambda i: (spans[i]["ts"], -spans[i]["dur"])):
        span = spans[index]
        while open_spans and spans[open_spans[-1]]["ts"] + spans[open_spans[-1]]["dur"] <= span["ts"]:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1]] -= span["dur"]
        open_spans.append(index)
    return zip(spans, own, strict=True)


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """The events of the one trace in `folder`. Raises FileNotFoundError when the profiler has written none."""
    paths = sorted(folder.glob("*.pt.trace.json*"))
    if not paths:
        raise FileNotFoundError("vLLM's profiler has written no trace")
    raw = paths[0].read_bytes()
    text = gzip.decompress(raw) if paths[0].suffix == ".gz" else raw
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


async def measure(
    contenders: Sequence[str], work: Workload, lora: Lora, count: int, steps: int, model: Path, step: output.Step
) -> tuple[dict[str, Profile], dict[str, Any]]:
    """Profile one contender after the other; returns their profiles, and the facts of the last engine."""
    profiles: dict[str, Profile] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        scratch = Path(folder)
        adapters = make_adapters(scratch / "adapters", tensor_shapes(model), lora.targets, lora.rank, count)
        for name in contenders:
            kernels = {OURS: "auto", STOCK: "off"}.get(name)
            spec = EngineSpec(
                str(model),
                replace(lora, kernels=kernels) if kernels else None,
                max_running=max(32, work.batch),
                profile_dir=str(scratch / f"trace-{name}"),
            )
            arguments = {"engine": spec.to_json(), "adapters": [str(path) for path in adapters]}
            with step(f"starting {name}"):
                running, facts = await start_module(name, CONTENDER, arguments, spec.environment(), scratch)
            try:
                with step(f"profiling {name}"):
                    profiles[name] = await _profile(running, work, Mix(count if kernels else 0), steps, spec)
            finally:
                await running.stop()
    return profiles, facts


async def _profile(running: Running, work: Workload, mix: Mix, steps: int, spec: EngineSpec) -> Profile:
    """Twice unwatched, the first time to warm up, then watched."""
    asks = [asdict(ask) for ask in work.asks(seed=1, vocabulary=1000, mix=mix)]
    question = {"kind": work.kind, "asks": asks}
    await running.ask(question)
    unwatched = await running.ask(question)
    await running.ask(question | {"profile": [_SKIP, steps]})
    return summarize(read_trace(Path(spec.profile_dir)), unwatched["itl_p50_ms"])


def table(profiles: Mapping[str, Profile], top: int) -> Table:
    """The operators that take longest in the first engine with adapters, or else in the base; the others beside them."""
    first = next((name for name in profiles if name != BASE), BASE)
    names = sorted(profiles[first].operators, key=lambda name: -profiles[first].operators[name].self_ms)[:top]
    made = Table(title="An average decode step", title_justify="left", box=None, pad_edge=False)
    made.add_column("operator", no_wrap=True)
    for name in profiles:
        for heading in (f"{name} ms", "share", "calls"):
            made.add_column(heading, justify="right", no_wrap=True)
        if name != BASE and BASE in profiles:
            made.add_column("above base", justify="right", no_wrap=True)
    for operator in names:
        made.add_row(operator, *(cell for name in profiles for cell in _cells(operator, name, profiles)))
    made.add_section()
    made.add_row(
        "step, watched", *(cell for name in profiles for cell in _total(profiles[name].step_ms, name, profiles))
    )
    made.add_row(
        "between tokens, unwatched",
        *(cell for name in profiles for cell in _total(profiles[name].unwatched_ms, name, profiles)),
    )
    return made


def _cells(operator: str, name: str, profiles: Mapping[str, Profile]) -> Iterable[str]:
    nothing = Operator(0, 0.0)
    found = profiles[name].operators.get(operator, nothing)
    yield f"{found.self_ms:.2f}"
    yield f"{100 * found.self_ms / profiles[name].step_ms:.1f} %"
    yield f"{found.calls:.0f}" if found.calls else ""
    if name != BASE and BASE in profiles:
        yield f"{found.self_ms - profiles[BASE].operators.get(operator, nothing).self_ms:+.2f} ms"


def _total(value: float, name: str, profiles: Mapping[str, Profile]) -> Iterable[str]:
    yield from (f"{value:.2f}", "", "")
    if name != BASE and BASE in profiles:
        yield ""


def profile(
    contenders: Annotated[str, typer.Option(metavar="LIST", help="Of base, ours, stock.")] = f"{BASE},{OURS}",
    count: Annotated[int, typer.Option("--adapters", min=1, help="Adapters in the batch.")] = 4,
    rank: Annotated[int, typer.Option(min=1, max=512, help="Rank of the adapters.")] = 16,
    targets: Annotated[str, typer.Option(help=f"Layers with adapters: {' or '.join(TARGETS)}.")] = "attention",
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    steps: Annotated[int, typer.Option(min=1, max=64, help="Steps to watch.")] = 8,
    top: Annotated[int, typer.Option(min=1, help="Operators to print; the JSON has all.")] = 20,
    model: output.Model = output.DEFAULT_MODEL,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """Where a decode step's time goes: operators with adapters beside the base's.

    Examples:
      make bench ARGS="profile"            one and a half minutes
      make bench ARGS="profile --contenders base,ours,stock --adapters 16"

    An operator's time is its own, without what it calls. Watching makes
    small operators slower; the last line is without a profiler.
    profile.json goes into the report's folder.
    """
    names = output.chosen("--contenders", contenders, str, (BASE, OURS, STOCK))
    (layers,) = output.chosen("--targets", targets, str, tuple(TARGETS))
    lora = Lora(count, rank, TARGETS[layers])
    work = Workload("decode", batch, output=steps + 2 * _SKIP)
    with output.progress(2 * len(names)) as step:
        profiles, facts = run_until_signal(measure(names, work, lora, count, steps, model.resolve(), step))
    data = {
        "machine": machine(), "engine": facts, "model": model.name, "adapters": count, "rank": rank, "targets": targets,
        "requests": batch, "profiles": {name: asdict(found) for name, found in profiles.items()},
    }  # fmt: skip
    path = output.save(data, report / "profile.json")
    if as_json:
        output.write_json(data)
    else:
        output.show([table(profiles, top)])
    output.note(f"written: {path}")
