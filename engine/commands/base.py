"""`loraplex base`: what identifies a base model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from engine.commands.output import emit, facts, seconds, size, spinner
from engine.commands.params import Json

app = typer.Typer(no_args_is_help=True)


@app.callback()
def base() -> None:
    """Look at base models.

    Example:
      loraplex base fingerprint .models/smollm2-135m-instruct
    """


@app.command()
def fingerprint(
    folder: Annotated[Path, typer.Argument(help="The model's folder: config.json, tokenizer, .safetensors.")],
    as_json: Json = False,
) -> None:
    """Identify a base model by its contents; adapters fit exactly the base that they were trained on.

    Examples:
      loraplex base fingerprint .models/smollm2-135m-instruct
      loraplex base fingerprint /models/llama-8b --json | jq -r .fingerprint

    The same weights in other shards, or in another folder, have the same
    fingerprint; another precision, tokenizer or chat template has another one.
    It reads every weight: about a second per 300 MB and core.
    """
    from engine.registry.fingerprint import check_base, read_base

    started = time.monotonic()
    with spinner(f"hashing {folder.name}"):
        found = read_base(folder)
        _, tensors = check_base(folder)
    data = {
        "name": found.name,
        "fingerprint": found.fingerprint,
        "dtype": found.dtype,
        "tensors": len(tensors),
        "parameters": sum(math.prod(shape) for shape in found.shapes.values()),
        "size_bytes": sum(tensor.end - tensor.start for tensor in tensors.values()),
    }
    emit(data, as_json, lambda: _render(data, time.monotonic() - started))


def _render(data: dict[str, Any], took: float) -> Iterator[RenderableType]:
    yield facts(
        [
            ("name", data["name"]),
            ("fingerprint", data["fingerprint"]),
            ("dtype", data["dtype"]),
            ("tensors", f"{data['tensors']:,}"),
            ("parameters", f"{data['parameters']:,}"),
            ("size", size(data["size_bytes"])),
            ("hashed in", seconds(took)),
        ]
    )
