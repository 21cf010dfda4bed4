"""A TCP proxy between the client processes and the target: a network whose connections break or stand still when told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

_PIECE = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing sends RST instead of FIN


class Proxy:
    """One listening port that leads to `target` (host:port)."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str:
        """Listen on a free port of loopback; returns the address."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def stop(self) -> None:
        """Stop listening, and end all connections."""
        self._flows.set()
        self.drop()
        if self._server:
            self._server.close()
            await self._server.wait_closed()

    def drop(self) -> int:
        """Reset every connection, on both sides; returns how many there were."""
        count = len(self._open) // 2
        for writer in list(self._open):
            end: socket.socket = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        return count

    async def stall(self, seconds: float) -> None:
        """Let nothing through for a while; nothing is lost."""
        self._flows.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # whoever closed it has said so to the other side too
            async with self._connected(writer) as (from_target, to_target):
                await asyncio.gather(self._pump(reader, to_target), self._pump(from_target, writer))

    @contextlib.asynccontextmanager
    async def _connected(
        self, client: asyncio.StreamWriter
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        ends = {client}
        try:
            from_target, to_target = await asyncio.open_connection(self._host, self._port)
            ends.add(to_target)
            self._open |= ends
            yield from_target, to_target
        finally:
            self._open -= ends
            for end in ends:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(_PIECE):
            await self._flows.wait()
            sink.write(piece)
            await sink.drain()
        sink.close()


@contextlib.asynccontextmanager
async def proxied(addresses: tuple[str, ...]) -> AsyncIterator[dict[str, Proxy]]:
    """A proxy before each address; by the address to ask instead."""
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for address in addresses:
            proxy = Proxy(address)
            found[await proxy.start()] = proxy
            stack.push_async_callback(proxy.stop)
        yield found
