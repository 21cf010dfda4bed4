"""TLS of both ports, with certificates that are replaced while the server runs.

gRPC asks for the certificates at each new connection; the HTTP port changes to the latest context in each handshake. With a
client CA the gRPC port takes no connection without a client certificate. The HTTP port does, so that health can be asked
for, and whatever else is on it asks for the certificate.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NoReturn, Protocol

import grpc

from engine.config import read_named
from engine.errors import BadConfiguration
from engine.server.identity.certificates import check_authorities, check_pair
from engine.server.identity.follow import LOOK_S, Followed


class TlsSettings(Protocol):
    """The settings that are about TLS."""

    @property
    def tls_certificate(self) -> Path | None:
        """Our certificate, and what leads from it to a root."""

    @property
    def tls_key(self) -> Path | None:
        """Its private key."""

    @property
    def tls_client_ca(self) -> Path | None:
        """Who signs clients' certificates."""


@dataclass(frozen=True)
class _Material:
    grpc: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext
    ends: datetime


class Tls:
    """The certificates now. Raises BadConfiguration if they cannot be used; later on, the last good ones stay."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        paths = [certificate, key, *([client_ca] if client_ca else [])]
        self.files = Followed("TLS certificates", paths, self._read)
        self.context = self._context()
        self.context.sni_callback = self._latest

    @classmethod
    def of(cls, settings: TlsSettings) -> Tls | None:
        """What the settings say; None if there is to be no TLS."""
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        return cls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)

    @property
    def ends(self) -> datetime:
        """When the certificate expires."""
        return self.files.value.ends

    async def follow(self) -> NoReturn:
        """Put changed files in force."""
        while True:
            await asyncio.sleep(LOOK_S)
            await asyncio.to_thread(self.files.refresh)

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC's port."""
        return grpc.dynamic_ssl_server_credentials(
            self.files.value.grpc,
            lambda: self.files.value.grpc,
            require_client_authentication=self._client_ca is not None,
        )

    def _latest(self, connection: ssl.SSLObject, _name: str | None, _first: ssl.SSLContext) -> None:
        connection.context = self.files.value.context

    def _read(self) -> _Material:
        certificate, key = read_named(self._certificate), read_named(self._key)
        ends = check_pair(certificate, key)
        authorities = read_named(self._client_ca) if self._client_ca else None
        if authorities is not None:
            check_authorities(authorities)
        try:
            context = self._context()
        except (OSError, ValueError) as error:
            raise BadConfiguration("the TLS certificates cannot be used together") from error
        return _Material(grpc.ssl_server_certificate_configuration([(key, certificate)], authorities), context, ends)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        if self._client_ca:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        return context
