"""The client for threads, and what importing the package costs."""

# ruff: noqa: N802 - servicers have the names of the proto's methods

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from engine.api.loraplex.v1 import adapters_pb2, adapters_pb2_grpc
from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.api.loraplex.v1 import generation_pb2_grpc as services
from engine.client import Adapters, AsyncClient, Client, NotFound, RequestError, SyncAdapters


class Server(services.GenerationServiceServicer, adapters_pb2_grpc.AdapterServiceServicer):
    """Echoes prompts; the prompts "missing" and "endless" are refused and never end."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.released = asyncio.Event()

    async def Generate(self, request, context):
        if request.text == "missing":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no adapter")
        if request.text == "endless":
            self.begun.set()
            await asyncio.Event().wait()
        return pb.GenerateResponse(completions=[pb.Completion(text=request.text)])

    async def GenerateStream(self, request, context):
        text = request.request.text
        try:
            for sequence, letter in enumerate(text):
                yield pb.GenerateStreamResponse(
                    sequence=sequence, text=letter, usage=pb.Usage() if sequence == len(text) - 1 else None
                )
                if text == "endless":
                    await asyncio.Event().wait()
        finally:
            self.released.set()

    async def ListAdapters(self, request, context):
        return adapters_pb2.ListAdaptersResponse(adapters=[adapters_pb2.AdapterSummary(name="support")])

    async def PreloadAdapter(self, request, context):
        yield adapters_pb2.PreloadAdapterResponse(progress=adapters_pb2.Progress(stage="loading"))
        yield adapters_pb2.PreloadAdapterResponse(version=adapters_pb2.AdapterVersion(name=request.adapter))

    async def WatchAdapters(self, request, context):
        yield adapters_pb2.WatchAdaptersResponse(name=request.name)


async def in_thread(work, serve, *services):
    """Run `work(client)` in a thread, with a Client of a server of these services."""
    target = await serve(*services)

    def run():
        with Client(target) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_eight_threads_share_a_client(serve):
    """Eight threads call and stream at once over one client; each gets its own answers, and close joins the thread."""

    def work(client: Client):
        def one(number: int) -> list[str]:
            prompts = [f"{number}-{turn}" for turn in range(20)]
            whole = [client.generate(prompt=prompt).text for prompt in prompts]
            streamed = ["".join(chunk.text for chunk in client.stream(prompt=prompt)) for prompt in prompts]
            assert whole == streamed == prompts
            return whole

        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(8)))

    answers = await in_thread(work, serve, Server())
    assert len({text for texts in answers for text in texts}) == 160
    assert not [thread for thread in threading.enumerate() if thread.name == "loraplex-client"]


async def test_errors_and_administration(serve):
    """Errors, progress and watches come through as in the asyncio client."""

    def work(client: Client):
        with pytest.raises(NotFound, match="no adapter"):
            client.generate(prompt="missing")
        with pytest.raises(TypeError, match="exactly one"):
            client.stream()
        stages: list[str] = []
        assert [one.name for one in client.adapters.list()] == ["support"]
        assert client.adapters.preload("support", lambda step: stages.append(step.stage)).name == "support"
        assert stages == ["loading"]
        assert [change.name for change in client.adapters.watch("support")] == ["support"]

    await in_thread(work, serve, Server())


async def test_leaving_a_stream_cancels_it(serve):
    """A break in a thread frees the server, while the client stays open."""
    server = Server()

    async def released() -> None:
        await asyncio.wait_for(server.released.wait(), 2)

    loop = asyncio.get_running_loop()

    def work(client: Client):
        for _ in client.stream(prompt="endless"):
            break
        asyncio.run_coroutine_threadsafe(released(), loop).result()

    await in_thread(work, serve, server)


async def test_close_ends_calls_in_flight(serve):
    """Closing fails a call of another thread as CANCELLED; later calls are refused, and closing twice is harmless."""
    server = Server()
    client = Client(await serve(server))
    call = asyncio.create_task(asyncio.to_thread(client.generate, prompt="endless"))
    await server.begun.wait()
    await asyncio.to_thread(client.close)
    with pytest.raises(RequestError, match="closed") as caught:
        await call
    assert caught.value.code is grpc.StatusCode.CANCELLED
    with pytest.raises(RuntimeError, match="the client is closed"):
        client.generate(prompt="x")
    client.close()


async def test_calls_from_callbacks_are_refused(serve):
    """A callback runs on the client's own thread, where waiting for the client would never end."""

    def work(client: Client):
        with pytest.raises(RuntimeError, match="own callbacks"):
            client.adapters.preload("support", lambda _: client.adapters.list())

    await in_thread(work, serve, Server())


@pytest.mark.parametrize(("asynchronous", "blocking"), [(AsyncClient, Client), (Adapters, SyncAdapters)])
def test_both_clients_have_the_same_methods(asynchronous, blocking):
    """Every public method is in both, with the same parameters."""

    def public(kind):
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert public(asynchronous) == public(blocking)


def test_importing_the_client_loads_nothing_heavy():
    """The client needs grpcio and protobuf alone."""
    heavy = "vllm torch transformers pydantic obstore numpy yaml structlog google.rpc engine.config engine.errors"
    script = f"import sys, engine.client; print([name for name in '{heavy}'.split() if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


async def test_a_client_that_is_never_closed_does_not_hold_the_program(serve):
    """A program that forgets to close its client ends all the same, quietly."""
    target = await serve(Server())
    script = f"from engine.client import Client; print(Client({target!r}).generate(prompt='hello').text)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert (stdout, stderr, process.returncode) == (b"hello\n", b"", 0)
