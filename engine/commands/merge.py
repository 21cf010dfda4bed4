"""`loraplex merge`: a version into its base, or several versions into one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from engine.commands import output
from engine.commands.params import Json, RegistryUrl

if TYPE_CHECKING:
    from engine.commands.fetched import Fetched
    from engine.tuning.merging import Scoring

_SEVERAL = "Several versions into one"


def merge(
    refs: Annotated[list[str], typer.Argument(metavar="NAME[@REF]...", help="support@v2, or ./folder.")],
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A new folder for the result.")] = None,
    model: Annotated[
        Path, typer.Option("--model", metavar="FOLDER", envvar="LORAPLEX_MODEL", help="The base, in 16 or 32 bits.")
    ] = Path(".models/smollm2-135m-instruct"),
    onto: Annotated[
        str, typer.Option(help="base, dequantized (for QLoRA), or auto: whichever answers better.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as the base), float32, bfloat16 or float16.")] = "auto",
    suite: Annotated[
        Path | None, typer.Option(help="A suite, as of loraplex eval, to score on.", exists=True, dir_okay=False)
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, help="With --suite: most tokens of an answer.")
    ] = 64,
    stop: Annotated[
        list[str] | None, typer.Option(help="With --suite: end answers before this text; may be repeated.")
    ] = None,
    demonstrate: Annotated[
        bool, typer.Option("--demonstrate-4bit", help="Measure what merging into 4 bits would cost.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Compare the merged model with base and adapter.")] = True,
    method: Annotated[
        str, typer.Option(help="linear, ties, dare_linear, dare_ties, cat or svd.", rich_help_panel=_SEVERAL)
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Default: equal, 1 in all.", rich_help_panel=_SEVERAL)
    ] = None,
    density: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of values kept (ties, dare).", rich_help_panel=_SEVERAL)
    ] = 0.5,
    registry: RegistryUrl = None,
    as_json: Json = False,
) -> None:
    """Merge a version into its base: a model folder that serves as a base of its own. Or several versions into one adapter.

    Examples:
      loraplex merge support@v2 --out merged
      loraplex merge support@v2 --out merged --suite tickets.jsonl --demonstrate-4bit
      loraplex merge support@v2 legal@v1 --method ties --density 0.4 --out both

    Sums in float32, rounds once, one shard in memory at a time. The merged
    model's logits are compared with base and adapter, and its card says where
    it comes from. Merging into 4-bit weights is refused: it erases the adapter.
    A QLoRA version is merged into the original and into the dequantised base,
    and the better one is kept. The comparisons load whole models: where they do
    not fit into memory, use --no-check and, for QLoRA, --onto.
    """
    from engine.commands.fetched import fetched
    from engine.tuning.merge import check_target
    from engine.tuning.merging import Scoring
    from engine.tuning.suite import read_suite

    _check_options(out, dtype, demonstrate)
    check_target(model, onto)
    scoring = Scoring(read_suite(suite), max_tokens, tuple(stop or ())) if suite else None
    with fetched(refs, registry) as versions:
        if len(versions) > 1:
            data = _combine(versions, model, out, method, weights, density)
            told = Text(f"{data['ref']} in {out}: loraplex adapters publish {out} NAME")
            output.emit(data, as_json, lambda: [*output.warnings(data["warnings"]), told])
            return
        data = _merge(versions[0], model, out, onto, dtype, scoring, check=check, demonstrate=demonstrate)
    output.emit(data, as_json, lambda: _render(data))


def _check_options(out: Path | None, dtype: str, demonstrate: bool) -> None:
    if out is None and not demonstrate:
        raise typer.BadParameter("name the folder to write to", param_hint="--out")
    if out is not None and out.exists():
        raise typer.BadParameter(f"{out} exists already", param_hint="--out")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} is none of auto, float32, bfloat16 and float16", param_hint="--dtype")


def _combine(
    versions: Sequence[Fetched], model: Path, out: Path | None, method: str, weights: str | None, density: float
) -> dict[str, Any]:
    from engine.registry.file_checks import RUN
    from engine.tuning.combine import combine

    try:
        shares = [float(part) for part in weights.split(",")] if weights else [1 / len(versions)] * len(versions)
    except ValueError as error:
        raise typer.BadParameter(f"{weights!r} are no numbers", param_hint="--weights") from error
    if out is None:
        raise typer.BadParameter("name the folder to write to", param_hint="--out")
    fingerprint, *_ = [_check_base(version, model) for version in versions]
    precisions = {version.precision for version in versions}
    with output.spinner(f"merging {len(versions)} adapters"):
        config = combine(model, [version.folder for version in versions], shares, method, density, out)
        parents = [{"ref": version.ref, "digest": version.digest, "weight": share}
                   for version, share in zip(versions, shares, strict=True)]  # fmt: skip
        record: dict[str, Any] = {"combined": {"method": method, "density": density, "parents": parents}}
        if len(precisions) == 1:
            record["base"] = {"name": model.resolve().name, "fingerprint": fingerprint, "precision": precisions.pop()}
        (out / RUN).write_text(json.dumps(record, indent=2) + "\n")
    return {"ref": " + ".join(v.ref for v in versions), "method": method, "weights": shares, "rank": config["r"],
            "warnings": _warnings(versions, model)}  # fmt: skip


def _check_base(version: Fetched, model: Path) -> str:
    """The base's fingerprint; WrongBase when the version was trained on another one."""
    from engine.config import load_settings
    from engine.errors import WrongBase
    from engine.registry.fingerprint import read_base

    base = read_base(model, load_settings().cache / "fingerprints")
    if version.fingerprint and version.fingerprint != base.fingerprint:
        raise WrongBase(version.ref, version.fingerprint, base.fingerprint)
    return base.fingerprint


def _warnings(versions: Sequence[Fetched], model: Path) -> list[str]:
    name = model.resolve().name
    return [
        f"nothing records which base {version.ref} was trained on: {name} was assumed"
        for version in versions if version.assumed
    ]  # fmt: skip


def _merge(
    version: Fetched,
    model: Path,
    out: Path | None,
    onto: str,
    dtype: str,
    scoring: Scoring | None,
    *,
    check: bool,
    demonstrate: bool,
) -> dict[str, Any]:
    from engine.tuning.merging import Merging

    fingerprint = _check_base(version, model)
    with output.stages(f"merging {version.ref}") as report:
        work = Merging(version.folder, version.precision, model, scoring, report)
        data: dict[str, Any] = {"ref": version.ref, "precision": version.precision, "out": str(out or ""),
                                "warnings": _warnings([version], model)}  # fmt: skip
        if out is not None:
            data["onto"], data["choices"] = work.choose(onto, check=check)
            try:
                data |= work.write(out, data["onto"], dtype, check=check)
            except BaseException:
                shutil.rmtree(out, ignore_errors=True)
                raise
            work.card(out, version.ref, version.digest, fingerprint, data)
        if demonstrate:
            data["four_bits"] = work.demonstrate()
    return data


def _render(data: dict[str, Any]) -> Iterator[RenderableType]:
    yield from output.warnings(data["warnings"])
    if data["out"]:
        yield Text(f"merged {data['ref']}", "bold").append(
            f" onto {data['onto']}, {data['dtype']}, in {data['out']}", "not bold"
        )
        for name, facts in data["choices"].items():
            yield Text(f"  {name}: {_facts(facts)}")
        if "likeness" in data:
            alike = data["likeness"]
            yield Text(
                f"  compared with base and adapter: largest difference of a logit {alike['largest']:.3g}, "
                f"KL {alike['kl']:.2g}, same likeliest token {alike['agreement']:.1%}"
            )
        if "accuracy" in data:
            yield Text(f"  on the suite: {data['accuracy']:.1%} right merged, {data['accuracy_unmerged']:.1%} unmerged")
    if lost := data.get("four_bits"):
        made = output.table("", "right", "same likeliest token", "KL", title="what merging into 4 bits would cost")
        for name, facts in lost["models"].items():
            right = "-" if facts["accuracy"] is None else f"{facts['accuracy']:.1%}"
            made.add_row(name, right, f"{facts['agreement']:.1%}", f"{facts['kl']:.3g}")
        yield made
        layers = lost["layers"]
        yield Text(
            f"the adapter changes weights by {layers['change']:.2%}, quantising moves them by {layers['error']:.1%}; of the "
            f"change, a cosine of {layers['survives']:.3f} survives", "dim")  # fmt: skip


def _facts(facts: dict[str, Any]) -> str:
    score = "" if facts["accuracy"] is None else f"{facts['accuracy']:.1%} right, "
    return f"{score}KL to the model as trained {facts['kl']:.3g}, same likeliest token {facts['agreement']:.1%}"
