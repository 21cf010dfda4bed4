"""What it costs to ask callers who they are: rights, quotas and the log's words included.

Servers with made-up answers, a process each: one asks nobody, the others have a policy. Calls take turns one by one, so that
whatever the machine does meanwhile hits all of them alike; what is added is the median of the differences within a turn.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
import yaml
from rich.table import Table

from engine.client import AsyncClient
from engine.client.testing import write_base
from loadtest.bench import output
from loadtest.bench.child import Running, run_until_signal, start
from loadtest.bench.machine import machine
from loadtest.ports import free_port

OPEN, KEY, TOKEN = "nobody is asked", "API key", "token (ES256)"
_ISSUER, _AUDIENCE = "https://bench.invalid", "loraplex"
_WARM_UP = 200
_TURN = (OPEN, KEY, TOKEN)


def _token(folder: Path) -> str:
    """A token, and beside the policy the key that it is checked with."""
    import jwt
    from cryptography.hazmat.primitives.asymmetric import ec

    signing = ec.generate_private_key(ec.SECP256R1())
    public = jwt.algorithms.ECAlgorithm.to_jwk(signing.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [public | {"kid": "1"}]}))
    claims = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": "bench", "exp": int(time.time()) + 3600}
    return jwt.encode(claims, signing, "ES256", headers={"kid": "1"})


async def _locked(folder: Path) -> tuple[Path, dict[str, str]]:
    """A policy with limits that no call meets, and what each caller shows."""
    path, token = folder / "policy.yaml", _token(folder)
    command = [sys.executable, "-m", "engine.cli", "keys", "create", "--json"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    made = json.loads((await process.communicate())[0])
    limits = {"requests_per_s": 100_000, "tokens_per_min": 1_000_000_000, "concurrent": 1000, "max_tokens": 1000}
    tenant = {"base": True, "adapters": ["a-*"], "keys": [made["policy"]], "limits": limits}
    issuer = {"issuer": _ISSUER, "audience": _AUDIENCE, "jwks": "jwks.json", "algorithms": ["ES256"]}
    path.write_text(yaml.safe_dump({"version": 1, "tenants": {"bench": tenant}, "issuers": [issuer]}))
    return path, {OPEN: "", KEY: made["key"], TOKEN: token}


async def _serve(name: str, scratch: Path, base: Path, *more: str) -> Running:
    """A server of its own for each way: one that gets more calls than another is warmer, and answers sooner."""
    port = free_port()
    command = [
        sys.executable, "-m", "engine.cli", "serve", "--engine", "fake", "--model", str(base),
        "--registry", str(scratch / "registry"), "--cache", str(scratch / "cache"), "--port", str(port),
        "--http-port", "0", *more,
    ]  # fmt: skip
    running = await start(name, command, {}, scratch, piped=False)
    running.port = port
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        await client.wait_ready(timeout_s=60)
    return running


async def contest(rounds: int, calls: int) -> dict[str, Any]:
    """Milliseconds by way, and what the policy added to the open server's, round by round."""
    async with AsyncExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-identity-")))
        write_base(scratch / "base")
        policy, credentials = await _locked(scratch)
        log = str(scratch / "audit.jsonl")
        servers = {}
        for way in _TURN:
            (scratch / way).mkdir()
            more = () if way == OPEN else ("--policy", str(policy), "--audit-log", log)
            servers[way] = await _serve(way, scratch / way, scratch / "base", *more)
            stack.push_async_callback(servers[way].stop)
        clients = {
            way: await stack.enter_async_context(
                AsyncClient(f"127.0.0.1:{servers[way].port}", api_key=credentials[way], retries=0)
            )
            for way in _TURN
        }
        await _turns(clients, _WARM_UP)
        with output.progress(rounds) as step:
            measured = []
            for number in range(rounds):
                with step(f"round {number + 1} of {rounds}"):
                    measured.append(await _turns(clients, calls))
        return _medians(measured)


async def _turns(clients: dict[str, AsyncClient], count: int) -> dict[str, list[float]]:
    """So many calls of each way, in milliseconds; who begins changes, so that nobody always follows the same one."""
    times: dict[str, list[float]] = {way: [] for way in clients}
    ways = list(clients)
    for number in range(count):
        for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
            began = time.perf_counter()
            await clients[way].generate(prompt="hello", max_tokens=1, temperature=0)
            times[way].append((time.perf_counter() - began) * 1000)
    return times


def _medians(measured: list[dict[str, list[float]]]) -> dict[str, Any]:
    ways = {
        way: {
            "p50_ms": statistics.median(statistics.median(one[way]) for one in measured),
            "p99_ms": statistics.median(statistics.quantiles(one[way], n=100)[98] for one in measured),
        }
        for way in measured[0]
    }
    added = {
        way: [
            statistics.median(mine - theirs for mine, theirs in zip(one[way], one[OPEN], strict=True))
            for one in measured
        ]
        for way in (KEY, TOKEN)
    }
    return {
        "ways": ways,
        "added_p50_ms": {way: statistics.median(rounds) for way, rounds in added.items()},
        "added_by_round_ms": added,
    }


def table(results: dict[str, Any]) -> Table:
    """The medians over the rounds."""
    made = Table(title="A unary call of one token", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "p50", "p99", "added to p50"):
        made.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for way, times in results["ways"].items():
        added = f"{results['added_p50_ms'][way]:+.3f} ms" if way in results["added_p50_ms"] else ""
        made.add_row(way, f"{times['p50_ms']:.3f} ms", f"{times['p99_ms']:.3f} ms", added)
    return made


def identity(
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    calls: Annotated[int, typer.Option(min=10, help="Calls of each way in a round.")] = 1000,
    report: output.Report = output.DEFAULT_REPORT,
    as_json: output.Json = False,
) -> None:
    """What a policy costs a call: the caller's credentials, rights and quotas, against a server that asks nobody.

    Examples:
      make bench ARGS="identity"           half a minute on two cores
      make bench ARGS="identity --rounds 1 --calls 200"

    Answers are made up, so that nothing hides the difference. identity.json goes
    into the report's folder.
    """
    uvloop.install()
    results = run_until_signal(contest(rounds, calls))
    data = {"machine": machine(), "calls": calls, **results}
    path = output.save(data, report / "identity.json")
    if as_json:
        output.write_json(data)
    else:
        output.show([f"{rounds} rounds of {calls} calls each, taking turns", table(results)])
    output.note(f"written: {path}")
