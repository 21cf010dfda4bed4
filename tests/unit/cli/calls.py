"""Calls the command line as a user does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from engine.cli import make_app

COMMAND = get_command(make_app())


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


def call(*words: str | Path, stdin: str | None = None) -> Outcome:
    """Run `loraplex` with these words; a traceback fails the test."""
    with CliRunner().isolation(input=stdin, env={"COLUMNS": "200"}) as (out, err, _):
        try:
            COMMAND.main(args=[str(word) for word in words], prog_name="loraplex")
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Outcome(code, out.getvalue().decode(), err.getvalue().decode())
