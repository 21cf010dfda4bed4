"""run.json: everything that a run found, in a form that programs can rely on (loadtest/schemas/run.json)."""

from __future__ import annotations

import json
import math
import platform
import sys
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from loadtest.drive.case import Result
from loadtest.drive.site import Site
from loadtest.errors import Exit
from loadtest.judge.verdict import Verdict, cost_per_million, overall, replicas

VERSION = 1


def document(
    results: list[Result], site: Site, command: list[str], kind: str = "run", **more: object
) -> dict[str, Any]:
    """The whole of run.json, `more` on top. Infinity is the string "inf", what is undefined is null."""
    found = {
        "version": VERSION,
        "kind": kind,
        "command": command,
        "exit": int(worst(results)),
        "verdict": verdict_of(results),
        "environment": _environment() | {"target": ", ".join(site.spec.addresses)} | site.about,
        "workers": site.workers,
        "slots": site.slots,
        "references": _references(site),
        "cases": [_case(result) for result in results],
        **more,
    }
    plain: dict[str, Any] = clean(found)
    return plain


def worst(results: list[Result]) -> Exit:
    """The exit code of all cases together: the gravest."""
    order = (Exit.INTERRUPTED, Exit.UNREACHABLE, Exit.INCORRECT, Exit.MISSED, Exit.UNRESOLVED, Exit.PASS)
    codes = {result.exit for result in results}
    return next((code for code in order if code in codes), Exit.UNRESOLVED)


def verdict_of(results: list[Result]) -> str:
    """One word (or four) for all cases."""
    if not results or any(result.interrupted or result.gone for result in results):
        return Verdict.INCONCLUSIVE
    if any(result.exit is Exit.INCORRECT for result in results):
        return Verdict.FAILS
    verdicts = [Verdict.INCONCLUSIVE if result.health.problems else overall(result.checks) for result in results]
    return next((one for one in (Verdict.FAILS, Verdict.INCONCLUSIVE) if one in verdicts), Verdict.MEETS)


def check(data: dict[str, Any]) -> None:
    """Validate against the committed schema; jsonschema.ValidationError when it does not fit."""
    import jsonschema

    jsonschema.validate(data, json.loads((resources.files("loadtest") / "schemas" / "run.json").read_text()))


def write(data: dict[str, Any], folder: Path) -> Path:
    """Write run.json."""
    path = folder / "run.json"
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return path


def clean(value: Any) -> Any:
    """JSON has no infinity and no nan: "inf" and null."""
    if isinstance(value, dict):
        return {str(key): clean(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [clean(one) for one in value]
    if isinstance(value, float):
        return "inf" if math.isinf(value) else None if math.isnan(value) else value
    return value


def _case(result: Result) -> dict[str, Any]:
    required, right = result.case.workload.requirements, result.correctness
    met = overall(result.checks) is Verdict.MEETS and not result.health.problems
    offered = result.measures["offered_rate"]
    return {
        "name": result.case.title,
        "exit": int(result.exit),
        "verdict": overall(result.checks),
        "valid": not result.health.problems,
        "interrupted": result.interrupted,
        "gone": result.gone,
        "growing": result.growing,
        "workload": result.case.workload.model_dump(mode="json", exclude={"requirements"}),
        "requirements": required.model_dump(mode="json", exclude_none=True),
        "tape": {"sha256": result.tape.sha256, "requests": len(result.tape), "adapters": result.tape.adapters},
        "measures": result.measures,
        "client": vars(result.health),
        "correctness": {
            "checked": right.checked,
            "misroutes": right.misroutes,
            "counts": dict(right.counts),
            "canaries": dict(right.canaries),
            "findings": [vars(finding) for finding in right.findings],
            "confusion": [[asked, by, count] for (asked, by), count in sorted(right.confusion.items())],
        },
        "checks": [vars(one) | {"headroom": one.headroom} for one in result.checks],
        "events": [vars(event) for event in result.events],
        "replicas": replicas(required.rate, offered) if required.rate and met else None,
        "cost_per_million_good_tokens": cost_per_million(required, result.measures["good_tokens_per_s"])
        if met
        else None,
    }


def _references(site: Site) -> dict[str, Any] | None:
    if site.references is None:
        return None
    return {
        "answerers": site.references.who,
        "prompts": len(site.references.prompts),
        "power": site.references.power,
        "floor": site.references.floor,
        "unstable": site.references.unstable,
    }


def _environment() -> dict[str, str]:
    import os

    try:
        version = metadata.version("loraplex")
    except metadata.PackageNotFoundError:
        version = "source"
    return {
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cores": str(os.cpu_count()),
        "loraplex": version,
    }
