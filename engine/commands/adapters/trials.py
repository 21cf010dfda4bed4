"""`loraplex adapters`: try a version beside the current one, as a canary that answers or as a shadow that does not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands import output
from engine.commands.adapters.changes import tell_move
from engine.commands.adapters.group import app, run
from engine.commands.params import DEFAULT_SERVER, Json, Reason, Ref, RegistryUrl, Server, whoami

if TYPE_CHECKING:
    from engine.api.loraplex.v1 import adapters_pb2 as pb
    from engine.commands.backends import Backend, Move
    from engine.registry.names import AdapterRef

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _duration(text: str) -> float:
    """Seconds of "90s", "10m", "2h" or "1d"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time: write 90s, 10m, 2h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


@app.command()
def canary(
    ref: Ref,
    weight: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The canary's share of the requests, 0 to 1; 0.05 is 5 %."),
    ] = None,
    for_s: Annotated[
        float | None,
        typer.Option("--for", metavar="TIME", parser=_duration, help="Judge it, for 90s, 10m, 2h, ..."),
    ] = None,
    max_error_rate: Annotated[
        float | None, typer.Option(metavar="SHARE", help="With --for: how much may fail; default 0.02.")
    ] = None,
    max_ttft_ratio: Annotated[
        float | None, typer.Option(metavar="TIMES", help="With --for: how slow against current; default 1.5.")
    ] = None,
    then: Annotated[
        Literal["end", "promote"] | None, typer.Option(help="With --for: what follows if it did well; default end.")
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="Let the current version answer alone again.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Show how both sides fare on the server.")] = False,
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Try a version on a share of the requests: load and probe it, then give it its share.

    Examples:
      loraplex adapters canary support@v3 --weight 0.05
      loraplex adapters canary support@v3 --weight 0.05 --for 10m --then promote
      loraplex adapters canary support@v3 --weight 0.1 --for 1h --max-ttft-ratio 1.2
      loraplex adapters canary support --report          # how it fares
      loraplex adapters canary support --weight 0.25     # more of it
      loraplex adapters promote support@canary           # it is good: all of them
      loraplex adapters canary support --end             # it is not: none

    Only requests for `support` are shared out; `support@current` and
    `support@v2` get what they name. Requests with the same routing key always
    get the same version. The canary ends when `current` or `canary` moves.

    With --for the servers judge it against the current version. They end it as
    soon as it fails more or is slower than allowed, beyond chance, and say why
    in the alias's history (`adapters show`); it is promoted only after enough
    requests.
    """
    parsed = _parsed(ref)
    bounds = {"--max-error-rate": max_error_rate, "--max-ttft-ratio": max_ttft_ratio, "--then": then}
    _check_one(parsed, "--weight SHARE", weight, end=end, report=report)
    if given := [name for name, value in bounds.items() if value is not None and for_s is None]:
        raise typer.BadParameter(f"{given[0]} needs --for TIME: how long to judge the canary")
    if for_s is not None and weight is None:
        raise typer.BadParameter("--for needs --weight SHARE")
    if report:
        _tell_canary(parsed.name, server, registry, as_json=as_json)
        return
    trial = None if for_s is None else _trial(for_s, max_error_rate, max_ttft_ratio, then)

    async def work(backend: Backend) -> tuple[str, pb.AliasChange, str]:
        move = _move(parsed, "canary", reason)
        if end:
            return parsed.name, await backend.end_canary(move), backend.after_move
        version = await _version(backend, parsed)
        with output.stages(f"starting a canary of {move.name}") as stages:
            change = await backend.set_canary(move, version, weight or 0.0, trial, stages)
        return parsed.name, change, backend.after_move

    tell_move(*run(work, server, registry), as_json=as_json)


@app.command()
def shadow(
    ref: Ref,
    sample: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The share of the requests that is copied, 0 to 1; 0.1 is 10 %."),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="Copy no more requests.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Show how its answers compare on the server.")] = False,
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Ask a version what the current one has answered, compare, and drop it: no caller gets anything of it.

    Examples:
      loraplex adapters shadow support@v3 --sample 0.1
      loraplex adapters shadow support --report        # how often it is equal
      loraplex adapters shadow support --sample 0.5    # more of it
      loraplex adapters shadow support --end

    Copies of requests for `support` run after the answer, only while nothing
    waits and half of the engine is free, and give way at once. Greedy answers
    are compared token by token; for sampled ones both versions are asked again
    at temperature 0. It ends when `current` or `shadow` moves.
    """
    parsed = _parsed(ref)
    _check_one(parsed, "--sample SHARE", sample, end=end, report=report)
    if report:
        _tell_shadow(parsed.name, server, registry, as_json=as_json)
        return

    async def work(backend: Backend) -> tuple[str, pb.AliasChange, str]:
        move = _move(parsed, "shadow", reason)
        if end:
            return parsed.name, await backend.end_shadow(move), backend.after_move
        version = await _version(backend, parsed)
        with output.stages(f"starting a shadow of {move.name}") as stages:
            change = await backend.set_shadow(move, version, sample or 0.0, stages)
        return parsed.name, change, backend.after_move

    tell_move(*run(work, server, registry), as_json=as_json)


def _parsed(ref: str) -> AdapterRef:
    from engine.registry.names import AdapterRef

    return AdapterRef.parse(ref)


def _check_one(ref: AdapterRef, option: str, share: float | None, *, end: bool, report: bool) -> None:
    """Exactly one thing may be asked for, and only a share has a version."""
    if (share is not None) + end + report != 1 or (share is None and not ref.bare):
        raise typer.BadParameter(
            f"give {option} to start or change it, {ref.name} --report to look, or {ref.name} --end to end it"
        )


def _move(ref: AdapterRef, alias: str, reason: str) -> Move:
    from engine.commands.backends import Move

    return Move(ref.name, alias, whoami(), reason)


async def _version(backend: Backend, ref: AdapterRef) -> str:
    """The version that is named; empty for a bare name, which means the one on trial."""
    from engine.commands.backends import find

    return "" if ref.bare else (await find(backend, str(ref))).version


def _trial(
    for_s: float, max_error_rate: float | None, max_ttft_ratio: float | None, then: str | None
) -> pb.CanaryTrial:
    from engine.client.adapters import trial

    return trial(for_s, max_error_rate, max_ttft_ratio, promote=then == "promote")


def _tell_canary(name: str, server: str, registry: str | None, *, as_json: bool) -> None:
    from engine.commands.adapters import trial_reports

    found = run(lambda backend: backend.canary_report(name), server, registry)
    output.emit(trial_reports.canary_data(name, found), as_json, lambda: trial_reports.canary_view(name, found))


def _tell_shadow(name: str, server: str, registry: str | None, *, as_json: bool) -> None:
    from engine.commands.adapters import trial_reports

    found = run(lambda backend: backend.shadow_report(name), server, registry)
    output.emit(trial_reports.shadow_data(name, found), as_json, lambda: trial_reports.shadow_view(name, found))
