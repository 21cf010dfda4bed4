"""A file of requests: all checked first, then answered side by side, written in their order."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer

from engine.client import AsyncClient, GenerateOptions, RequestError, connect
from engine.commands import output
from engine.commands.generate import checked, conversation, generation_data
from engine.commands.root import explain

_HINT = "--file"


@dataclass(frozen=True)
class _Line:
    number: int
    request: GenerateOptions


def run(
    file: Path,
    defaults: dict[str, Any],
    out: Path | None,
    concurrency: int,
    server: str,
    *,
    chat: bool,
    system: str | None,
) -> None:
    """Answer every request of `file`; exit code 1 when one of them failed."""
    lines = _parse(_read(file), defaults, chat=chat, system=system)
    started = time.monotonic()
    with _opened(out) as target, output.counting("requests", len(lines)) as step:
        writer = _InOrder(target)
        asyncio.run(_answer_all(server, lines, concurrency, writer, step))
    took = output.seconds(time.monotonic() - started)
    failed = f"{writer.failed} failed, " if writer.failed else ""
    output.note(f"{writer.written - writer.failed} answered, {failed}{writer.tokens} tokens in {took}")
    if writer.failed:
        raise typer.Exit(1)


def _read(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise typer.BadParameter(f"there is no file {file}", param_hint=_HINT) from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is not UTF-8 text", param_hint=_HINT) from error


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield output.out.file  # type: ignore[misc]
        return
    with out.open("w", encoding="utf-8") as target:
        yield target


def _parse(text: str, defaults: dict[str, Any], *, chat: bool, system: str | None) -> list[_Line]:
    """Every line that is not empty; a usage error naming all that are wrong."""
    lines, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            lines.append(_Line(number, checked(defaults | _request(line, chat=chat, system=system))))
        except typer.BadParameter as error:
            problems.append(f"line {number}: {error.message}")
    if problems:
        more = f" (and {len(problems) - 5} more lines)" if len(problems) > 5 else ""
        raise typer.BadParameter("; ".join(problems[:5]) + more, param_hint=_HINT)
    if not lines:
        raise typer.BadParameter("it holds no requests", param_hint=_HINT)
    return lines


def _request(line: str, *, chat: bool, system: str | None) -> dict[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise typer.BadParameter(f"it is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise typer.BadParameter("it is no JSON object")
    if isinstance(request.get("prompt"), str) and "messages" not in request:
        request |= {"prompt": None} | conversation(request["prompt"], chat=chat, system=system)
    if isinstance(request.get("logit_bias"), dict):
        request["logit_bias"] = _by_token(request["logit_bias"])
    return request


def _by_token(bias: dict[str, float]) -> dict[int, float]:
    """JSON knows no numbers as keys."""
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError as error:
        raise typer.BadParameter("the keys of logit_bias must be token ids") from error


class _InOrder:
    """Writes results as soon as all before them are written."""

    def __init__(self, target: TextIO) -> None:
        self.failed = self.written = self.tokens = 0
        self._target = target
        self._waiting: dict[int, dict[str, Any]] = {}

    def add(self, place: int, result: dict[str, Any]) -> None:
        """Take the result of request number `place`, from 0."""
        self._waiting[place] = result
        while (ready := self._waiting.pop(self.written, None)) is not None:
            self.written += 1
            self.failed += "error" in ready
            self.tokens += ready.get("usage", {}).get("completion_tokens", 0)
            self._target.write(json.dumps(ready, ensure_ascii=False) + "\n")
            self._target.flush()


async def _answer_all(
    server: str, lines: list[_Line], concurrency: int, writer: _InOrder, step: Callable[[], None]
) -> None:
    places = iter(enumerate(lines))

    async def work(client: AsyncClient) -> None:
        for place, line in places:
            writer.add(place, {"line": line.number} | await _answer(client, line.request))
            step()

    async with connect(server) as client, asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, len(lines))):
            tasks.create_task(work(client))


async def _answer(client: AsyncClient, request: GenerateOptions) -> dict[str, Any]:
    try:
        return generation_data(await client.generate(**request))
    except RequestError as error:
        return {"error": explain(error)}
