"""Printing for all parts: results to standard output, progress to standard error; lists and folders among the options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PIPE_WIDTH = 140  # columns of a table that no terminal shows
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)
err = Console(stderr=True, highlight=False, markup=False)

MODEL = "LORAPLEX_MODEL"  # environment variable
Model = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The base model.", envvar=MODEL, exists=True, file_okay=False)
]
Report = Annotated[Path, typer.Option(metavar="FOLDER", help="Where the report's files go.", file_okay=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DEFAULT_MODEL = Path(".models/smollm2-135m-instruct")
DEFAULT_REPORT = Path("out/bench")
Step = Callable[[str], AbstractContextManager[object]]
"""Enclosed in it is one step of the work, which the text describes."""
T = TypeVar("T")


def chosen(option: str, text: str, parse: Callable[[str], T], allowed: Sequence[T] = ()) -> tuple[T, ...]:
    """The values of a list option, "1,4,8"; raises typer.BadParameter, which says what would be right."""
    hint = f"; choose from {', '.join(map(str, allowed))}" if allowed else ""
    values: list[T] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        try:
            value = parse(word)
        except ValueError as error:
            raise typer.BadParameter(f"{word!r}: {error}{hint}", param_hint=option) from error
        if allowed and value not in allowed:
            raise typer.BadParameter(f"{word!r} is unknown{hint}", param_hint=option)
        values.append(value)
    if not values:
        raise typer.BadParameter(f"needs at least one value{hint}", param_hint=option)
    return tuple(dict.fromkeys(values))


def positive(word: str) -> int:
    """A whole number from 1; raises ValueError."""
    if not word.isdecimal() or int(word) < 1:
        raise ValueError("is not a whole number from 1")
    return int(word)


def show(items: Iterable[RenderableType]) -> None:
    """Print results for people, with a line between them."""
    for item in items:
        out.print(item)
        out.print()


def write_json(data: Any) -> None:
    """Print results for programs."""
    out.file.write(json.dumps(data, indent=1) + "\n")


def save(data: Any, path: Path) -> Path:
    """Write results for programs into a file, whose folder is made if need be; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def note(text: str) -> None:
    """Say something beside the result."""
    err.print(text, soft_wrap=True)


@contextmanager
def progress(total: int) -> Iterator[Step]:
    """A bar on standard error for so many steps; without a terminal, a line as each step begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=total)

        @contextmanager
        def step(text: str) -> Iterator[None]:
            bar.update(task, description=text)
            if not err.is_terminal:
                note(text)
            yield
            bar.advance(task)

        yield step
