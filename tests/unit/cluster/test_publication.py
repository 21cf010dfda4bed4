"""Publications through the router: to a replica of their base, chunk by chunk, and known to all."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2
from engine.client import Aborted
from engine.client.testing import write_adapter
from tests.unit.cluster.conftest import StartCluster
from tests.unit.server.conftest import chunk, parts, upload


async def test_a_publication_is_visible_everywhere(start: StartCluster) -> None:
    """What is published through the router, or at one server alone, all answer before they would look by themselves."""
    async with start(3) as cluster:
        await cluster.publish("support")
        for app in cluster.apps:
            assert "support" in app.catalog.adapters
        write_adapter(cluster.folder / "other", 9)
        header = adapters_pb2.PublishHeader(name="direct")
        target = cluster.addresses[0]
        await asyncio.to_thread(lambda: upload(target, parts(cluster.folder / "other", header)))
        for _ in range(3):
            assert (
                await cluster.client.generate(adapter="direct", prompt="x", temperature=0)
            ).text == "direct@v1 heard: x"


async def test_a_refused_upload_says_why(start: StartCluster) -> None:
    """A publication that the replica refuses in its middle ends with the replica's own status."""
    async with start() as cluster:
        target = f"127.0.0.1:{cluster.router.port}"
        messages = [chunk("a", b"x")] * 3

        def send() -> str:
            try:
                upload(target, messages)
            except grpc.RpcError as error:
                return str(error)
            return "accepted"

        assert "must be the first message" in await asyncio.to_thread(send)


async def test_a_malformed_upload_says_why(start: StartCluster) -> None:
    """A message that breaks a constraint in the middle of an upload is named, as by a server."""
    async with start() as cluster:
        header = adapters_pb2.PublishAdapterRequest(header=adapters_pb2.PublishHeader(name="support"))
        messages = [header, chunk("adapter_config.json", b"{}"), chunk("", b"x"), chunk("y", b"z")]

        def send() -> tuple[str, str]:
            try:
                upload(f"127.0.0.1:{cluster.router.port}", messages)
            except grpc.RpcError as error:
                return error.code().name, str(error)
            return "OK", ""

        code, text = await asyncio.to_thread(send)
        assert (code, "path" in text) == ("INVALID_ARGUMENT", True)


async def test_a_publication_goes_to_a_replica_of_its_base(start: StartCluster) -> None:
    """Which replica is less busy does not decide on which base an adapter counts as trained."""
    async with start(3, models=("main", "main", "other")) as cluster:
        bases = [app.generator.residency.base_fingerprint for app in cluster.apps if app.generator]
        assert bases[0] == bases[1] != bases[2]
        for number, (name, base) in enumerate((("a", bases[2]), ("b", bases[0]), ("c", ""), ("d", bases[2]))):
            write_adapter(cluster.folder / name, number)
            for link in cluster.router.fleet.usable():
                link.replica.sent += link.replica.report.base == (base or bases[0])  # the busier ones
            published = await cluster.client.adapters.publish(cluster.folder / name, name, base_fingerprint=base)
            assert published.base_fingerprint == (base or bases[0])


async def test_a_replica_that_is_gone_when_it_is_to_publish(start: StartCluster) -> None:
    """The caller is told to look; asked again, another replica publishes."""
    async with start(2, router={"poll_s": 60}) as cluster:
        first = cluster.router.fleet.usable()[0].address
        server = cluster.apps[cluster.addresses.index(first)]._server
        assert server
        await server.stop(None)
        with pytest.raises(Aborted) as lost:
            await cluster.publish("support")
        assert lost.value.reason == "REPLICA_LOST"
        assert await cluster.publish("support") == "v1"
