"""What every HTTP request passes first: whose page sent it, and how errors are told."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from urllib.parse import SplitResult, urlsplit

import structlog
from aiohttp import web

from engine.config import is_loopback
from engine.errors import InternalError, LoraplexError
from engine.server.web.openai.routes import error_of
from engine.server.web.refusal import Refusal, Refused, of

log = structlog.get_logger("loraplex.http")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_OPEN = ("/metrics", "/discovery", "/healthz", "/readyz")  # for programs that know no more than an address


def guard(*, loopback: bool) -> Callable[[web.Request, Handler], Awaitable[web.StreamResponse]]:
    """The middleware. On a loopback address only loopback names are answered, or a page could reach us by a name of its own."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN:
            return await handler(request)
        try:
            _check_site(request, loopback=loopback)
            return await handler(request)
        except Refused as refused:
            return told(refused.refusal)
        except LoraplexError as error:  # of identity, outside of any call
            return told(of(error))
        except web.HTTPException as error:
            return told(_plain(error))
        except (ConnectionError, TimeoutError):
            raise  # the caller has left, or takes nothing
        except Exception:
            request_id = uuid.uuid4().hex
            log.exception("bug", path=request.path, request_id=request_id)
            return told(of(InternalError(request_id), request_id))

    return guarded


def told(refusal: Refusal) -> web.Response:
    """A refusal as JSON in OpenAI's form."""
    status = refusal.http_status
    headers = refusal.headers | ({"www-authenticate": "Bearer"} if status == 401 else {})
    return web.json_response({"error": error_of(refusal)}, status=status, headers=headers)


def _check_site(request: web.Request, *, loopback: bool) -> None:
    """Raise Refused when a page of another site sent the request, or it came by a name that is not ours."""
    host = _split(f"//{request.host}")
    if loopback and not (host and is_loopback(host.hostname or "")):
        raise Refused(Refusal("PERMISSION_DENIED", "the server listens on loopback only", "WRONG_HOST"))
    origin = request.headers.get("Origin")
    if origin is None:
        return
    site = _split(origin)
    if site is None or site.netloc != request.host:
        raise Refused(Refusal("PERMISSION_DENIED", "pages of other sites may not send requests", "OTHER_SITE"))


def _split(address: str) -> SplitResult | None:
    """An address's parts; None if it is none, such as one with a bracket that nothing closes."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def _plain(error: web.HTTPException) -> Refusal:
    if error.status == 405:
        return Refusal("UNIMPLEMENTED", "this path takes other methods", "METHOD_NOT_ALLOWED", http=405)
    return Refusal("NOT_FOUND", "there is nothing at this path", "PAGE_NOT_FOUND")
