"""Where the replicas' addresses come from."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterable, Set
from pathlib import Path
from typing import Protocol

import structlog

from engine.config import read_yaml
from engine.errors import BadConfiguration

log = structlog.get_logger(__name__)

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_PORTS = range(1, 65536)
_LOOK_S = 0.5  # between looks at the file
_ASK_S = 2.0  # between questions to the DNS


class Source(Protocol):
    """Tells the addresses (host:port), and tells them again whenever they change."""

    def watch(self) -> AsyncIterator[Set[str]]:
        """All addresses, at once and after every change. If the source fails, the last ones stay."""
        ...


class StaticSource:
    """A list that never changes."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = frozenset(checked(addresses, "replicas"))

    async def watch(self) -> AsyncIterator[Set[str]]:
        """The list."""
        yield self._addresses


class FileSource:
    """A YAML file `replicas: [host:port, ...]`, read again when it changes; one that is broken changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._addresses = self._read()

    async def watch(self) -> AsyncIterator[Set[str]]:
        """What the file says."""
        known: Set[str] | None = None
        while True:
            try:
                self._addresses = await asyncio.to_thread(self._read)
            except BadConfiguration as error:
                log.warning("the list of replicas is left as it was", problem=error.message)
            if self._addresses != known:
                known = self._addresses
                yield known
            await asyncio.sleep(_LOOK_S)

    def _read(self) -> frozenset[str]:
        content = read_yaml(self._path)
        if not isinstance(content.get("replicas"), list):
            raise BadConfiguration(f"{self._path.name} must hold `replicas:` and a list of host:port")
        return frozenset(checked(content["replicas"], self._path.name))


class DnsSource:
    """A DNS name (name:port) whose addresses are the replicas, such as a headless Service of Kubernetes; asked every 2 s."""

    def __init__(self, address: str) -> None:
        name, _, port = checked([address], "replicas")[0].rpartition(":")
        self._name, self._port = name, int(port)
        try:
            name.encode("idna")  # as getaddrinfo will
        except UnicodeError as error:
            raise BadConfiguration(f"replicas: {name!r} cannot be a DNS name: a label is empty or too long") from error

    async def watch(self) -> AsyncIterator[Set[str]]:
        """What the name stands for; nothing until it stands for something."""
        known: Set[str] | None = None
        while True:
            try:
                found = await self._resolve()
            except OSError as error:
                log.debug("the replicas' name has no address", name=self._name, problem=str(error))
                found = known or frozenset()
            if found != known:
                known = found
                yield known
            await asyncio.sleep(_ASK_S)

    async def _resolve(self) -> Set[str]:
        loop = asyncio.get_running_loop()
        entries = await loop.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
        return frozenset(
            f"[{address[0]!s}]:{self._port}" if family == socket.AF_INET6 else f"{address[0]!s}:{self._port}"
            for family, _, _, _, address in entries
        )


def checked(addresses: Iterable[object], where: str) -> list[str]:
    """The addresses, if all are host:port. Raises BadConfiguration naming the first that is not."""
    found = [str(address) for address in addresses]
    for address in found:
        match = _ADDRESS.fullmatch(address)
        if not match:
            raise BadConfiguration(f"{where}: {address!r} is not host:port")
        if int(match[2]) not in _PORTS:
            raise BadConfiguration(f"{where}: the port of {address!r} is not one of 1 to 65535")
    return found
