"""The shipped scenarios: a list of them, or the YAML of one."""

from __future__ import annotations

from importlib import resources

from loadtest.console import out
from loadtest.plan import scenario


def execute(name: str) -> None:
    """Print all, or the one of this name. Raises BadInput if there is none."""
    if name:
        scenario.load(name)
        out.print((resources.files("loadtest") / "scenarios" / f"{name}.yaml").read_text(), markup=False, end="")
        return
    for one in scenario.shipped():
        found = scenario.load(one)
        out.print(f"[bold]{one:11}[/] {found.about}" + (f" ({len(found.cases)} cases)" if found.cases else ""))
