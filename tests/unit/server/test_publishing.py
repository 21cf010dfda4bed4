"""Publishing through the server: all or nothing, whatever is uploaded and whenever it breaks off."""

from __future__ import annotations

import asyncio
import errno
import json
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2 as pb
from engine.client.testing import FakeServer, fake_server, write_adapter
from engine.errors import RegistryUnavailable
from engine.registry.store import Store
from tests.unit.server.conftest import Refusal, Stubs, all_of, ask, chunk, parts, refused, stubs_to, until, upload

Code = grpc.StatusCode


def header(name: str, **fields: str) -> pb.PublishHeader:
    """The header of an upload."""
    return pb.PublishHeader(name=name, **fields)


def files_in(folder: Path) -> list[Path]:
    """What is in a folder."""
    return list(folder.iterdir())


async def publish(server: FakeServer, messages: Any) -> list[pb.PublishAdapterResponse]:
    """Upload from a thread: grpc.aio loses the status of an upload that is refused before its end (grpc issue 36066)."""
    return await asyncio.to_thread(upload, server.target, messages)


async def names_in(stubs: Stubs) -> set[str]:
    """Every adapter that the server lists."""
    return {adapter.name for adapter in (await stubs.adapters.ListAdapters(pb.ListAdaptersRequest())).adapters}


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server puts what it receives; nothing else is in it."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


async def test_publish(stubs: Stubs, server: FakeServer, scratch: Path, folder: Path, name: str) -> None:
    """Progress in order, then the version with all that the publisher said; the first one becomes current."""
    said = {"run_id": "run-7", "publisher": "me", "notes": "good", "evaluation_json": '{"accuracy": 0.9}'}
    *progress, last = await publish(server, parts(folder, header(name, **said)))
    stages = [message.progress.stage for message in progress]
    assert stages == ["receiving", "receiving", "checking", "storing"]
    assert [message.progress.fraction for message in progress] == sorted(m.progress.fraction for m in progress)
    version = last.version
    assert (version.name, version.version, version.run_id, version.publisher, version.notes) == (
        name,
        "v1",
        "run-7",
        "me",
        "good",
    )
    assert json.loads(version.evaluation_json) == {"accuracy": 0.9}
    assert {file.path for file in version.files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert version.size_bytes == sum(path.stat().st_size for path in files_in(folder))
    found = await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    assert dict(found.adapter.aliases) == {"current": "v1"}
    assert list(found.versions) == [version]
    assert not files_in(scratch)


async def test_small_chunks(server: FakeServer, folder: Path, name: str) -> None:
    """How the bytes are cut into chunks makes no difference."""

    def crumbs() -> Iterator[pb.PublishAdapterRequest]:
        yield pb.PublishAdapterRequest(header=header(name))
        for path in folder.iterdir():
            data = path.read_bytes()
            for start in range(0, len(data), 100):
                yield chunk(path.name, data[start : start + 100])

    first = (await publish(server, crumbs()))[-1].version
    again = (await publish(server, parts(folder, header(name, version="v1"))))[-1].version
    assert again == first


async def test_same_bytes_and_other_bytes(server: FakeServer, folder: Path, tmp_path: Path, name: str) -> None:
    """The same version again is no error; with other bytes it is ALREADY_EXISTS."""
    write_adapter(tmp_path / "other", seed=99)
    await publish(server, parts(folder, header(name, version="v3")))
    assert (await publish(server, parts(folder, header(name, version="v3"))))[-1].version.version == "v3"
    refusal = await refused(publish(server, parts(tmp_path / "other", header(name, version="v3"))))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "VERSION_EXISTS")
    assert refusal.resource is not None
    assert refusal.resource.resource_name == f"{name}@v3"


async def test_race_for_a_version(server: FakeServer, tmp_path: Path, name: str) -> None:
    """Of two who publish one version at once, one succeeds and the other is told."""
    for seed in (1, 2):
        write_adapter(tmp_path / str(seed), seed=500 + seed)
    results = await asyncio.gather(
        *(publish(server, parts(tmp_path / str(seed), header(name, version="v1"))) for seed in (1, 2)),
        return_exceptions=True,
    )
    (error,) = [result for result in results if isinstance(result, grpc.RpcError)]
    assert Refusal.of(error).code is Code.ALREADY_EXISTS
    assert sum(isinstance(result, list) for result in results) == 1


async def test_many_publishers(server: FakeServer, stubs: Stubs, tmp_path: Path, name: str) -> None:
    """Who asks for the next version gets one of their own."""
    folders = [tmp_path / str(seed) for seed in range(4)]
    for seed, each in enumerate(folders):
        write_adapter(each, seed=600 + seed)
    results = await asyncio.gather(*(publish(server, parts(each, header(name))) for each in folders))
    assert {result[-1].version.version for result in results} == {"v1", "v2", "v3", "v4"}
    found = await stubs.adapters.GetAdapter(pb.GetAdapterRequest(name=name))
    assert len(found.history) == 1


SHARED = "adapter_model.safetensors"


def _truncated(folder: Path) -> None:
    (folder / SHARED).write_bytes((folder / SHARED).read_bytes()[:-7])


def _flipped(folder: Path) -> None:
    data = bytearray((folder / SHARED).read_bytes())
    data[20] ^= 0xFF  # inside the header
    (folder / SHARED).write_bytes(data)


def _not_finite(folder: Path) -> None:
    data = bytearray((folder / SHARED).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    (folder / SHARED).write_bytes(data)


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _too_high_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")


def _no_tensors(folder: Path) -> None:
    (folder / SHARED).write_bytes(b"")


@pytest.mark.parametrize(
    "spoil",
    [_truncated, _flipped, _not_finite, _no_config, _broken_config, _too_high_rank, _pickle, _no_tensors],
)
async def test_bad_adapter(
    server: FakeServer, stubs: Stubs, scratch: Path, folder: Path, name: str, spoil: Any
) -> None:
    """A bad adapter is INVALID_ARGUMENT with the check and the place, and leaves nothing."""
    spoil(folder)
    refusal = await refused(publish(server, parts(folder, header(name))))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_ADAPTER")
    assert refusal.violations
    assert refusal.metadata["fix"]
    assert str(scratch) not in str(refusal.__dict__)
    assert name not in await names_in(stubs)
    assert not files_in(scratch)


@pytest.mark.parametrize(
    "path", ["../x", "a/b", "/etc/passwd", ".hidden", "..", ".", "a\\b", "con trol", "x\x00.json", "ä.json", "a" * 256]
)
async def test_path_that_leads_out(server: FakeServer, stubs: Stubs, scratch: Path, name: str, path: str) -> None:
    """No file name leads out of the upload's folder."""
    messages = [pb.PublishAdapterRequest(header=header(name)), chunk(path, b"x")]
    refusal = await refused(publish(server, messages))
    assert refusal.code is Code.INVALID_ARGUMENT
    assert name not in await names_in(stubs)
    assert not files_in(scratch)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "header"),
        ([chunk("adapter_config.json", b"{}")], "header"),
        ([pb.PublishAdapterRequest()], "part"),
        ([pb.PublishAdapterRequest(header=pb.PublishHeader(name="Bad"))], "header.name"),
        ([pb.PublishAdapterRequest(header=header("x", version="1"))], "header.version"),
        ([pb.PublishAdapterRequest(header=header("x", base_fingerprint="abc"))], "header.base_fingerprint"),
        ([pb.PublishAdapterRequest(header=header("x", evaluation_json="{"))], "header.evaluation_json"),
        ([pb.PublishAdapterRequest(header=header("x", evaluation_json="[]"))], "header.evaluation_json"),
        ([pb.PublishAdapterRequest(header=header("x"))] * 2, "header"),
        ([pb.PublishAdapterRequest(header=header("x")), chunk("", b"x")], "chunk.path"),
        ([pb.PublishAdapterRequest(header=header("x")), *(chunk(n, b"x") for n in "aba")], "chunk.path"),
        ([pb.PublishAdapterRequest(header=header("x")), chunk("a", b"x" * 4_194_305)], "chunk.data"),
    ],
)
async def test_out_of_order(
    server: FakeServer, scratch: Path, messages: list[pb.PublishAdapterRequest], field: str
) -> None:
    """Messages that are wrong or come in the wrong order are refused by field."""
    refusal = await refused(publish(server, messages))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert field in refusal.violations
    assert not files_in(scratch)


async def test_header_alone(server: FakeServer, stubs: Stubs, name: str) -> None:
    """An upload without files is no adapter."""
    refusal = await refused(publish(server, [pb.PublishAdapterRequest(header=header(name))]))
    assert refusal.reason == "INVALID_ADAPTER"
    assert name not in await names_in(stubs)


async def test_too_many_files(server: FakeServer, scratch: Path, name: str) -> None:
    """The number of files is bounded."""
    messages = [pb.PublishAdapterRequest(header=header(name)), *(chunk(f"f{i}.txt", b"x") for i in range(65))]
    assert "more than 64 files" in (await refused(publish(server, messages))).message
    assert not files_in(scratch)


async def test_too_many_bytes(scratch: Path) -> None:
    """The size of an upload is bounded while it comes in, not when it is complete."""
    with fake_server(max_adapter_mib=1) as server:

        def flood() -> Iterator[pb.PublishAdapterRequest]:
            yield pb.PublishAdapterRequest(header=header("flood"))
            for number in range(1000):
                yield chunk(f"part-{number // 20}", b"x" * 500_000)

        refusal = await refused(publish(server, flood()))
        assert refusal.code is Code.INVALID_ARGUMENT
        assert "larger than 1048576 bytes" in refusal.message
        assert not [path for path in files_in(scratch) if path.name.startswith("loraplex-upload-")]


@pytest.mark.parametrize("how", ["header", "run.json"])
async def test_other_base(server: FakeServer, stubs: Stubs, folder: Path, name: str, how: str) -> None:
    """An adapter for another base is FAILED_PRECONDITION, naming both fingerprints."""
    other = "sha256:" + "ab" * 32
    said = {"base_fingerprint": other} if how == "header" else {}
    if how == "run.json":
        (folder / "run.json").write_text(json.dumps({"base": {"name": "other", "fingerprint": other}}))
    refusal = await refused(publish(server, parts(folder, header(name, **said))))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "WRONG_BASE")
    assert other in refusal.message
    assert refusal.message.count("sha256:") == 2
    assert name not in await names_in(stubs)


async def test_cut_off(server: FakeServer, stubs: Stubs, scratch: Path, folder: Path, name: str) -> None:
    """An upload whose caller leaves half-way leaves nothing, not even a scratch folder."""
    waiting, go_on = threading.Event(), threading.Event()

    def half() -> Iterator[pb.PublishAdapterRequest]:
        yield pb.PublishAdapterRequest(header=header(name))
        yield chunk("adapter_config.json", (folder / "adapter_config.json").read_bytes())
        waiting.set()
        go_on.wait(10)

    def begin_and_leave() -> None:
        with grpc.insecure_channel(server.target) as channel:
            call = channel.stream_stream(
                "/loraplex.v1.AdapterService/PublishAdapter",
                pb.PublishAdapterRequest.SerializeToString,
                pb.PublishAdapterResponse.FromString,
            )(half())
            assert next(call).progress.stage == "receiving"
            assert len(files_in(scratch)) == 1
            call.cancel()
            go_on.set()

    await asyncio.to_thread(begin_and_leave)
    await until(lambda: not files_in(scratch))
    assert name not in await names_in(stubs)


async def test_uploads_at_once_are_bounded(folder: Path) -> None:
    """One upload too many is UNAVAILABLE; a place that is free again can be used."""
    with fake_server(max_publishing=1) as server:
        begun, go_on = threading.Event(), threading.Event()

        def slow() -> Iterator[pb.PublishAdapterRequest]:
            messages = parts(folder, header("slow"))
            yield next(messages)
            yield next(messages)
            begun.set()
            go_on.wait(10)
            yield from messages

        first = asyncio.create_task(publish(server, slow()))
        await asyncio.to_thread(begun.wait, 5)
        await asyncio.sleep(0.05)
        refusal = await refused(publish(server, parts(folder, header("second"))))
        assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "OVERLOADED")
        go_on.set()
        assert (await first)[-1].version.version == "v1"
        assert (await publish(server, parts(folder, header("second"))))[-1].version.version == "v1"


@pytest.mark.parametrize("why", ["disk full", "read-only"])
async def test_registry_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A full or read-only registry is UNAVAILABLE with the reason; nothing changes, and loaded adapters answer on."""
    with fake_server() as server:
        server.publish("loaded")
        async with stubs_to(server.target) as stubs:
            await stubs.generation.Generate(ask(adapter="loaded"))
            before = await stubs.adapters.ListAdapters(pb.ListAdaptersRequest())

            async def fail(_self: Store, path: str, _data: bytes) -> None:
                raise RegistryUnavailable(f"writing {path}", why)

            with monkeypatch.context() as patch:
                patch.setattr(Store, "create", fail)
                refusals = [
                    await refused(publish(server, parts(folder, header("late")))),
                    await refused(
                        all_of(stubs.adapters.SetAlias(pb.SetAliasRequest(name="loaded", alias="canary", version="v1")))
                    ),
                ]
                answer = await stubs.generation.Generate(ask(adapter="loaded"))
            for refusal in refusals:
                assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "REGISTRY_UNAVAILABLE")
                assert why in refusal.message
                assert refusal.retry_s is not None
            assert answer.completions[0].text == "loaded@v1 heard: hi"
            assert await stubs.adapters.ListAdapters(pb.ListAdaptersRequest()) == before
            assert (await publish(server, parts(folder, header("late"))))[-1].version.name == "late"


@pytest.mark.parametrize("when", ["opening", "writing"])
async def test_own_disk_full(
    server: FakeServer, stubs: Stubs, scratch: Path, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A full disk of the server's own, while it receives, is UNAVAILABLE too, without naming its paths."""
    opened = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if scratch not in self.parents or "x" not in mode:
            return opened(self, mode, *args, **kwargs)
        if when == "opening":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return opened(Path("/dev/full"), "wb", *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        refusal = await refused(publish(server, parts(folder, header(name))))
    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "REGISTRY_UNAVAILABLE")
    assert "disk is full" in refusal.message
    assert str(scratch) not in str(refusal.__dict__)
    assert name not in await names_in(stubs)
    assert not files_in(scratch)


async def test_no_place_for_the_upload(
    server: FakeServer, stubs: Stubs, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When not even the scratch folder can be made, that is the storage's failure, not a bug."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        refusal = await refused(publish(server, parts(folder, header(name))))
    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "REGISTRY_UNAVAILABLE")
    assert name not in await names_in(stubs)


def nested(levels: int) -> str:
    """JSON that is so deep."""
    return '{"a":' * levels + "1" + "}" * levels


# Each was lost in another place: read back, written, written with Python's text of it, or read at all.
UNREADABLE = [nested(200), nested(220), nested(300), nested(2000), r'{"a": "\ud800"}']


@pytest.mark.parametrize("text", UNREADABLE, ids=["200", "220", "300", "2000", "surrogate"])
async def test_evaluations_that_could_not_be_read_again(
    stubs: Stubs, server: FakeServer, folder: Path, name: str, text: str
) -> None:
    """They are refused before anything is stored, whichever way they come."""
    refusal = await refused(publish(server, parts(folder, header(name, evaluation_json=text))))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert any("evaluation_json" in field for field in refusal.violations)
    (folder / "run.json").write_text(f'{{"evaluation": {text}}}')
    refusal = await refused(publish(server, parts(folder, header(name))))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_ADAPTER")
    store = Store.open(server.app.settings.registry)
    assert await store.list(f"adapters/{name}") == []
    (folder / "run.json").write_text(f'{{"evaluation": {nested(199)}}}')
    published = (await publish(server, parts(folder, header(name))))[-1].version
    assert published.version == "v1"
    assert published.evaluation_json.count("{") == 199
    assert name in await names_in(stubs)


@pytest.mark.parametrize("text", UNREADABLE[1:], ids=["220", "300", "2000", "surrogate"])
async def test_records_that_could_not_be_read_again(stubs: Stubs, server: FakeServer, name: str, text: str) -> None:
    """A record of an evaluation has the same limits."""
    await asyncio.to_thread(server.publish, name)
    record = pb.RecordEvaluationRequest(name=name, version="v1", record_json=text)
    refusal = await refused(stubs.adapters.RecordEvaluation(record))
    assert (refusal.code, refusal.reason) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "record_json" in refusal.violations
    kept = await stubs.adapters.ListEvaluations(pb.ListEvaluationsRequest(name=name, version="v1"))
    assert not kept.records_json


async def test_evaluations_are_kept_beside_their_version(stubs: Stubs, server: FakeServer, name: str) -> None:
    """In the order in which they were recorded; of no version that does not exist, and nothing but JSON objects."""
    await asyncio.to_thread(server.publish, name)
    for number in (1, 2):
        record = pb.RecordEvaluationRequest(name=name, version="v1", record_json=json.dumps({"number": number}))
        assert (await stubs.adapters.RecordEvaluation(record)).sequence == number
    kept = await stubs.adapters.ListEvaluations(pb.ListEvaluationsRequest(name=name, version="v1"))
    assert [json.loads(text)["number"] for text in kept.records_json] == [1, 2]
    bad = pb.RecordEvaluationRequest(name=name, version="v1", record_json="[]")
    assert (await refused(stubs.adapters.RecordEvaluation(bad))).code == Code.INVALID_ARGUMENT
    absent = pb.ListEvaluationsRequest(name=name, version="v9")
    assert (await refused(stubs.adapters.ListEvaluations(absent))).code == Code.NOT_FOUND


async def test_an_evaluation_does_not_grow(server: FakeServer, folder: Path, name: str) -> None:
    """What a header may hold is told to others within the same bound, in any alphabet."""
    text = json.dumps({"log": "é" * 32760}, ensure_ascii=False, separators=(",", ":"))
    published = (await publish(server, parts(folder, header(name, evaluation_json=text))))[-1].version
    assert published.evaluation_json == text


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
async def test_numbers_that_json_lacks(stubs: Stubs, server: FakeServer, name: str, number: str) -> None:
    """They are refused in a record: other programs could not read it."""
    server.publish(name)
    record = pb.RecordEvaluationRequest(name=name, version="v1", record_json=f'{{"loss": {number}}}')
    refusal = await refused(stubs.adapters.RecordEvaluation(record))
    assert (refusal.code, list(refusal.violations)) == (Code.INVALID_ARGUMENT, ["record_json"])
