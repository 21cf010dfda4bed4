"""The same stream through Ray Serve's own gRPC proxy, to compare with.

    python -m loadtest.bench.router.ray_proxy '{}'

A deployment of one replica yields ready-made messages; Serve's proxy carries them to the client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from engine.api.loraplex.v1 import generation_pb2
from loadtest.bench.child import Handler, Stop, echo, serve
from loadtest.bench.router.server import messages
from loadtest.ports import free_port

_ADDER = "engine.api.loraplex.v1.generation_pb2_grpc.add_GenerationServiceServicer_to_server"


async def prepare(arguments: dict[str, Any]) -> tuple[dict[str, Any], Handler, Stop]:
    """Start Ray and Serve in a session of their own; tells the proxy's port."""
    del arguments
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve as ray_serve
    from ray.serve.config import gRPCOptions

    port = free_port()
    await asyncio.to_thread(_start, ray, ray_serve, gRPCOptions(port=port, grpc_servicer_functions=[_ADDER]))

    async def stop() -> None:
        await asyncio.to_thread(ray_serve.shutdown)
        await asyncio.to_thread(ray.shutdown)

    return {"port": port}, echo, stop


def _start(ray: Any, ray_serve: Any, options: Any) -> None:
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=100 * 1024 * 1024, log_to_driver=False,
        configure_logging=False,
    )  # fmt: skip
    ray_serve.start(grpc_options=options, proxy_location="HeadOnly")

    class Streams:
        """Yields what the scripted server sends."""

        async def GenerateStream(self, request: Any) -> AsyncIterator[Any]:  # noqa: N802 - gRPC's name
            for data in messages(request.request.sampling.max_tokens):
                yield generation_pb2.GenerateStreamResponse.FromString(data)

    deployment = ray_serve.deployment(Streams, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
    ray_serve.run(deployment.bind(), name="bench", route_prefix="/bench")


if __name__ == "__main__":
    asyncio.run(serve(prepare))
