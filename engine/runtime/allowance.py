"""How much of the engine a tenant may have, as the generator asks it; the server's policy says more than this default."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext


class Allowance:
    """Everything, without limits. Requests with different `cache_salt` share no cached prefixes."""

    max_tokens: int | None = None  # of one answer
    max_priority: int | None = None
    cache_salt: str = ""

    def entered(self, *, goes_on: bool = False) -> AbstractContextManager[None]:  # noqa: ARG002 - all may
        """A request, for the time of the block; `goes_on` if it is for an answer's rest. Raises QuotaExceeded over a limit."""
        return nullcontext()

    def spend(self, tokens: int) -> None:
        """A request took so many tokens, of its prompt or its answer; fewer than none if it lost what it had taken."""


Allowances = Callable[[str], Allowance]  # by the tenant's name

_everything = Allowance()


def unlimited(_tenant: str) -> Allowance:
    """The allowance of every tenant where no policy says otherwise."""
    return _everything
