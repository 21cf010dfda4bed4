"""A port that routers of one fleet share, and the way out of it: a router's successor listens before the router leaves.

The kernel gives each new connection to one of those who listen (SO_REUSEPORT), for good: what one of them has not accepted when
it closes is reset, and gRPC refuses its caller's calls until it tries again, a second later. So whoever leaves goes in steps:

1. first packets of new connections are dropped. Their clients send them again after a second;
2. what is on its way is accepted, then the port is closed: from now on new connections find the others;
3. HTTP's connections end with their next answer, gRPC's by its goodbye (GOAWAY), which lets calls under way end.

A call that crosses with the goodbye ends CANCELLED: gRPC's server drops what comes after its own end began, and clients of ours
send it again. gRPC can also send each connection away at a certain age, where no call is dropped; but then it now and then
closes the connection with the end of an answer still unsent (measured: docs/cluster.md).
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import structlog

from engine.errors import AddressInUse

log = structlog.get_logger(__name__)

_ON_THEIR_WAY_S = 0.5  # the longest round trip of a connection that is being made; less than the second above
_LOOK_S = 0.1
_SO_ATTACH_FILTER = 26
# Classic BPF on a TCP header: load the flags, keep SYN and ACK; SYN alone is dropped, all else passes whole.
_NO_FIRST_PACKETS = (
    (0x30, 0, 0, 13),
    (0x54, 0, 0, 0x12),
    (0x15, 0, 1, 0x02),
    (0x06, 0, 0, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
)


def claim(port: int, fleet: str) -> socket.socket:
    """A mark that this process listens on the port for a fleet, as long as it is open. Raises AddressInUse if another one does.

    It is a socket with a name in the same namespace as the port, and ends with its process.
    """
    whose = hashlib.sha256(fleet.encode()).hexdigest()[:16]
    mark = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    mark.bind(f"\0loraplex-router/{port}/{whose}/{os.getpid()}/{mark.fileno()}")
    listed = Path("/proc/net/unix").read_text(errors="replace")
    if set(re.findall(rf"@loraplex-router/{port}/(\w+)/", listed)) != {whose}:
        mark.close()
        raise AddressInUse(f"port {port}, where another fleet's router listens")
    return mark


async def turn_away(*ports: int) -> None:
    """Return when this process has accepted its last connection there (step 1, and 2 up to closing)."""
    code = b"".join(struct.pack("HBBI", *step) for step in _NO_FIRST_PACKETS)
    steps = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(_NO_FIRST_PACKETS), ctypes.addressof(steps))
    for one in _sockets(ports, listening=True):
        try:
            one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        except OSError as error:
            log.warning("callers who connect just now may be refused", problem=str(error))
    await asyncio.sleep(_ON_THEIR_WAY_S)


def close(port: int) -> None:
    """Stop listening there with gRPC's sockets, which gRPC does not let go of before the server ends."""
    for one in _sockets((port,), listening=True):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)  # gRPC logs that it cannot accept any more


async def until_left(port: int) -> None:
    """Return when no connection to the port is left."""
    while any(True for _ in _sockets((port,), listening=False)):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(_LOOK_S)


def _sockets(ports: tuple[int, ...], *, listening: bool) -> Iterator[socket.socket]:
    """Sockets of this process at the ports, gRPC's too; each is open as long as the loop looks at it."""
    for number in Path("/proc/self/fd").iterdir():
        try:
            if not stat.S_ISSOCK(os.fstat(int(number.name)).st_mode):
                continue
            one = socket.socket(fileno=os.dup(int(number.name)))
        except OSError:
            continue  # closed meanwhile
        with one:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                continue
            try:
                if one.getsockname()[1] not in ports:
                    continue
                if not listening:
                    one.getpeername()
                elif not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    continue
            except OSError:
                continue  # not connected, or not any more
            yield one
