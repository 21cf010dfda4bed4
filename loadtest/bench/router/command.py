"""What the router adds to its replica: time to first token, and how many messages it forwards.

Replica, router and client are a process each; the replica answers from ready-made bytes. The ways take turns in each round.
On a machine of few cores the wall clock measures all of them together, so messages are also counted per second of the
router's CPU.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import grpc
import psutil
import typer
import uvloop
from rich.table import Table

from engine.api.loraplex.v1 import generation_pb2 as pb
from loadtest.bench import output
from loadtest.bench.child import run_until_signal, start_module
from loadtest.bench.machine import machine
from loadtest.bench.router.process import NAME as ROUTER
from loadtest.bench.router.process import start_router

DIRECT, RAY, SINGLY = "replica alone", "Ray Serve gRPC proxy", "one by one (--no-coalesce)"
_STREAM = "/loraplex.v1.GenerationService/GenerateStream"


@dataclass
class Way:
    """One way to the messages: its channel, and the processes whose CPU time it costs beside the replica's."""

    name: str
    channel: grpc.aio.Channel
    process: psutil.Process | None = None

    def call(self, tokens: int) -> Any:
        """A stream of so many messages."""
        sampling = pb.SamplingParams(max_tokens=tokens)
        request = pb.GenerateStreamRequest(request=pb.GenerateRequest(text="hello", sampling=sampling))
        metadata = (("application", "bench"),) if self.name == RAY else None
        method: Any = self.channel.unary_stream(_STREAM)
        return method(request.SerializeToString(), metadata=metadata)

    async def first_tokens(self, count: int) -> list[float]:
        """Milliseconds to the first message, of so many streams one after the other."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            call = self.call(1)
            await call.read()
            times.append((time.perf_counter() - began) * 1000)
            await call.code()
        return times

    async def throughput(self, streams: int, tokens: int) -> dict[str, float]:
        """One-token messages a second with so many streams at once, by the clock and by the process's CPU time.

        Of messages that were put together each counts as those that it is made of.
        """

        async def one() -> int:
            read = pb.GenerateStreamResponse.FromString
            return sum([len(read(message).token_ids) async for message in self.call(tokens)])

        cpu, began = self._cpu_s(), time.perf_counter()
        received = sum(await asyncio.gather(*(one() for _ in range(streams))))
        seconds, cpu_s = time.perf_counter() - began, self._cpu_s() - cpu
        if received != streams * tokens:
            raise RuntimeError(f"{self.name} lost messages: {received} of {streams * tokens} came")
        return {"messages_per_s": received / seconds, "per_cpu_s": received / cpu_s if cpu_s else 0.0}

    def _cpu_s(self) -> float:
        return sum(self.process.cpu_times()[:2]) if self.process else 0.0


async def contest(rounds: int, streams: int, tokens: int, with_ray: bool) -> dict[str, Any]:
    """Start all ways, let them take turns, and return the medians over the rounds by way."""
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-router-")))
        replica, facts = await start_module(DIRECT, "loadtest.bench.router.server", {}, {}, scratch)
        stack.push_async_callback(replica.stop)
        targets: dict[str, tuple[int, psutil.Process | None]] = {DIRECT: (facts["port"], None)}
        for name, flags in ((ROUTER, ()), (SINGLY, ("--no-coalesce",))):
            router = await start_router([f"127.0.0.1:{facts['port']}"], scratch, *flags, name=name)
            stack.push_async_callback(router.stop)
            targets[name] = (router.port, psutil.Process(router.pid))
        if with_ray:
            proxy, told = await start_module(RAY, "loadtest.bench.router.ray_proxy", {}, {}, scratch)
            stack.push_async_callback(proxy.stop)
            targets[RAY] = (told["port"], None)
        ways = []
        for name, (port, process) in targets.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            ways.append(Way(name, channel, process))
        return await _take_turns(ways, rounds, streams, tokens)


async def _take_turns(ways: list[Way], rounds: int, streams: int, tokens: int) -> dict[str, Any]:
    measured: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    with output.progress((rounds + 1) * len(ways)) as step:
        for number in range(rounds + 1):  # the first one warms up
            for way in ways:
                with step(f"round {number} of {rounds}: {way.name}"):
                    few = 8 if way.name == RAY else 1  # it would take as many times longer
                    first = statistics.median(await way.first_tokens(200 // few))
                    figures = await way.throughput(streams, tokens // few)
                    measured[way.name].append(figures | {"ttft_p50_ms": first})
    medians = {
        name: {key: statistics.median(one[key] for one in results[1:]) for key in results[0]}
        for name, results in measured.items()
    }
    added = [
        routed["ttft_p50_ms"] - direct["ttft_p50_ms"]
        for routed, direct in zip(measured[ROUTER][1:], measured[DIRECT][1:], strict=True)
    ]
    return {"ways": medians, "rounds": measured, "added_ttft_p50_ms": statistics.median(added)}


def table(results: dict[str, Any]) -> Table:
    """The medians."""
    made = Table(title="Medians over the rounds", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "TTFT p50", "messages/s", "per second of its CPU"):
        made.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for name, way in results["ways"].items():
        cpu = f"{way['per_cpu_s']:,.0f}" if way["per_cpu_s"] else ""
        made.add_row(name, f"{way['ttft_p50_ms']:.2f} ms", f"{way['messages_per_s']:,.0f}", cpu)
    return made


def router(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each.")] = 5,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=8, help="Messages of a stream.")] = 800,
    ray: Annotated[bool, typer.Option(help="Compare with Ray Serve's gRPC proxy, if Ray is installed.")] = True,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What the router costs: added time to first token, and messages a second, against the replica alone and Ray's proxy.

    Examples:
      make bench ARGS="router"             a minute on two cores
      make bench ARGS="router --no-ray"

    The replica is scripted and answers from ready-made bytes, so that all that
    is left is the hop. A busy router puts messages together (--coalesce); with
    --no-coalesce it never does. router.json goes into the report's folder.
    """
    with_ray = ray and find_spec("ray") is not None
    uvloop.install()
    results = run_until_signal(contest(rounds, streams, tokens, with_ray))
    data = {"machine": machine(), "streams": streams, "tokens": tokens, **results}
    path = output.save(data, report / "router.json")
    if as_json:
        output.write_json(data)
    else:
        added = f"The router adds {results['added_ttft_p50_ms']:.2f} ms to the median time to first token."
        output.show([f"{streams} streams of {tokens} messages, {rounds} rounds", table(results), added])
    output.note(f"written: {path}")
