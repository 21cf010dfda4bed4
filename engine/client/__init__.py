"""The Python client: `AsyncClient` for asyncio, `Client` for threads. It needs grpcio and protobuf, nothing else.

    async with AsyncClient("127.0.0.1:50051") as client:
        answer = await client.generate(adapter="support", prompt="Where is my parcel?", max_tokens=64)
        print(answer.text, answer.adapter)

Every failed call raises a `RequestError`; its subclasses are named after the gRPC status codes.
"""

from engine.client.adapters import Adapters
from engine.client.aio import AsyncClient, connect
from engine.client.credentials import Credentials
from engine.client.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RequestError,
    ResourceExhausted,
    StreamBroken,
    Unauthenticated,
    Unavailable,
)
from engine.client.requests import GenerateOptions, Prompt, Sampling
from engine.client.results import (
    Adapter,
    Chunk,
    Completion,
    Generation,
    Timings,
    TokenCount,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from engine.client.sync import Client, SyncAdapters

__all__ = [
    "Aborted",
    "Adapter",
    "Adapters",
    "AlreadyExists",
    "AsyncClient",
    "Chunk",
    "Client",
    "Completion",
    "Credentials",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "GenerateOptions",
    "Generation",
    "Internal",
    "InvalidArgument",
    "NotFound",
    "PermissionDenied",
    "Prompt",
    "RequestError",
    "ResourceExhausted",
    "Sampling",
    "StreamBroken",
    "SyncAdapters",
    "Timings",
    "TokenCount",
    "TokenLogprob",
    "TokenLogprobs",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "connect",
]
