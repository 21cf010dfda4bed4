"""Reading a request's body: bounded in size and time, and JSON only."""

from __future__ import annotations

import asyncio

from aiohttp import web

from engine.server.web.refusal import Refusal, Refused, wrong

_READ_S = 30.0  # a body that is not there by then is not waited for


async def read(request: web.Request, most: int) -> bytes:
    """The body. Raises Refused when it is no JSON by its own account, too large, or too slow.

    Asking for application/json keeps pages of other sites out, too: a browser asks before it sends such a request for them.
    """
    if request.content_type != "application/json":
        raise wrong("", "the Content-Type must be application/json")
    if (request.content_length or 0) > most:
        raise Refused(_too_large(most))
    data = bytearray()
    try:
        async with asyncio.timeout(_READ_S):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > most:
                    raise Refused(_too_large(most))
    except TimeoutError:
        raise Refused(Refusal("DEADLINE_EXCEEDED", "the body did not arrive in time", "SLOW_BODY", http=408)) from None
    return bytes(data)


def _too_large(most: int) -> Refusal:
    fix = "Send less, or raise --max-message-mib."
    return Refusal("RESOURCE_EXHAUSTED", f"the body is larger than {most} bytes", "MESSAGE_TOO_LARGE", fix, http=413)
