"""Two targets on the same tapes, in turns: A B, B A, and so on, so that a drifting machine drifts for both."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loadtest.commands.run import end_on_sigterm, references, shown, tell, wanted_cases
from loadtest.console import err
from loadtest.drive.case import Result, resolved
from loadtest.drive.openers import remote, served, stock_vllm
from loadtest.drive.records import Record
from loadtest.drive.site import Site, asked_adapters
from loadtest.errors import BadInput, Exit
from loadtest.judge import canaries, paired
from loadtest.judge.paired import Difference, Round
from loadtest.judge.verdict import Verdict
from loadtest.plan import tape as tapes
from loadtest.plan.scenario import Case
from loadtest.plan.strict import read_yaml
from loadtest.report import curves, document
from loadtest.report.write import new_folder, write

PEERS = ("vllm",)
QUANTILES = (0.05, *(n / 10 for n in range(1, 10)), 0.95)
"""Where the plot of the ratios has its points."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What the command line says."""

    names: list[str]
    targets: list[str]
    """Two addresses; with `serve` two files of settings, or none beside a peer."""
    serve: Path | None
    adapters: list[Path]
    engine: str
    peer: str
    model: str
    quick: bool
    overrides: dict[str, Any]
    workers: int
    rounds: int
    tolerance: float


@dataclass
class Side:
    """One of the two: A is the baseline."""

    label: str
    site: Site


@dataclass
class Comparison:
    """Everything that the rounds brought, by case."""

    sides: tuple[Side, Side]
    results: list[Result] = field(default_factory=list)
    pairs: dict[str, list[tuple[Result, Result]]] = field(default_factory=dict)
    ratios: list[paired.Ratio] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Whether a side is gone, or the user has had enough."""
        return any(result.interrupted or result.gone for result in self.results)

    def rounds(self, title: str) -> list[Round]:
        """The rounds of a case, for the statistics."""
        return [Round(_judged_ones(a), _judged_ones(b), (a.start, b.start)) for a, b in self.pairs[title]]

    def tail(self) -> dict[str, list[tuple[float, float, float]]]:
        """B's TTFT over A's at QUANTILES, with its interval, by case."""
        return {title: paired.ttft_ratios(self.rounds(title), self.window(title), QUANTILES) for title in self.pairs}

    def window(self, title: str) -> tuple[float, float]:
        """The measured seconds of each round."""
        work = self.pairs[title][0][0].case.workload
        return work.warmup, work.duration


def _judged_ones(result: Result) -> list[Record]:
    """All records but those of a noisy tenant, whom nobody is judged by."""
    noisy = tapes.noisy_adapter(result.case.workload, result.tape.adapters)
    return [one for one in result.records if not noisy or one.adapter != noisy]


async def execute(options: CompareOptions, folder: Path, *, as_json: bool) -> Exit:
    """Run all cases in turns, write the report, print the ratios; returns the exit code."""
    _check(options)
    wanted = wanted_cases(
        options.names, options.serve, options.adapters, quick=options.quick, overrides=options.overrides
    )
    new_folder(folder)
    end_on_sigterm()
    async with contextlib.AsyncExitStack() as stack:
        comparison = Comparison(await _sides(options, wanted, stack))
        await _prepare(comparison, wanted)
        for case in wanted:
            if not comparison.over:
                await _turns(comparison, case, options)
        return _report(comparison, folder, as_json=as_json)


def _check(options: CompareOptions) -> None:
    if options.peer and options.peer not in PEERS:
        raise BadInput(f"there is no peer {options.peer!r}", f"There is {', '.join(PEERS)}.")
    if options.peer and not options.serve:
        raise BadInput("--peer is started beside a server of our own", "Add --serve MODEL.")
    wanted = 0 if options.peer else 2
    if len(options.targets) != wanted:
        what = "files of settings" if options.serve else "targets"
        raise BadInput(
            f"{len(options.targets)} targets are named, {wanted} are needed",
            f"Name two {what}, or use --serve MODEL --peer vllm.",
        )


async def _sides(options: CompareOptions, wanted: list[Case], stack: contextlib.AsyncExitStack) -> tuple[Side, Side]:
    serve, timeout = options.serve, max(case.workload.timeout for case in wanted)
    if serve is None:
        a, b = [
            Side(target, await stack.enter_async_context(remote(target, timeout, options.model, options.workers)))
            for target in options.targets
        ]
        return a, b
    start = (serve, options.adapters, wanted, options.engine, options.workers)
    if options.peer:
        err.print("starting loraplex serve, then vLLM's own server (about a minute)", style="dim")
        ours = await stack.enter_async_context(served(*start))
        theirs = await stack.enter_async_context(stock_vllm(serve, options.adapters, wanted, options.workers, ours))
        return Side("vLLM", theirs), Side("Loraplex", ours)
    err.print("starting two servers (about a minute)", style="dim")
    a, b = [
        Side(Path(file).stem, await stack.enter_async_context(served(*start, read_yaml(Path(file)))))
        for file in options.targets
    ]
    return a, b


async def _prepare(comparison: Comparison, wanted: list[Case]) -> None:
    """References of both, and one yardstick: a good answer is as fast for one as for the other."""
    sites = [side.site for side in comparison.sides]
    for site in sites:
        await references(site, wanted)
    known = [site.alone_ttft_s for site in sites if site.names and site.alone_ttft_s]
    for site in sites:
        site.yardstick_s = min(known, default=0.0)


async def _turns(comparison: Comparison, case: Case, options: CompareOptions) -> None:
    a, b = comparison.sides
    names = asked_adapters(case.workload, a.site)
    if missing := [name for name in names if name.partition("@")[0] not in b.site.adapters]:
        raise BadInput(f"{b.label} has no adapter {missing[0]!r}, which {a.label} has")
    case = await resolved(case, a.site, b.site)
    prompts = len(a.site.prompts) if case.workload.canary and a.site.references and b.site.references else 0
    for number in range(options.rounds):
        work = case.workload.model_copy(update={"seed": case.workload.seed + number})
        tape = tapes.build(work, names, prompts, canaries.TOKENS)
        found: dict[str, Result] = {}
        for side in (b, a) if number % 2 else (a, b):
            name = f"{case.name} {side.label} {number + 1}".strip()
            result = await shown(side.site, case.model_copy(update={"workload": work, "name": name}), tape)
            comparison.results.append(result)
            found[side.label] = result
            if comparison.over:
                break
        if comparison.over:
            break
        comparison.pairs.setdefault(case.title, []).append((found[a.label], found[b.label]))
    if case.title not in comparison.pairs:
        return
    late = any(one.health.late for pair in comparison.pairs[case.title] for one in pair)
    found_ratios = paired.ratios(
        case.title, comparison.rounds(case.title), comparison.window(case.title), options.tolerance
    )
    # A client that was late adds to both sides alike: it hides a difference, and makes none.
    comparison.ratios += [
        replace(one, verdict=Difference.OPEN) if late and one.verdict is Difference.SAME else one
        for one in found_ratios
    ]


def _report(comparison: Comparison, folder: Path, *, as_json: bool) -> Exit:
    command = ["loraplex", "loadtest", *sys.argv[1:]]
    code, verdict = _judged(comparison)
    labels = [side.label for side in comparison.sides]
    found = {
        "sides": labels,
        "ratios": [vars(ratio) for ratio in comparison.ratios],
        "counts": [_counts(title, pairs) for title, pairs in comparison.pairs.items()],
    }
    data = document.document(
        comparison.results, comparison.sides[1].site, command, "compare",
        exit=int(code), verdict=verdict, compare=document.clean(found),
    )  # fmt: skip
    write(comparison.results, data, folder, curves.compared(comparison.tail(), QUANTILES, labels))
    tell(data, folder, as_json=as_json)
    return code


def _counts(title: str, pairs: list[tuple[Result, Result]]) -> dict[str, Any]:
    """What is counted rather than timed, over all rounds of a case."""
    return {"case": title} | {key: _sums([pair[at] for pair in pairs]) for at, key in enumerate("ab")}


def _sums(results: list[Result]) -> dict[str, Any]:
    return {
        "requests": sum(one.measures["requests"] for one in results),
        "failed": sum(one.measures["failed"] for one in results),
        "good": sum(round(one.measures["goodput"] * one.measures["window_s"]) for one in results),
        "misroutes": sum(one.correctness.misroutes for one in results),
        "canaries": sum(one.correctness.compared for one in results),
        "lost_tokens": sum(one.correctness.lost_tokens for one in results),
        "late": list(dict.fromkeys(reason for one in results for reason in one.health.late)),
    }


def _judged(comparison: Comparison) -> tuple[Exit, str]:
    """Whether B is at least as good as A: a wrong answer of B outranks all, a doubt leaves it open."""
    results = comparison.results
    if any(one.interrupted for one in results):
        return Exit.INTERRUPTED, Verdict.INCONCLUSIVE
    if any(one.gone for one in results):
        return Exit.UNREACHABLE, Verdict.INCONCLUSIVE
    if any(b.correctness.wrong for pairs in comparison.pairs.values() for _, b in pairs):
        return Exit.INCORRECT, Verdict.FAILS
    found = {ratio.verdict for ratio in comparison.ratios}
    if Difference.WORSE in found:
        return Exit.MISSED, Verdict.FAILS
    if any(one.health.problems for one in results) or Difference.OPEN in found or not found:
        return Exit.UNRESOLVED, Verdict.INCONCLUSIVE
    return Exit.PASS, Verdict.MEETS
