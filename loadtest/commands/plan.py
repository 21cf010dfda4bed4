"""What a run would be, without sending anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.console import out
from loadtest.plan.forecast import forecast


def execute(names: list[str], overrides: Mapping[str, Any], capacity: float, *, quick: bool) -> None:
    """Print the forecast of these scenarios; `capacity` in requests/s. Raises BadInput."""
    for line in forecast(names, quick, overrides, capacity):
        out.print(line)
