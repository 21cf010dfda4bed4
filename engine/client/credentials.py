"""What a client shows a server, and how it knows the server: TLS files and an API key or token.

Programs pass them to a client; the command line and the load test take them from the environment, so that no secret is ever
on a command line, where every user of the machine could read it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import grpc

from engine import variables
from engine.client.errors import Unauthenticated

SYSTEM = "system"  # instead of a CA's file: the roots that the system trusts

_GIVE_CA = "Give the CA of the server's certificate (--tls-ca FILE), or --tls-ca system for one that the system trusts."

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Credentials:
    """`tls_ca` turns TLS on: a file, or "system". The certificate and its key are for servers that ask for one (mTLS)."""

    tls_ca: str = ""
    tls_certificate: str = ""
    tls_key: str = ""
    api_key: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> Self:
        """What engine/variables.py names. Raises OSError when the key's file cannot be read."""
        get = os.environ.get
        key = get(variables.API_KEY, "")
        if not key and (file := get(variables.API_KEY_FILE)):
            key = Path(file).read_text().strip()
        ca, certificate = get(variables.CLIENT_TLS_CA, ""), get(variables.CLIENT_TLS_CERTIFICATE, "")
        return cls(ca, certificate, get(variables.CLIENT_TLS_KEY, ""), key)

    def channel(self) -> grpc.ChannelCredentials | None:
        """For a secure channel; None without TLS. Raises OSError for a file that cannot be read, else Unauthenticated."""
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise _refused("a client certificate and its key go together", "Give both.")
        if not self.tls_ca:
            if self.tls_certificate:
                raise _refused("a client certificate is shown by TLS only", _GIVE_CA)
            return None
        roots = None if self.tls_ca == SYSTEM else Path(self.tls_ca).read_bytes()
        pair = [Path(file).read_bytes() if file else None for file in (self.tls_key, self.tls_certificate)]
        return grpc.ssl_channel_credentials(roots, *pair)

    def metadata(self, target: str) -> Metadata:
        """The header with the key for calls to `target`. Raises Unauthenticated where others could read it on its way."""
        return authorization(self.api_key, target, encrypted=bool(self.tls_ca))


def authorization(api_key: str, target: str, *, encrypted: bool) -> Metadata:
    """The header of an API key or token; nothing without one. Raises Unauthenticated where others could read it."""
    if not api_key:
        return ()
    if not encrypted and not _is_local(target):
        raise _refused(f"{target} is another machine, and an API key is sent there by TLS only", _GIVE_CA)
    return (("authorization", f"Bearer {api_key}"),)


def _refused(problem: str, fix: str) -> Unauthenticated:
    error = Unauthenticated(problem)
    error.fix = fix
    return error


def _is_local(target: str) -> bool:
    host = target.rpartition(":")[0].strip("[]")
    if target.startswith("unix:") or host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name, which may begin with 127. and be anybody's
        return False
