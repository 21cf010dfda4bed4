"""A server or router as a process of its own, under a Ray actor."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import yaml

import engine
from engine.api.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, engine_pb2, engine_pb2_grpc
from engine.client.credentials import Credentials
from engine.cluster.router.workers import NOTIFY_SOCKET
from engine.server.process_end import END_WITH_PARENT

_LOOK_S = 0.2
_OURS = str(Path(engine.__file__).parents[1])  # where the child finds this very package
_CALL_S = 2.0
_SILENT_S = 30.0  # without an answer, after which a server that was ready is of no use any more
_SILENT_RESTARTING_S = 600.0  # the same while it starts an engine, which may keep it busy
_LOG_BYTES = 16 * 1024 * 1024  # of a log, after which a new one begins; the one before it is kept
_LAST_WORDS_BYTES = 2000
_MODULE = ("-P", "-m", "engine.cli")  # -P: no modules of the working folder


class ChildDied(RuntimeError):
    """The process has ended, or is of no use any more; says why, or how its log ends."""


class Child:
    """`python -P -m engine.cli COMMAND --config ...`, with the settings that are given; it drains when its parent dies."""

    def __init__(
        self,
        command: str,
        settings: Mapping[str, Any],
        folder: Path,
        keeps: Sequence[int] = (),
        environment: Mapping[str, str] = {},
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / f"{command}.yaml"
        config.write_text(yaml.safe_dump({name: _plain(value) for name, value in settings.items()}))
        self._log = folder / f"{command}.log"
        paths = os.pathsep.join(filter(None, (_OURS, os.environ.get("PYTHONPATH"))))  # a runtime environment's, too
        parent = {END_WITH_PARENT: str(os.getpid()), "PYTHONPATH": paths}
        self._older_log = folder / f"{command}.log.1"
        with self._log.open("ab") as log:  # appends wherever it ends, so that it can be made empty under the child
            self.process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, *_MODULE, command, "--config", str(config)],
                stdout=log,
                stderr=log,
                env=os.environ | parent | dict(environment),
                start_new_session=True,
                pass_fds=keeps,
            )

    def check(self) -> None:
        """Raise ChildDied if it has ended. Called every few seconds, and so what keeps its log small."""
        if (code := self.process.poll()) is not None:
            raise ChildDied(f"the process ended with {code}; its log ends:\n{self._last_words()}")
        with suppress(OSError):
            self._rotate()

    def _rotate(self) -> None:
        """By copying: the child and its own children, whatever they are, keep the file open."""
        if self._log.stat().st_size > _LOG_BYTES:
            try:
                shutil.copyfile(self._log, self._older_log)
            finally:  # on a full disk, too
                os.truncate(self._log, 0)

    def _last_words(self) -> str:
        text = b""
        for log in (self._log, self._older_log):
            with suppress(OSError), log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - _LAST_WORDS_BYTES))
                text = file.read() + text
        return text[-_LAST_WORDS_BYTES:].decode(errors="replace")

    def stop(self, grace_s: float) -> None:
        """Have it finish what it has, for so long at most."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """End it and all that it started, at once."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.process.wait(10)


class RouterChild(Child):
    """`loraplex router`, whose processes tell when they take calls: at its port another router may be answering."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, keeps: Sequence[int] = ()) -> None:
        address = str(folder / "ready")
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(address)
        self._awaited = int(settings["workers"])
        super().__init__("router", settings, folder, keeps, environment={NOTIFY_SOCKET: address})

    def wait_ready(self, timeout_s: float) -> None:
        """Return when all its processes take calls. Raises ChildDied, TimeoutError."""
        until = time.monotonic() + timeout_s
        self._told.settimeout(_LOOK_S)
        with self._told:
            while self._awaited and time.monotonic() < until:
                self.check()
                with suppress(TimeoutError):
                    self._told.recv(64)
                    self._awaited -= 1
        if self._awaited:
            raise TimeoutError(f"not ready within {timeout_s:.0f} s")


class ServerChild(Child):
    """`loraplex serve`, and calls to it. They block: an actor makes them in a thread."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, keeps: Sequence[int] = ()) -> None:
        super().__init__("serve", settings, folder, keeps)
        self.address = f"{settings['host']}:{settings['port']}"
        known_by = Credentials.from_environment()  # of this node, if its servers ask who calls
        tls = known_by.channel()
        self._channel = grpc.secure_channel(self.address, tls) if tls else grpc.insecure_channel(self.address)
        self._metadata = known_by.metadata(self.address)
        self._engine = engine_pb2_grpc.EngineServiceStub(self._channel)
        self._adapters = adapters_pb2_grpc.AdapterServiceStub(self._channel)
        self._latest: engine_pb2.GetEngineResponse | None = None
        self._silent_since: float | None = None  # the first look of late that had no answer

    def wait_ready(self, timeout_s: float) -> engine_pb2.GetEngineResponse:
        """Return when the engine can generate. Raises ChildDied, TimeoutError."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            self.check()
            try:
                return self.look()
            except grpc.RpcError:
                time.sleep(_LOOK_S)
        raise TimeoutError(f"not ready within {timeout_s:.0f} s")

    def look(self) -> engine_pb2.GetEngineResponse:
        """How it is. Raises grpc.RpcError."""
        try:
            found: engine_pb2.GetEngineResponse = self._engine.GetEngine(
                engine_pb2.GetEngineRequest(), timeout=_CALL_S, metadata=self._metadata
            )
        except grpc.RpcError:
            self._silent_since = self._silent_since or time.monotonic()
            raise
        self._latest, self._silent_since = found, None
        return found

    def check(self) -> None:
        """Raise ChildDied if it has ended, its engine is dead for good, or the looks had no answer for too long."""
        super().check()
        if self._latest is None:
            return  # it loads its model
        load = self._latest.load
        if load.dead:
            raise ChildDied("its engine is dead for good")
        limit_s = _SILENT_RESTARTING_S if load.restarting else _SILENT_S
        if self._silent_since and time.monotonic() - self._silent_since > limit_s:
            self.kill()  # one that is stopped would not notice that its parent is gone, and keep what it has
            raise ChildDied(f"it has not answered for {limit_s:.0f} s")

    def pin(self, ref: str, *, pinned: bool = True) -> bool:
        """Load an adapter and keep it, or no longer keep it; whether it worked."""
        try:
            asked = adapters_pb2.PinAdapterRequest(adapter=ref, pinned=pinned)
            self._adapters.PinAdapter(asked, timeout=60, metadata=self._metadata)
        except grpc.RpcError:
            return False
        return True

    def preload(self, ref: str) -> bool:
        """Load an adapter before anybody asks for it; whether it worked."""
        try:
            asked = adapters_pb2.PreloadAdapterRequest(adapter=ref)
            list(self._adapters.PreloadAdapter(asked, timeout=60, metadata=self._metadata))
        except grpc.RpcError:
            return False
        return True

    def stop(self, grace_s: float) -> None:
        """As a Child, and close the connection."""
        super().stop(grace_s)
        self._channel.close()


def free_port(host: str) -> int:
    """A port of this host that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
