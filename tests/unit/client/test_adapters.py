"""The adapters namespace: uploads bit for bit, progress, results, and what is never done twice."""

# ruff: noqa: N802 - servicers have the names of the proto's methods

from __future__ import annotations

import asyncio
import json
import os

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.api.loraplex.v1 import adapters_pb2_grpc as services
from engine.client import AlreadyExists, RequestError, StreamBroken, Unavailable
from engine.client.channel import MEBIBYTE


class Registry(services.AdapterServiceServicer):
    """Keeps what it is sent, answers with what it was asked."""

    def __init__(self) -> None:
        self.header = pb.PublishHeader()
        self.files: dict[str, bytes] = {}
        self.largest = 0
        self.requests: list = []
        self.stuck, self.released = asyncio.Event(), asyncio.Event()

    async def hang(self) -> None:
        """Do nothing until the call is cancelled."""
        try:
            self.stuck.set()
            await asyncio.Event().wait()
        finally:
            self.released.set()

    async def PublishAdapter(self, request_iterator, context):
        async for part in request_iterator:
            if part.WhichOneof("part") == "header":
                self.header = part.header
                if part.header.name == "taken":
                    await context.abort(grpc.StatusCode.ALREADY_EXISTS, "taken")
                if part.header.name == "stuck":
                    await self.hang()
                if part.header.name == "busy":
                    self.requests.append(part.header)
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
                yield pb.PublishAdapterResponse(progress=pb.Progress(stage="receiving"))
                continue
            self.largest = max(self.largest, len(part.chunk.data))
            self.files[part.chunk.path] = self.files.get(part.chunk.path, b"") + part.chunk.data
        yield pb.PublishAdapterResponse(progress=pb.Progress(stage="checking", fraction=0.5))
        yield pb.PublishAdapterResponse(version=pb.AdapterVersion(name=self.header.name, version="v4"))

    async def SetAlias(self, request, context):
        self.requests.append(request)
        yield pb.SetAliasResponse(progress=pb.Progress(stage="loading"))
        yield pb.SetAliasResponse(change=pb.AliasChange(sequence=1, alias=request.alias, version=request.version))

    async def RollbackAlias(self, request, context):
        self.requests.append(request)
        if request.name == "busy":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "busy")
        yield pb.RollbackAliasResponse(change=pb.AliasChange(alias=request.alias, version="v1"))

    async def SetCanary(self, request, context):
        self.requests.append(request)
        yield pb.SetCanaryResponse(progress=pb.Progress(stage="probing"))
        yield pb.SetCanaryResponse(change=pb.AliasChange(alias="canary", version="v3", canary_weight=request.weight))

    async def EndCanary(self, request, context):
        self.requests.append(request)
        return pb.EndCanaryResponse(change=pb.AliasChange(alias="canary", version="v3"))

    async def RemoveAlias(self, request, context):
        self.requests.append(request)
        return pb.RemoveAliasResponse(change=pb.AliasChange(alias=request.alias))

    async def PreloadAdapter(self, request, context):
        self.requests.append(request)
        yield pb.PreloadAdapterResponse(progress=pb.Progress(stage="loading"))
        if request.adapter != "lost":
            yield pb.PreloadAdapterResponse(version=pb.AdapterVersion(name=request.adapter))

    async def PinAdapter(self, request, context):
        self.requests.append(request)
        return pb.PinAdapterResponse(version=pb.AdapterVersion(name=request.adapter))

    async def UnloadAdapter(self, request, context):
        self.requests.append(request)
        return pb.UnloadAdapterResponse(was_resident=True)

    async def DeleteVersion(self, request, context):
        self.requests.append(request)
        return pb.DeleteVersionResponse()

    async def ListAdapters(self, request, context):
        return pb.ListAdaptersResponse(adapters=[pb.AdapterSummary(name="support", aliases={"current": "v1"})])

    async def GetAdapter(self, request, context):
        return pb.GetAdapterResponse(adapter=pb.AdapterSummary(name=request.name))

    async def WatchAdapters(self, request, context):
        self.watched = request.name
        yield pb.WatchAdaptersResponse()
        yield pb.WatchAdaptersResponse(name="support", deleted_version="v1")
        await self.hang()


async def test_publish_sends_the_folder_bit_for_bit(connect, tmp_path):
    """Every regular file arrives whole, the empty one too, in chunks of at most 1 MiB, after its header."""
    files = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": os.urandom(2 * MEBIBYTE + 17),
        "exact.bin": os.urandom(MEBIBYTE),
        "empty.txt": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "inner.bin").write_bytes(b"not sent")
    registry, stages = Registry(), []
    client = await connect(registry)

    version = await client.adapters.publish(
        tmp_path,
        "support",
        "v4",
        base_fingerprint="sha256:" + "0" * 64,
        run_id="run-1",
        publisher="ci",
        notes="first",
        evaluation={"loss": 0.5},
        on_progress=lambda progress: stages.append(progress.stage),
    )
    assert registry.files == files
    assert registry.largest == MEBIBYTE
    assert (version.name, version.version) == ("support", "v4")
    assert stages == ["receiving", "checking"]
    header = registry.header
    assert (header.version, header.base_fingerprint) == ("v4", "sha256:" + "0" * 64)
    assert (header.run_id, header.publisher, header.notes) == ("run-1", "ci", "first")
    assert json.loads(header.evaluation_json) == {"loss": 0.5}


async def test_publish_refused_early(connect, tmp_path):
    """A refusal in the middle of a large upload is the error that the caller sees."""
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(32 * MEBIBYTE))
    client = await connect(Registry())
    with pytest.raises(AlreadyExists, match="taken"):
        await client.adapters.publish(tmp_path, "taken")


async def test_an_upload_ends_with_its_task_or_its_client(connect, tmp_path):
    """Cancelling the task and closing the client each end an upload that the server does not answer."""
    for by_close in (False, True):
        registry = Registry()
        client = await connect(registry)
        upload = asyncio.create_task(client.adapters.publish(tmp_path, "stuck"))
        await asyncio.wait_for(registry.stuck.wait(), 2)
        if by_close:
            await client.close()
        else:
            upload.cancel()
        with pytest.raises(RequestError if by_close else asyncio.CancelledError):
            await upload
        await asyncio.wait_for(registry.released.wait(), 2)


async def test_publish_of_files_that_cannot_be_read(connect, tmp_path, monkeypatch):
    """A folder that is missing, or a file that vanishes during the upload, is the OSError that it is."""
    registry = Registry()
    client = await connect(registry)
    with pytest.raises(FileNotFoundError):
        await client.adapters.publish(tmp_path / "nowhere", "support")

    monkeypatch.setattr("engine.client.adapters._files", lambda folder: [folder / "vanished"])
    with pytest.raises(FileNotFoundError, match="vanished"):
        await client.adapters.publish(tmp_path, "support")


async def test_what_must_not_happen_twice_is_not_retried(connect, tmp_path):
    """A publication and a rollback that fail as UNAVAILABLE are sent once."""
    registry = Registry()
    client = await connect(registry)
    with pytest.raises(Unavailable):
        await client.adapters.rollback("busy")
    with pytest.raises(Unavailable):
        await client.adapters.publish(tmp_path, "busy")
    assert len(registry.requests) == 2


async def test_administration(connect):
    """Each call sends what it was given and returns its result."""
    registry, stages = Registry(), []
    adapters = (await connect(registry)).adapters
    change = await adapters.promote(
        "support",
        "v2",
        expected_version="v1",
        actor="me",
        reason="better",
        on_progress=lambda p: stages.append(p.stage),
    )
    assert (change.alias, change.version, stages) == ("current", "v2", ["loading"])
    assert (await adapters.rollback("support", actor="me", reason="worse")).version == "v1"
    assert (await adapters.set_canary("support", 0.25, actor="me", reason="try")).canary_weight == 0.25
    assert not (await adapters.end_canary("support", actor="me", reason="bad")).HasField("canary_weight")
    assert (await adapters.remove_alias("support", "canary", actor="me", reason="done")).alias == "canary"
    assert (await adapters.preload("support@v2", lambda p: stages.append(p.stage))).name == "support@v2"
    assert (await adapters.pin("support@v2")).name == "support@v2"
    await adapters.pin("support", pinned=False)
    assert await adapters.unload("support@v2") is True
    await adapters.delete_version("support", "v1")
    assert registry.requests == [
        pb.SetAliasRequest(
            name="support", alias="current", version="v2", expected_version="v1", actor="me", reason="better"
        ),
        pb.RollbackAliasRequest(name="support", alias="current", actor="me", reason="worse"),
        pb.SetCanaryRequest(name="support", weight=0.25, actor="me", reason="try"),
        pb.EndCanaryRequest(name="support", actor="me", reason="bad"),
        pb.RemoveAliasRequest(name="support", alias="canary", actor="me", reason="done"),
        pb.PreloadAdapterRequest(adapter="support@v2"),
        pb.PinAdapterRequest(adapter="support@v2", pinned=True),
        pb.PinAdapterRequest(adapter="support", pinned=False),
        pb.UnloadAdapterRequest(adapter="support@v2"),
        pb.DeleteVersionRequest(name="support", version="v1"),
    ]
    assert [one.name for one in await adapters.list()] == ["support"]
    assert (await adapters.get("support")).adapter.name == "support"


async def test_long_work_without_a_result_is_broken(connect):
    """Progress alone is no success."""
    client = await connect(Registry())
    with pytest.raises(StreamBroken):
        await client.adapters.preload("lost")


async def test_watch(connect):
    """Changes come as they happen, without a deadline, until the watcher leaves."""
    registry = Registry()
    client = await connect(registry, timeout_s=0.5)
    changes = client.adapters.watch("support")
    assert (await anext(changes)).WhichOneof("change") is None
    assert (await anext(changes)).deleted_version == "v1"
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting := asyncio.ensure_future(anext(changes))), 0.7)
    assert registry.watched == "support"
    waiting.cancel()
    await asyncio.wait_for(registry.released.wait(), 2)
