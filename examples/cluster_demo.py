"""The cluster demo: Ray places two engines and a router on this machine; one engine is killed under traffic.

make cluster-demo              run it and stop

First all requests are answered undisturbed, then again while a whole server, engine and all, is killed with SIGKILL. Streams
have to go on on the other engine, and in float32 every answer has to be the same, token by token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from engine.client import AsyncClient, RequestError

HERE = Path(__file__).parent
HOME = Path(".loraplex/cluster-demo")
ADAPTERS = ("support", "legal", "code")
REQUESTS, CALLERS, TOKENS = 48, 8, 64
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
ENGINE = {
    "dtype": "float32",
    "max_running": 8,
    "kv_cache_gib": 1,
    "context_length": 1024,
    "max_resident": 4,
    "drain_s": 10,
}


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    tokens: tuple[int, ...]
    failovers: int
    error: str = ""


@contextlib.contextmanager
def cluster(model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`loraplex cluster up` as a process, ended by Ctrl-C at the end of the block."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    command = [
        sys.executable, "-m", "engine.cli", "cluster", "up", "--replicas", "2", "--cpus", "0.5", "--model", str(model),
        "--registry", str(HOME / "registry"), "--cache", str(HOME / "cache"), "--port", str(port), "--http-port", "0",
        "--name", "demo", "--engine", json.dumps(ENGINE),
    ]  # fmt: skip
    with (HOME / "cluster.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=90)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


async def until_up(client: AsyncClient, process: subprocess.Popen[bytes], engines: int) -> float:
    """Wait until the router knows so many engines; returns how long that took. Ends with the log if it all ended."""
    started = time.monotonic()
    while time.monotonic() - started < 300:
        if process.poll() is not None:
            raise SystemExit("the cluster did not start:\n" + (HOME / "cluster.log").read_text()[-3000:])
        with contextlib.suppress(RequestError):
            if (await client.engine()).engine.startswith(f"{engines} of {engines} "):
                return time.monotonic() - started
        await asyncio.sleep(0.25)
    raise SystemExit(f"{engines} engines did not come up in five minutes; see {HOME / 'cluster.log'}")


def questions() -> list[tuple[str, str]]:
    """Adapters and prompts, the base's among them."""
    rows: list[tuple[str, str]] = []
    for name in ADAPTERS:
        lines = (HERE / name / "heldout.jsonl").read_text().splitlines()
        rows += [(name, json.loads(line)["prompt"]) for line in lines[: REQUESTS // 4]]
    rows += [("", f"Tell a story about the number {number}.") for number in range(REQUESTS // 4)]
    return [rows[at] for start in range(REQUESTS // 4) for at in range(start, len(rows), REQUESTS // 4)]


async def ask_all(client: AsyncClient, rows: list[tuple[str, str]], half_way: asyncio.Event) -> list[Answer]:
    """Stream the answers, some at a time; `half_way` is set when a third has ended."""
    places = asyncio.Semaphore(CALLERS)
    ended = 0

    async def one(name: str, prompt: str) -> Answer:
        nonlocal ended
        tokens: list[int] = []
        failovers, error = 0, ""
        async with places:
            try:
                async for chunk in client.stream(
                    adapter=name or None, prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True
                ):
                    tokens += chunk.token_ids
                    failovers = max(failovers, chunk.failovers)
            except RequestError as problem:
                error = str(problem)
        ended += 1
        if ended == len(rows) // 3:
            half_way.set()
        return Answer(tuple(tokens), failovers, error)

    return await asyncio.gather(*(one(name, prompt) for name, prompt in rows))


def kill_one() -> str:
    """Kill the busier one of the demo's servers, with the engine that it started; says which."""
    ours = [one for one in psutil.process_iter(["cmdline"]) if "serve" in (one.info["cmdline"] or [])[2:5]]
    servers = [one for one in ours if any("demo-engine" in word for word in one.info["cmdline"])]
    victim = max(servers, key=lambda one: one.cpu_percent(0.3))
    for process in (victim, *victim.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return f"process {victim.pid}"


async def demo(client: AsyncClient, process: subprocess.Popen[bytes]) -> None:
    """All of it, in order."""
    started = time.monotonic()
    console.rule("[bold]1  start Ray, two engines and a router", align="left")
    with console.status("starting (about a minute)"):
        await until_up(client, process, engines=2)
    console.print(f"  {(await client.engine()).engine}, {time.monotonic() - started:.0f} s")
    console.rule("[bold]2  publish three adapters through the router", align="left")
    for name in ADAPTERS:
        version = await client.adapters.publish(HERE / name / "v1", name, publisher="demo")
        await client.adapters.preload(name)
        console.print(f"  {name}@{version.version} is ready on both")
    rows = questions()
    console.rule(f"[bold]3  {len(rows)} streams, undisturbed", align="left")
    undisturbed = await ask_all(client, rows, asyncio.Event())
    _show(undisturbed, undisturbed)
    console.rule("[bold]4  the same again, and one engine is killed", align="left")
    half_way = asyncio.Event()
    asking = asyncio.create_task(ask_all(client, rows, half_way))
    await half_way.wait()
    console.print(f"  killed {await asyncio.to_thread(kill_one)} with SIGKILL, its engine too")
    disturbed = await asking
    good = _show(disturbed, undisturbed)
    with console.status("waiting for Ray to replace it (about a minute)"):
        seconds = await until_up(client, process, engines=2)
    console.print(f"  Ray has replaced it: 2 engines again after another {seconds:.0f} s")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s.")
    if not good:
        raise SystemExit("answers were lost or changed")
    if not any(answer.failovers for answer in disturbed):
        raise SystemExit("the engine that was killed had no request, so nothing was shown")


def _show(answers: list[Answer], expected: list[Answer]) -> bool:
    lost = [answer for answer in answers if answer.error]
    changed = sum(one.tokens != other.tokens for one, other in zip(answers, expected, strict=True))
    moved = sum(answer.failovers > 0 for answer in answers)
    console.print(
        f"  {len(answers)} streams, {sum(len(answer.tokens) for answer in answers)} tokens: {len(lost)} lost, "
        f"{changed} changed, {moved} went on on the other engine"
    )
    for answer in lost[:3]:
        console.print(f"  [red]{answer.error}")
    return not lost and not changed


async def main() -> None:
    """Read the arguments, run the cluster around the demo; SIGTERM ends it as Ctrl-C does."""
    main_task = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: main_task and main_task.cancel())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".models/smollm2-135m-instruct"))
    parser.add_argument("--port", type=int, default=50050)
    arguments = parser.parse_args()
    with cluster(arguments.model.resolve(), arguments.port) as process:
        async with AsyncClient(f"127.0.0.1:{arguments.port}", timeout_s=300, retries=0) as client:
            await demo(client, process)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
        asyncio.run(main())
