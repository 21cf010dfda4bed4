"""Printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

# No markup: what people write into notes and prompts is not for us to interpret.
out = Console(markup=False, highlight=False, emoji=False)
err = Console(markup=False, highlight=False, emoji=False, stderr=True)

Report = Callable[[str, str, float], None]
"""Takes a stage, a few words about it, and the share of the whole that is done."""

_PIPE_WIDTH = 200  # columns of a table that no terminal shows
_KIBI = 1024


def emit(data: Any, as_json: bool, render: Callable[[], Iterable[RenderableType]]) -> None:
    """Print a result: `data` as JSON, or else what `render` makes of it."""
    if as_json:
        write_json(data, indent=2)
        return
    for item in render():
        show(item)


def show(item: RenderableType) -> None:
    """Print something for people; only a terminal's width breaks lines."""
    if not out.is_terminal:
        out.width = _PIPE_WIDTH
    out.print(item, soft_wrap=isinstance(item, Text))


def write(text: str, console: Console = out) -> None:
    """Write text as it is, at once."""
    console.file.write(text)
    console.file.flush()


def write_json(data: Any, indent: int | None = None, console: Console = out) -> None:
    """Write one JSON document, by default as one line."""
    write(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", console)


def note(text: str, style: str = "dim") -> None:
    """Say something beside the result."""
    err.print(Text(text, style), soft_wrap=True)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table with these columns."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", title_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def facts(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values, one pair a line; those without a value are left out."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if str(value):
            made.add_row(name, value)
    return made


def warnings(texts: Iterable[str]) -> Iterator[Text]:
    """Each warning on a line of its own."""
    for text in texts:
        yield Text("warning: ", "bold yellow").append(text, "yellow")


def size(count: float) -> str:
    """Bytes for people."""
    if count < _KIBI:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= _KIBI
        if count < _KIBI:
            return f"{count:.1f} {unit}"
    return f"{count / _KIBI:.1f} TiB"


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def harmless(text: str) -> str:
    """Text that cannot steer the terminal that it is written to."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text) if out.is_terminal else text


@contextmanager
def stages(title: str) -> Iterator[Report]:
    """A bar on stderr for work that reports its stages; nothing where stderr is no terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def report(stage: str, detail: str, share: float) -> None:
            bar.update(task, description=f"{title}: {stage} {detail}".rstrip(), completed=share)

        yield report


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr for a number of equal steps; call what it yields after each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def spinner(title: str) -> Iterator[None]:
    """A spinner on stderr for work that cannot say how far it is."""
    if not err.is_terminal:
        yield
        return
    with err.status(Text(title)):
        yield
