"""The real Ray, with whole servers and made-up answers: whatever is killed, scaled, changed or drained, no caller notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from engine.client import AsyncClient, RequestError
from engine.client.testing import write_adapter, write_base
from loadtest.drive.processes import below
from loadtest.ports import free_port
from tests.unit.cluster.load import NAMES, Load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.asyncio(loop_scope="module")]

_KILL_FLEET = """
from engine.cluster.ray.local import connected
from engine.config import ClusterSettings
with connected(ClusterSettings(ray="auto")) as ray:
    from engine.cluster.ray.control import fleet_of
    ray.kill(fleet_of("e2e"), no_restart=False)
"""
# Many log probabilities fill the connection, so that the servers are far from done when the first tokens are read.
_WIDE: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0, "logprobs": 20}


class Cluster:
    """`loraplex cluster up` as a process, and what the command line can do to it."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        for name in ("base", "other"):
            write_base(folder / name)
        self.other = folder / "other"
        (self.other / "tokenizer.json").write_text('{"name": "other"}')  # and so another fingerprint
        self.spec = [
            "--replicas", "2", "--cpus", "0.1", "--model", str(folder / "base"), "--registry", str(folder / "registry"),
            "--cache", str(folder / "cache"), "--port", str(self.port), "--http-port", "0", "--name", "e2e",
        ]  # fmt: skip
        self.log = (folder / "cluster.log").open("wb")
        command = [sys.executable, "-m", "engine.cli", "cluster", "up", *self.spec, *self.settings()]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, start_new_session=True)

    @staticmethod
    def settings(max_resident: int = 8, drain_s: int = 20) -> list[str]:
        """Settings of the servers and the router."""
        engine = {"engine": "fake", "drain_s": 10, "context_length": 2048, "max_resident": max_resident}
        return ["--engine", json.dumps(engine), "--router", json.dumps({"drain_s": drain_s})]

    async def command(self, *words: str) -> str:
        """Run `loraplex cluster ...`; its output."""
        command = [sys.executable, "-m", "engine.cli", "cluster", *words]
        piped = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=piped, stderr=piped, env=self.environment())
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()

    def raylet(self) -> psutil.Process:
        """Ray's process on this machine, of this cluster: others may be running."""
        return next(one for one in psutil.Process(self.process.pid).children(recursive=True) if one.name() == "raylet")

    def environment(self) -> dict[str, str]:
        """With it `--ray auto` means this cluster's Ray."""
        start = "--gcs-address="
        address = next(word for word in self.raylet().cmdline() if word.startswith(start))
        return os.environ | {"RAY_ADDRESS": address.removeprefix(start)}

    async def status(self) -> list[dict[str, Any]]:
        """What `status` says of the replicas."""
        found: list[dict[str, Any]] = json.loads(await self.command("status", "--name", "e2e", "--json"))["replicas"]
        return found

    @staticmethod
    def processes(kind: str) -> list[psutil.Process]:
        """The processes of the engines or routers."""
        return [
            one for one in psutil.process_iter(["cmdline"])
            if any(f"e2e-{kind}-" in word for word in one.info["cmdline"] or [])
        ]  # fmt: skip

    def stop(self) -> None:
        """End all of it."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            for one in (*self.processes("engine"), *self.processes("router"), *below(os.getpid(), ["e2e"])):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            self.log.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Ray for all of these tests."""
    pytest.importorskip("ray")
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        yield started
    finally:
        started.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncClient]:
    """Connected to the router, when both engines are there and have three adapters to answer with."""
    async with AsyncClient(f"127.0.0.1:{cluster.port}", timeout_s=60) as connected:
        await up(connected)
        folder = tmp_path_factory.mktemp("adapters")
        for seed, name in enumerate(filter(None, NAMES)):
            write_adapter(folder / name, seed)
            await connected.adapters.publish(folder / name, name)
        yield connected


async def up(client: AsyncClient, engines: int = 2) -> None:
    """Wait until the router knows so many engines, and no others."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        try:
            if (await client.engine()).engine.startswith(f"{engines} of {engines} "):
                return
        except RequestError:
            pass
        await asyncio.sleep(0.1)
    pytest.fail(f"{engines} engines did not come up")


async def gone(processes: set[psutil.Process]) -> None:
    """Wait until all of them have ended."""
    left = (await asyncio.to_thread(psutil.wait_procs, list(processes), 30))[1]
    assert not left


def load(client: AsyncClient) -> Load:
    """Answers of 200 tokens each, and some time for Ray: it all shares a machine."""
    return Load(client, pause_s=0.1, max_tokens=200, ignore_eos=True)


async def test_a_server_is_killed(cluster: Cluster, client: AsyncClient) -> None:
    """Ray replaces it, and no answer is lost or changed."""
    callers = load(client)
    async with callers.running(6):
        await asyncio.sleep(1)
        cluster.processes("engine")[0].kill()
        await asyncio.sleep(1)
        await up(client)
    assert not callers.wrong
    assert callers.answered > 20


async def test_scaling_restarts_nothing(cluster: Cluster, client: AsyncClient) -> None:
    """One more engine, and one less again; those that stay, and the router, are the same processes as before."""
    engines, routers = set(cluster.processes("engine")), set(cluster.processes("router"))
    callers = load(client)
    async with callers.running(6):
        await cluster.command("scale", "3", "--name", "e2e")
        await up(client, engines=3)
        three = set(cluster.processes("engine"))
        assert engines < three
        await cluster.command("scale", "2", "--name", "e2e")
        await up(client, engines=2)
    assert not callers.wrong
    assert callers.answered > 20
    assert set(cluster.processes("engine")) < three
    assert set(cluster.processes("router")) == routers


async def test_new_settings_roll(cluster: Cluster, client: AsyncClient) -> None:
    """The same settings restart nothing; new ones replace every engine, and the router at its port: nobody notices."""
    engines, routers = set(cluster.processes("engine")), set(cluster.processes("router"))
    callers = load(client)
    async with callers.running(6):
        await cluster.command("up", *cluster.spec, "--ray", "auto", *cluster.settings())
        assert set(cluster.processes("engine")) == engines
        assert set(cluster.processes("router")) == routers
        settings = [*cluster.settings(max_resident=4, drain_s=19), "--runtime-env", '{"env_vars": {"E2E": "rolled"}}']
        await cluster.command("up", *cluster.spec, "--ray", "auto", *settings)
        await up(client)
    assert not callers.wrong
    assert callers.answered > 20
    assert not engines & set(cluster.processes("engine"))
    assert not routers & set(cluster.processes("router"))
    assert (await client.engine()).limits.max_resident == 2 * 4
    assert {one.environ().get("E2E") for kind in ("engine", "router") for one in cluster.processes(kind)} == {"rolled"}


async def test_a_drained_engine_is_replaced(cluster: Cluster, client: AsyncClient) -> None:
    """It finishes what it has, and a fresh one takes its place."""
    before = {row["address"] for row in await cluster.status()}
    drained = min(before)
    callers = load(client)
    async with callers.running(6):
        await cluster.command("drain", drained, "--name", "e2e")
        await asyncio.sleep(3)
        await up(client)
    after = {row["address"] for row in await cluster.status()}
    assert not callers.wrong
    assert callers.answered > 20
    assert before - after == {drained}
    assert len(after) == 2


async def test_the_fleet_is_killed(cluster: Cluster, client: AsyncClient) -> None:
    """Routers go on with what they know, and soon the new Fleet knows it too; the settings are not forgotten."""
    engines = set(cluster.processes("engine"))
    callers = load(client)
    async with callers.running(6):
        kill = [sys.executable, "-c", _KILL_FLEET]
        await asyncio.to_thread(subprocess.run, kill, check=True, env=cluster.environment())
        await asyncio.sleep(5)
        assert len(await cluster.status()) == 2
        await cluster.command("scale", "2", "--name", "e2e")
    assert not callers.wrong
    assert set(cluster.processes("engine")) == engines


async def test_down_lets_answers_end(cluster: Cluster, client: AsyncClient) -> None:
    """What has begun is finished, then nothing of ours runs; Ray goes on, and it can all be started again."""
    streams = [client.stream(prompt=f"{number}", **_WIDE) for number in range(6)]
    firsts = [await anext(aiter(stream)) for stream in streams]
    assert all(first.token_ids for first in firsts)
    down = asyncio.create_task(cluster.command("down", "--name", "e2e"))
    with contextlib.suppress(RequestError):  # from when the engines take no more
        while not down.done():
            await client.engine()
            await asyncio.sleep(0.1)
    counts = [1 + sum([len(chunk.token_ids) async for chunk in stream]) for stream in streams]
    assert counts == [1500] * 6
    await down
    assert not cluster.processes("engine")
    assert not cluster.processes("router")
    await cluster.command("up", *cluster.spec, "--ray", "auto", *cluster.settings())
    await up(client)


async def test_the_base_changes(cluster: Cluster, client: AsyncClient) -> None:
    """A second base comes beside the first, whose engines are left alone, and then is the only one, with its own left alone."""
    engines, routers = set(cluster.processes("engine")), set(cluster.processes("router"))
    change = ["up", *cluster.spec, "--ray", "auto", *cluster.settings()]
    callers = load(client)
    async with callers.running(6):
        await cluster.command(*change, "--next-model", str(cluster.other))
        await up(client, engines=3)
        assert engines < set(cluster.processes("engine"))
        bases = sorted(row["base"].partition(" ")[0] for row in await cluster.status())
        assert bases == ["base", "base", "other"]
        await cluster.command("scale", "1", "--next-replicas", "2", "--name", "e2e")
        await up(client, engines=3)
        others = set(cluster.processes("engine")) - engines
    assert not callers.wrong
    assert callers.answered > 20
    await cluster.command(*change, "--model", str(cluster.other))
    await gone(engines)
    await up(client)
    assert set(cluster.processes("engine")) == others
    assert set(cluster.processes("router")) == routers
    assert (await client.engine()).base.name == "other"
    await cluster.command(*change)
    await up(client)


async def test_engines_follow_the_work(cluster: Cluster, client: AsyncClient) -> None:
    """With nothing to do there are as few as allowed; work that waits brings another one, and it goes again."""
    limits = ["--replicas", "1", "--max-replicas", "2", "--scale-up-after-s", "1", "--scale-down-after-s", "4"]
    await cluster.command("up", *cluster.spec, "--ray", "auto", *cluster.settings(), *limits)
    await up(client, engines=1)
    callers = Load(client, max_tokens=1000, ignore_eos=True)
    async with callers.running(40):  # of 32 places
        await up(client, engines=2)
    await up(client, engines=1)
    assert not callers.wrong


async def test_the_raylet_is_killed(cluster: Cluster, client: AsyncClient) -> None:
    """With Ray itself gone, answers under way are finished. The last test: nothing is left afterwards."""
    streams = [client.stream(prompt=f"{number}", **_WIDE) for number in range(6)]
    firsts = [await anext(aiter(stream)) for stream in streams]
    assert all(first.token_ids for first in firsts)
    cluster.raylet().kill()
    counts = [1 + sum([len(chunk.token_ids) async for chunk in stream]) for stream in streams]
    assert counts == [1500] * 6
