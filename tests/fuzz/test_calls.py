"""Random calls of every RPC over a real socket: each gets a status of our table, and the server lives."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc import aio

from engine.api.loraplex.v1 import engine_pb2, engine_pb2_grpc, generation_pb2, generation_pb2_grpc
from engine.client.testing import FakeServer, fake_server
from engine.server.grpc_server import SERVICES
from tests.fuzz.conftest import Dice
from tests.fuzz.messages import random_message, spoilt
from tests.unit.identity.conftest import Keys, make_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

Code = grpc.StatusCode
Maker = Callable[[MethodDescriptor, random.Random], list[bytes]]
Metadata = tuple[tuple[str, str], ...]
METHODS = [method for service in SERVICES for method in service.methods]
NAMES = ("support", "support@v1", "support@current", "legal", "legal@v2", "v1", "v2", "current", "canary")
TOGETHER = 16  # calls at once
PATIENCE_S = 0.2  # a watch never ends by itself, and a request may ask for a million tokens
REFUSED_WITHIN_S = 20.0
SECRET = "zanzibar-merger"  # another tenant's adapter, of which the callers below may learn nothing
NEAR = (
    "zanzibar",
    "zanzibar-merge",
    "zanzibar-merge@v1",
    "zanzibar-*",
    "mine-a",
    "mine-a@v1",
    "mine-b",
    "v1",
    "current",
)
NEVER = {Code.UNKNOWN, Code.INTERNAL, Code.UNIMPLEMENTED, Code.DATA_LOSS}
# What grpc.aio's client says by itself when the server ended a stream of which it had more to send.
LOCAL = "Internal error from Core"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """A server with two adapters of two versions each."""
    with fake_server(max_running=64, max_streams=256, max_publishing=TOGETHER) as found:
        for name in ("support", "support", "legal", "legal"):
            found.publish(name)
        yield found


@pytest.fixture(scope="module")
def tenants() -> Keys:
    """One tenant that publishes and promotes its own, and one that has the secret."""
    return make_keys(
        {
            "curious": {"roles": ["invoke", "publish", "promote", "observe"], "adapters": ["mine-*"], "base": True},
            "operators": {"roles": ["admin"], "adapters": ["*"], "base": True},
        }
    )


@pytest.fixture(scope="module")
def guarded(tenants: Keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """A server with a policy, and an adapter of each tenant."""
    folder = tmp_path_factory.mktemp("policy")
    files = {"policy": tenants.write(folder / "policy.yaml"), "audit_log": folder / "audit.jsonl"}
    with fake_server(max_running=64, max_streams=256, max_publishing=TOGETHER, **files) as found:
        found.api_key = tenants.of["operators"]
        for name in (SECRET, "mine-a", "mine-b"):
            found.publish(name)
        yield found


async def test_random_messages(server: FakeServer, dice: Dice) -> None:
    """Messages of the right type with any contents."""
    codes = await _send(server, dice("messages"), _messages)
    assert codes[Code.OK]
    assert codes[Code.INVALID_ARGUMENT]


async def test_spoilt_bytes(server: FakeServer, dice: Dice) -> None:
    """Messages with flipped bits, holes and noise."""
    await _send(server, dice("bytes"), lambda *given: [spoilt(data, given[1]) for data in _messages(*given)])


async def test_another_tenants_names(guarded: FakeServer, tenants: Keys, dice: Dice) -> None:
    """A tenant that guesses at names gets no answer, and no refusal, that says what others have."""
    codes = await _send(guarded, dice("tenants"), lambda *given: _messages(*given, NEAR), tenants.header("curious"))
    assert codes[Code.OK]
    assert codes[Code.PERMISSION_DENIED]


async def test_spoilt_credentials(guarded: FakeServer, tenants: Keys, dice: Dice) -> None:
    """Keys with anything wrong about them open nothing."""
    key = tenants.of["curious"].encode()
    async with aio.insecure_channel(guarded.target, options=[("grpc.enable_retries", 0)]) as channel:
        for each in dice("credentials"):
            spoilt_key = spoilt(key, each).decode("latin-1").encode("ascii", "ignore").decode().replace("\0", "")
            shown = "".join(letter for letter in spoilt_key if letter.isprintable()).strip()
            metadata = (("authorization", each.choice(("Bearer ", "bearer", "", "Basic ")) + shown),)
            # A refusal never has to be waited for, however slow the machine is: only the key itself may open a watch.
            patience_s = PATIENCE_S if shown == key.decode() else REFUSED_WITHIN_S
            code = await _one(channel, each, lambda *given: _messages(*given, NEAR), metadata, patience_s)
            assert code in (Code.UNAUTHENTICATED, Code.CANCELLED) or shown == key.decode(), shown


def _messages(method: MethodDescriptor, dice: random.Random, names: tuple[str, ...] = NAMES) -> list[bytes]:
    """What one call sends: a stream has a few messages."""
    count = dice.randint(0, 4) if method.client_streaming else 1
    return [random_message(method.input_type, dice, names).SerializeToString() for _ in range(count)]


async def _send(
    server: FakeServer, dice: Iterator[random.Random], make: Maker, metadata: Metadata = ()
) -> Counter[grpc.StatusCode]:
    codes: Counter[grpc.StatusCode] = Counter()
    async with aio.insecure_channel(server.target, options=[("grpc.enable_retries", 0)]) as channel:

        async def work() -> None:
            for each in dice:
                codes[await _one(channel, each, make, metadata)] += 1

        await asyncio.gather(*(work() for _ in range(TOGETHER)))
        await _serves_on(channel, metadata)
    return codes


async def _one(
    channel: aio.Channel,
    dice: random.Random,
    make: Maker,
    metadata: Metadata = (),
    patience_s: float = PATIENCE_S,
) -> grpc.StatusCode:
    method = dice.choice(METHODS)
    sent = make(method, dice)
    path = f"/{method.containing_service.full_name}/{method.name}"
    given = {"timeout": patience_s, "metadata": metadata}
    try:
        if method.client_streaming:
            answers = channel.stream_stream(path)(iter(sent), **given)
        elif method.server_streaming:
            answers = channel.unary_stream(path)(sent[0], **given)
        else:
            answers = _as_stream(channel.unary_unary(path)(sent[0], **given))
        async for answer in answers:
            assert SECRET.encode() not in answer, f"{path}: {answer!r}"
    except aio.AioRpcError as error:
        return _refused(error, f"{path}\n{[data.hex() for data in sent]}")
    return Code.OK


def _refused(error: aio.AioRpcError, sent: str) -> grpc.StatusCode:
    if error.details() == LOCAL:
        return Code.CANCELLED
    told = f"{error.details()}{error.trailing_metadata()!r}"
    assert error.code() not in NEVER, f"{told}\n{sent}"
    assert "Traceback" not in told, f"{told}\n{sent}"
    assert SECRET not in told, f"{told}\n{sent}"
    return error.code()


async def _as_stream(call: Awaitable[bytes]) -> AsyncIterator[bytes]:
    yield await call


async def _serves_on(channel: aio.Channel, metadata: Metadata) -> None:
    """The base still answers, and nothing of all this is left running."""
    generation = generation_pb2_grpc.GenerationServiceStub(channel)
    engine = engine_pb2_grpc.EngineServiceStub(channel)
    sampling = generation_pb2.SamplingParams(temperature=0.0)
    request = generation_pb2.GenerateRequest(text="hi", sampling=sampling)
    answer = await generation.Generate(request, timeout=20, metadata=metadata)
    assert answer.completions[0].text == "base heard: hi"
    await asyncio.sleep(2 * PATIENCE_S)
    load = (await engine.GetEngine(engine_pb2.GetEngineRequest(), metadata=metadata)).load
    assert (load.running, load.waiting) == (0, 0)
