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
    from engine.tuning.suite import Suite

_Refs = Annotated[list[str], typer.Argument(metavar="NAME[@REF]...", help="Versions: support@v2, legal@canary.")]
_SuiteFile = Annotated[Path, typer.Argument(help="The suite, a JSONL file.", exists=True, dir_okay=False)]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Most tokens of an answer.")]
_Concurrency = Annotated[int, typer.Option(min=1, max=4096, help="Requests at once.")]
_Stop = Annotated[list[str] | None, typer.Option(help="End answers before this text; may be repeated.")]
_LINE = 60  # characters of an answer in a table
_Question = tuple[int, str, str, dict[str, Any]]  # a row's number, question, expected answer, and how to ask it


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
    one, too. The base and the current version are asked the same. Results have
    95 % intervals and are kept beside the version, where
    `adapters promote --require` reads them.
    """
    from engine.tuning.evaluation import Options
    from engine.tuning.suite import read_suite

    cases = read_suite(suite)
    options = Options(max_tokens=max_tokens, concurrency=concurrency, loglik=loglik, stop=tuple(stop or ()))
    record = asyncio.run(_evaluate(server, refs, cases, options, alone=alone, keep=keep))
    output.emit(record, as_json, lambda: _render(record))


async def _evaluate(
    server: str, refs: list[str], suite: Suite, options: Any, *, alone: bool, keep: bool
) -> dict[str, Any]:
    from engine.client import connect
    from engine.commands.backends import ServerBackend, find
    from engine.tuning.evaluation import BASE, evaluate

    async with connect(server) as client:
        backend = ServerBackend(client.adapters)
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
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Show what two versions answer, side by side.

    Examples:
      loraplex compare support@v1 support@v2 tickets.jsonl --different
      loraplex compare base support@canary tickets.jsonl --rows 20

    Rows need a prompt or messages; what else they have is shown if it is an
    expected answer. Greedy decoding, all rows in one batch.
    """
    cases = _prompts(prompts)[:rows]
    pairs = asyncio.run(_answers(server, (first, second), cases, max_tokens, tuple(stop or ()), concurrency))
    data = [
        {"row": number, "asked": asked, "expected": expected, first: a, second: b, "same": a == b}
        for (number, asked, expected, _), (a, b) in zip(cases, pairs, strict=True)
        if not only_different or a != b
    ]
    output.emit(data, as_json, lambda: _side_by_side(first, second, data, len(cases)))


def _prompts(file: Path) -> list[_Question]:
    from engine.tuning.jsonl import parsed

    return parsed(file.read_text(), file.name, _question)


def _question(line: str, number: int) -> _Question:
    import json

    from engine.tuning.jsonl import BadRow

    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not (row.get("prompt") or row.get("messages")):
        raise BadRow("it is no JSON object with a prompt or messages")
    if row.get("prompt"):
        return number, row["prompt"], str(row.get("completion", "")), {"prompt": row["prompt"]}
    turns = row["messages"]
    if not (isinstance(turns, list) and all(isinstance(turn, dict) and "content" in turn for turn in turns)):
        raise BadRow("its messages are no list of objects with role and content")
    if turns[-1].get("role") == "assistant":
        turns = turns[:-1]
    if not turns:
        raise BadRow("its only message is an answer: there is nothing to ask")
    return number, turns[-1]["content"], "", {"messages": turns}


async def _answers(
    server: str, who: tuple[str, str], cases: list[Any], max_tokens: int, stop: tuple[str, ...], concurrency: int
) -> list[tuple[str, str]]:
    from engine.client import connect

    places = asyncio.Semaphore(concurrency)
    async with connect(server) as client:
        with output.counting("asking", 2 * len(cases)) as step:

            async def one(name: str, question: dict[str, Any]) -> str:
                adapter = None if name == "base" else name
                async with places:
                    answer = await client.generate(
                        adapter=adapter, **question, max_tokens=max_tokens, temperature=0, stop=stop or None
                    )
                step()
                return answer.text

            told = await asyncio.gather(*(one(name, case[3]) for case in cases for name in who))
    return list(zip(told[::2], told[1::2], strict=True))


def _side_by_side(first: str, second: str, data: list[dict[str, Any]], count: int) -> Iterator[RenderableType]:
    made = output.table("row", "asked", "expected", first, second)
    for row in data:
        style = "" if row["same"] else "bold"
        asked = " ".join(row["asked"].split())
        cells = (asked[-_LINE:], row["expected"].strip(), row[first].strip(), row[second].strip())
        made.add_row(str(row["row"]), *(output.harmless(cell[:_LINE]) for cell in cells), style=style)
    yield made
    different = sum(not row["same"] for row in data)
    yield Text(f"{different} of {count} answers differ", "dim")
