"""Identity: who calls, by the policy that is in force, and what is written down about it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import structlog
from aiohttp import web
from grpc import aio

from engine.config import TENANT, Settings
from engine.errors import InvalidRequest, Unauthenticated
from engine.runtime.admission import ANONYMOUS
from engine.runtime.allowance import Allowances, unlimited
from engine.server.identity.audit import AuditLog
from engine.server.identity.certificates import authenticate_certificate
from engine.server.identity.follow import LOOK_S, Followed
from engine.server.identity.keys import PREFIX, authenticate_key
from engine.server.identity.policy import Policy, read_policy
from engine.server.identity.principal import Principal, Role
from engine.server.identity.quotas import Quotas
from engine.server.identity.tls import Tls
from engine.server.identity.tokens import Tokens

log = structlog.get_logger(__name__)

TENANT_KEY = "x-loraplex-tenant"
FORWARDED_KEY = "x-loraplex-forwarded"  # a router's word: it speaks for somebody else, at this address
_AUTHORIZATION = "authorization"
_LONGEST = 7168  # characters of a key or token; gRPC takes 8 KiB of all metadata together
_REFLECTION = "/grpc.reflection."


class Observer(Protocol):
    """Counts what identity does."""

    def quota_refused(self, tenant: str, limit: str) -> None:
        """A request was refused because of this limit."""

    def audit_failed(self) -> None:
        """A line of the audit log could not be written."""

    def watch_identity(self, policy_valid: Callable[[], bool], tls: Tls | None) -> None:
        """Report from now on whether the files that are in force are those on the disk."""


class Identity:
    """Knows callers. Without a policy it asks nobody who they are (`on` is false)."""

    def __init__(self, settings: Settings, observer: Observer) -> None:
        """Read everything. Raises BadConfiguration if a file is broken: a server never starts without its locks."""
        self.tls = Tls.of(settings)
        self.quotas = Quotas(observer.quota_refused)
        self._path = settings.policy
        self._followed: Followed[Policy] | None = None
        self._tokens: Tokens | None = None
        self._writing: set[asyncio.Future[None]] = set()  # lines of the audit log
        self._audit = AuditLog(settings.audit_log_path, observer.audit_failed) if settings.audit_log_path else None
        if self._path:
            path = self._path
            self._followed = Followed("policy", [path], lambda: read_policy(path))
            self._adopt(self._followed.value, path)
        observer.watch_identity(self._valid, self.tls)

    @property
    def on(self) -> bool:
        """Whether callers have to say who they are."""
        return self._followed is not None

    @property
    def policy(self) -> Policy | None:
        """The policy that is in force."""
        return self._followed.value if self._followed else None

    @property
    def allowances(self) -> Allowances:
        """What each tenant may have of the engine."""
        return self.quotas.of if self.on else unlimited

    async def watch(self) -> NoReturn:
        """Put changed files in force."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Look at the files once."""
        if self.tls:
            await asyncio.to_thread(self.tls.files.refresh)
        if self._path and self._followed:
            changed: bool = await asyncio.to_thread(self._followed.refresh)
            if changed:
                self._adopt(self._followed.value, self._path)

    async def close(self) -> None:
        """Close the audit log, once all lines are in it."""
        await asyncio.gather(*self._writing, return_exceptions=True)
        if self._audit:
            self._audit.close()

    async def of_call(self, method: str, context: aio.ServicerContext[Any, Any]) -> Principal | None:
        """Who makes a gRPC call; None where nobody is asked. Raises Unauthenticated."""
        policy = self.policy
        if policy is None or _needs_none(method, policy):
            return None
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]
        given = [value for key, value in metadata if key == _AUTHORIZATION]
        if given or any(key == FORWARDED_KEY for key, _ in metadata):  # a router's certificate is not its callers'
            return await self._known(policy, given, None)
        pem = context.auth_context().get("x509_pem_cert") if self.tls else None
        return await self._known(policy, given, bytes(next(iter(pem))) if pem else None)

    async def of_http(self, request: web.Request) -> Principal:
        """Who makes an HTTP request. Raises Unauthenticated, or InvalidRequest about a malformed tenant's name."""
        policy = self.policy
        if policy is None:
            return Principal(named_tenant(request.headers.items()))
        connection = request.transport.get_extra_info("ssl_object") if request.transport else None
        der = connection.getpeercert(binary_form=True) if connection else None
        pem = ssl.DER_cert_to_PEM_cert(der).encode() if der else None
        return await self._known(policy, request.headers.getall("Authorization", []), pem)

    async def check_metrics(self, request: web.Request) -> None:
        """Raise Unauthenticated or PermissionDenied unless whoever asks may read the metrics."""
        policy = self.policy
        if policy and not policy.open.metrics:
            (await self.of_http(request)).require(Role.OBSERVE)

    async def record(self, principal: Principal | None, method: str, code: str, **facts: Any) -> None:
        """Write one line to the audit log, if there is one; it is on the disk when this returns."""
        if self._audit is None:
            return
        who = {"tenant": principal.tenant, "credential": principal.credential} if principal else {"tenant": None}
        write = asyncio.to_thread(self._audit.write, **who, method=method, result=code, **facts)
        writing = asyncio.ensure_future(write)
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        await asyncio.shield(writing)  # also of a call whose caller has left

    async def _known(self, policy: Policy, authorization: list[str], certificate: bytes | None) -> Principal:
        if not authorization:
            if certificate is None:
                raise Unauthenticated("it shows no credentials")
            return authenticate_certificate(policy, certificate)
        if len(authorization) > 1:
            raise Unauthenticated("it shows more than one authorization")
        scheme, _, credential = authorization[0].partition(" ")
        if scheme.lower() != "bearer" or not credential:
            raise Unauthenticated("its authorization does not begin with Bearer")
        if len(credential) > _LONGEST:
            raise Unauthenticated(f"its authorization is longer than {_LONGEST} characters")
        if credential.startswith(PREFIX) or self._tokens is None:
            return authenticate_key(policy, credential)
        return await self._tokens.authenticate(credential)

    def _adopt(self, policy: Policy, path: Path) -> None:
        self.quotas.adopt(policy)
        self._tokens = Tokens(policy, path.parent, self._tokens) if policy.issuers else None

    def _valid(self) -> bool:
        return self._followed is None or self._followed.valid


def named_tenant(headers: Iterable[tuple[str, str | bytes]]) -> str:
    """The tenant that a call names, where nothing proves it. Raises InvalidRequest when the name is malformed."""
    for key, value in headers:
        if key.lower() == TENANT_KEY:
            if not isinstance(value, str) or not TENANT.fullmatch(value):
                raise InvalidRequest(
                    TENANT_KEY,
                    "is no name of at most 64 letters, digits, '.', '_' and '-' that begins with a letter or digit",
                )
            return value
    return ANONYMOUS


def _needs_none(method: str, policy: Policy) -> bool:
    return method.startswith("/grpc.health.") or (policy.open.reflection and method.startswith(_REFLECTION))
