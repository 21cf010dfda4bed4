"""What each tenant has used of its limits. Counted by each server for itself, from its start."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from engine.errors import PermissionDenied, QuotaExceeded
from engine.runtime.allowance import Allowance
from engine.server.identity.policy import Policy, Tenant, TenantLimits

_BUSY_S = 1.0  # when to come back if too many requests are open: nobody knows when one ends
_LONGEST_S = 60.0
_MINUTE_S = 60.0

T = TypeVar("T")


class Bucket:
    """A token bucket: it fills at `rate` a second up to `size`, and may be overdrawn, which has to be paid back first."""

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate, self._size = rate, size
        self._level, self._at = size, now

    def change(self, rate: float, size: float, now: float) -> None:
        """From now on it fills otherwise; what was used stays used."""
        self._fill(now)
        self._level += size - self._size
        self._rate, self._size = rate, size

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` is in it; 0 if it is."""
        self._fill(now)
        return max(0.0, (amount - self._level) / self._rate)

    def take(self, amount: float, now: float) -> None:
        """Take it out, whether or not it is in."""
        self._fill(now)
        self._level -= amount

    def _fill(self, now: float) -> None:
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now


class Quota(Allowance):
    """One tenant's limits, and what it has used of them."""

    def __init__(self, name: str, refused: Callable[[str, str], None], clock: Callable[[], float]) -> None:
        self._name = name
        self._refused = refused
        self._clock = clock
        self._limits = TenantLimits()
        self._open = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None

    def adopt(self, limits: TenantLimits, cache_salt: str) -> None:
        """Keep to these limits from now on; what was used before counts."""
        now = self._clock()
        self._limits, self.cache_salt = limits, cache_salt
        self.max_tokens, self.max_priority = limits.max_tokens, limits.max_priority
        burst = limits.burst or max(1.0, math.ceil(limits.requests_per_s or 1))
        self._requests = _adopted(self._requests, limits.requests_per_s, burst, now)
        per_min = limits.tokens_per_min
        self._tokens = _adopted(self._tokens, per_min / _MINUTE_S if per_min else None, per_min or 0, now)

    @contextmanager
    def entered(self, *, goes_on: bool = False) -> Iterator[None]:
        """Count a request as open. Raises QuotaExceeded; a request that is refused uses nothing up.

        The rest of an answer may begin in debt, down to another minute's tokens: when a replica dies, all its answers go on
        here at once, and each is charged for its beginning. Who only claims that gains one minute, once: debts are paid back.
        """
        now, limits = self._clock(), self._limits
        if limits.concurrent is not None and self._open >= limits.concurrent:
            raise self._over("concurrent", f"has {self._open} requests open, as many as it may have at once", _BUSY_S)
        least = 1 - (limits.tokens_per_min or 0) if goes_on else 1
        if self._tokens and (wait := self._tokens.wait_s(least, now)):
            raise self._over("tokens_per_min", f"has used its {limits.tokens_per_min} tokens a minute", wait)
        if self._requests:
            if wait := self._requests.wait_s(1, now):
                raise self._over("requests_per_s", f"is over its {limits.requests_per_s:g} requests a second", wait)
            self._requests.take(1, now)
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def spend(self, tokens: int) -> None:
        """Count tokens. They are known only when they are there, so a running request may overdraw what is left.

        Fewer than none give back what an answer had taken that begins again.
        """
        if self._tokens:
            self._tokens.take(tokens, self._clock())

    def _over(self, limit: str, problem: str, wait_s: float) -> QuotaExceeded:
        self._refused(self._name, limit)
        return QuotaExceeded(self._name, problem, min(_LONGEST_S, max(0.01, wait_s)))


class Quotas:
    """The quotas of all tenants of the policy that is in force."""

    def __init__(self, refused: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._refused = refused
        self._clock = clock
        self._secret = secrets.token_bytes(32)  # of this process, as is the cache that it is for
        self._quotas: dict[str, Quota] = {}
        self.weights: dict[str, float] = {}  # for admission, as it changes
        self.waiting_limits: dict[str, int] = {}

    def adopt(self, policy: Policy) -> None:
        """Keep to this policy; tenants that stay keep what they have used."""
        limits = {name: tenant.limits for name, tenant in policy.tenants.items()}
        _replace(self.weights, {name: one.weight for name, one in limits.items()})
        _replace(
            self.waiting_limits, {name: one.max_waiting for name, one in limits.items() if one.max_waiting is not None}
        )
        known, self._quotas = self._quotas, {}
        for name, tenant in policy.tenants.items():
            quota = known.get(name) or Quota(name, self._refused, self._clock)
            quota.adopt(tenant.limits, self._salt(policy, name, tenant))
            self._quotas[name] = quota

    def of(self, tenant: str) -> Allowance:
        """The tenant's allowance. Raises PermissionDenied for one that has left the policy since its call began."""
        quota = self._quotas.get(tenant)
        if quota is None:
            raise PermissionDenied(tenant, "do this any more")
        return quota

    def _salt(self, policy: Policy, name: str, tenant: Tenant) -> str:
        """What a tenant's prefixes are cached under: a caller can neither choose nor guess it."""
        if policy.share_prefix_cache:
            return ""
        return self._hash(f"group:{tenant.cache_group}" if tenant.cache_group else f"tenant:{name}")

    def _hash(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _replace(mapping: dict[str, T], content: dict[str, T]) -> None:
    mapping.clear()
    mapping.update(content)


def _adopted(bucket: Bucket | None, rate: float | None, size: float, now: float) -> Bucket | None:
    if rate is None:
        return None
    if bucket is None:
        return Bucket(rate, size, now)
    bucket.change(rate, size, now)
    return bucket
