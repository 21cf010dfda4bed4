"""`loraplex eval` and `loraplex compare`: what versions answer, and how right it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from engine.commands import output
from engine.commands.params import DEFAULT_SERVER, Json, Server

if TYPE_CHECKING:
    from engine.tuning.evaluation import Options
    from engine.tuning.suite import Suite

_Refs = Annotated[list[str], typer.Argument(metavar="NAME[@REF]...", help="Versions: support@v2, legal@canary.")]
_SuiteFile = Annotated[Path, typer.Argument(help="The suite, a JSONL file.", exists=True, dir_okay=False)]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")]
_Concurrency = Annotated[int, typer.Option(min=1, max=4096, help="Requests at once.")]
_Stop = Annotated[list[str] | None, typer.Option(help="End answers before this text; may be repeated.")]
_Timeout = Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Deadline of each request.")]
_ASKED = 60  # characters of a question in a table


def evaluate(
    refs: _Refs,
    suite: _SuiteFile,
    max_tokens: _MaxTokens = 64,
    loglik: Annotated[
        bool, typer.Option("--loglik", help="Also how likely the right answers are, token by token.")
    ] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Without base and current version beside it.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the results beside the version.")] = True,
    stop: _Stop = None,
    concurrency: _Concurrency = 64,
    timeout: _Timeout = 3600.0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Score versions on a suite, in one mixed batch through a running server.

    Examples:
      loraplex eval support@v2 tickets.jsonl
      loraplex eval support@v2 tickets.jsonl --loglik --json
      loraplex eval support@v1 support@v2 legal@v1 mixed.jsonl --alone

    A row of the suite is a prompt (or messages) and what a right answer is:
    completion (that text), contains, regex, or json_schema; training rows are
    rows of a suite, too. The base and the current version are asked the same. Results have
    95 % intervals and are kept beside the version, where
    `adapters promote --require` reads them.
    """
    from engine.tuning.evaluation import Options
    from engine.tuning.suite import read_suite

    cases = read_suite(suite)
    options = Options(max_tokens, concurrency, loglik, tuple(stop or ()), timeout)
    record = asyncio.run(_evaluate(server, refs, cases, options, alone=alone, keep=keep))
    output.emit(record, as_json, lambda: _render(record))


async def _evaluate(
    server: str, refs: list[str], suite: Suite, options: Options, *, alone: bool, keep: bool
) -> dict[str, Any]:
    from engine.client import connect
    from engine.commands.backends import ServerBackend, find
    from engine.tuning.evaluation import BASE, evaluate

    async with connect(server) as client:
        backend = ServerBackend(client)
        versions = [await find(backend, ref) for ref in refs]
        who = [f"{version.name}@{version.version}" for version in versions]
        if not alone:
            names = dict.fromkeys(version.name for version in versions)
            currents = [(name, (await backend.get(name)).adapter.aliases.get("current")) for name in names]
            who += [f"{name}@{current}" for name, current in currents if current] + [BASE]
        who = list(dict.fromkeys(who))
        with output.counting(f"evaluating {', '.join(who)}", len(who) * len(suite.cases)) as step:
            record = await evaluate(client, suite, who, options, step)
        if keep:
            for version in versions:
                await backend.record_evaluation(version.name, version.version, record)
    return record


def _render(record: dict[str, Any]) -> Iterator[RenderableType]:
    results: dict[str, Any] = record["results"]
    metrics = list(dict.fromkeys(name for result in results.values() for name in result if name != "classes"))
    made = output.table("", *metrics, title=f"{record['suite']}, {record['rows']} rows, {record['seconds']:.1f} s")
    for who, result in results.items():
        made.add_row(who, *(_score(result.get(metric)) for metric in metrics))
    yield made
    first, result = next(iter(results.items()))
    if "classes" in result:
        yield Text()
        classes = output.table("class", "precision", "recall", "f1", "rows", title=first)
        for label, row in result["classes"].items():
            classes.add_row(label, *(f"{row[key]:.2f}" for key in ("precision", "recall", "f1")), str(row["rows"]))
        yield classes


def _score(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    if "interval" not in entry:
        return f"{entry['value']:.3f}"
    low, high = entry["interval"]
    return f"{entry['value']:.3f} ({low:.2f} to {high:.2f})"


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A version, or base.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    prompts: Annotated[Path, typer.Argument(help="Prompts, a JSONL file.", exists=True, dir_okay=False)],
    max_tokens: _MaxTokens = 64,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    only_different: Annotated[bool, typer.Option("--different", help="Only rows with different answers.")] = False,
    stop: _Stop = None,
    concurrency: _Concurrency = 64,
    timeout: _Timeout = 3600.0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Show what two versions answer, side by side.

    Examples:
      loraplex compare support@v1 support@v2 tickets.jsonl --different
      loraplex compare base support@canary tickets.jsonl --rows 20

    Rows are as in a suite, but need not say what a right answer is; it is shown
    if they do. Greedy decoding, all rows in one batch.
    """
    from dataclasses import replace

    from engine.tuning.evaluation import Options
    from engine.tuning.suite import read_suite

    suite = read_suite(prompts, judged=False)
    suite = replace(suite, cases=suite.cases[:rows])
    options = Options(max_tokens, concurrency, stop=tuple(stop or ()), timeout_s=timeout)
    (first, second), told = asyncio.run(_answers(server, (first, second), suite, options))
    data = [
        {"row": case.number, "asked": case.asked, "expected": case.wanted.get("exact", ""), first: a, second: b,
         "same": a == b}
        for case, a, b in zip(suite.cases, *told, strict=True)
        if not only_different or a != b
    ]  # fmt: skip
    output.emit(data, as_json, lambda: _side_by_side(first, second, data, len(suite.cases)))


async def _answers(
    server: str, refs: tuple[str, str], suite: Suite, options: Options
) -> tuple[list[str], list[list[str]]]:
    """Who answers, and what."""
    from engine.client import connect
    from engine.commands.backends import ServerBackend, find
    from engine.tuning.evaluation import BASE, ask

    async with connect(server) as client:
        backend = ServerBackend(client)
        # A bare name is its current version here: asked by its name, a canary would answer some of the rows.
        found = [None if ref == BASE else await find(backend, ref) for ref in refs]
        who = [f"{version.name}@{version.version}" if version else BASE for version in found]
        with output.counting("asking", len(who) * len(suite.cases)) as step:
            answers = await ask(client, suite, who, options, step)
    return who, [[answer.text for answer in told] for told in answers]


def _side_by_side(first: str, second: str, data: list[dict[str, Any]], count: int) -> Iterator[RenderableType]:
    """Answers are shown whole, as they may differ anywhere; of a question the end will do."""
    made = output.table("row", "asked", "expected", first, second)
    for row in data:
        style = "" if row["same"] else "bold"
        asked = " ".join(row["asked"].split())
        asked = asked if len(asked) <= _ASKED else f"…{asked[1 - _ASKED :]}"
        cells = (asked, row["expected"].strip(), row[first].strip(), row[second].strip())
        made.add_row(str(row["row"]), *(output.harmless(cell) for cell in cells), style=style)
    yield made
    different = sum(not row["same"] for row in data)
    yield Text(f"{different} of {count} answers differ", "dim")
