"""The tables of an earlier run, again."""

from __future__ import annotations

import json
from pathlib import Path

from loadtest.commands.run import show
from loadtest.errors import BadInput


def execute(folder: Path) -> None:
    """Print them. Raises BadInput if the folder holds no run."""
    try:
        data = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} holds no run: {error}") from error
    show(data)
