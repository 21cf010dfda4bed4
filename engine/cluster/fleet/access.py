"""How a router reaches replicas, and who it is where it does not speak for a caller."""

from __future__ import annotations

from dataclasses import dataclass, field

import grpc
from grpc import aio

from engine.config import RouterSettings, read_named

_COMMON = (
    ("grpc.enable_retries", 0),  # the router retries, elsewhere
    # A peer that vanished without a word is noticed after this long, and its streams go on elsewhere.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
)
OPTIONS = (
    *_COMMON,
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class Access:
    """How a router calls replicas: by TLS or not, and as whom where it does not speak for a caller."""

    tls: grpc.ChannelCredentials | None = None
    tls_name: str = ""  # in the replicas' certificates, if it is not their address
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, settings: RouterSettings) -> Access:
        """What the settings say. Raises BadConfiguration for a file that cannot be read."""
        files = (settings.replica_tls_ca, settings.replica_tls_key, settings.replica_tls_certificate)
        ca, key, certificate = (read_named(file) if file else None for file in files)
        tls = grpc.ssl_channel_credentials(ca, key, certificate) if ca else None
        own = read_named(settings.replica_key_file).decode().strip() if settings.replica_key_file else ""
        return cls(tls, settings.replica_tls_name, (("authorization", f"Bearer {own}"),) if own else ())

    def channel(self, address: str) -> aio.Channel:
        """A connection of its own."""
        if self.tls is None:
            return aio.insecure_channel(address, OPTIONS)
        return aio.secure_channel(address, self.tls, (*OPTIONS, *self._named()))

    def upload_channel(self, address: str) -> grpc.Channel:
        """One for an upload, through gRPC's threads."""
        options = (*_COMMON, *self._named())
        return grpc.secure_channel(address, self.tls, options) if self.tls else grpc.insecure_channel(address, options)

    def _named(self) -> tuple[tuple[str, str], ...]:
        return (("grpc.ssl_target_name_override", self.tls_name),) if self.tls_name else ()


NO_ACCESS = Access()
