"""The demo: one engine, three adapters and the base in one batch; a promotion and a rollback under traffic.

make demo                      run it and stop
make serve                     publish the adapters that are missing, and serve until Ctrl-C; what you publish stays
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engine.client import AsyncClient, Generation, RequestError
from engine.server.process_end import END_WITH_PARENT

HERE = Path(__file__).parent
HOME = Path(".loraplex/demo")  # log of the demo's server, and its registry unless it stays
ADAPTERS = ("support", "legal", "code")
BASE_PROMPT = "The capital of France is"
console = Console(width=None if sys.stdout.isatty() else 120)


def held_out(name: str, count: int) -> list[dict[str, str]]:
    """The first rows of an adapter's held-out set."""
    lines = (HERE / name / "heldout.jsonl").read_text().splitlines()[:count]
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def server(model: Path, port: int, keep: bool) -> Iterator[subprocess.Popen[bytes]]:
    """`loraplex serve` as a process of its own, stopped by SIGTERM at the end of the block.

    If it is to `keep` what it is told, it has the default registry and HTTP port, those that every other command expects.
    """
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    flags = ["--model", str(model), "--port", str(port)]
    if not keep:
        flags += ["--registry", str(HOME / "registry"), "--http-port", "0"]
    command = [sys.executable, "-m", "engine.cli", "serve", *flags, "--log-format", "json"]
    with (HOME / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {END_WITH_PARENT: str(os.getpid())}
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


async def until_ready(client: AsyncClient, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server, or stop with its last words."""
    ready = asyncio.create_task(client.wait_ready(timeout_s=300))
    while not ready.done():
        await asyncio.wait([ready], timeout=0.5)
        if process.poll() is not None:
            ready.cancel()
            raise SystemExit("the server did not start:\n" + (HOME / "server.log").read_text()[-2000:])
    await ready


async def publish(client: AsyncClient) -> None:
    """Publish those of the three shipped adapters that are not there yet, checked against the base, and load them."""
    published = {adapter.name for adapter in await client.adapters.list()}
    for name in ADAPTERS:
        if name in published:
            console.print(f"  [bold]{name}[/] is there already")
            continue
        version = await client.adapters.publish(HERE / name / "v1", name, publisher="demo")
        await client.adapters.preload(name)
        score = json.loads(version.evaluation_json)
        console.print(
            f"  published [bold]{name}@{version.version}[/]: rank {version.rank}, {version.size_bytes / 1e6:.1f} MB, "
            f"held-out {score['adapter']:.0%} (base {score['base']:.0%}), {version.digest[:19]}"
        )


async def mixed_batch(client: AsyncClient) -> None:
    """Send requests for every adapter and the base at once, and show the answers side by side."""
    rows = [(name, held_out(name, 12)[at]) for at in (4, 8, 11) for name in ADAPTERS]
    calls = [client.generate(adapter=name, prompt=row["prompt"], max_tokens=24, temperature=0) for name, row in rows]
    calls.append(client.generate(prompt=BASE_PROMPT, max_tokens=12, temperature=0))
    rows.append(("", {"prompt": BASE_PROMPT, "completion": ""}))
    started = time.monotonic()
    answers = await asyncio.gather(*calls)
    seconds = time.monotonic() - started
    table = Table(box=None, pad_edge=False)
    for heading in ("who", "asked", "answered", "expected", "TTFT", "total"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("TTFT", "total") else "left")
    for (_, row), answer in zip(rows, answers, strict=True):
        table.add_row(*_row(row, answer))
    console.print(table)
    tokens = sum(answer.usage.prompt_tokens + answer.usage.completion_tokens for answer in answers)
    console.print(
        f"  {len(answers)} requests for 3 adapters and the base in one batch: {tokens} tokens in {seconds:.1f} s"
    )


def _row(row: dict[str, str], answer: Generation) -> tuple[str, ...]:
    asked = row["prompt"].splitlines()[-2] if "\n" in row["prompt"] else row["prompt"]
    timings = answer.timings
    return (
        str(answer.adapter),
        _short(asked.partition(": ")[2] or asked, 40),
        _short(answer.text.strip().splitlines()[0], 24),
        _short(row["completion"].strip(), 24),
        f"{timings.time_to_first_token_s:.2f} s",
        f"{timings.total_s:.2f} s",
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


async def promote_and_roll_back(client: AsyncClient) -> None:
    """Publish support's second version, promote it and roll it back while requests keep coming."""
    second = await client.adapters.publish(HERE / "support" / "v2", "support", publisher="demo")
    seen: Counter[str] = Counter()
    failed: list[RequestError] = []
    stop = asyncio.Event()
    rows = held_out("support", 50)

    async def traffic(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            try:
                answer = await client.generate(
                    adapter="support", prompt=rng.choice(rows)["prompt"], max_tokens=4, temperature=0
                )
                seen[str(answer.adapter)] += 1
            except RequestError as error:
                failed.append(error)

    callers = [asyncio.create_task(traffic(seed)) for seed in range(2)]
    await asyncio.sleep(2)
    for what, work in (
        (f"promote support@{second.version}", lambda: client.adapters.promote("support", second.version)),
        ("roll back support", lambda: client.adapters.rollback("support")),
    ):
        before = Counter(seen)
        started = time.monotonic()
        change = await work()
        seconds = time.monotonic() - started
        await asyncio.sleep(3)
        console.print(
            f"  {what}: [bold]support@current is {change.version}[/] after {seconds:.2f} s; "
            f"answers since: {', '.join(f'{count} by {who}' for who, count in sorted((seen - before).items()))}",
            highlight=False,
        )
    stop.set()
    await asyncio.gather(*callers)
    console.print(f"  {sum(seen.values())} requests during all this, {len(failed)} failed")
    if failed:
        raise SystemExit(f"requests failed: {failed[0]}")


async def demo(client: AsyncClient, process: subprocess.Popen[bytes], keep: bool) -> None:
    """All of it, in order."""
    started = time.monotonic()
    console.rule("[bold]1  start the server", align="left")
    with console.status("starting vLLM (about half a minute)"):
        await until_ready(client, process)
    info = await client.engine()
    console.print(
        f"  {info.engine}, base {info.base.name} {info.base.fingerprint[:19]}, {time.monotonic() - started:.0f} s"
    )
    console.rule("[bold]2  publish three adapters", align="left")
    await publish(client)
    if keep:
        console.print(f"\nServing on {client.target}; the console and OpenAI's API: http://127.0.0.1:{info.http_port}")
        console.print("Try, in another terminal:")
        _next_steps()
        console.print("Ctrl-C stops it; what is published stays, in .loraplex/registry.")
        await asyncio.to_thread(process.wait)
        return
    console.rule("[bold]3  one batch for all of them", align="left")
    with console.status("answering"):
        await mixed_batch(client)
    console.rule("[bold]4  promote and roll back under traffic", align="left")
    await promote_and_roll_back(client)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. What to do next, after [bold]make serve[/]:")
    _next_steps()


def _next_steps() -> None:
    console.print(
        "  .venv/bin/loraplex generate --adapter code "
        "$'Write one shell or SQL command.\\nTask: count the rows in users\\nCommand:'\n"
        "  .venv/bin/loraplex adapters list\n"
        "  .venv/bin/loraplex adapters publish examples/support/v2 support\n"
        "  .venv/bin/loraplex adapters promote support@v2",
        highlight=False,
        soft_wrap=True,
    )


async def main() -> None:
    """Read the arguments, run the server around the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2-135m-instruct"))
    parser.add_argument("--port", type=int, default=50051)
    parser.add_argument("--serve", action="store_true", help="publish the adapters and keep serving")
    arguments = parser.parse_args()
    with server(arguments.model, arguments.port, arguments.serve) as process:
        async with AsyncClient(f"127.0.0.1:{arguments.port}") as client:
            await demo(client, process, arguments.serve)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main())
