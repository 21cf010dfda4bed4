"""`loraplex generate`: one prompt to the terminal, or a file of requests."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from engine.commands import output
from engine.commands.params import DEFAULT_SERVER, Json, Server

if TYPE_CHECKING:
    from engine.client import Adapter, AsyncClient, GenerateOptions, Generation, Timings, Usage

_SAMPLING = "Sampling"
_FILE = "Many requests"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='The prompt; "-" reads it from stdin.', show_default=False)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", metavar="NAME[@REF]", help="Who answers; default: the base model.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's message, for the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="The system message; means --chat.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", "-n", min=1, help="Most tokens (default 128).", rich_help_panel=_SAMPLING),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 is greedy (default 1).", rich_help_panel=_SAMPLING)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus (default 1: all).", rich_help_panel=_SAMPLING)] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Likeliest tokens (default 0: all).", rich_help_panel=_SAMPLING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING)] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be repeated.", rich_help_panel=_SAMPLING)
    ] = None,
    regex: Annotated[
        str | None, typer.Option(help="The answer matches this expression.", rich_help_panel=_SAMPLING)
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is one of these; repeat it.", rich_help_panel=_SAMPLING)
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The answer fits the schema in this file.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help='Requests, one JSON object a line; "-" is stdin.', rich_help_panel=_FILE),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, help="Where answers go (default: stdout).", rich_help_panel=_FILE),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Requests at once.", rich_help_panel=_FILE)] = 16,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    timeout: Annotated[float, typer.Option(min=0.001, metavar="SECONDS", help="Deadline of each request.")] = 300.0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Answer a prompt, or every request of a file.

    Examples:
      loraplex generate "Where is my parcel?" --adapter support --chat
      loraplex generate "def fib(n):" --adapter code@v2 --max-tokens 64 --temperature 0
      cat contract.txt | loraplex generate - --adapter legal --json | jq -r .text
      loraplex generate --file requests.jsonl --out answers.jsonl --concurrency 32

    A line of a file holds "prompt" or "messages", and if you like "adapter"
    and any other keyword of the Python client's generate:

      {"prompt": "Hi", "adapter": "support", "max_tokens": 32}

    Options given here hold for the lines that do not say otherwise. Answers are
    JSON lines in the order of the requests; a request that fails becomes
    {"line": ..., "error": ...}, and the exit code is 1.
    """
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give a prompt, or --file with requests", param_hint="PROMPT")
    options = {
        "adapter": adapter,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or None,
        "regex": regex,
        "choice": choice or None,
        "json_schema": json_schema.read_text() if json_schema else None,
        "timeout_s": timeout,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if file is not None:
        from engine.commands import generate_file

        generate_file.run(file, given, out, concurrency, server, chat=chat, system=system)
        return
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    request = checked(given | conversation(text, chat=chat, system=system))
    asyncio.run(_answer(server, request, stream=stream and not as_json, as_json=as_json))


def conversation(prompt: str, *, chat: bool, system: str | None) -> dict[str, Any]:
    """The prompt as it is, or as a conversation."""
    if not chat and system is None:
        return {"prompt": prompt}
    messages = [{"role": "user", "content": prompt}]
    return {"messages": [{"role": "system", "content": system}, *messages] if system is not None else messages}


def checked(options: dict[str, Any]) -> GenerateOptions:
    """The options, if they make a request at all; a usage error otherwise."""
    from engine.client.requests import generate_request

    request = cast("GenerateOptions", options)
    try:
        generate_request(request)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    return request


async def _answer(server: str, request: GenerateOptions, *, stream: bool, as_json: bool) -> None:
    from engine.client import connect

    async with connect(server) as client:
        if stream:
            await _stream(client, request)
            return
        generation = await client.generate(**request)
    if as_json:
        output.write_json(generation_data(generation), indent=2)
    else:
        output.write(output.harmless(generation.text) + "\n")
        _tell(generation.adapter, generation.usage, generation.timings, generation.finish_reason)


async def _stream(client: AsyncClient, request: GenerateOptions) -> None:
    chunk = None
    try:
        async with aclosing(client.stream(**request)) as chunks:
            async for chunk in chunks:
                output.write(output.harmless(chunk.text))
    finally:
        if chunk:
            output.write("\n")
    if chunk and chunk.usage and chunk.timings:
        _tell(chunk.adapter, chunk.usage, chunk.timings, chunk.finish_reason)


def _tell(adapter: Adapter, usage: Usage, timings: Timings, reason: str) -> None:
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    speed = f"{usage.completion_tokens / timings.total_s:.1f} tokens/s" if timings.total_s else ""
    parts = [
        str(adapter),
        f"{usage.prompt_tokens}{cached} + {usage.completion_tokens} tokens",
        f"first after {output.seconds(timings.time_to_first_token_s)}",
        f"all after {output.seconds(timings.total_s)}",
        speed,
        "cut at the token limit" if reason == "length" else "",
    ]
    output.note(" · ".join(filter(None, parts)))


def generation_data(generation: Generation) -> dict[str, Any]:
    """An answer for programs; log probabilities only where there are any."""
    completions = [
        {name: value for name, value in asdict(completion).items() if name != "logprobs" or value}
        for completion in generation.completions
    ]
    data = {
        "text": generation.text,
        "adapter": str(generation.adapter),
        "digest": generation.adapter.digest,
        "finish_reason": generation.finish_reason,
        "completions": completions,
        "usage": asdict(generation.usage),
        "timings": asdict(generation.timings),
        "request_id": generation.request_id,
    }
    if generation.prompt_logprobs:
        data["prompt_logprobs"] = [asdict(place) for place in generation.prompt_logprobs]
    return data
